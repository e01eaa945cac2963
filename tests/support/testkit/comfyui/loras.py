"""Random LoRAs of the kinds that ComfyUI applies, for the tiny checkpoints."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import save_file
from testkit import tiny
from wan_parallel.wanvideo.base.config import WanConfig

_PARTS = ("blocks.", "vace_blocks.", "img_emb.", "face_adapter.", "audio_injector.")


def write_lora(path: Path, config: WanConfig, rank: int = 4, seed: int = 1) -> None:
    """A plain LoRA with alpha on all matrices of the blocks and of the image embedding, and a bias difference."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, shape in config.shapes().items():
        if name.startswith(_PARTS) and len(shape) == 2:
            module = f"diffusion_model.{name.removesuffix('.weight')}"
            tensors[f"{module}.lora_up.weight"] = torch.randn(shape[0], rank, generator=generator) * 0.1
            tensors[f"{module}.lora_down.weight"] = torch.randn(rank, shape[1], generator=generator) * 0.1
            tensors[f"{module}.alpha"] = torch.tensor(float(rank) / 2)
    tensors["diffusion_model.blocks.0.ffn.0.diff_b"] = torch.randn(config.ffn_dim, generator=generator) * 0.1
    save_file(tensors, path)


def write_odd_lora(path: Path, config: WanConfig, rank: int = 4, seed: int = 2) -> None:
    """What a plain low-rank merge cannot do: LoHa on one matrix, DoRA on another, set_weight on a third."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator) * 0.1

    d, block = config.dim, "diffusion_model.blocks.0"
    tensors = {
        f"{block}.self_attn.q.hada_w1_a": normal(d, rank),
        f"{block}.self_attn.q.hada_w1_b": normal(rank, d),
        f"{block}.self_attn.q.hada_w2_a": normal(d, rank),
        f"{block}.self_attn.q.hada_w2_b": normal(rank, d),
        f"{block}.self_attn.q.alpha": torch.tensor(float(rank)),
        f"{block}.cross_attn.v.lora_up.weight": normal(d, rank),
        f"{block}.cross_attn.v.lora_down.weight": normal(rank, d),
        f"{block}.cross_attn.v.dora_scale": 1 + normal(d, 1),
        f"{block}.norm3.set_weight": 1 + normal(d),
        f"{block}.self_attn.o.diff": normal(d, d),
    }
    save_file(tensors, path)


Pair = Callable[[str, torch.Tensor, torch.Tensor], dict[str, torch.Tensor]]


def _pairs(config: WanConfig, rank: int, seed: int, write: Pair) -> dict[str, torch.Tensor]:
    """The tensors that `write` makes of (module, up, down) for each matrix of the blocks."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, shape in config.shapes().items():
        if name.startswith("blocks.") and len(shape) == 2:
            up = torch.randn(shape[0], rank, generator=generator) * 0.1
            down = torch.randn(rank, shape[1], generator=generator) * 0.1
            tensors |= write(name.removesuffix(".weight"), up, down)
    return tensors


def _named(prefix: str, up: str, down: str, flat: bool = False, diffusers: bool = False, alpha: float = 0.0) -> Pair:
    def write(module: str, wide: torch.Tensor, thin: torch.Tensor) -> dict[str, torch.Tensor]:
        module = tiny.diffusers_name(f"{module}.weight").removesuffix(".weight") if diffusers else module
        name = prefix + (module.replace(".", "_") if flat else module)
        tensors = {f"{name}.{up}": wide, f"{name}.{down}": thin}
        return {**tensors, f"{name}.alpha": torch.tensor(alpha)} if alpha else tensors

    return write


UP, DOWN = "lora_up.weight", "lora_down.weight"
B, A = "lora_B.weight", "lora_A.weight"
STOCK_NAMES = {
    "native": _named("diffusion_model.", UP, DOWN, alpha=2.0),
    "native peft": _named("diffusion_model.", B, A),
    "peft adapter": _named("diffusion_model.", "lora_B.default.weight", "lora_A.default.weight"),
    "kohya": _named("lora_unet_", UP, DOWN, flat=True, alpha=1.0),
    "VideoX-Fun": _named("lora_unet__", UP, DOWN, flat=True, alpha=3.0),
}
"""How files name a LoRA that LoraLoaderModelOnly reads."""
OTHER_NAMES = {
    "diffusers": _named("transformer.", B, A, diffusers=True),
    "diffusers bare": _named("", B, A, diffusers=True),
    "peft": _named("base_model.model.", B, A),
    "peft of diffusers": _named("base_model.model.", B, A, diffusers=True),
    "DiffSynth": _named("pipe.dit.", "lora_B.default.weight", "lora_A.default.weight"),
    "bare": _named("", "lora_B.default.weight", "lora_A.default.weight"),
    "LyCORIS": _named("lycoris_", B, A, flat=True, diffusers=True),
    "OneTrainer": _named("lora_transformer_", UP, DOWN, flat=True, diffusers=True),
}
"""How others do, which only the loader's own input reads; none has an alpha, so all mean what "native peft" does."""


def write_named(path: Path, config: WanConfig, names: str, rank: int = 4, seed: int = 3) -> None:
    """A plain LoRA on all matrices of the blocks under names of this kind."""
    save_file(_pairs(config, rank, seed, (STOCK_NAMES | OTHER_NAMES)[names]), path)


