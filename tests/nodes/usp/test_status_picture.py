"""The picture and the lines of XDit+USP Status."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from wan_parallel.distributed.client.attention_count import AttentionCount
from wan_parallel.distributed.client.pool import PoolStatus
from wan_parallel.distributed.comm.timing import RankTimes
from wan_parallel.distributed.plan.degrees import ParallelPlan
from wan_parallel.distributed.protocol.reports import AttentionUse, MemoryUse, WorkerStatus
from wan_parallel.distributed.protocol.specs import PoolSettings
from wan_parallel.nodes.common.bar_chart import BAR, LEFT, RIGHT, ROW, WIDTH
from wan_parallel.nodes.common.drawing import BLUE, GREEN, GREY, ORANGE, PINK, RED, SKY, YELLOW
from wan_parallel.nodes.usp.status_figures import (
    attention_lines,
    draw_status,
    forward_line,
    shares_lines,
    worker_lines,
)

GIB = 2**30
SECONDS = 2.0
MEMORY = {BLUE: 26, RED: 18, PINK: 4, SKY: 1, YELLOW: 3, GREY: 8}  # of 80 GiB


def times(rank: int) -> RankTimes:
    waiting = 0.1 * rank
    return RankTimes(SECONDS - 0.3 - waiting, 0.3, waiting, (("all-to-all", 0.2), ("weights", 0.1)))


def worker(rank: int) -> WorkerStatus:
    memory = MemoryUse(*(n * GIB for n in MEMORY.values()), 80 * GIB, measured=True)
    return WorkerStatus(rank, 1, "NVIDIA H200", 0, 0, 0, True, (), memory=memory)


def status(ranks: int, **changes: object) -> PoolStatus:
    plan, numbers = ParallelPlan(ranks), range(ranks)
    whole = PoolStatus(
        "ready",
        PoolSettings(plan, "cuda"),
        workers=tuple(map(worker, numbers)),
        last_forward_seconds=SECONDS,
        times=tuple(map(times, numbers)),
    )
    return replace(whole, **changes)


def bars(picture: torch.Tensor) -> list[dict[tuple[int, ...], int]]:
    """Pixels of each colour in the lowest line of every bar, from top to bottom: no letters reach there."""
    pixels = (picture[0] * 255).round().int()[:, LEFT:RIGHT]
    inside = [y for y in range(len(pixels)) if all(tuple(pixels[y, x].tolist()) in (GREEN, BLUE) for x in range(0, 9))]
    lowest = [y for y in inside if y + 1 not in inside]
    found = []
    for y in lowest:
        colours, counts = pixels[y].unique(dim=0, return_counts=True)
        found.append({tuple(c): n for c, n in zip(colours.tolist(), counts.tolist(), strict=True)})
    return found


@pytest.mark.parametrize("ranks", [1, 2, 4, 8])
def test_each_gpu_has_a_bar_for_time_and_one_for_memory_whose_parts_are_in_proportion(ranks):
    picture = draw_status(status(ranks), "Ulysses 4")
    assert picture.shape[0] == 1 and picture.shape[2:] == (WIDTH, 3) and picture.dtype == torch.float32
    assert picture.min() >= 0 and picture.max() <= 1
    assert picture.shape[1] <= 320 + 2 * ranks * ROW
    found = bars(picture)
    assert len(found) == 2 * ranks
    width = RIGHT - LEFT
    for rank, bar in enumerate(found[:ranks]):
        expected = times(rank)
        parts = {GREEN: expected.compute, SKY: expected.exchange, ORANGE: expected.waiting}
        for colour, value in parts.items():
            assert bar.get(colour, 0) == pytest.approx(width * value / SECONDS, abs=1)
    for bar in found[ranks:]:
        for colour, gib in MEMORY.items():
            assert bar[colour] == pytest.approx(width * gib / 80, abs=1)
        assert sum(bar.values()) == width


def test_the_gpu_with_less_memory_has_the_shorter_bar():
    small = replace(worker(1), memory=replace(worker(1).memory, total=70 * GIB))
    large, bar = bars(draw_status(status(2, workers=(worker(0), small)), ""))[2:]
    assert large[BLUE] == bar[BLUE]
    free = {colour for colour in large if colour not in MEMORY}
    assert len(free) == 1
    assert bar[free.pop()] == pytest.approx((RIGHT - LEFT) / 8, abs=1)


@pytest.mark.parametrize("changes", [{}, {"failed": True}], ids=["before one", "after one that failed"])
def test_no_times_are_shown_where_no_forward_was_finished(changes):
    without = status(2, times=(), last_forward_seconds=0.0, **changes)
    assert len(bars(draw_status(without, ""))) == 2  # of memory
    line = forward_line(without)
    assert ("failed or was cancelled" in line) == bool(changes) and "0.000" not in line
    assert not [line for line in worker_lines(without, without.workers[0]) if "compute" in line]


@pytest.mark.parametrize("state", ["not started", "ended"])
def test_without_workers_the_picture_says_so(state):
    picture = draw_status(status(4, state=state, workers=(), times=()), "")
    assert picture.shape[2:] == (WIDTH, 3) and picture.shape[1] < 4 * BAR
    assert picture.max() > 0.9  # letters
    assert bars(picture) == []


def test_the_lines_say_what_the_bars_do():
    times_line, memory_line = worker_lines(status(2), worker(1))
    assert times_line == (
        "  last forward: compute 1.600 s (80 %), exchange 0.300 s (15 %: all-to-all 0.200 s, weights 0.100 s), "
        "waiting 0.100 s (5 %)"
    )
    assert memory_line == (
        "  memory at the fullest moment of the last forward: weights 26.0 GiB, activations 18.0 GiB, kept keys and "
        "values 4.0 GiB, exchange buffers 1.0 GiB, torch's unused cache 3.0 GiB, CUDA and others 8.0 GiB, "
        "free 20.0 GiB, of 80.0 GiB"
    )


def computing(*seconds: float) -> tuple[RankTimes, ...]:
    return tuple(RankTimes(own, 0.1, max(seconds) - own) for own in seconds)


def test_a_slower_gpu_is_pointed_out_with_the_shares_that_suit_it():
    (line,) = shares_lines(status(2, times=computing(1.2, 2.4)))
    assert line.startswith("rank 1 computed 2.0 times as long as rank 0")
    assert line.endswith("gpu_shares in XDit+USP Config to 100, 50")
    assert not list(shares_lines(status(3, times=computing(1.2, 1.3, 1.4))))


def test_shares_are_named_and_those_that_suit_are_counted_from_them():
    unlike = replace(status(2).settings, plan=ParallelPlan(2, speeds=(2, 1)))
    assert list(shares_lines(status(2, settings=unlike))) == ["shares of the video: as 2 to 1, by rank"]
    _, line = shares_lines(status(2, settings=unlike, times=computing(2.0, 1.0)))
    assert line.endswith("to 100, 100")


@pytest.mark.parametrize("sizes", [{"tensor_parallel": 2}, {"data_parallel": 2}, {"pipeline_parallel": 2}], ids=str)
def test_nothing_is_said_of_what_is_not_shared_by_speed(sizes):
    divided = replace(status(2).settings, plan=ParallelPlan(2, **sizes))
    assert not list(shares_lines(status(2, settings=divided, times=computing(1.0, 2.0))))
    on_cpu = replace(status(2).settings, device="cpu")
    assert not list(shares_lines(status(2, settings=on_cpu, times=computing(1.0, 2.0))))
    assert not list(shares_lines(status(2, times=())))


def test_the_status_says_whether_attention_was_sparse_and_why_not():
    assert list(attention_lines(status(1))) == []
    kept = "10 % of the key blocks exact"
    ran = AttentionUse("flash_attn_3", 38, 40, kept)
    (line,) = attention_lines(status(1, attention=AttentionCount(ran, 8, 2)))
    assert f"(lossy): sparse with {kept}; in the last forward in 38 of 40 blocks, dense by flash_attn_3" in line
    assert line.endswith("8 of the last 10 forwards sparse")
    waits = AttentionUse("flash_attn_3", 0, 40, kept, "sigma 0.95 is outside of 0 to 0.9")
    (line,) = attention_lines(status(1, attention=AttentionCount(waits, 0, 2)))
    assert "in the last forward dense (sigma 0.95 is outside of 0 to 0.9)" in line
    (line,) = attention_lines(status(1, attention=AttentionCount(AttentionUse("comfy_kitchen_int8", 0, 40))))
    assert "comfy_kitchen_int8, as a node behind the loader asks" in line
