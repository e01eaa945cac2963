"""diffusers' Wan VAEs as the reference of ours: tiny, with random weights."""

from __future__ import annotations

import torch

RESIDUAL = {  # what diffusers' files of the 5B say of its VAE beside its widths
    "z_dim": 48,
    "is_residual": True,
    "in_channels": 12,
    "out_channels": 12,
    "patch_size": 2,
    "scale_factor_spatial": 16,
}


def tiny_vae(seed: int = 0, dim: int = 8, vae: str = "2.1") -> torch.nn.Module:
    """A small AutoencoderKLWan in float32, of Wan 2.1 or 2.2."""
    torch.manual_seed(seed)
    model = build(dim, dim, vae).eval().requires_grad_(False)
    for name, parameter in model.named_parameters():
        if "gamma" in name:
            parameter.add_(torch.randn_like(parameter) / 10)
    return model


def build(encoder_dim: int, decoder_dim: int, vae: str) -> torch.nn.Module:
    """diffusers' class with so many channels at the finest resolution of either half."""
    from diffusers import AutoencoderKLWan

    return AutoencoderKLWan(encoder_dim, decoder_dim, **(RESIDUAL if vae == "2.2" else {}))


def native_names(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A state dict of diffusers under the names of Wan's own files, which are ComfyUI's."""
    residual = any("upsampler." in name for name in state)
    return {_native(name, residual): tensor for name, tensor in state.items()}


_LEAVES = {
    "norm1.gamma": "residual.0.gamma",
    "conv1": "residual.2",
    "norm2.gamma": "residual.3.gamma",
    "conv2": "residual.6",
    "conv_shortcut": "shortcut",
}
_OUTER = {
    "quant_conv": "conv1",
    "post_quant_conv": "conv2",
    "conv_in": "conv1",
    "norm_out": "head.0",
    "conv_out": "head.2",
    "mid_block.attentions.0": "middle.1",
}


def _native(name: str, residual: bool) -> str:
    half, rest = name.split(".", 1) if name.startswith(("encoder.", "decoder.")) else ("", name)
    for theirs, native in _OUTER.items():
        if rest.startswith(f"{theirs}."):
            return f"{half}.{rest.replace(theirs, native)}".removeprefix(".")
    if rest.startswith("mid_block.resnets."):
        number, leaf = rest.removeprefix("mid_block.resnets.").split(".", 1)
        return f"{half}.middle.{2 * int(number)}.{_leaf(leaf)}"
    blocks, layers = ("downsamples", 3) if half == "encoder" else ("upsamples", 4)
    block, leaf = rest.removeprefix("down_blocks.").removeprefix("up_blocks.").split(".", 1)
    if half == "encoder" and not residual:  # one list already
        return f"{half}.{blocks}.{block}.{_leaf(leaf)}"
    kind, leaf = leaf.split(".", 1)
    number = str(layers - 1)
    if kind in ("resnets", "upsamplers"):
        given, leaf = leaf.split(".", 1)
        number = given if kind == "resnets" else number
    place = f"{block}.{blocks}.{number}" if residual else layers * int(block) + int(number)
    return f"{half}.{blocks}.{place}.{_leaf(leaf)}"


def _leaf(leaf: str) -> str:
    for theirs, native in _LEAVES.items():
        if leaf.startswith(theirs):
            return leaf.replace(theirs, native)
    return leaf
