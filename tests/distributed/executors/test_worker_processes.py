"""How the workers of a launcher start, and how their end is told: forked from a zygote on the CPU, else spawned."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
import testkit
from testkit import tiny
from testkit.processes import descendants, wait_until_gone
from wan_parallel.distributed.client.pool import Pool
from wan_parallel.distributed.executors import local
from wan_parallel.distributed.executors.worker_processes import AdoptedProcess
from wan_parallel.distributed.plan.degrees import ParallelPlan
from wan_parallel.distributed.protocol.pool_errors import WorkerDied
from wan_parallel.distributed.protocol.specs import PoolSettings

WITHOUT_FORKS = """
import sys
sys.path.insert(0, {root!r})
import bootstrap
bootstrap.load_pack()
if __name__ == "__main__":
    from wan_parallel.distributed.executors import launcher
    launcher.can_fork = lambda: False
    sys.exit(launcher.main(sys.argv[2]))
"""


def parent_of(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


def catches(pid: int, number: int) -> bool:
    """Whether the process has a handler of its own for a signal."""
    caught = next(line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith("SigCgt"))
    return bool(int(caught.split()[1], 16) >> (number - 1) & 1)


@pytest.fixture(params=["forked", "spawned"])
def pool(request, monkeypatch, tmp_path):
    if request.param == "spawned":
        program = tmp_path / "launcher.py"
        program.write_text(WITHOUT_FORKS.format(root=str(testkit.ROOT)))
        monkeypatch.setattr(local, "_BOOTSTRAP", program)
    pool = Pool(PoolSettings(ParallelPlan(2), device="cpu"))
    yield pool
    pool.close()


def test_workers_are_children_of_the_launcher_give_the_result_and_are_missed_by_rank_and_cause(pool, spec, model):
    given = tiny.inputs()
    assert tiny.relative_error(pool.forward(spec, *given), model(*given)) <= 2e-6
    everybody, victim = descendants(pool.launcher_pid), pool.worker_pids[1]
    assert {parent_of(pid) for pid in pool.worker_pids} == {pool.launcher_pid}
    assert all(pid in pool.worker_pids or "resource_tracker" in command(pid) for pid in everybody)
    assert not any(catches(pid, signal.SIGINT) for pid in pool.worker_pids)  # it would be told as status 1

    killed = []

    def kill() -> None:
        if not killed:
            killed.append(os.kill(victim, signal.SIGRTMIN + 6))

    with pytest.raises(WorkerDied, match=rf"rank 1 \(pid {victim}\) was ended by SIGRTMIN\+6"):
        while True:
            pool.forward(spec, *tiny.inputs(size=(6, 40, 40)), poll=kill)
    assert not wait_until_gone(everybody, 5)


def command(pid: int) -> str:
    return Path(f"/proc/{pid}/cmdline").read_text()


def test_the_end_of_a_process_that_another_has_forked_is_seen():
    for end, code in ((lambda pid: os._exit(3), 3), (lambda pid: os.kill(pid, signal.SIGKILL), -signal.SIGKILL)):
        ready, go = os.pipe()
        pid = os.fork()
        if pid == 0:
            os.read(ready, 1)
            end(os.getpid())
        process = AdoptedProcess(pid)
        assert process.exitcode is None
        process.join(0.01)
        assert process.exitcode is None
        os.write(go, b"x")
        process.join(10)
        assert process.exitcode == code
        process.kill()  # of a process that is no more
        for descriptor in (ready, go, process.sentinel):
            os.close(descriptor)
