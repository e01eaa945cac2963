"""The seam between one forward and the way in which the ranks of a pool share it.

A `Strategy` decides which tokens this rank takes and in how many passes through the blocks, how the self-attention of
these tokens sees the tokens of other ranks, and what is kept for the next step of a sampling run. Where weights lie,
how pipeline stages pass on what they computed, and when a request is cancelled is decided elsewhere; the kernel that
computes attention belongs to the model, whatever the strategy.

A strategy registers itself under a name by being defined, and a request names the strategy that it wants. All ranks
call the methods of a strategy with the same request, so a method may make collective calls.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

from ...wanvideo.attention.kernels import AttentionKernel
from ...wanvideo.base.conditioning import Conditioning
from ...wanvideo.base.grid import Grid, Part
from ...wanvideo.model.layers import SelfAttention
from ...wanvideo.model.model import WanModel
from ..plan.degrees import PlanError
from ..protocol.reports import Exchange
from ..protocol.requests import Displaced
from .groups import ParallelGroups
from .sequence_group import SequenceGroup

_registered: dict[str, type[Strategy]] = {}


def _nothing() -> None:
    pass


@dataclass(frozen=True)
class WorkItem:
    """What goes through this rank's blocks in one pass.

    Attributes:
        items: the batch items.
        part: the tokens of each item, among all tokens of its sequence.
        tokens: how many tokens `part` has.
        attend: the self-attention of these tokens.
        finish: is called once behind the last block, and also where the forward was given up before it.
    """

    items: slice
    part: Part
    tokens: int
    attend: SelfAttention
    finish: Callable[[], None] = _nothing


@dataclass(frozen=True)
class StepInputs:
    """What a strategy is told of one forward.

    Attributes:
        model: this rank's part of the model.
        conditioning: the further inputs of all batch items.
        grid: the tokens of one batch item.
        group: the ranks that share the tokens.
        batches: the batch items of this rank, in slices that go through the model one after the other.
        asked: the part that the forward takes in an approximate run; None where it belongs to none.
        kernel: the kernel of self-attention; None is the model's own.
    """

    model: WanModel
    conditioning: Conditioning
    grid: Grid
    group: SequenceGroup
    batches: Sequence[slice]
    asked: Displaced | None = None
    kernel: AttentionKernel | None = None

    @property
    def self_kernel(self) -> AttentionKernel:
        """The kernel of self-attention."""
        return self.kernel or self.model.self_kernel


class Step(ABC):
    """One forward under a strategy."""

    @property
    def new_bytes(self) -> int:
        """Bytes on this rank's device that `work` will allocate and keep for later steps, for all batches."""
        return 0

    @abstractmethod
    def work(self, items: slice) -> list[WorkItem]:
        """The passes of this rank through its blocks for the batch items `items`, in their order."""

    def report(self) -> Exchange | None:
        """What the forward exchanged beside the exchanges of the exact path, once all work is finished; None if
        nothing."""
        return None


class Strategy(ABC):
    """One way to share forwards among the ranks of a pool; each rank has an instance, which outlives a forward.

    Define a subclass with a name to register it: `class Mine(Strategy, name="mine")`. A subclass without a name is a
    base for others.

    Attributes:
        name: what a request calls the strategy.
        keeps_texts: whether keys and values of texts may take the device memory that is left beside a forward. A
            strategy whose own buffers were promised that memory says False.
    """

    name: ClassVar[str]
    keeps_texts: ClassVar[bool] = True

    def __init_subclass__(cls, name: str = "", **kwargs: object):
        super().__init_subclass__(**kwargs)
        if name:
            cls.name = name
            _registered[name] = cls

    def __init__(self, parallel: ParallelGroups):
        self.parallel = parallel

    @abstractmethod
    def begin(self, inputs: StepInputs) -> Step:
        """Begin a forward. For a forward that the strategy cannot share in its own way, return an `ExactStep`."""

    @property
    def nbytes(self) -> int:
        """Bytes on this rank's device that are kept between forwards."""
        return 0

    def trim(self) -> None:  # noqa: B027 (a strategy that keeps nothing has nothing to give back)
        """Give back the device memory that only a sampling run needs, once nothing is written into it."""

    def close(self) -> None:
        """Give back all memory, on the host too. The strategy can be used again, for a run that begins anew."""
        self.trim()


class Strategies:
    """The strategies of one rank, each made when a request first names it."""

    def __init__(self, parallel: ParallelGroups):
        self._parallel = parallel
        self._made: dict[str, Strategy] = {}

    def named(self, name: str) -> Strategy:
        """The strategy of that name.

        Raises:
            PlanError: no strategy has that name.
        """
        if name not in _registered:
            known = ", ".join(sorted(_registered))
            raise PlanError(f"The workers know no strategy called {name}. Use one of {known}.")
        if name not in self._made:
            self._made[name] = _registered[name](self._parallel)
        return self._made[name]

    @property
    def nbytes(self) -> int:
        """Bytes on this rank's device that all strategies keep between forwards."""
        return sum(strategy.nbytes for strategy in self._made.values())

    def trim(self) -> None:
        """Give back the device memory that only a sampling run needs, of all strategies."""
        for strategy in self._made.values():
            strategy.trim()

    def close(self) -> None:
        """Give back all memory of all strategies, which can be used again."""
        for strategy in self._made.values():
            strategy.close()