def write_distilled(path: Path, config: WanConfig, seed: int = 4) -> None:
    """As lightx2v extracts them: bf16 pairs on matrices, differences of biases, norms and modulation."""
    generator = torch.Generator().manual_seed(seed)
    tensors = _pairs(config, 8, seed, _named("diffusion_model.", UP, DOWN))
    for name, shape in config.shapes().items():
        module = f"diffusion_model.{name.removesuffix('.weight').removesuffix('.bias')}"
        change = torch.randn(shape, generator=generator) * 0.05
        if name.endswith(".bias"):
            tensors[f"{module}.diff_b"] = change
        elif "norm" in name or "modulation" in name or "patch_embedding" in name:
            tensors[f"{module}.diff"] = change
    save_file({name: tensor.bfloat16() for name, tensor in tensors.items()}, path)


def _normal(seed: int) -> Callable[..., torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return lambda *shape: torch.randn(shape, generator=generator) * 0.1


def _lokr(module: str, shape: tuple[int, int], normal: Callable[..., torch.Tensor]) -> dict[str, torch.Tensor]:
    rows, columns = shape
    return {
        f"{module}.lokr_w1": normal(8, 8) * 6,
        f"{module}.lokr_w2_a": normal(rows // 8, 4),
        f"{module}.lokr_w2_b": normal(4, columns // 8),
        f"{module}.alpha": torch.tensor(4.0),
    }


def _loha(module: str, shape: tuple[int, int], normal: Callable[..., torch.Tensor]) -> dict[str, torch.Tensor]:
    rows, columns = shape
    return {
        f"{module}.hada_w1_a": normal(rows, 4) * 3,
        f"{module}.hada_w1_b": normal(4, columns) * 3,
        f"{module}.hada_w2_a": normal(rows, 4),
        f"{module}.hada_w2_b": normal(4, columns),
        f"{module}.alpha": torch.tensor(4.0),
    }


def _dora(module: str, shape: tuple[int, int], normal: Callable[..., torch.Tensor]) -> dict[str, torch.Tensor]:
    rows, columns = shape
    return {
        f"{module}.{UP}": normal(rows, 4),
        f"{module}.{DOWN}": normal(4, columns),
        f"{module}.alpha": torch.tensor(4.0),
        f"{module}.dora_scale": 1 + normal(rows, 1),
    }


def _rare(module: str, shape: tuple[int, int], normal: Callable[..., torch.Tensor]) -> dict[str, torch.Tensor]:
    """OFT on queries, BOFT on keys, GLoRA on values, and differences of the norm beside an attention's output."""
    rows, columns = shape
    layer = module.rpartition(".")[2]
    if layer == "q":
        return {f"{module}.oft_blocks": normal(rows // 32, 32, 32), f"{module}.rescale": 1 + normal(rows, 1)}
    if layer == "k":
        return {f"{module}.oft_blocks": normal(2, rows // 16, 16, 16)}
    if layer == "v":
        wide, thin = (rows, 4), (4, columns)
        sizes = {"a1": thin, "a2": (columns, 4), "b1": wide, "b2": thin}
        return {f"{module}.{part}.weight": normal(*size) for part, size in sizes.items()}
    if module.endswith("self_attn.o"):
        norm = module.replace("self_attn.o", "norm3")
        return {f"{norm}.w_norm": normal(rows), f"{norm}.b_norm": normal(rows)}
    return {}


ADAPTERS = {"LoKr": _lokr, "LoHa": _loha, "DoRA": _dora, "rare": _rare}


def write_control(
    path: Path, config: WanConfig, channels: int, rank: int = 4, seed: int = 8, told: int | None = None
) -> None:
    """As control LoRAs are published: pairs for the blocks and for a patch embedding of `channels`."""
    normal, module = _normal(seed), "diffusion_model.patch_embedding"
    tensors = _pairs(config, rank, seed, STOCK_NAMES["native peft"])
    tensors[f"{module}.{B}"] = normal(config.dim, rank, 1, 1, 1)
    tensors[f"{module}.{A}"] = 3 * normal(rank, channels, 1, 2, 2)
    tensors[f"{module}.diff_b"] = normal(config.dim)
    tensors[f"{module}.reshape_weight"] = torch.tensor([config.dim, told or channels, 1, 2, 2])
    save_file(tensors, path)


def write_both_experts(path: Path, config: WanConfig, seed: int = 3) -> None:
    """As diffusers has a LoRA for both experts of Wan 2.2; the half for the low-noise one is that of "native peft"."""
    high = _pairs(config, 4, seed + 1, _named("transformer.", B, A, diffusers=True))
    save_file(high | _pairs(config, 4, seed, _named("transformer_2.", B, A, diffusers=True)), path)


def write_adapter(path: Path, config: WanConfig, kind: str, seed: int = 5) -> None:
    """An adapter of this kind on all matrices of the blocks."""
    tensors, normal = {}, _normal(seed)
    for name, shape in config.shapes().items():
        if name.startswith("blocks.") and len(shape) == 2:
            tensors |= ADAPTERS[kind](f"diffusion_model.{name.removesuffix('.weight')}", shape, normal)
    save_file(tensors, path)
