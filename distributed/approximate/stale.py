"""What strategies have in common whose self-attention uses keys and values of the step before."""

from __future__ import annotations

from abc import abstractmethod

from ...wanvideo.base.errors import UserError
from ..parallel.exact import ExactStep
from ..parallel.groups import Membership
from ..parallel.strategy import Step, StepInputs, Strategy
from ..protocol.requests import Displaced
from .schedule import EXACT


class StaleError(UserError, RuntimeError):
    """A stale step was asked for where there is nothing stale."""

    @classmethod
    def nothing_kept(cls) -> StaleError:
        """The error of a rank that has no keys and values for a stale step."""
        return cls("The workers have no keys and values of the step before. Queue the prompt again.")


class StaleStrategy(Strategy):
    """A strategy that keeps keys and values of one step for the next one of the same sampling run.

    Keys and values are kept of all blocks or none, so a forward that leaves blocks out is exact. So is one whose blocks
    ask the other ranks something: that concerns all tokens of a block together.
    """

    def __init__(self, membership: Membership):
        super().__init__(membership)
        self._run = ""

    def begin(self, inputs: StepInputs) -> Step:
        """Begin a forward, and drop what an earlier run has left. Without a part in a run the forward is exact."""
        step, options = inputs.asked, inputs.conditioning.options
        layers = range(inputs.model.config.num_layers)
        whole = not set(options.skip_blocks) & set(layers) and not inputs.model.asks_other_ranks(inputs.conditioning)
        if step is None or not whole or not self.suits(inputs):
            return ExactStep(self.membership, inputs)
        if step.run != self._run:
            self.trim()
            self._run = step.run
        return ExactStep(self.membership, inputs) if step.kind == EXACT else self.approximate(inputs, step)

    @abstractmethod
    def suits(self, inputs: StepInputs) -> bool:
        """Whether the strategy can share this forward at all."""

    @abstractmethod
    def approximate(self, inputs: StepInputs, step: Displaced) -> Step:
        """A forward that fills in for a stale one, or is stale."""
