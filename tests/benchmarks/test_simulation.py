"""The promised caps, by a worker's own code on tensors without bytes, and that against what GPUs took."""

from __future__ import annotations

import json
import logging
import sys

import memory
import pytest
from benchlib.simulation import CUBLAS_BYTES, Simulated, simulate
from testkit.shared.guides import rows
from wan_parallel.distributed.plan.degrees import ParallelPlan
from wan_parallel.distributed.protocol.specs import ModelSpec, PoolSettings

GIB = 2**30
P480 = (21, 60, 104)


@pytest.fixture(autouse=True)
def quiet(caplog):
    """Not a line for each placement."""
    with caplog.at_level(logging.WARNING, logger="wan_parallel"):
        yield


def worker(size: str, gpus: int, cap: float, overlap: bool = True, **options: object) -> Simulated:
    settings = PoolSettings(ParallelPlan(gpus), device="cuda", overlap=overlap)
    return simulate(settings, ModelSpec(f"random:{size}", **options), P480, int(cap * GIB))


@pytest.mark.parametrize("gpus, measured", [(1, 30.02), (4, 27.71)])
def test_it_counts_what_h200s_took(gpus, measured):
    """14B at 480p, 2026-11-21: GiB that torch's allocator gave out at most, of which 26.62 are weights."""
    found = worker("14b", gpus, 130, overlap=False)
    assert found.peak == pytest.approx(measured * GIB, abs=0.05 * GIB)


@pytest.mark.parametrize("size, gpus, cap", [("14b", 4, 12), ("14b", 8, 6), ("1.3b", 8, 1)])
def test_the_tightest_cells_fit_as_the_guide_says(size, gpus, cap):
    found = worker(size, gpus, cap, slice_tokens=8192)
    shown = {row[0]: row for row in rows("Memory")}[f"{gpus} x {cap} GiB"]
    assert found.peak + found.exchange <= cap * GIB
    assert found.peak / GIB == pytest.approx(float(shown[3].split()[0]), rel=0.05, abs=0.06)
    assert (found.host > 0) == ("host memory" in shown[2])
    assert found.placement.startswith(f"1/{gpus} of each block")


def test_what_can_not_run_is_refused_with_what_is_missing():
    assert "are missing" in worker("1.3b", 8, 0.5).refusal


def test_a_part_of_a_divided_model_is_counted():
    plan = ParallelPlan(4, pipeline_parallel=2, tensor_parallel=2)
    spec = ModelSpec("random:1.3b", slice_tokens=8192)
    found = simulate(PoolSettings(plan, device="cuda"), spec, P480, 20 * GIB)
    assert found.weights == pytest.approx(0.7 * GIB, abs=0.05 * GIB) and found.peak < 3 * GIB + CUBLAS_BYTES


@pytest.mark.parametrize("gpus, cap", [("1", None), ("2", None), ("2", "0.7")])
def test_the_automatic_plan_is_simulated_under_its_cap(monkeypatch, capsys, gpus, cap):
    arguments = ["--simulate", "--auto", "--batch", "2", "--size", "1.3b", "--gpus", gpus, "--res", "2x16x16"]
    monkeypatch.setattr(sys, "argv", ["memory.py", *arguments, *(["--cap", cap] if cap else [])])
    status = memory.main()
    row = json.loads(capsys.readouterr().out)
    assert status == 0 and row["fits"] and row["auto"] and row["batch"] == 2
    assert row["allocated_gib"] <= row["cap_gib"]
    assert row["plan"] in row["reason"]
    assert ("of each block" in row["placement"]) == (cap is not None)


def test_a_cap_under_which_no_plan_fits_is_a_row_with_the_refusal(monkeypatch, capsys):
    arguments = ["--simulate", "--auto", "--size", "1.3b", "--gpus", "1", "--cap", "0.1", "--res", "2x16x16"]
    monkeypatch.setattr(sys, "argv", ["memory.py", *arguments])
    assert memory.main() == 1
    assert "missing" in json.loads(capsys.readouterr().out)["refusal"]
