"""The ranks of a pool as a mesh of data x pipeline x sequence x tensor: which coordinates a rank has, and which ranks
form a group along some of the axes.

The last axis is the fastest: the ranks that talk most are neighbours. All arithmetic between a rank's number and its
coordinates is here.
"""

from __future__ import annotations

from dataclasses import astuple, dataclass
from typing import Literal

Axis = Literal["data", "stage", "sequence", "tensor"]


@dataclass(frozen=True)
class RankCoords:
    """The coordinates of a rank, each counted from 0.

    Attributes:
        data: which data-parallel group the rank belongs to.
        stage: which pipeline stage the rank is.
        sequence: which shard of the token sequence the rank has.
        tensor: which part of the matrices the rank has.
    """

    data: int
    stage: int
    sequence: int
    tensor: int


@dataclass(frozen=True)
class RankMesh:
    """How many ranks lie along each axis. Attributes as those of `RankCoords`."""

    data: int
    stage: int
    sequence: int
    tensor: int

    @property
    def size(self) -> int:
        """How many ranks the mesh has."""
        return self.data * self.stage * self.sequence * self.tensor

    def coords(self, rank: int) -> RankCoords:
        """The coordinates of `rank`."""
        rest, tensor = divmod(rank, self.tensor)
        rest, sequence = divmod(rest, self.sequence)
        data, stage = divmod(rest, self.stage)
        return RankCoords(data, stage, sequence, tensor)

    def rank(self, coords: RankCoords) -> int:
        """The rank that has these coordinates."""
        rest = coords.data * self.stage + coords.stage
        return (rest * self.sequence + coords.sequence) * self.tensor + coords.tensor

    def groups(self, *axes: Axis) -> list[tuple[int, ...]]:
        """The ranks whose coordinates differ along `axes` alone: every such group, each in ascending order."""
        groups: dict[tuple[int, ...], list[int]] = {}
        for rank in range(self.size):
            coords = self.coords(rank)
            fixed = {axis: at for axis, at in zip(_AXES, astuple(coords), strict=True) if axis not in axes}
            groups.setdefault(tuple(fixed.values()), []).append(rank)
        return [tuple(group) for group in groups.values()]


_AXES: tuple[Axis, ...] = ("data", "stage", "sequence", "tensor")
