"""The changes that a LoRA makes to single weights, and their merge, which follows ComfyUI's."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from .errors import UserError


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


class PatchError(UserError, ValueError):
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


def narrow_patch(patch: WeightPatch, shape: tuple[int, ...], dim: int, runs: Sequence[tuple[int, int]]) -> WeightPatch:
    """The part of a patch of a weight of `shape` that changes some of the weight's rows (dim 0) or columns (dim 1).

    Args:
        runs: start and length of each run of rows or columns.

    Raises:
        PatchError: the patch does not have the weight's shape.
    """
    match patch:
        case LowRank():
            rows, columns = patch.up.shape[0], patch.down.flatten(1).shape[1]
            if (rows, columns) == shape:
                if dim == 0:
                    return replace(patch, up=_runs(patch.up, 0, runs))
                return replace(patch, down=_runs(patch.down.flatten(1), 1, runs))
            if rows * columns != math.prod(shape):
                raise _misfit((rows, columns), shape)
            whole = torch.mm(patch.up.flatten(1).float(), patch.down.flatten(1).float())
            return narrow_patch(Difference(whole, patch.scale, patch.base_scale), shape, dim, runs)
        case Difference():
            return replace(patch, diff=_runs(_shaped(patch.diff, shape), dim, runs))
        case Replacement():
            return replace(patch, weight=_runs(_shaped(patch.weight, shape), dim, runs))


def _runs(x: torch.Tensor, dim: int, runs: Sequence[tuple[int, int]]) -> torch.Tensor:
    parts = [x.narrow(dim, *run) for run in runs]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim)


def _product(patch: LowRank, weight: torch.Tensor) -> torch.Tensor:
    up, down = (t.to(weight.device).float() for t in (patch.up, patch.down))  # one after the other: see _like
    return _like(torch.mm(up.flatten(1), down.flatten(1)), weight)


def _like(change: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """`change` in the shape of `weight`, on the device of `weight`, in float32. The move comes before the conversion,
    as the other way round torch would convert `change` on its old device."""
    return _shaped(change, tuple(weight.shape)).to(weight.device).float()


def _shaped(change: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    if change.numel() != math.prod(shape):
        raise _misfit(tuple(change.shape), shape)
    return change.reshape(shape)


def _misfit(change: tuple[int, ...], weight: tuple[int, ...]) -> PatchError:
    return PatchError(
        f"A LoRA tensor of shape {change} does not fit a weight of shape {weight}. "
        "Use a LoRA made for this size of Wan."
    )
