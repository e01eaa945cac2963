"""The common base of strategies whose self-attention uses keys and values of the step before."""

from __future__ import annotations

from abc import abstractmethod

from ...wanvideo.base.user_error import UserError
from ..parallel.exact import ExactStep
from ..parallel.groups import ParallelGroups
from ..parallel.strategy import Step, StepInputs, Strategy
from ..protocol.requests import Displaced
from .schedule import EXACT


class StaleError(UserError, RuntimeError):
    """A stale step was asked for, and no keys and values of a step before are kept."""

    @classmethod
    def nothing_kept(cls) -> StaleError:
        """The error of a rank that has no keys and values for a stale step."""
        return cls("The workers have no keys and values of the step before. Queue the prompt again.")


class StaleStrategy(Strategy):
    """A strategy that keeps keys and values of one step for the next one of the same sampling run.

    Keys and values are kept of all blocks or of none, so a forward that leaves blocks out is exact. A forward is exact
    too if its blocks compute more than self-attention over the tokens of all ranks (`WanModel.asks_other_ranks`): all
    tokens must then be in a block at the same time.
    """

    def __init__(self, parallel: ParallelGroups):
        super().__init__(parallel)
        self._run = ""

    def begin(self, inputs: StepInputs) -> Step:
        """Begin a forward, and drop keys and values of an earlier run. A forward that has no part in a run is exact."""
        step, options = inputs.asked, inputs.conditioning.options
        layers = range(inputs.model.config.num_layers)
        whole = not set(options.skip_blocks) & set(layers) and not inputs.model.asks_other_ranks(inputs.conditioning)
        if step is None or not whole or not self.suits(inputs):
            return ExactStep(self.parallel, inputs)
        if step.run != self._run:
            self.trim()
            self._run = step.run
        return ExactStep(self.parallel, inputs) if step.kind == EXACT else self.approximate(inputs, step)

    @abstractmethod
    def suits(self, inputs: StepInputs) -> bool:
        """Whether the strategy can share this forward at all."""

    @abstractmethod
    def approximate(self, inputs: StepInputs, step: Displaced) -> Step:
        """A forward that keeps keys and values for a stale forward, or is stale itself."""
