"""What a MODEL whose patches are streamed through pipeline stages (PipeFusion) knows of its sampling runs. Needs no
ComfyUI."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

from ..distributed.messages import Displaced
from ..distributed.pool import Pool
from ..distributed.schedule import PatchSettings, Schedule
from .patch_runs import lane_names


class StreamRuns:
    """The sampling runs of one MODEL; see `Schedule` for which of their forwards are exact."""

    def __init__(self, pool: Pool):
        self.pool = pool
        self._schedule = Schedule()

    def begin(self) -> None:
        """A new sampling run."""
        self._schedule.restart()

    @contextmanager
    def step(
        self, x: torch.Tensor, timestep: torch.Tensor, options: Mapping[str, Any], patches: str
    ) -> Iterator[Displaced | None]:
        """Around one forward of the pool, which is given what this yields: None where it must be exact.

        Args:
            x: latent [B, C, T, H, W].
            options: ComfyUI's transformer options.
            patches: another one for every other set of LoRAs.
        """
        lanes = lane_names(options, len(x))
        try:
            if lanes is None or options.get("context_window") is not None:  # other frames or items in every call
                self._schedule.restart()
                yield None
            else:
                yield self._schedule.plan(PatchSettings(), (self.pool.launcher_pid, patches), lanes, x, timestep)
        except BaseException:  # a Cancel is no Exception: whatever it was, what is kept is not the last step's
            self._schedule.restart()
            raise
