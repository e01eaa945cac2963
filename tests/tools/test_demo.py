"""The demo: what it writes, what it refuses, and that nothing of it stays behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from importlib import util
from pathlib import Path
from types import ModuleType

import pytest
import testkit
import torch
from testkit.processes import descendants, wait_until_gone

DEMO = testkit.ROOT / "tools" / "demo.py"


def command(*arguments: str) -> list[str]:
    return [sys.executable, str(DEMO), *arguments]


@pytest.fixture(scope="module")
def demo() -> Iterator[ModuleType]:
    """The program as a module, for runs in this process."""
    spec = util.spec_from_file_location("wan_parallel_demo", DEMO)
    module = sys.modules[spec.name] = util.module_from_spec(spec)
    spec.loader.exec_module(module)
    ended = signal.getsignal(signal.SIGTERM)
    yield module
    signal.signal(signal.SIGTERM, ended)


@pytest.fixture
def written(tmp_path: Path) -> Path:
    """The folder into which a demo on the CPU has written: that of DEMO_OUTPUT where .ci/run has just run one."""
    shown = Path(os.environ.get("DEMO_OUTPUT", tmp_path), "report.json")
    if shown.exists() and json.loads(shown.read_text(encoding="utf-8"))["device"] == "CPU":
        return shown.parent
    done = subprocess.run(
        command("--device", "cpu", "--out", str(tmp_path)), capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return tmp_path


@pytest.mark.timeout(300)  # two samplings of 20 steps, on a machine that may be busy
def test_the_demo_follows_its_prompt_agrees_with_one_worker_and_writes_what_it_did(written: Path) -> None:
    report = json.loads((written / "report.json").read_text(encoding="utf-8"))
    assert report["workers"] == 2
    assert report["torch"] == torch.__version__
    assert report["backend"] == "native"
    assert report["relative_diff_vs_one_worker"] <= report["relative_tolerance"] == 1e-5
    assert {"plan", "seconds_per_step", "max_abs_diff_vs_one_worker", "versions"} <= report.keys()
    assert report["prompt"] == "a red circle moves right over a blue background"
    assert report["seen_in_the_video"] == "red moves right over blue"
    assert report["weights"] == ["tiny_wan_t2v.safetensors", "tiny_wan_vae.safetensors"]
    assert (written / "frames.png").stat().st_size > 10_000
    video = next(path for path in (written / "video.mp4", written / "video.gif") if path.exists())
    assert video.stat().st_size > 5_000


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--device", "cpu", "--gpus", "9"), "num_gpus is 9"),
        (("--device", "cuda", "--gpus", "64"), "GPU"),
        (("--device", "cpu", "--out", str(DEMO)), "Choose another folder with --out."),
        (("--prompt", "a pink cat"), 'does not know "pink", "cat". Write a prompt such as'),
    ],
)
def test_what_the_user_can_put_right_is_said_without_a_traceback(
    demo: ModuleType, capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], words: str
) -> None:
    assert demo.main(list(arguments)) == 2
    said = capsys.readouterr().err
    assert words in said
    assert "Traceback" not in said


def test_ctrl_c_leaves_no_process_behind(ctrl_c_works: None, tmp_path: Path) -> None:
    demo = subprocess.Popen(
        command("--device", "cpu", "--steps", "1000", "--out", str(tmp_path)),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        deadline = time.monotonic() + 60
        while len(started := descendants(demo.pid)) < 3 and time.monotonic() < deadline:  # launcher, two workers
            time.sleep(0.1)
        demo.send_signal(signal.SIGINT)
        _, errors = demo.communicate(timeout=20)
    finally:
        demo.kill()
    assert len(started) >= 3
    assert demo.returncode == 130
    assert "Traceback" not in errors
    assert wait_until_gone(started, seconds=5) == set()
