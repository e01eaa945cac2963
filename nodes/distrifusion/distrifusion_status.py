"""Official DistriFusion Status: the patches of a MODEL and the figures of their last run, as text and picture."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from comfy_api.latest import io, ui

from ...distributed.approximate.displaced_memory_estimate import gib
from ...distributed.approximate.kv_buffers import official_version
from ...distributed.approximate.patch_layout import PatchLayout, token_pixels
from ...distributed.approximate.schedule import StepInfo
from ...distributed.client.displaced_runs import DisplacedRuns, RunRecord
from ...distributed.client.pool import PoolStatus
from ...distributed.plan.degrees import PlanError
from ...distributed.protocol.reports import Exchange, WorkerStatus
from ...wanvideo.base.grid import Grid
from ..common import shared_inputs
from ..common.progress import WorkersPoll
from ..common.sockets import DISTRIFUSION_CATEGORY, DISTRIFUSION_MODEL
from ..common.validation import new_fingerprint
from ..model.model_patcher import displaced_runs
from .distrifusion_loader import availability
from .patch_picture import draw_layout

_EXAMPLE = (832, 480, 21)  # width, height and latent frames of the video shown before a run


class OfficialDistriFusionStatus(io.ComfyNode):
    """Asks the pool behind a MODEL; starts nothing."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Describe the node to ComfyUI."""
        return io.Schema(
            node_id="OfficialDistriFusionStatus",
            display_name="🎯 Official DistriFusion Status",
            category=DISTRIFUSION_CATEGORY,
            description=(
                "Availability of the official package, GPUs and their links, who owns which patch, and what the last "
                "run did: synchronous and stale steps, seconds, bytes exchanged and how much of that was hidden. Runs "
                "with every prompt. To see the state after sampling, connect the latent of the sampler too."
            ),
            inputs=[
                DISTRIFUSION_MODEL.Input(
                    "model", tooltip="From Official DistriFusion Model Loader, or any node behind it."
                ),
                shared_inputs.after(),
                io.Image.Input("frame", optional=True, tooltip="The patches are drawn over its first frame."),
            ],
            outputs=[io.String.Output(display_name="status"), io.Image.Output(display_name="patches")],
            is_output_node=True,
        )

    @classmethod
    def fingerprint_inputs(cls, **_inputs: object) -> float:
        """Let the node run with every prompt."""
        return new_fingerprint()

    @classmethod
    def execute(cls, model: object, after: object = None, frame: torch.Tensor | None = None) -> io.NodeOutput:
        """Return the status as text, and the patches as a picture over `frame` [B, H, W, 3].

        Raises:
            ValueError: the MODEL does not run by patches.
        """
        runs = displaced_runs(model)
        if runs is None:
            raise ValueError(
                "This MODEL does not run by patches, so there is no status of them. "
                "Connect Official DistriFusion Model Loader, or XDit+USP Status for a MODEL of that loader."
            )
        pool = runs.pool.status(WorkersPoll(runs.pool))
        layout, problem = _layout(runs)
        text = "\n".join(_report(runs, pool, layout, problem))
        picture = draw_layout(layout, _caption(runs), None if frame is None else frame[0])
        return io.NodeOutput(text, picture, ui=ui.PreviewText(text))


