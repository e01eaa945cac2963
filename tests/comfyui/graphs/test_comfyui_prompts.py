"""Ten prompts in a row through two experts, with ComfyUI's text encoder and VAE: no error, and no file read again."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import testkit

BENCHMARK = testkit.ROOT / "benchmarks" / "prompts.py"


@pytest.mark.timeout(300)
def test_ten_prompts_of_a_two_expert_graph_read_every_file_once(comfyui_dir, tmp_path):
    python = os.environ.get("COMFYUI_PYTHON", sys.executable)
    command = [python, str(BENCHMARK), "--comfyui", str(comfyui_dir), "--folder", str(tmp_path)]
    command += ["--tiny", "--cpu", "--res", "32x32x1", "--steps", "2", "--cfg", "1"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280)
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert done.returncode == 0, f"{rows[-1:]}\n{done.stderr[-3000:]}"
    assert [row["prompt"] for row in rows] == list(range(10))
    assert all(row["ok"] and row["finite"] for row in rows)
    assert all(row["again_gib"] < 0.002 for row in rows[1:])
    assert not list(tmp_path.iterdir())  # its files are gone
