"""The sampling runs of one MODEL, where some of its forwards may use keys and values of the step before.

A sampler asks for one forward after the other. DistriFusion and PipeFusion let a forward use what the step before has
left on the GPUs, so somebody must know which forwards belong to one run, which of them follow each other, and whether
all that a run keeps fits into memory. `SamplingRuns` is what the two have in common.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from ...wanvideo.base.config import WanConfig
from ...wanvideo.base.grid import Grid, grid_of
from ...wanvideo.checkpoint.header import Header
from ..approximate.schedule import PatchSettings, Schedule
from ..protocol.requests import Displaced
from ..protocol.specs import ModelSpec
from .pool import Pool

Size = tuple[int, ...]
"""The shape [B, C, T, H, W] of a latent, with the branches of cfg in B."""


@dataclass(frozen=True)
class SampledForward:
    """What a sampler says of one forward beside its tensors.

    Args:
        branch_ids: a name for each batch item, the same in every step of a run. Empty where the batch items cannot be
            told apart.
        steps: the number of steps of the whole run; None where the sampler does not say.
        in_context_window: the latent is a part of a longer video, in every call another part.
        skips_blocks: a node leaves blocks out of some forwards (SkipLayerGuidanceDiT).
        two_speakers: keys of the first frame tell which of two speakers each token belongs to (InfiniteTalk).
        sync_frequency: the sampler's own setting, which wins over that of the MODEL; None where the sampler has none.
        vace_contexts: control videos of VACE, which have keys and values of their own.
        context_tokens: tokens behind those of the video in the sequence.
    """

    branch_ids: tuple[str, ...]
    steps: int | None = None
    in_context_window: bool = False
    skips_blocks: bool = False
    two_speakers: bool = False
    sync_frequency: int | None = None
    vace_contexts: int = 0
    context_tokens: int = 0


class SamplingRuns(ABC):
    """The sampling runs of one MODEL whose forwards are not all exact; `Schedule` says which of them are.

    Args:
        config: the shapes of the model.
        spec: the model as the workers load it.
        pool: the workers.
        header: the header of the model's file; random weights have none.
    """

    def __init__(self, config: WanConfig, spec: ModelSpec, pool: Pool, header: Header | None = None):
        self.config, self.spec, self.pool, self.header = config, spec, pool, header
        self._schedule = Schedule()
        self._run = ""
        self._kept: dict[tuple[str, ...], int] = {}
        """What this run keeps for the batch items of each forward; subclasses say in which unit."""

    def begin(self) -> None:
        """Begin a new sampling run: its first forward warms up again."""
        self._schedule.restart()

    def change_model(self, header: Header, spec: ModelSpec) -> None:
        """Go on with another model, such as the same one with further layers."""
        self.config, self.spec, self.header = header.config, spec, header

    @abstractmethod
    def check(self, size: Size, forward: SampledForward) -> None:
        """Refuse a run that could not be done, before workers start and weights are read.

        Raises:
            PlanError: the video cannot be divided like this, or its keys and values do not fit into memory (TooLarge).
        """

    @contextmanager
    def step(
        self,
        x: torch.Tensor,
        timestep: torch.Tensor,
        forward: SampledForward,
        lora_uuid: str,
        make_room: Callable[[int], object],
    ) -> Iterator[Displaced | None]:
        """Surround one forward of the pool, which is given the value that this yields: None where it must be exact.

        Args:
            x: latent [B, C, T, H, W].
            timestep: [B] or [B, T].
            lora_uuid: names the set of LoRAs; another set has another name.
            make_room: called with the bytes that a GPU will need, once for each branch of a run, on GPUs.

        Raises:
            PlanError: as in `check`, but for all branches of the run together.
        """
        try:
            yield self._plan(x, timestep, forward, lora_uuid, make_room)
        except BaseException:  # a Cancel is no Exception; whatever it was, the GPUs do not hold the last step's keys
            self._schedule.restart()
            raise

    def _plan(
        self,
        x: torch.Tensor,
        timestep: torch.Tensor,
        forward: SampledForward,
        lora_uuid: str,
        make_room: Callable[[int], object],
    ) -> Displaced | None:
        size, settings = tuple(x.shape), self._settings(forward)
        if self._why_exact(size, forward):
            self._schedule.restart()
            return None
        state, branches = (self.pool.launcher_pid, lora_uuid), self._branches(forward)
        step = self._schedule.plan(settings, state, branches, x, timestep)
        if step.run != self._run:
            self._run, self._kept = step.run, {}
        if settings.sync_frequency > 1 and branches not in self._kept:
            nbytes = self._keep(branches, size, forward)
            if self.pool.settings.device == "cuda":
                make_room(nbytes)
        return step

    @abstractmethod
    def _settings(self, forward: SampledForward) -> PatchSettings:
        """When forwards of this MODEL are synchronous."""

    @abstractmethod
    def _why_exact(self, size: Size, forward: SampledForward) -> str:
        """Why this forward takes no part in the method; "" if it does."""

    def _branches(self, forward: SampledForward) -> tuple[str, ...]:
        """The names of what is kept for this forward's batch items."""
        return forward.branch_ids

    @abstractmethod
    def _keep(self, branches: tuple[str, ...], size: Size, forward: SampledForward) -> int:
        """Put what the run will keep for these branches into `_kept`; returns the bytes that a GPU needs for it.

        Raises:
            PlanError: as in `check`, but beside what the run keeps already.
        """


def grid_of_size(size: Size) -> Grid:
    """The token grid of a latent of this shape."""
    return grid_of(torch.empty(size, device="meta"))
