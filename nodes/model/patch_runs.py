"""What a MODEL that runs by displaced patches knows of its sampling runs: which part each forward takes in them,
whether a run fits into memory, and what the status shows of the last one. Needs no ComfyUI."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from ...distributed.approximate.displaced_memory import PatchMemory, capacity, check_run, patch_memory
from ...distributed.approximate.kv_buffers import manager_name
from ...distributed.approximate.patch_layout import PatchLayout, split_grid, token_pixels
from ...distributed.approximate.schedule import STALE, PatchSettings, Schedule, StepInfo
from ...distributed.client.pool import Pool
from ...distributed.protocol.reports import Exchange
from ...distributed.protocol.requests import Displaced
from ...distributed.protocol.specs import ModelSpec
from ...wanvideo.base.config import WanConfig
from ...wanvideo.base.grid import Grid, grid_of
from ...wanvideo.checkpoint.header import Header
from .infinitetalk_patch import has_places

SYNC_FREQUENCY = "wan_parallel_sync_frequency"
"""Where OfficialDistriFusionSampler leaves its setting among the transformer options."""


@dataclass
class RunRecord:
    """One sampling run as the status shows it. Times are those of whole forwards, in seconds."""

    grid: Grid | None = None
    branches: int = 0  # batch items that have buffers of their own
    need: PatchMemory | None = None
    sync_frequency: int = 0
    last: StepInfo | None = None
    exact_because: str = ""
    synchronous: list[float] = field(default_factory=list)
    stale: list[float] = field(default_factory=list)
    exchanges: tuple[Exchange, ...] = ()  # of the last stale forward, by rank
    received: int = 0  # bytes by all stale forwards, on the GPU that received most


class PatchRuns:
    """The sampling runs of one MODEL; see `Schedule` for which of their forwards are synchronous.

    Raises:
        MissingPackage: the official manager was asked for and is not installed.
    """

    def __init__(
        self, settings: PatchSettings, config: WanConfig, spec: ModelSpec, pool: Pool, header: Header | None = None
    ):
        self.settings, self.config, self.spec, self.pool, self.header = settings, config, spec, pool, header
        self.manager = manager_name(settings.manager, torch.device(pool.settings.device))
        self.record = RunRecord()
        self._schedule = Schedule()
        self._run = ""
        self._items: dict[tuple[str, ...], int] = {}  # whose buffers each GPU keeps in this run

    def begin(self) -> None:
        """A new sampling run."""
        self.record = RunRecord()
        self._schedule.restart()

    @contextmanager
    def step(
        self,
        x: torch.Tensor,
        timestep: torch.Tensor,
        options: Mapping[str, Any],
        patches: str,
        make_room: Callable[[int], object],
    ) -> Iterator[Displaced | None]:
        """Around one forward of the pool, which is given what this yields.

        Args:
            x: latent [B, C, T, H, W].
            options: ComfyUI's transformer options.
            patches: another one for every other set of LoRAs.
            make_room: called with the bytes a GPU will need, once for each branch of a run, on GPUs.

        Raises:
            PlanError: the video cannot be cut like this, or does not fit into memory.
        """
        try:
            displaced = self._plan(x, timestep, options, patches, make_room)
            begin = time.perf_counter()
            yield displaced
        except BaseException:  # a Cancel is no Exception: whatever it was, the buffers are not the last step's
            self._schedule.restart()
            raise
        self._note(displaced, time.perf_counter() - begin)

    def check(self, size: tuple[int, ...], options: Mapping[str, Any]) -> None:
        """Refuse a run that could not be done, before workers start and weights are read.

        Args:
            size: of the latent [B, C, T, H, W], with the branches of cfg in B.
            options: ComfyUI's transformer options.

        Raises:
            PlanError: as in `step`.
        """
        settings, ranks, lanes = self._settings(options), self._ranks(size[0]), lane_names(options, size[0])
        if settings.sync_frequency > 1 and not _why_exact(self.config, settings, ranks, lanes, options):
            grid = grid_of(torch.empty(size, device="meta"))
            self._check(self.layout(grid, ranks), _share(size[0], ranks, self.pool))

    def _plan(
        self,
        x: torch.Tensor,
        timestep: torch.Tensor,
        options: Mapping[str, Any],
        patches: str,
        make_room: Callable[[int], object],
    ) -> Displaced | None:
        settings = self._settings(options)
        ranks, lanes = self._ranks(len(x)), lane_names(options, len(x))
        self.record.grid, self.record.sync_frequency = grid_of(x), settings.sync_frequency
        self.record.exact_because = _why_exact(self.config, settings, ranks, lanes, options)
        if self.record.exact_because:
            self._schedule.restart()
            return None
        step = self._schedule.plan(settings, (self.pool.launcher_pid, patches), lanes, x, timestep)
        if step.run != self._run:
            self._run, self._items = step.run, {}
        if settings.sync_frequency > 1:
            self._keep_buffers(lanes, grid_of(x), ranks, make_room)
        self.record.last = self._schedule.last
        return step

    def _keep_buffers(self, lanes: tuple[str, ...], grid: Grid, ranks: int, make_room: Callable[[int], object]) -> None:
        """Make sure that the buffers of these batch items fit beside those that the run has already."""
        layout = self.layout(grid, ranks)
        if lanes in self._items:
            return
        self._items[lanes] = _share(len(lanes), ranks, self.pool)
        need = self._check(layout, sum(self._items.values()))
        self.record.branches, self.record.need = sum(len(names) for names in self._items), need
        if self.pool.settings.device == "cuda":
            make_room(need.total - need.weights)

    def need(self, layout: PatchLayout, items: int) -> PatchMemory:
        """What a run needs whose buffers are those of `items` batch items on each GPU."""
        spec = self.spec
        return patch_memory(
            self.config,
            layout,
            spec.weight_dtype,
            spec.compute_dtype,
            items=items,
            at_once=min(items, spec.max_batch),
            fp8_buffers=self.settings.fp8_buffers,
            slice_tokens=spec.slice_tokens,
            manager=self.manager,
            groups=self.pool.settings.plan.num_gpus // len(layout.patches),
            header=self.header,
        )

    @property
    def available(self) -> int:
        """Bytes that each worker may take."""
        pool = self.pool.settings
        return capacity(pool.device, pool.plan.num_gpus, pool.memory_fraction)

    def _check(self, layout: PatchLayout, items: int) -> PatchMemory:
        need = self.need(layout, items)
        check_run(need, self.available, self._ways_out())
        return need

    def _ways_out(self) -> list[str]:
        plan, ways = self.pool.settings.plan, []
        if plan.data_parallel == 1 and plan.num_gpus % 2 == 0:
            ways.append("switch split_cfg on, which halves the buffers on each GPU where cfg is above 1")
        if not self.settings.fp8_buffers:
            ways.append("set kv_buffers to fp8")
        if self.manager != "host":
            ways.append("set manager to host, which keeps the buffers in host memory")
        return [*ways, "raise gpu_memory_fraction"]

    def _settings(self, options: Mapping[str, Any]) -> PatchSettings:
        return replace(self.settings, sync_frequency=options.get(SYNC_FREQUENCY, self.settings.sync_frequency))

    def layout(self, grid: Grid, ranks: int) -> PatchLayout:
        """How `ranks` GPUs share a video. Raises PlanError where they cannot."""
        return split_grid(grid, self.settings.split, ranks, token_pixels(self.config))

    def _ranks(self, batch: int) -> int:
        return self.pool.settings.plan.group_ranks(batch)

    def _note(self, displaced: Displaced | None, seconds: float) -> None:
        record = self.record
        stale = displaced is not None and displaced.kind == STALE
        (record.stale if stale else record.synchronous).append(seconds)
        if stale and self.pool.last.exchanges:
            record.exchanges = self.pool.last.exchanges
            record.received += max(exchange.received for exchange in record.exchanges)


def lane_names(options: Mapping[str, Any], batch: int) -> tuple[str, ...] | None:
    """A name for each batch item, the same in every step of a run; None where the options name other items.

    ComfyUI puts as many videos into a batch as there are, for each conditioning in `uuids` one after the other.
    """
    branches = [
        f"{name}:{label}"
        for name, label in zip(options.get("uuids") or (), options.get("cond_or_uncond") or (), strict=False)
    ]
    if not branches:
        return tuple(str(item) for item in range(batch))
    if batch % len(branches):
        return None
    return tuple(f"{branch}:{item}" for branch in branches for item in range(batch // len(branches)))


def _why_exact(
    config: WanConfig, settings: PatchSettings, ranks: int, lanes: tuple[str, ...] | None, options: Mapping[str, Any]
) -> str:
    """Why this forward takes no part in the method; "" if it does."""
    if config.why_exact:
        return config.why_exact
    if has_places(options):
        return "who of two speakers a token belongs to is told by keys of the first frame, which are in other patches"
    if options.get("patches_replace", {}).get("dit"):
        return "a node leaves blocks out of some forwards (SkipLayerGuidanceDiT)"
    if options.get("context_window") is not None:
        return "context windows show the model other frames in every call"
    if ranks == 1:
        return "each video has one GPU to itself, so there is nothing to exchange"
    if lanes is None:
        return "a node has split the batch, and the branches cannot be told apart"
    sigmas: Sequence[Any] | None = options.get("sample_sigmas")
    if sigmas is not None and len(sigmas) - 1 <= settings.warmup_steps:
        return f"the run has no more steps than the warm-up, which is {settings.warmup_steps}"
    return ""


def _share(items: int, ranks: int, pool: Pool) -> int:
    """How many of some batch items one group of GPUs takes."""
    return -(-items * ranks // pool.settings.plan.num_gpus)
