"""Room on a GPU that workers and ComfyUI share, with a played GPU and played pools in ComfyUI's own code."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import testkit
from testkit import tiny

ROOT = testkit.ROOT
SCRIPT = ROOT / "tests" / "support" / "testkit" / "comfyui" / "inside" / "room_script.py"


@pytest.fixture(scope="module")
def result(comfyui_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> dict:
    checkpoint = tiny.write_checkpoint(tmp_path_factory.mktemp("room") / "tiny.safetensors")
    python = os.environ.get("COMFYUI_PYTHON", sys.executable)
    command = [python, "-s", str(SCRIPT), str(ROOT), checkpoint]
    done = subprocess.run(command, cwd=comfyui_dir, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_comfyui_frees_its_own_models_and_keeps_ours(result):
    outcome, freed, calls = result["first"]
    assert outcome == "ok"
    assert freed == [[1000, "cuda:0", 1]]
    assert calls == ["keep"]


def test_the_pool_of_another_config_ends(result):
    outcome, second, first = result["second"]
    assert outcome == "ok"
    assert second == ["keep"] and first[-1] == "close"


def test_out_of_memory_is_tried_once_more_without_the_other_models(result):
    assert result["retried"] == ["ok", ["keep", "aside"]]


def test_out_of_memory_with_nothing_left_to_free_is_reported_at_once(result):
    outcome, attempts = result["hopeless"]
    assert outcome == "OutOfMemory" and attempts <= 2


def test_unloading_all_models_reaches_the_pool(result):
    assert "unload" in result["freed"]


def test_what_the_workers_hold_is_shown_and_a_part_of_it_steps_out_when_it_is_asked_for(result):
    sizes, calls, still_there = result["little"]
    assert sizes == [1, 0, 2000, 2000, 2000, 1600]
    assert calls == [["out", [0, 1], 300], "trim"]
    assert still_there


def test_all_of_it_steps_out_when_more_than_that_is_asked_for(result):
    sizes, calls, still_there = result["all"]
    assert sizes[-2:] == [2000, 200]
    assert [call[0] for call in calls[:-1]] == ["out"] and calls[-1] == "trim"  # nothing is forgotten
    assert not still_there


def test_unload_models_outside_of_a_node_forgets_the_weights(result):
    _, calls, still_there = result["unload"]
    assert calls == ["unload", "trim"] and not still_there
