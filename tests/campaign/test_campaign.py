"""A short campaign of faults, and that a campaign notices what it is there to notice.

The long ones are run by hand: `python3 tests/campaign/faults.py --help`.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
import uuid
from dataclasses import replace
from pathlib import Path

import pytest
import testkit
from testkit.campaign import clients, drills, faults
from testkit.campaign.campaign import Campaign
from testkit.campaign.clients import Call, Client, Pace
from testkit.campaign.drills import DRILLS, Scene, Verdict
from testkit.campaign.drive_pool import PoolClient
from testkit.campaign.families import MARK, left_over, shared_files
from testkit.campaign.faults import Fault
from testkit.campaign.table import as_line, from_line, markdown, table
from testkit.campaign.worlds import filled

JOBS = ("ulysses", "lora", "decode")  # which have one pool
SEED, SHORT = 9, 6  # six kinds


@pytest.mark.timeout(400)
def test_some_faults_leave_a_pool_as_it_was(tmp_path):
    kinds = [kind for kind in faults.KINDS if kind not in faults.IN_A_WORLD]
    mark = uuid.uuid4().hex
    drawn = list(faults.draw(SEED, SHORT, JOBS, JOBS[:2], kinds))
    environment = dict(os.environ)
    verdicts = Campaign(PoolClient(tmp_path, mark), mark).run(drawn, lambda verdict: print(verdict))
    assert dict(os.environ) == environment
    assert [(str(verdict.fault), verdict.short) for verdict in verdicts if verdict.short] == []
    assert len(verdicts) == SHORT
    assert not left_over(mark, 0, 5)


# What is drawn.


def test_a_fault_is_drawn_by_its_seed_and_its_number():
    few, many = (list(faults.draw(7, count, JOBS, JOBS[:1])) for count in (20, 60))
    assert few == many[:20]
    assert few != list(faults.draw(8, 20, JOBS, JOBS[:1]))


def test_every_kind_comes_in_every_round_and_has_a_drill():
    a_round = len(faults.KINDS) + len(faults.OFTEN)
    for round_ in (0, 1):
        drawn = list(faults.draw(3, 2 * a_round, JOBS, JOBS[:1]))[round_ * a_round : (round_ + 1) * a_round]
        assert {fault.kind for fault in drawn} == set(faults.KINDS) == DRILLS.keys()
    assert {fault.job for fault in drawn if fault.kind == faults.FILE} == set(JOBS[:1])


# What is noticed.


class Scripted(Client):
    """A client without processes, whose calls end as a test says, by what was asked for; others never do."""

    place, jobs, pid, temp = "nowhere", JOBS, os.getpid(), Path("/proc/self/cwd")

    def __init__(self, ends: dict[str, tuple[str, str, str]]):
        self.ends = ends

    def begin(self, what: str) -> Call:
        call = Call(time.monotonic())
        if what in self.ends:
            call.end(*self.ends[what])
        return call

    def start(self, kind: str = "") -> None: ...

    def stop(self) -> None: ...

    def cancel(self, call: Call) -> None: ...

    def unload(self) -> None: ...

    def file_of(self, job: str) -> Path | None: ...

    def write_file(self, job: str, path: Path, seed: int) -> None: ...


FAULT = Fault(0, faults.POOL, "ulysses", faults.RUN, 1, 15, 0.5, 1.0, 1, faults.STATUS)


def after(ends: dict[str, tuple[str, str, str]], fault: Fault = FAULT) -> Scene:
    pace, digests = Pace(0.0, 0.0, 0.0), {("ulysses", clients.OLD): "right"}
    return Scene(Scripted(ends), fault, pace, digests, Verdict(fault))


def test_a_result_of_other_bits_is_noticed():
    scene = after({"ulysses": (clients.DONE, "", "wrong"), faults.STATUS: (clients.DONE, "", "")})
    DRILLS[faults.POOL](scene)
    assert scene.verdict.unequal and set(scene.verdict.short) == {"the result of ulysses is not bit-equal"}


def test_a_call_that_does_not_end_is_noticed(monkeypatch):
    monkeypatch.setattr("testkit.campaign.drills.RUN_SECONDS", 0.05)
    scene = after({})
    DRILLS[faults.POOL](scene)
    assert scene.verdict.hung


@pytest.mark.parametrize(
    ("told", "named"),
    [
        ("Worker rank 1 (pid 5) was ended by SIGTERM. Queue the prompt again.", True),
        ("Worker rank 0 (pid 5) was ended by SIGTERM. Queue the prompt again.", False),
        ("Worker rank 1 (pid 6) was ended by SIGTERM. Queue the prompt again.", False),
        ("Worker rank 1 (pid 5) was ended. Queue the prompt again.", False),
    ],
)
def test_a_message_must_name_the_rank_the_process_and_the_signal(monkeypatch, told, named):
    fault = replace(FAULT, kind=faults.SIGNAL)
    scene = after({"ulysses": (clients.FAILED, told, "")}, fault)
    monkeypatch.setattr(scene, "victim", lambda call: 5)
    monkeypatch.setattr(os, "kill", lambda pid, number: None)
    monkeypatch.setattr(drills, "wait_until_gone", lambda pids, seconds: set())
    DRILLS[faults.SIGNAL](scene)
    assert scene.verdict.unnamed is not named


def test_a_process_that_stays_is_noticed_whoever_its_parent_is():
    mark = uuid.uuid4().hex
    orphan = "import os, time; os.fork() and os._exit(0); time.sleep(60)"
    subprocess.run([sys.executable, "-c", orphan], env={**os.environ, MARK: mark}, check=True)
    left = left_over(mark, 0, 0.2)
    assert len(left) == 1
    os.kill(*left, 9)
    assert not left_over(mark, 0, 5)


def test_a_file_that_stays_in_shared_memory_is_noticed():
    name = f"campaign-{uuid.uuid4().hex}"
    path = Path("/dev/shm") / name
    path.touch()
    try:
        with path.open():
            assert shared_files({*os.listdir("/dev/shm")} - {name}, 0) == set()  # somebody's, who may use it yet
        assert name in shared_files({*os.listdir("/dev/shm")} - {name}, 0)
    finally:
        path.unlink()


def test_no_disk_of_the_machine_is_filled(tmp_path):
    with pytest.raises(RuntimeError, match="no small disk"), filled(os.getpid(), tmp_path):
        pass
    assert list(tmp_path.iterdir()) == []


# What is printed.


def test_the_table_counts_what_fell_short():
    fine, hung = Verdict(FAULT, seconds=1.0), Verdict(FAULT, seconds=2.0)
    hung.hang("ulysses")
    slow = Verdict(FAULT, seconds=1.5, short=["Cancel took 1.5 s"])
    rows = table([fine, hung, slow])
    assert [(row.kind, row.faults, row.ended, row.bit_equal, row.short, row.slowest) for row in rows] == [
        (faults.POOL, 3, 2, 3, 2, 2.0),
        ("all", 3, 2, 3, 2, 2.0),
    ]
    assert markdown([fine, hung, slow]).splitlines()[-1] == "| all | 3 | 2 | 3 | 3 | 3 | 2 | 2.0 |"


def test_a_line_of_results_is_read_as_it_was_written():
    verdict = Verdict(FAULT, "pool", told="Worker rank 1 (pid 5) was ended by SIGKILL.", seconds=0.3)
    verdict.leave("a process")
    assert from_line(as_line(verdict)) == verdict


def test_the_table_in_the_readme_counts_the_recorded_faults():
    lines = (testkit.ROOT / "benchmarks" / "results" / "faults.jsonl").read_text(encoding="utf-8").splitlines()
    assert len(lines) >= 50
    assert markdown([from_line(line) for line in lines]) in (testkit.ROOT / "README.md").read_text(encoding="utf-8")
