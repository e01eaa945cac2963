"""Files of InfiniteTalk's layers, as ComfyUI's ModelPatchLoader takes them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from wan_parallel.wanvideo.base.config import WanConfig
from wan_parallel.wanvideo.base.shapes import linear, norm
from wan_parallel.wanvideo.variants.infinitetalk import InfiniteTalk

from testkit import tiny

LAYERS, FEATURES = 13, 768  # of the audio encoder: its outputs, of which the first is left out, and their width
BLOCKS = 40  # which ComfyUI takes for granted, as the next number
_TOKENS, _HIDDEN = 32, 8
_WINDOW = (LAYERS - 1) * FEATURES


MARKER = {"audio_proj.proj1.weight": torch.zeros(8, 64)}
"""What tells such a file from others, beside the layers."""


def is_infinitetalk(name: str) -> bool:
    """Whether a tensor is in the file of the layers."""
    return ".audio_cross_attn." in name or ".norm_x." in name


def write_patch(
    path: Path, config: WanConfig, seed: int = 0, dtype: torch.dtype = torch.float16, blocks: int = BLOCKS
) -> str:
    """A file for a model of `config`: random numbers for its blocks, and zeros for those that it lacks."""
    weights = {name: weight for name, weight in tiny.random_weights(config, seed).items() if is_infinitetalk(name)}
    infinitetalk = config[InfiniteTalk]
    shapes = infinitetalk.shapes(replace(config, num_layers=blocks))
    tensors = {name: weights[name] if name in weights else torch.zeros(shape) for name, shape in shapes.items()}
    projection = linear("proj1", 5 * _WINDOW, _HIDDEN) | linear("proj1_vf", 8 * _WINDOW, _HIDDEN)
    projection |= linear("proj2", _HIDDEN, _HIDDEN) | linear("proj3", _HIDDEN, _TOKENS * infinitetalk.width)
    projection |= norm("norm", infinitetalk.width)
    generator = torch.Generator().manual_seed(seed)
    for name, shape in projection.items():
        noise = torch.randn(shape, generator=generator)
        tensors[f"audio_proj.{name}"] = noise / shape[-1] ** 0.5 if len(shape) > 1 else 0.5 + noise
    path.parent.mkdir(parents=True, exist_ok=True)
    return tiny.write_weights(path, {name: tensor.to(dtype) for name, tensor in tensors.items()})
