"""The sampling runs of a MODEL by displaced patches (DistriFusion): which part each forward takes in them, whether a
run fits into memory, and what the status shows of the last run."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import torch

from ...wanvideo.base.config import WanConfig
from ...wanvideo.base.grid import Grid
from ...wanvideo.checkpoint.header import Header
from ..approximate.displaced_memory_estimate import PatchMemory, capacity, check_run, patch_memory
from ..approximate.kv_buffers import manager_name
from ..approximate.patch_layout import PatchLayout, split_grid, token_pixels
from ..approximate.schedule import STALE, PatchSettings, StepInfo
from ..protocol.reports import Exchange
from ..protocol.requests import Displaced
from ..protocol.specs import ModelSpec
from .pool import Pool
from .sampling_runs import SampledForward, SamplingRuns, Size, grid_of_size


@dataclass
class RunRecord:
    """One sampling run as the status shows it. Times are those of whole forwards, in seconds.

    Args:
        grid: the tokens of the video; None before the first forward.
        branches: batch items that have buffers of their own.
        need: the memory of the run; None where nothing is kept.
        last: the forward that was planned last; None where none has taken part in the method.
        exact_because: why the last forward took no part in the method; "" if it did.
        exchanges: what the last stale forward exchanged, by rank.
        received: bytes that all stale forwards brought to the GPU that received most.
    """

    grid: Grid | None = None
    branches: int = 0
    need: PatchMemory | None = None
    sync_frequency: int = 0
    last: StepInfo | None = None
    exact_because: str = ""
    synchronous: list[float] = field(default_factory=list)
    stale: list[float] = field(default_factory=list)
    exchanges: tuple[Exchange, ...] = ()
    received: int = 0


class DisplacedRuns(SamplingRuns):
    """The sampling runs of one MODEL; `_kept` are the batch items whose buffers each GPU keeps.

    Raises:
        MissingPackage: the official manager was asked for and is not installed.
    """

    def __init__(
        self, settings: PatchSettings, config: WanConfig, spec: ModelSpec, pool: Pool, header: Header | None = None
    ):
        super().__init__(config, spec, pool, header)
        self.settings = settings
        self.manager = manager_name(settings.manager, torch.device(pool.settings.device))
        self.record = RunRecord()

    def begin(self) -> None:
        """Begin a new sampling run, with a new record."""
        super().begin()
        self.record = RunRecord()

    def check(self, size: Size, forward: SampledForward) -> None:
        """Refuse a run that could not be done, before workers start and weights are read.

        Raises:
            PlanError: the video cannot be cut like this, or its buffers do not fit into memory (TooLarge).
        """
        if self._settings(forward).sync_frequency > 1 and not self._why_exact(size, forward):
            ranks = self._ranks(size[0])
            self._check(self.layout(grid_of_size(size), ranks), self._share(size[0], ranks))

    @contextmanager
    def step(
        self,
        x: torch.Tensor,
        timestep: torch.Tensor,
        forward: SampledForward,
        lora_uuid: str,
        make_room: Callable[[int], object],
    ) -> Iterator[Displaced | None]:
        """Surround one forward of the pool, as `SamplingRuns.step` does, and record its seconds and its exchange."""
        with super().step(x, timestep, forward, lora_uuid, make_room) as displaced:
            started = time.perf_counter()
            yield displaced
        self._note(displaced, time.perf_counter() - started)

    def need(self, layout: PatchLayout, items: int) -> PatchMemory:
        """The memory of a run whose buffers are those of `items` batch items on each GPU."""
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
        return capacity(pool.device, pool.gpu_indices, pool.memory_fraction)

    def layout(self, grid: Grid, ranks: int) -> PatchLayout:
        """The patches of a video that `ranks` GPUs share.

        Raises:
            PlanError: the video cannot be cut into so many.
        """
        return split_grid(grid, self.settings.split, ranks, token_pixels(self.config))

    def _plan(
        self,
        x: torch.Tensor,
        timestep: torch.Tensor,
        forward: SampledForward,
        lora_uuid: str,
        make_room: Callable[[int], object],
    ) -> Displaced | None:
        record, size = self.record, tuple(x.shape)
        record.grid, record.sync_frequency = grid_of_size(size), self._settings(forward).sync_frequency
        record.exact_because = self._why_exact(size, forward)
        displaced = super()._plan(x, timestep, forward, lora_uuid, make_room)
        if displaced is not None:
            record.last = self._schedule.last
        return displaced

    def _settings(self, forward: SampledForward) -> PatchSettings:
        if forward.sync_frequency is None:
            return self.settings
        return replace(self.settings, sync_frequency=forward.sync_frequency)

    def _why_exact(self, size: Size, forward: SampledForward) -> str:
        if self.config.why_exact:
            return self.config.why_exact
        if forward.two_speakers:
            return (
                "who of two speakers a token belongs to is told by keys of the first frame, which are in other patches"
            )
        if forward.skips_blocks:
            return "a node leaves blocks out of some forwards (SkipLayerGuidanceDiT)"
        if forward.in_context_window:
            return "context windows show the model other frames in every call"
        if self._ranks(size[0]) == 1:
            return "each video has one GPU to itself, so there is nothing to exchange"
        if not forward.branch_ids:
            return "a node has split the batch, and the branches cannot be told apart"
        warmup = self.settings.warmup_steps
        if forward.steps is not None and forward.steps <= warmup:
            return f"the run has no more steps than the warm-up, which is {warmup}"
        return ""

    def _keep(self, branches: tuple[str, ...], size: Size, forward: SampledForward) -> int:
        ranks = self._ranks(size[0])
        layout = self.layout(grid_of_size(size), ranks)
        self._kept[branches] = self._share(size[0], ranks)
        need = self._check(layout, sum(self._kept.values()))
        self.record.branches, self.record.need = sum(len(names) for names in self._kept), need
        return need.total - need.weights

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

    def _ranks(self, batch: int) -> int:
        """The number of GPUs that share a video."""
        return self.pool.settings.plan.group_ranks(batch)

    def _share(self, items: int, ranks: int) -> int:
        """The number of batch items, out of so many, that one group of GPUs takes."""
        return -(-items * ranks // self.pool.settings.plan.num_gpus)

    def _note(self, displaced: Displaced | None, seconds: float) -> None:
        record = self.record
        stale = displaced is not None and displaced.kind == STALE
        (record.stale if stale else record.synchronous).append(seconds)
        if stale and self.pool.last.exchanges:
            record.exchanges = self.pool.last.exchanges
            record.received += max(exchange.received for exchange in record.exchanges)