def _layout(runs: DisplacedRuns) -> tuple[PatchLayout, str]:
    """The patches of the last video, or, before the first run, of a video in Wan's most common size.

    The second result is the reason why the video cannot be cut into patches; "" for a video that can.
    """
    width, height, frames = _EXAMPLE
    pixels = token_pixels(runs.config)
    grid = runs.record.grid or Grid(frames, height // pixels, width // pixels)
    try:
        return runs.layout(grid, runs.pool.settings.plan.sequence_ranks), ""
    except PlanError as error:
        return runs.layout(grid, 1), str(error)


def _caption(runs: DisplacedRuns) -> str:
    split = runs.settings.split
    return f"{split.mode} patches: patch_size {split.size}, patch_overlap {split.overlap}"


def _report(runs: DisplacedRuns, pool: PoolStatus, layout: PatchLayout, problem: str) -> Iterator[str]:
    version = official_version()
    yield f"{'✅' if version else '⚠️'} Official DistriFusion: {availability()}."
    settings, plan = runs.settings, pool.settings.plan
    yield (
        f"🔲 {_caption(runs)}; {settings.warmup_steps} warm-up steps, K/V buffers "
        f"{'fp8' if settings.fp8_buffers else runs.spec.compute_dtype}, manager {runs.manager}"
    )
    yield f"🎮 {plan.num_gpus} workers on {pool.settings.device}: {_state(pool)}"
    yield from (f"  {line}" for line in map(_worker, pool.workers))
    if not pool.workers and pool.settings.device == "cuda":
        yield from (f"  {_gpu(index)}" for index in range(plan.num_gpus))
    yield from _layout_lines(layout, runs.record, plan.data_parallel)
    if problem:
        yield f"  {problem}"
    yield from _run_lines(runs.record)


def _state(pool: PoolStatus) -> str:
    return "ready" if pool.state == "ready" else f"{pool.state}; they start with the next sampling step"


def _worker(worker: WorkerStatus) -> str:
    return (
        f"rank {worker.rank}: {worker.device}, {gib(worker.used)} used, {gib(worker.total - worker.used)} free, "
        f"link: {worker.link}"
    )


def _gpu(index: int) -> str:
    """The line of a GPU without a worker, found out without a CUDA context, which would take memory on the GPU."""
    found = torch.cuda.get_device_properties(index)
    return f"rank {index}: {found.name}, {gib(found.total_memory)}; what is free, and the link, once the workers run"


def _layout_lines(layout: PatchLayout, record: RunRecord, groups: int) -> Iterator[str]:
    grid = layout.grid
    what = "the last run" if record.grid else f"{_EXAMPLE[0]}x{_EXAMPLE[1]}, 81 frames, before the first run"
    each = f", the same in each of {groups} groups of GPUs" if groups > 1 and len(layout.patches) > 1 else ""
    yield f"📐 patches of {what}{each}: {grid.frames} latent frames of {grid.rows} x {grid.columns} tokens"
    yield from (f"  {line}" for line in layout.describe())


def _run_lines(record: RunRecord) -> Iterator[str]:
    if not record.synchronous and not record.stale:
        yield "🔄 nothing has been sampled yet"
        return
    yield f"🔄 {_step(record)}"
    if record.need:
        yield f"  memory needed: {record.need}, for {record.branches} batch items (cfg branches)"
    yield f"  seconds per forward: {_seconds('synchronous', record.synchronous)}, {_seconds('stale', record.stale)}"
    if record.exchanges:
        yield from (f"  {line}" for line in _exchange_lines(record))


def _step(record: RunRecord) -> str:
    if record.exact_because:
        return f"every forward is exact and synchronous: {record.exact_because}"
    last: StepInfo | None = record.last
    if last is None:
        return "the run ended in its first forward"
    kind = "synchronous" if last.synchronous else "stale: with the other patches of the step before"
    return f"step {last.index + 1} was the last ({kind}); every {record.sync_frequency}. step is synchronous"


def _seconds(kind: str, seconds: list[float]) -> str:
    if not seconds:
        return f"no {kind} ones"
    median = sorted(seconds)[len(seconds) // 2]
    return f"{median:.3f} ({len(seconds)} {kind})"


def _exchange_lines(record: RunRecord) -> Iterator[str]:
    worst = max(record.exchanges, key=lambda exchange: exchange.waited)
    received, buffers = max(e.received for e in record.exchanges), max(e.buffers for e in record.exchanges)
    yield (
        f"exchanged by {worst.manager}: {_bytes(received)} to each GPU in a stale forward, {_bytes(record.received)} "
        "in the run"
    )
    yield f"hidden behind computation: {_hidden(worst)}"
    yield f"K/V buffers during the run: {_bytes(buffers)} on each GPU"


def _hidden(exchange: Exchange) -> str:
    """The share of its exchange that the rank with the longest wait hides behind computation."""
    if exchange.seconds <= 0:
        return "not measured"
    share = max(0.0, 1 - exchange.waited / exchange.seconds)
    return (
        f"{100 * share:.0f} % (the exchange alone takes {exchange.seconds:.3f} s, the slowest GPU waited "
        f"{exchange.waited:.3f} s)"
    )


def _bytes(nbytes: int) -> str:
    return gib(nbytes) if nbytes >= 2**30 else f"{nbytes / 2**20:.1f} MiB"
