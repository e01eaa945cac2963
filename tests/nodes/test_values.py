"""Values that only API callers and links bring: every input of every node refuses them in words, or allows them."""

from __future__ import annotations

import re
import subprocess
import sys

import testkit


def test_every_input_of_every_node_refuses_in_words_or_allows():
    folder = testkit.ROOT / "tests" / "support"
    command = [sys.executable, "-m", "testkit.hostile.hostile_values"]
    run = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr[-3000:]
    inputs, values = map(int, re.fullmatch(r"(\d+) inputs, (\d+) values\n", run.stdout).groups())
    assert inputs > 60 and values > 20 * inputs
