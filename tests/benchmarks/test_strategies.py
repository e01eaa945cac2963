"""benchmarks/strategies.py on CPU workers: names of strategies, and what it prints."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import testkit
from wan_parallel.distributed.plan.degrees import ParallelPlan

PROGRAM = testkit.ROOT / "benchmarks" / "strategies.py"
from strategies import Strategy  # noqa: E402


@pytest.mark.parametrize(
    "name, sizes",
    [
        ("u4", {"ulysses_degree": 4}),
        ("d2u2", {"data_parallel": 2, "ulysses_degree": 2}),
        ("p2t2", {"pipeline_parallel": 2, "tensor_parallel": 2}),
        ("u2r2", {"ulysses_degree": 2, "ring_degree": 2}),
    ],
)
def test_a_short_name_has_the_sizes_by_their_letters(name, sizes):
    assert Strategy.of(name, 4) == Strategy(name, ParallelPlan(4, **sizes), False, ())


def test_words_can_be_combined_and_unknown_ones_are_refused():
    assert Strategy.of("t2,offload,shard", 4).switches == ("offload", "shard_weights")
    assert Strategy.of("auto", 4).auto
    with pytest.raises(ValueError, match="no strategy x2"):
        Strategy.of("x2", 4)


def test_it_prints_a_row_for_each_strategy_and_names_those_that_cannot_run(checkpoint):
    options = ["--model", checkpoint, "--size", "1.3b", "--res", "3x16x16", "--device", "cpu", "--precision", "fp32"]
    command = [sys.executable, str(PROGRAM), *options, "--gpus", "2", "--iters", "1", "--plans", "auto", "t4"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200)
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert [(row["strategy"], row["data"], row["batch"]) for row in rows] == [("auto", 2, 2)], done.stderr
    assert rows[0]["expected_s"] > 0 and rows[0]["link_gbps"] > 0 and rows[0]["finite"]
    assert "t4: tensor_parallel_size 4 does not divide" in done.stderr
