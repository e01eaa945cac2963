"""The changes that a LoRA makes to single weights, and their merge, which follows ComfyUI's."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from .user_error import UserError


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


class LoraError(UserError, ValueError):
    """A delta that does not fit its weight."""


LoraDelta = LowRank | Difference | Replacement


def merge(weight: torch.Tensor, deltas: Sequence[LoraDelta]) -> torch.Tensor:
    """Apply `deltas` in their order to `weight` in float32; the result has its dtype, shape and device.

    Raises:
        LoraError: a delta does not have the weight's shape.
    """
    merged = weight.to(torch.float32, copy=True)
    for delta in deltas:
        match delta:
            case LowRank():
                merged.mul_(delta.base_scale)
                merged += delta.scale * _product(delta, merged)
            case Difference():
                merged.mul_(delta.base_scale)
                merged += delta.scale * _like(delta.diff, merged)
            case Replacement():
                merged = _like(delta.weight, merged).clone()
    return merged.to(weight.dtype)


def narrow_delta(delta: LoraDelta, shape: tuple[int, ...], dim: int, runs: Sequence[tuple[int, int]]) -> LoraDelta:
    """The part of a delta of a weight of `shape` that changes some of the weight's rows (dim 0) or columns (dim 1).

    Args:
        runs: start and length of each run of rows or columns.

    Raises:
        LoraError: the delta does not have the weight's shape.
    """
    match delta:
        case LowRank():
            rows, columns = delta.up.shape[0], delta.down.flatten(1).shape[1]
            if (rows, columns) == shape:
                if dim == 0:
                    return replace(delta, up=_runs(delta.up, 0, runs))
                return replace(delta, down=_runs(delta.down.flatten(1), 1, runs))
            if rows * columns != math.prod(shape):
                raise _misfit((rows, columns), shape)
            whole = torch.mm(delta.up.flatten(1).float(), delta.down.flatten(1).float())
            return narrow_delta(Difference(whole, delta.scale, delta.base_scale), shape, dim, runs)
        case Difference():
            return replace(delta, diff=_runs(_shaped(delta.diff, shape), dim, runs))
        case Replacement():
            return replace(delta, weight=_runs(_shaped(delta.weight, shape), dim, runs))


def _runs(x: torch.Tensor, dim: int, runs: Sequence[tuple[int, int]]) -> torch.Tensor:
    parts = [x.narrow(dim, *run) for run in runs]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim)


def _product(delta: LowRank, weight: torch.Tensor) -> torch.Tensor:
    up, down = (t.to(weight.device).float() for t in (delta.up, delta.down))  # one after the other: see _like
    return _like(torch.mm(up.flatten(1), down.flatten(1)), weight)


def _like(change: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """`change` in the shape of `weight`, on the device of `weight`, in float32. The move comes before the conversion,
    as the other way round torch would convert `change` on its old device."""
    return _shaped(change, tuple(weight.shape)).to(weight.device).float()


def _shaped(change: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    if change.numel() != math.prod(shape):
        raise _misfit(tuple(change.shape), shape)
    return change.reshape(shape)


def _misfit(change: tuple[int, ...], weight: tuple[int, ...]) -> LoraError:
    return LoraError(
        f"A LoRA tensor of shape {change} does not fit a weight of shape {weight}. "
        "Use a LoRA made for this size of Wan."
    )
