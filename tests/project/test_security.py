"""What SECURITY.md promises of the code and of the processes."""

from __future__ import annotations

import ast
import contextlib
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from testkit import ROOT
from testkit.processes import descendants
from wan_parallel.distributed.client.pool import Pool
from wan_parallel.distributed.plan.degrees import ParallelPlan
from wan_parallel.distributed.protocol.specs import PoolSettings
from wan_parallel.distributed.shm.arena import Arena

PAGE = (ROOT / "SECURITY.md").read_text(encoding="utf-8")
RUNS_WHAT_IT_READS = {"pickle", "cloudpickle", "dill", "marshal", "shelve", "joblib"}
CONNECTS = {"urllib", "http", "requests", "httpx", "aiohttp", "ftplib", "smtplib", "huggingface_hub"}
SHIPPED = [path for top in ("distributed", "wanvideo", "nodes") for path in sorted((ROOT / top).rglob("*.py"))]


def calls_and_imports(path: Path) -> Iterator[str]:
    for part in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(part, ast.Call):
            yield f"{ast.unparse(part.func)}()"
        elif isinstance(part, ast.Import):
            yield from (name.name.split(".")[0] for name in part.names)
        elif isinstance(part, ast.ImportFrom) and part.level == 0:
            yield (part.module or "").split(".")[0]


def test_nothing_that_is_read_is_run_and_nothing_calls_out():
    forbidden = RUNS_WHAT_IT_READS | CONNECTS | {"eval()", "exec()", "compile()", "torch.load()", "os.system()"}
    found = [
        (path.relative_to(ROOT), word) for path in SHIPPED for word in calls_and_imports(path) if word in forbidden
    ]
    assert len(SHIPPED) > 150 and not found


def test_every_variable_and_file_that_the_page_names_is_there():
    decided = (ROOT / "distributed" / "executors" / "network.py").read_text(encoding="utf-8")
    named = set(re.findall(r"`((?:GLOO|NCCL|TP|MASTER|TORCH)_[A-Z_]+[A-Z])`", PAGE)) - {"NCCL_CONF_FILE"}
    assert len(named) == 11 and [name for name in named if name not in decided] == []
    set_there = set(re.findall(r"\b((?:GLOO|NCCL|TP|MASTER|TORCH)_[A-Z_]+)\b", decided))
    assert set_there == named
    files = re.findall(r"`([\w/]+\.py)`", PAGE)
    assert files and [name for name in files if not (ROOT / name).exists()] == []


def test_holes_are_reported_where_the_project_lives():
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    home = re.search(r'Repository = "(.+)"', project)[1]
    assert re.findall(r"\((https://github\.com/[^)]+)\)", PAGE) == [f"{home}/security/advisories/new"]


def anonymous_memory(pid: int) -> Iterator[str]:
    for entry in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # the folder's own descriptor is gone again
            if "memfd:" in os.readlink(entry):
                yield str(entry)


READ = """
import sys
for path in sys.argv[1:]:
    try:
        open(path, "rb").close()
        print(path)
    except PermissionError:
        pass
"""


def test_no_other_user_opens_what_the_processes_share():
    if os.getuid() != 0 or shutil.which("setpriv") is None:
        pytest.skip("needs root, to become another user, and setpriv")
    pool, arena = Pool(PoolSettings(ParallelPlan(2), device="cpu")), Arena(4096)
    try:
        with pool.session():
            pass
        pids = (os.getpid(), pool.launcher_pid, *descendants(pool.launcher_pid))
        shared = [path for pid in pids for path in anonymous_memory(pid)]
        assert len(shared) >= 3  # an arena, the store, the cancel flag
        # Python may lie in root's home
        reads_all = [f"--{kind}-caps=-all,+dac_read_search" for kind in ("inh", "ambient")]
        nobody = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", *reads_all]
        command = [*nobody, sys.executable, "-c", READ]
        ran = subprocess.run([*command, *shared], capture_output=True, text=True, check=True)
        assert ran.stdout == ""
        ran = subprocess.run([sys.executable, "-c", READ, *shared], capture_output=True, text=True, check=True)
        assert ran.stdout.split() == shared  # the test would see it
    finally:
        pool.close()
        arena.close()
