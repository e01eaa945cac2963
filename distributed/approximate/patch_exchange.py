"""Which tokens the ranks of displaced patches send each other fresh: border strips, and shards that become patches."""

from __future__ import annotations

import itertools
import math

import torch
import torch.distributed as dist

from ..parallel.sequence_group import SequenceGroup
from .patch_layout import Patch, PatchLayout


class Strips:
    """The border strips of the patches on a layout, exchanged fresh."""

    def __init__(self, layout: PatchLayout, group_rank: int):
        self.layout, self.group_rank = layout, group_rank
        ranks = range(len(layout.patches))
        self._sent = [layout.strip(group_rank, reader) for reader in ranks]
        self._received = [layout.strip(owner, group_rank) for owner in ranks]

    def exchange(self, own: torch.Tensor, group: dist.ProcessGroup) -> list[torch.Tensor]:
        """Send the strips of this rank's patch `own` [2, B, n, heads, d]; returns the other ranks' strips, flat, by
        owner."""
        outgoing = [self._box(own, self.group_rank, strip).flatten() for strip in self._sent if strip]
        token = own.numel() // own.shape[2]
        sent, received = (
            [strip.tokens(self.layout.grid) * token if strip else 0 for strip in strips]
            for strips in (self._sent, self._received)
        )
        arrived = own.new_empty(sum(received))
        dist.all_to_all_single(arrived, torch.cat([*outgoing, own.new_empty(0)]), received, sent, group=group)
        return list(arrived.split(received))

    def insert(self, parts: list[torch.Tensor], arrived: list[torch.Tensor]) -> None:
        """Write the strips that arrived into the patches [2, B, n, heads, d] of all ranks."""
        for owner, (strip, fresh) in enumerate(zip(self._received, arrived, strict=True)):
            if strip:
                box = self._box(parts[owner], owner, strip)
                box.copy_(fresh.view(box.shape))

    def _box(self, patch: torch.Tensor, owner: int, strip: Patch) -> torch.Tensor:
        """A strip of a patch [2, B, n, heads, d]: [2, B, frames, rows, columns, heads, d]."""
        whole = self.layout.patches[owner]
        frames, rows = whole.frames[1] - whole.frames[0], whole.rows[1] - whole.rows[0]
        grid = patch.unflatten(2, (frames, rows, self.layout.grid.columns))
        return grid[:, :, slice(*strip.frames), slice(*strip.rows)]


class PatchesOfShards:
    """Turns the shards of the sequence, which ranks have on the exact path, into the patches of the ranks."""

    def __init__(self, layout: PatchLayout, group: SequenceGroup, device: torch.device):
        group_rank, ranks = group.index, range(len(layout.patches))
        ends = list(itertools.accumulate(group.lengths(layout.grid.tokens), initial=0))
        shards = list(itertools.pairwise(ends))
        sent = [_within(layout.index(patch), shards[group_rank]) for patch in ranks]
        self._places = torch.cat(sent).to(device)
        self._sent = [len(places) for places in sent]
        self._received = [len(_within(layout.index(group_rank), shard)) for shard in shards]

    def exchange(self, shard: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
        """Send the tokens of a shard [2, B, n, heads, d] to their patches; returns this rank's patch."""
        token = math.prod(shard.shape[:2]) * math.prod(shard.shape[3:])
        outgoing = shard.index_select(2, self._places).movedim(2, 0).contiguous()
        arrived = outgoing.new_empty(sum(self._received), *outgoing.shape[1:])
        dist.all_to_all_single(
            arrived.view(-1),
            outgoing.view(-1),
            [count * token for count in self._received],
            [count * token for count in self._sent],
            group=group,
        )
        return arrived.movedim(0, 2)  # shards follow each other in the grid, and so do the tokens of a patch


def _within(index: torch.Tensor, shard: tuple[int, int]) -> torch.Tensor:
    """Positions within a shard of the tokens that are both in the shard and in `index`."""
    return index[(index >= shard[0]) & (index < shard[1])] - shard[0]
