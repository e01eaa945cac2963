"""Which forwards of a sampling run may use activations of the step before, decided where the sampler runs.

The approximate strategies rely on two successive steps looking alike. So the first steps of a run are synchronous, some
later ones are too, and whatever breaks the sequence starts it anew: another model, resolution or LoRA, a step back in
noise, or a latent that is not the last one a little denoised.
"""

from __future__ import annotations

import uuid
from collections.abc import Hashable
from dataclasses import dataclass, field

import torch

from ..plan.degrees import PatchSplit
from ..protocol.requests import Displaced

EXACT, FILL, STALE = "exact", "fill", "stale"
"""The kinds of forwards: on the exact path; exact and keeping keys and values for the next forward; using those of the
forward before."""

JUMP = 0.5
"""Relative change of the latent between two calls that makes the second one a new beginning.

A step of an ordinary schedule moves the latent by up to 0.37 of its norm (20 steps, shift 8); another latent of
the same noise level is 1.4 away. Runs of four steps move it by more, and are too short to gain from stale steps.
"""


@dataclass(frozen=True)
class PatchSettings:
    """How a MODEL is run by an approximate strategy.

    Args:
        split: how the frame is cut.
        warmup_steps: synchronous steps at the start of a run, 1 at least.
        sync_frequency: every such step after them is synchronous; 1 makes all of them so.
        fp8_buffers: hold and exchange the other patches' keys and values in fp8. On the tiny Wan it costs 0.1 dB.
        manager: who does the exchange, see `kv_buffers.manager_name`.
        strategy: the approximate strategy by which the workers share the forwards; `split`, `fp8_buffers` and `manager`
            are for displaced patches alone.
    """

    split: PatchSplit = field(default_factory=PatchSplit)
    warmup_steps: int = 4
    sync_frequency: int = 10
    fp8_buffers: bool = False
    manager: str = "auto"
    strategy: str = "displaced"


@dataclass(frozen=True)
class StepInfo:
    """The forward that was planned last: its index in its run, counted from 0, and its kind."""

    index: int
    kind: str

    @property
    def synchronous(self) -> bool:
        """Whether the forward used no keys and values of the step before."""
        return self.kind != STALE


@dataclass(frozen=True)
class _Last:
    """A branch's last forward."""

    index: int
    timestep: float
    x: torch.Tensor


class Schedule:
    """How far one MODEL is in its sampling runs. A branch is the batch items that one forward takes together."""

    def __init__(self) -> None:
        self.last: StepInfo | None = None
        self._state: Hashable = None
        self.restart()

    def restart(self) -> None:
        """Forget the run: the next forward warms up again, with buffers of its own."""
        self._run = uuid.uuid4().hex
        self._branches: dict[tuple[str, ...], _Last] = {}

    def plan(
        self,
        settings: PatchSettings,
        state: Hashable,
        branch_ids: tuple[str, ...],
        x: torch.Tensor,
        timestep: torch.Tensor,
    ) -> Displaced:
        """Decide how the next forward of a branch takes part in a run.

        Args:
            state: equal as long as the model, its patches and its workers are the same.
            branch_ids: names the batch items over the steps of a run, so that no two branches share buffers.
            x: latent [B, C, T, H, W].
            timestep: [B] or [B, T].
        """
        state = (state, settings, x.shape[1:])
        if state != self._state:
            self._state = state
            self.restart()
        now, index = float(timestep.max()), 0
        before = self._branches.get(branch_ids)
        if before is not None and _follows(now, x, before):
            index = before.index + 1
        self._branches[branch_ids] = _Last(index, now, x.detach().clone())
        kind = _kind(settings, index)
        self.last = StepInfo(index, kind)
        return Displaced(
            kind, self._run, branch_ids, settings.split, settings.fp8_buffers, settings.manager, settings.strategy
        )


def _kind(settings: PatchSettings, index: int) -> str:
    if not _synchronous(settings, index):
        return STALE
    return EXACT if _synchronous(settings, index + 1) else FILL


def _synchronous(settings: PatchSettings, index: int) -> bool:
    return index < max(1, settings.warmup_steps) or (index - settings.warmup_steps + 1) % settings.sync_frequency == 0


def _follows(timestep: float, x: torch.Tensor, before: _Last) -> bool:
    """Whether a forward is the next one after `before` in the same run. An equal forward begins a new run."""
    moved = _distance(x, before.x)
    return timestep <= before.timestep and moved < JUMP and (moved > 0 or timestep < before.timestep)


def _distance(x: torch.Tensor, before: torch.Tensor) -> float:
    return float((x - before).norm() / before.norm().clamp_min(1e-12))
