"""Collective calls that several parts of a worker make: numbers of all ranks, and groups that share weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

from ..shm import signs
from ..shm.signs import Mark

# torch 2.13 has another name for it and warns at the old one
all_gather_single = dist.all_gather_single if hasattr(dist, "all_gather_single") else dist.all_gather_into_tensor


@dataclass(frozen=True)
class ShareGroup:
    """The ranks that keep one share of every block each; this rank keeps share `index`."""

    ranks: int = 1
    first_rank: int = 0
    index: int = 0
    group: dist.ProcessGroup | None = None


def join_share_group(groups: Sequence[Sequence[int]], rank: int) -> ShareGroup:
    """Make one process group for each of `groups` (a collective call of the whole world); returns that of `rank`.

    The process groups are apart from those of attention, so that gathers of weights and exchanges of activations pass
    each other.
    """
    mine = ShareGroup()
    for ranks in groups:
        options = None
        if dist.get_backend() == "nccl":
            options = dist.ProcessGroupNCCL.Options()
            options.is_high_priority_stream = True  # else a gather waits for room beside the matrix products
        with signs.marked(Mark.WAITING):
            group = dist.new_group(list(ranks), pg_options=options)
        if rank in ranks:
            mine = ShareGroup(len(ranks), ranks[0], list(ranks).index(rank), group)
    return mine


def gather_rows(row: Sequence[int], device: torch.device, world_size: int) -> list[list[int]]:
    """Every rank's `row` of numbers, by rank (a collective call of the whole world)."""
    if world_size == 1:
        return [list(row)]
    mine = torch.tensor(row, dtype=torch.int64, device=device)
    rows = mine.new_empty(world_size * len(row))
    with signs.marked(Mark.WAITING):
        all_gather_single(rows, mine)
        return rows.view(world_size, -1).tolist()
