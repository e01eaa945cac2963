"""LoRA changes for the tiny models."""

from __future__ import annotations

import itertools

import torch
from wan_parallel.distributed.weights.lora_transfer import LoraSet
from wan_parallel.wanvideo.base.lora import Difference, LowRank, Replacement

from testkit import tiny

uuids = (f"uuid-{i}" for i in itertools.count())
"""A name for each set of changes that no other has."""


def normal(*shape: int, seed: int = 1) -> torch.Tensor:
    """Normal random numbers, the same for a seed."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def some_lora(strength: float) -> dict[str, list]:
    """A change of each kind, on matrices, a bias, a norm and a modulation."""
    d, f = tiny.TINY.dim, tiny.TINY.ffn_dim
    return {
        "blocks.0.self_attn.q.weight": [LowRank(normal(d, 4) * 0.2, normal(4, d) * 0.2, strength)],
        "blocks.1.ffn.0.weight": [
            LowRank(normal(f, 4) * 0.2, normal(4, d) * 0.2, strength),
            Difference(normal(f, d) * 0.02, strength, base_scale=0.9),
        ],
        "blocks.0.ffn.2.bias": [Difference(normal(d) * 0.3, strength)],
        "blocks.1.self_attn.norm_q.weight": [Replacement(1 + normal(d) * 0.3)],
        "blocks.1.modulation": [Difference(normal(1, 6, d) * 0.3, strength)],
        "blocks.0.ffn.2.weight": [LowRank(normal(d, 4) * 0.2, normal(4, f) * 0.1, strength)],
        "blocks.1.cross_attn.o.weight": [Difference(normal(d, d) * 0.02, strength)],
        "time_projection.1.bias": [Difference(normal(6 * d) * 0.1, strength)],
        "text_embedding.2.weight": [Replacement(normal(d, d) / d**0.5)],
        "patch_embedding.weight": [LowRank(normal(d, 2) * 0.2, normal(2, 64) * 0.2, strength)],
        "head.head.weight": [Difference(normal(64, d) * 0.01, strength)],
    }


def lora_set(changes: dict[str, list]) -> LoraSet:
    """A set of its own uuid with these changes."""
    return LoraSet(next(uuids), lambda: changes)
