"""Changes to single weights, as a LoRA makes them, merged the way ComfyUI merges them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class LowRank:
    """weight * base_scale + scale * (up @ down).

    `up` [rows, rank, ...], `down` [rank, columns, ...]; the product takes the weight's shape.
    `scale` holds strength * alpha / rank.
    """

    up: torch.Tensor
    down: torch.Tensor
    scale: float
    base_scale: float = 1.0


@dataclass(frozen=True)
class Difference:
    """weight * base_scale + scale * diff, with `diff` in the weight's shape."""

    diff: torch.Tensor
    scale: float
    base_scale: float = 1.0


@dataclass(frozen=True)
class Replacement:
    """The whole new weight, computed elsewhere."""

    weight: torch.Tensor


class PatchError(ValueError):
    """A patch that does not fit its weight."""


WeightPatch = LowRank | Difference | Replacement


def merge(weight: torch.Tensor, patches: Sequence[WeightPatch]) -> torch.Tensor:
    """Apply `patches` in their order to `weight` in float32; the result has its dtype, shape and device.

    Raises:
        PatchError: a patch does not have the weight's shape.
    """
    merged = weight.to(torch.float32, copy=True)
    for patch in patches:
        match patch:
            case LowRank():
                merged.mul_(patch.base_scale)
                merged += patch.scale * _product(patch, merged)
            case Difference():
                merged.mul_(patch.base_scale)
                merged += patch.scale * _like(patch.diff, merged)
            case Replacement():
                merged = _like(patch.weight, merged).clone()
    return merged.to(weight.dtype)


def _product(patch: LowRank, weight: torch.Tensor) -> torch.Tensor:
    up, down = (t.to(weight.device, torch.float32) for t in (patch.up, patch.down))
    return _like(torch.mm(up.flatten(1), down.flatten(1)), weight)


def _like(change: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    if change.numel() != weight.numel():
        raise PatchError(
            f"A LoRA tensor of shape {tuple(change.shape)} does not fit a weight of shape {tuple(weight.shape)}. "
            "Use a LoRA made for this size of Wan."
        )
    return change.to(weight.device, torch.float32).reshape(weight.shape)
