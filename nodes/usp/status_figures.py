"""The figures of XDit+USP Status: the uses of a forward's time and of each GPU's memory, as lines and as a picture."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from ...distributed.client.pool import PoolStatus
from ...distributed.comm.timing import RankTimes
from ...distributed.protocol.reports import MemoryUse, WorkerStatus
from ..common.bar_chart import Chart, draw_charts
from ..common.drawing import BLUE, GREEN, GREY, ORANGE, PINK, RED, SKY, YELLOW

_TIMES = (("compute", GREEN), ("exchange", SKY), ("waiting", ORANGE))
_MEMORY = (
    ("weights", BLUE),
    ("activations", RED),
    ("kept keys and values", PINK),
    ("exchange buffers", SKY),
    ("torch's unused cache", YELLOW),
    ("CUDA and others", GREY),
    ("free", (52, 56, 64)),
)

_UNLIKE = 1.25
"""The status points out GPUs that compute longer than others by this factor; GPUs of one kind differ by up to 1.07."""


def forward_line(status: PoolStatus) -> str:
    """Say how long the last forward took as a whole."""
    if not status.times:
        return _no_times(status)
    return (
        f"last forward {status.last_forward_seconds:.3f} s, hop to the workers and back "
        f"{status.last_hop_seconds * 1000:.1f} ms"
    )


def attention_lines(status: PoolStatus) -> Iterator[str]:
    """Say how the last forwards computed self-attention, where a node asked for more than the model's own kernel."""
    count = status.attention
    if count is None:
        return
    use, forwards = count.last, count.sparse + count.dense
    if not use.chosen:
        yield f"attention: {use.dense}, as a node behind the loader asks"
        return
    blocks = f"in {use.sparse_blocks} of {use.blocks} blocks" if use.sparse_blocks else "dense"
    why = f" ({use.why_dense})" if use.why_dense else ""
    yield (
        f"self-attention (lossy): sparse with {use.chosen}; in the last forward {blocks}{why}, dense by {use.dense}; "
        f"{count.sparse} of the last {forwards} forwards sparse"
    )


def shares_lines(status: PoolStatus) -> Iterator[str]:
    """Say how unlike GPUs share a video, and which shares are better if some GPUs computed for much longer."""
    plan = status.settings.plan
    if plan.speeds:
        yield f"shares of the video: as {' to '.join(map(str, plan.speeds))}, by rank"
    computed = [times.compute for times in status.times]
    even = plan.sequence_ranks == plan.num_gpus and not status.exchanges  # patches are not shared out by speed
    if not even or status.settings.device != "cuda" or len(computed) < 2 or min(computed) <= 0:
        return
    if max(computed) > _UNLIKE * min(computed):
        speeds = [speed / own for speed, own in zip(plan.speeds or [1] * len(computed), computed, strict=True)]
        better = ", ".join(str(max(1, round(100 * speed / max(speeds)))) for speed in speeds)
        yield (
            f"rank {computed.index(max(computed))} computed {max(computed) / min(computed):.1f} times as long as rank "
            f"{computed.index(min(computed))}: if that stays so, set gpu_shares in XDit+USP Config to {better}"
        )


def worker_lines(status: PoolStatus, worker: WorkerStatus) -> Iterator[str]:
    """Say what one worker spent its time and its memory on in the last forward."""
    if worker.rank < len(status.times):
        yield f"  last forward: {_times_words(status.times[worker.rank])}"
    if worker.memory is not None:
        yield f"  {_memory_title(worker.memory, status.settings.device)}: {_memory_words(worker.memory)}"


def draw_status(status: PoolStatus, plan: str) -> torch.Tensor:
    """Draw a row of bars for the time of the last forward, and a row for memory.

    Args:
        plan: the degrees, in words.

    Returns:
        IMAGE [1, height, 1024, 3].
    """
    settings = status.settings
    workers = f"{settings.plan.num_gpus} workers on {settings.device}"
    if status.state != "ready":
        return draw_charts(f"{workers}: {status.state}", [Chart("They start with the next sampling step.")])
    charts = [_time_chart(status)]
    uses = [(worker.rank, worker.memory) for worker in status.workers if worker.memory is not None]
    if len(uses) == len(status.workers):
        charts.append(_memory_chart(uses, settings.device))
    return draw_charts(f"{workers}\n{plan}", charts)


def _time_chart(status: PoolStatus) -> Chart:
    if not status.times:
        return Chart("Time of the last forward", note=_no_times(status))
    return Chart(
        f"Time of the last forward: {status.last_forward_seconds:.3f} s",
        _TIMES,
        tuple((f"rank {rank}", (t.compute, t.exchange, t.waiting), "") for rank, t in enumerate(status.times)),
        seconds,
    )


def _memory_chart(uses: Sequence[tuple[int, MemoryUse]], device: str) -> Chart:
    return Chart(
        _memory_title(uses[0][1], device).capitalize(),
        _MEMORY,
        tuple((f"rank {rank}", _parts(use), f"of {size(use.total)}") for rank, use in uses),
        size,
        "The host's, as each worker sees it: to it the other workers are others." if device != "cuda" else "",
    )


def _no_times(status: PoolStatus) -> str:
    if status.failed:
        return "The last forward failed or was cancelled. The next one brings new figures."
    return "No forward yet."


def _memory_title(use: MemoryUse, device: str) -> str:
    if not use.measured:
        return "memory now"
    return "memory at the fullest moment of the last forward" if device == "cuda" else "memory after the last forward"


def _parts(use: MemoryUse) -> tuple[float, ...]:
    return (use.weights, use.activations, use.cache, use.peer_memory, use.unused, use.others, use.free)


def _times_words(times: RankTimes) -> str:
    def share(value: float) -> str:
        return f"{100 * value / times.total:.0f} %" if times.total else "0 %"

    kinds = ", ".join(f"{kind} {seconds(value)}" for kind, value in times.exchanges if value >= 5e-4)
    return (
        f"compute {seconds(times.compute)} ({share(times.compute)}), "
        f"exchange {seconds(times.exchange)} ({share(times.exchange)}{': ' if kinds else ''}{kinds}), "
        f"waiting {seconds(times.waiting)} ({share(times.waiting)})"
    )


def _memory_words(use: MemoryUse) -> str:
    parts = ", ".join(f"{name} {size(n)}" for (name, _), n in zip(_MEMORY, _parts(use), strict=True))
    return f"{parts}, of {size(use.total)}"


def seconds(value: float) -> str:
    """Write seconds, to the millisecond below 100."""
    return f"{value:.1f} s" if value >= 100 else f"{value:.3f} s"


def size(nbytes: float) -> str:
    """Write bytes in MiB or GiB."""
    if nbytes == 0:
        return "0"
    return f"{nbytes / 2**30:.1f} GiB" if nbytes >= 2**30 else f"{nbytes / 2**20:.1f} MiB"
