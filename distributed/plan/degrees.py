"""How a pool's GPUs are shared out: the degrees of parallelism and the arithmetic behind them.

Vocabulary: *data parallel* groups take different batch items (the conditional and the unconditional branch).
A group's blocks are divided among *pipeline* stages, through which its items pass one after the other. Within a
stage the token sequence is shared by `ulysses x ring` ranks: *Ulysses* exchanges heads for tokens around
self-attention (DeepSpeed-Ulysses, arXiv 2309.14509), *ring* passes keys and values round (arXiv 2310.01889); USP
combines them (arXiv 2405.07719). *Tensor* parallel ranks hold the same tokens and a part of each matrix
(Megatron-LM, arXiv 1909.08053). ranks.py says which rank is where.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from ...wanvideo.base.user_error import UserError
from .ranks import RankMesh

RING_COST = 0.2
"""The time that a ring adds to self-attention, as a share of the time of self-attention, for rings of any length: the
ring computes in smaller blocks, and merges their outputs.

Measured on 4 H200s, 14B at 480p: Ulysses 4 takes 0.710 s, Ulysses 2 x ring 2 0.792 s, ring 4 0.785 s; on 3, Ulysses 3
with uneven heads takes 0.916 s and ring 3 0.965 s (benchmarks/results/h200.jsonl).
"""


class PlanError(UserError, ValueError):
    """The sizes asked for cannot work. The text says why and which sizes do."""


@dataclass(frozen=True)
class SequenceDegrees:
    """How the ranks that share one token sequence are arranged: `ring` groups of `ulysses` ranks each.

    The ranks of a group exchange heads for tokens; keys and values go round from group to group.
    """

    ulysses: int
    ring: int

    @property
    def ranks(self) -> int:
        """Ranks that share the sequence."""
        return self.ulysses * self.ring

    def ulysses_groups(self, ranks: Sequence[int]) -> list[tuple[int, ...]]:
        """The Ulysses groups among the `ranks` of a sequence: each is a run of `ranks`, which are in the order of
        shards."""
        return [tuple(ranks[start : start + self.ulysses]) for start in range(0, len(ranks), self.ulysses)]

    def ring_groups(self, ranks: Sequence[int]) -> list[tuple[int, ...]]:
        """The rings among the `ranks` of a sequence: each has one rank of every Ulysses group."""
        return [tuple(ranks[start :: self.ulysses]) for start in range(self.ulysses)]

    def __str__(self) -> str:
        return f"Ulysses {self.ulysses} x ring {self.ring}"


@dataclass(frozen=True)
class ParallelPlan:
    """The degrees of parallelism as the user asked for them; a degree of 0 is chosen once the model is known.

    Attributes:
        speeds: the speed of each GPU, by rank, in any unit. GPUs share a sequence in proportion to their speeds. Empty
            where all GPUs are alike.
    """

    num_gpus: int = 2
    data_parallel: int = 1
    pipeline_parallel: int = 1
    tensor_parallel: int = 1
    ulysses_degree: int = 0
    ring_degree: int = 0
    speeds: tuple[int, ...] = ()

    @property
    def sequence_ranks(self) -> int:
        """Ranks that share one token sequence while every data-parallel group has work."""
        return self.num_gpus // (self.data_parallel * self.pipeline_parallel * self.tensor_parallel)

    @property
    def mesh(self) -> RankMesh:
        """The coordinates of the ranks, and their groups along each axis."""
        return RankMesh(self.data_parallel, self.pipeline_parallel, self.sequence_ranks, self.tensor_parallel)

    def sequence_groups(self, ranks: int) -> list[tuple[int, ...]]:
        """The ranks that share a token sequence, in the order of their shards, for every group there is.

        `ranks` is `sequence_ranks`, or as many times that as there are data-parallel groups (see `group_ranks`).
        """
        return self.mesh.groups("data", "sequence") if ranks > self.sequence_ranks else self.mesh.groups("sequence")

    def sequence_speeds(self, members: Sequence[int]) -> tuple[int, ...]:
        """The speed at which each rank of a sequence group gets through its tokens; empty where all GPUs are alike.

        Ranks of other stages, and ranks with other parts of the matrices, work on the same tokens as a rank of the
        group, so the slowest of them sets the speed.
        """
        if not self.speeds:
            return ()
        groups = self.mesh.groups("stage", "tensor")
        slowest = {rank: min(self.speeds[peer] for peer in group) for group in groups for rank in group}
        return tuple(slowest[rank] for rank in members)

    def tokens_of(self, rank: int, tokens: int) -> int:
        """Tokens of a sequence that `rank` has while every data-parallel group has work; at least those."""
        if not self.speeds:
            return math.ceil(tokens / self.sequence_ranks)
        members = next(group for group in self.sequence_groups(self.sequence_ranks) if rank in group)
        return shares(tokens, len(members), self.sequence_speeds(members))[members.index(rank)]

    def replicas(self) -> list[tuple[int, ...]]:
        """The ranks that hold the same weights, for every part into which stages and tensor ranks divide a model."""
        return self.mesh.groups("data", "sequence")

    def validate(self) -> None:
        """Check what needs no model.

        Raises:
            PlanError: the degrees do not share out `num_gpus`.
        """
        if self.num_gpus < 1:
            raise PlanError(f"num_gpus is {self.num_gpus}. Choose 1 or more.")
        if self.speeds and (len(self.speeds) != self.num_gpus or min(self.speeds) < 1):
            raise PlanError(
                f"The speeds of the GPUs are {_words(self.speeds)}. "
                f"Give {self.num_gpus} numbers above 0, as that is num_gpus."
            )
        sizes = self._sizes()
        for name, size in sizes.items():
            if size < 1 or self.num_gpus % size:
                raise PlanError(
                    f"{name}_size {size} does not divide num_gpus {self.num_gpus}. "
                    f"Use one of {_words(divisors(self.num_gpus))}."
                )
        product = math.prod(sizes.values())
        if self.num_gpus % product:
            factors = " x ".join(f"{name}_size {size}" for name, size in sizes.items() if size > 1)
            raise PlanError(
                f"{factors} is {product}, which does not divide num_gpus {self.num_gpus}. "
                f"Make their product one of {_words(divisors(self.num_gpus))}."
            )
        self._check_sequence(self.sequence_ranks)

    def holds_as(self, other: ParallelPlan) -> bool:
        """Whether every rank has the same part of a model under both plans, in the same groups of ranks."""
        if (self.pipeline_parallel, self.tensor_parallel) != (other.pipeline_parallel, other.tensor_parallel):
            return False
        coords = ((self.mesh.coords(rank), other.mesh.coords(rank)) for rank in range(self.num_gpus))
        return all((mine.stage, mine.tensor) == (its.stage, its.tensor) for mine, its in coords)

    def completions(self) -> list[ParallelPlan]:
        """All plans that keep the sizes which are set in this plan; sizes left at 1, and degrees left at 0, are free.

        Raises:
            PlanError: there is none.
        """
        sizes = divisors(self.num_gpus)
        free = ([size] if size != 1 else sizes for size in self._sizes().values())
        plans = []
        for data, pipeline, tensor in itertools.product(*free):
            plan = replace(self, data_parallel=data, pipeline_parallel=pipeline, tensor_parallel=tensor)
            try:
                plan.validate()
            except PlanError:
                continue
            plans.append(plan)
        if not plans:
            self.validate()
        return plans

    def _sizes(self) -> dict[str, int]:
        return {name: getattr(self, name) for name in ("data_parallel", "pipeline_parallel", "tensor_parallel")}

    def check_model(self, num_heads: int, num_layers: int) -> None:
        """Check that a model of `num_heads` attention heads and `num_layers` blocks can be divided by this plan.

        Raises:
            PlanError: the tensor size does not divide the heads, or a pipeline stage would have no block, or
                more Ulysses ranks than heads.
        """
        if num_heads % self.tensor_parallel:
            sizes = [size for size in divisors(num_heads) if self.num_gpus % size == 0]
            raise PlanError(
                f"tensor_parallel_size {self.tensor_parallel} does not divide the {num_heads} heads of this model. "
                f"Use one of {_words(sizes)}."
            )
        if self.pipeline_parallel > num_layers:
            raise PlanError(
                f"pipeline_parallel_size is {self.pipeline_parallel}, but this model has {num_layers} blocks. "
                f"Set it to {num_layers} or less."
            )
        self.sequence_degrees(num_heads)

    def _check_sequence(self, ranks: int) -> None:
        ulysses, ring = self.ulysses_degree, self.ring_degree
        if ulysses < 0 or ring < 0:
            raise PlanError("A parallel degree is below 0. Use 0 for an automatic choice, or 1 and more.")
        if ulysses and ring and ulysses * ring != ranks:
            raise PlanError(
                f"ulysses_degree {ulysses} x ring_degree {ring} is {ulysses * ring}, but {ranks} GPUs share each "
                f"token sequence. Make their product {ranks}, or set one of them to 0 (automatic)."
            )
        for name, degree in (("ulysses_degree", ulysses), ("ring_degree", ring)):
            if degree and ranks % degree:
                raise PlanError(
                    f"{name} {degree} does not divide the {ranks} GPUs that share each token sequence. "
                    f"Use one of {_words(divisors(ranks))}, or 0 (automatic)."
                )

    def sequence_degrees(self, num_heads: int, ranks: int | None = None) -> SequenceDegrees:
        """Choose the Ulysses and the ring degree for a model of `num_heads` heads over `ranks` ranks of a sequence.

        `ranks` is `sequence_ranks` by default. Tensor-parallel ranks share out their part of the heads alone. Heads are
        shared unevenly where the ranks do not divide their number, or where GPUs are unlike. The rank that needs
        longest for its heads then sets the pace, so the choice weighs uneven heads against the cost of a ring. Among
        equally fast choices the one with the shortest ring is taken.

        Raises:
            PlanError: more Ulysses ranks than heads.
        """
        ranks, num_heads = ranks or self.sequence_ranks, num_heads // self.tensor_parallel
        asked_for = ranks == self.sequence_ranks  # the user's degrees are meant for this group size alone
        candidates = [
            SequenceDegrees(ulysses, ranks // ulysses)
            for ulysses in divisors(ranks)
            if not asked_for or (self.ulysses_degree in (0, ulysses) and self.ring_degree in (0, ranks // ulysses))
        ]
        possible = [degrees for degrees in candidates if degrees.ulysses <= num_heads]
        if self.ring_degree == 1:  # who wants no ring wants none in larger groups either
            possible = [degrees for degrees in possible if degrees.ring == 1] or possible
        if not possible:
            raise PlanError(
                f"{num_heads} heads cannot be shared by ulysses_degree {self.ulysses_degree}. "
                f"Set it to {num_heads} or less, or to 0 (automatic)."
            )
        return min(possible, key=lambda degrees: (self.attention_cost(degrees, num_heads), degrees.ring))

    def attention_cost(self, degrees: SequenceDegrees, num_heads: int) -> float:
        """Expected time of one self-attention, relative to a perfect split among GPUs like the slowest, without a ring.

        `num_heads` is the number of heads of one tensor-parallel part.
        """
        groups = (self._relative_speeds(members) for members in self.sequence_groups(degrees.ranks))
        imbalance = max(_slowest_heads(degrees, num_heads, speeds) for speeds in groups)
        return imbalance * (1 + (RING_COST if degrees.ring > 1 else 0))

    def token_cost(self, tokens: int, ranks: int) -> float:
        """Expected time of all work that treats each of `tokens` tokens by itself, relative to an even split of the
        tokens over `ranks` GPUs as fast as the slowest one."""
        if not self.speeds:
            return 1.0
        groups = (self._relative_speeds(members) for members in self.sequence_groups(ranks))
        pairs = ((n, speed) for group in groups for n, speed in zip(shares(tokens, ranks, group), group, strict=True))
        return max(n / speed for n, speed in pairs) / math.ceil(tokens / ranks)

    def _relative_speeds(self, members: Sequence[int]) -> tuple[float, ...]:
        """The speeds of the ranks of a sequence group, as multiples of the speed of the slowest GPU of the pool; empty
        where all GPUs are alike."""
        return tuple(speed / min(self.speeds) for speed in self.sequence_speeds(members))

    def group_ranks(self, batch: int) -> int:
        """How many ranks share one token sequence: all ranks of all data-parallel groups where the batch has fewer
        items than there are groups."""
        return self.sequence_ranks if batch >= self.data_parallel else self.sequence_ranks * self.data_parallel

    def describe(self, num_heads: int) -> str:
        """One line for logs and the status, such as `4 workers: data 2 x Ulysses 2 x ring 1`."""
        workers = "1 worker" if self.num_gpus == 1 else f"{self.num_gpus} workers"
        pipeline = f"pipeline {self.pipeline_parallel} x " if self.pipeline_parallel > 1 else ""
        tensor = f" x tensor {self.tensor_parallel}" if self.tensor_parallel > 1 else ""
        speeds = f" at speeds {':'.join(map(str, self.speeds))}" if self.speeds else ""
        return f"{workers}: data {self.data_parallel} x {pipeline}{self.sequence_degrees(num_heads)}{tensor}{speeds}"


SPLIT_MODES = ("spatial", "temporal", "spatiotemporal")


@dataclass(frozen=True)
class PatchSplit:
    """How the user wants a video cut into patches (see patch_layout.py).

    Args:
        mode: one of `SPLIT_MODES`.
        size: pixels to whose multiples the borders between bands of rows snap. Frames have no pixels: borders in
            time lie between any two latent frames.
        overlap: pixels on either side of a border whose keys and values are exchanged fresh in every step; in
            time as many latent frames as that is rows of tokens.
    """

    mode: str = "spatial"
    size: int = 64
    overlap: int = 0


def shares(total: int, parts: int, speeds: Sequence[float] = ()) -> list[int]:
    """Split `total` units of work into `parts` whole shares, so that the last share is done as early as can be.

    `speeds` has the speed at which each share is worked on. Where all speeds are equal, or none are given, shares
    differ by 1 at most, and the larger shares come first. No share is 0 unless `total` is less than `parts`.
    """
    small, larger = divmod(total, parts)
    if len(set(speeds)) < 2 or small == 0:
        return [small + (i < larger) for i in range(parts)]
    split = [max(1, int(total * speed / sum(speeds))) for speed in speeds]
    while sum(split) > total:  # shares of very slow parts were raised to 1
        split[max(range(parts), key=lambda i: (split[i] > 1, split[i] / speeds[i]))] -= 1
    while sum(split) < total:
        split[min(range(parts), key=lambda i: (split[i] + 1) / speeds[i])] += 1
    return split


def head_speeds(degrees: SequenceDegrees, speeds: Sequence[float]) -> tuple[float, ...]:
    """The speeds in proportion to which an Ulysses group shares out heads; the ranks of a ring have the same heads."""
    return tuple(sum(speeds[place :: degrees.ulysses]) for place in range(degrees.ulysses)) if speeds else ()


def _slowest_heads(degrees: SequenceDegrees, num_heads: int, speeds: Sequence[float]) -> float:
    """How long the busiest rank computes attention for its heads, relative to a perfect split among ranks of speed
    1."""
    heads = shares(num_heads, degrees.ulysses, head_speeds(degrees, speeds))
    if not speeds:
        return max(heads) * degrees.ulysses / num_heads
    longest = 0.0
    for start in range(0, degrees.ranks, degrees.ulysses):
        group = speeds[start : start + degrees.ulysses]
        tokens = sum(group) / sum(speeds)
        longest = max(longest, *(tokens * n / speed for n, speed in zip(heads, group, strict=True)))
    return longest * degrees.ranks / num_heads


def bounds(total: int, parts: int, index: int) -> tuple[int, int]:
    """Start and stop of share `index` of `shares(total, parts)`."""
    split = shares(total, parts)
    start = sum(split[:index])
    return start, start + split[index]


def divisors(n: int) -> list[int]:
    """The numbers that divide `n`, in ascending order."""
    return [d for d in range(1, n + 1) if n % d == 0]


def _words(numbers: Sequence[int]) -> str:
    return ", ".join(str(n) for n in numbers)
