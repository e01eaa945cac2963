"""Random LoRAs of the kinds that ComfyUI applies, for the tiny checkpoints."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import save_file
from wan_parallel.wanvideo.config import WanConfig

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
