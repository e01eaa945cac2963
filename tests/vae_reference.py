"""diffusers' Wan VAE as the reference of ours: tiny, with random weights."""

from __future__ import annotations

import torch


def tiny_vae(seed: int = 0, dim: int = 8) -> torch.nn.Module:
    """A small AutoencoderKLWan in float32."""
    from diffusers import AutoencoderKLWan

    torch.manual_seed(seed)
    vae = AutoencoderKLWan(base_dim=dim).eval().requires_grad_(False)
    for name, parameter in vae.named_parameters():
        if "gamma" in name:
            parameter.add_(torch.randn_like(parameter) / 10)
    return vae


def native_names(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A state dict of diffusers under the names of Wan's own files, which are ComfyUI's."""
    return {_native(name): tensor for name, tensor in state.items()}


_LEAVES = {
    "norm1.gamma": "residual.0.gamma",
    "conv1": "residual.2",
    "norm2.gamma": "residual.3.gamma",
    "conv2": "residual.6",
    "conv_shortcut": "shortcut",
}


def _native(name: str) -> str:
    if name.startswith("quant_conv"):
        return name.replace("quant_conv", "conv1")
    if name.startswith("post_quant_conv"):
        return name.replace("post_quant_conv", "conv2")
    half, rest = name.split(".", 1)
    if rest.startswith("conv_in"):
        return f"{half}.{rest.replace('conv_in', 'conv1')}"
    if rest.startswith("norm_out"):
        return f"{half}.{rest.replace('norm_out', 'head.0')}"
    if rest.startswith("conv_out"):
        return f"{half}.{rest.replace('conv_out', 'head.2')}"
    if rest.startswith("mid_block.attentions.0"):
        return f"{half}.{rest.replace('mid_block.attentions.0', 'middle.1')}"
    if rest.startswith("mid_block.resnets."):
        number, leaf = rest.removeprefix("mid_block.resnets.").split(".", 1)
        return f"{half}.middle.{2 * int(number)}.{_leaf(leaf)}"
    if rest.startswith("down_blocks."):
        number, leaf = rest.removeprefix("down_blocks.").split(".", 1)
        return f"{half}.downsamples.{number}.{_leaf(leaf)}"
    block, kind, number, leaf = rest.removeprefix("up_blocks.").split(".", 3)
    place = 4 * int(block) + (int(number) if kind == "resnets" else 3)
    return f"{half}.upsamples.{place}.{_leaf(leaf)}"


def _leaf(leaf: str) -> str:
    for theirs, native in _LEAVES.items():
        if leaf.startswith(theirs):
            return leaf.replace(theirs, native)
    return leaf
