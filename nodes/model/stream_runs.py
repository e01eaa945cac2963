"""What a MODEL whose patches are streamed through pipeline stages (PipeFusion) knows of its sampling runs. Needs no
ComfyUI."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from ...distributed.approximate.pipefusion_memory import check_stream, kept_bytes, stream_memory
from ...distributed.approximate.schedule import PatchSettings, Schedule
from ...distributed.client.pool import Pool
from ...distributed.protocol.requests import Displaced
from ...distributed.protocol.specs import ModelSpec
from ...wanvideo.base.config import WanConfig
from ...wanvideo.base.grid import grid_of
from ...wanvideo.checkpoint.header import Header
from .infinitetalk_patch import has_places
from .patch_runs import lane_names

BESIDE = "wan_parallel_beside"
"""Key of ComfyUI's transformer options, set by the model: `Beside`."""

_SETTINGS = PatchSettings(strategy="pipefusion")


@dataclass(frozen=True)
class Beside:
    """What a forward keeps keys and values of beside a video: VACE's control videos, and tokens behind the video."""

    contexts: int = 0
    tail: int = 0


class StreamRuns:
    """The sampling runs of one MODEL; see `Schedule` for which of their forwards are exact."""

    def __init__(self, config: WanConfig, spec: ModelSpec, pool: Pool, header: Header | None = None):
        self.config, self.spec, self.pool, self.header = config, spec, pool, header
        self._schedule = Schedule()
        self._run = ""
        self._kept: dict[tuple[str, ...], int] = {}  # bytes on the fullest GPU, by batch items, of this run

    def begin(self) -> None:
        """A new sampling run."""
        self._schedule.restart()

    def check(self, size: tuple[int, ...], options: Mapping[str, Any]) -> None:
        """Refuse a run that could not be done, before workers start and weights are read.

        Args:
            size: of the latent [B, C, T, H, W], with the branches of cfg in B.
            options: ComfyUI's transformer options, and `BESIDE`.

        Raises:
            TooLarge: its keys and values do not fit.
        """
        if self._takes_part(size[0], options):
            beside = options.get(BESIDE, Beside())
            self._check(size, beside, self._bytes(size, beside))

    @contextmanager
    def step(
        self,
        x: torch.Tensor,
        timestep: torch.Tensor,
        options: Mapping[str, Any],
        patches: str,
        make_room: Callable[[int], object] = lambda _nbytes: None,
    ) -> Iterator[Displaced | None]:
        """Around one forward of the pool, which is given what this yields: None where it must be exact.

        Args:
            x: latent [B, C, T, H, W].
            options: ComfyUI's transformer options, and `BESIDE`.
            patches: another one for every other set of LoRAs.
            make_room: called with the bytes a GPU will need, once for each branch of a run, on GPUs.

        Raises:
            TooLarge: the keys and values of all branches of the run do not fit.
        """
        try:
            if not self._takes_part(len(x), options):
                self._schedule.restart()
                yield None
            else:
                beside = options.get(BESIDE, Beside())
                # a branch that has something else beside it is another one: other sizes are kept
                lanes = tuple(f"{lane}:{beside.contexts}:{beside.tail}" for lane in lane_names(options, len(x)))
                displaced = self._schedule.plan(_SETTINGS, (self.pool.launcher_pid, patches), lanes, x, timestep)
                self._keep(displaced, tuple(x.shape), beside, make_room)
                yield displaced
        except BaseException:  # a Cancel is no Exception: whatever it was, what is kept is not the last step's
            self._schedule.restart()
            raise

    def _takes_part(self, batch: int, options: Mapping[str, Any]) -> bool:
        """Whether a forward may keep something for the next one."""
        sigmas = options.get("sample_sigmas")
        long_enough = sigmas is None or len(sigmas) - 1 > _SETTINGS.warmup_steps
        same_items = lane_names(options, batch) is not None and options.get("context_window") is None
        # Places are computed exactly (see infinitetalk_patch.py).
        return long_enough and same_items and not has_places(options)

    def _keep(
        self, step: Displaced, size: tuple[int, ...], beside: Beside, make_room: Callable[[int], object]
    ) -> None:
        if step.run != self._run:
            self._run, self._kept = step.run, {}
        if step.lanes in self._kept:
            return
        self._kept[step.lanes] = self._bytes(size, beside)
        self._check(size, beside, sum(self._kept.values()))
        if self.pool.settings.device == "cuda":
            make_room(self._kept[step.lanes])

    def _bytes(self, size: tuple[int, ...], beside: Beside) -> int:
        settings, tokens = self.pool.settings, _tokens(size, beside)
        return kept_bytes(self.config, settings, self.spec.compute_dtype, tokens, size[0], beside.contexts)

    def _check(self, size: tuple[int, ...], beside: Beside, kept: int) -> None:
        settings, tokens = self.pool.settings, _tokens(size, beside)
        if settings.plan.pipeline_parallel > 1:
            check_stream(stream_memory(self.config, settings, self.spec, tokens, kept, self.header), settings)


def _tokens(size: tuple[int, ...], beside: Beside) -> int:
    return grid_of(torch.empty(size, device="meta")).tokens + beside.tail
