"""A start that fails for something that the machine lacks says what it is in the message, not only on the console."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
import testkit
from testkit.processes import descendants, wait_until_gone
from testkit.tiny import sentences
from wan_parallel.distributed.client.pool import Pool
from wan_parallel.distributed.executors import exits, local
from wan_parallel.distributed.executors.console import Console
from wan_parallel.distributed.plan.degrees import ParallelPlan
from wan_parallel.distributed.protocol.pool_errors import Failure, PoolError, WorkerDied
from wan_parallel.distributed.protocol.specs import PoolSettings

LIMITED = """
import resource, sys
resource.setrlimit(resource.RLIMIT_{name}, ({value}, resource.getrlimit(resource.RLIMIT_{name})[1]))
sys.path.insert(0, {root!r})
import bootstrap
bootstrap.load_pack()
if __name__ == "__main__":
    from wan_parallel.distributed.executors import launcher
    sys.exit(launcher.main(sys.argv[2]))
"""
FORKS_ONCE = """
import errno, os, sys
fork, forked = os.fork, []
def fork_once():
    if forked:
        raise OSError(errno.EAGAIN, os.strerror(errno.EAGAIN))
    forked.append(pid := fork())
    return pid
os.fork = fork_once
sys.path.insert(0, {root!r})
import bootstrap
bootstrap.load_pack()
if __name__ == "__main__":
    from wan_parallel.distributed.executors import launcher
    sys.exit(launcher.main(sys.argv[2]))
"""
NOBODY = ["--reuid=65534", "--regid=65534", "--clear-groups"]
READS_ALL = [f"--{kind}-caps=-all,+dac_read_search" for kind in ("inh", "ambient")]  # Python may lie in root's home
SUPPORT = str(Path(testkit.__file__).parents[1])


def client(checkpoint: str, *before: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """A client of two workers that ends when it has the result, in an interpreter that `before` starts."""
    return subprocess.run(
        [*before, sys.executable, "-m", "testkit.pool_client", checkpoint, "2", "once"],
        env=os.environ | {"PYTHONPATH": SUPPORT, "OMP_NUM_THREADS": "1"} | environment,
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.mark.parametrize(
    ("name", "value", "cause", "remedy"),
    [
        ("NOFILE", 16, "Too many open files", "ulimit -n"),
        ("AS", 100_000_000, "failed to map segment", "more memory"),
        ("FSIZE", 0, "File too large", "ulimit -f"),
    ],
)
def test_what_the_launcher_and_its_children_lack_is_in_the_message(monkeypatch, tmp_path, name, value, cause, remedy):
    program = tmp_path / "launcher.py"
    program.write_text(LIMITED.format(root=str(testkit.ROOT), name=name, value=value))
    monkeypatch.setattr(local, "_BOOTSTRAP", program)
    pool = Pool(PoolSettings(ParallelPlan(2), device="cpu"))
    with pytest.raises(exits.StartError) as refusal, pool.session():
        pass
    assert cause in str(refusal.value) and remedy in str(refusal.value) and sentences(str(refusal.value)) >= 2
    assert "Queue the prompt again" not in str(refusal.value)  # which would not help
    assert not pool.alive


def test_few_open_files_are_named_with_their_number(checkpoint):
    ended = client(checkpoint, "sh", "-c", 'ulimit -n 16; exec "$@"', "sh")
    said = ended.stderr.splitlines()[-1]
    assert "Too many open files" in said and "A process may have 16 open files here (ulimit -n)" in said


@pytest.mark.parametrize("limit", [3, 8])  # for the launcher; for the workers
def test_few_processes_are_named_with_their_number(checkpoint, limit):
    if os.getuid() != 0 or shutil.which("setpriv") is None:
        pytest.skip("needs root, to count the processes of a user who has no others, and setpriv")
    ended = client(checkpoint, "setpriv", *NOBODY, *READS_ALL, "prlimit", f"--nproc={limit}:{limit}")
    assert f"for this user, who may have {limit} (ulimit -u)" in ended.stderr.splitlines()[-1]


def test_one_worker_of_two_that_starts_keeps_nobody_waiting(monkeypatch, tmp_path):
    program = tmp_path / "launcher.py"
    program.write_text(FORKS_ONCE.format(root=str(testkit.ROOT)))
    monkeypatch.setattr(local, "_BOOTSTRAP", program)
    pool, everybody, deadline = Pool(PoolSettings(ParallelPlan(2), device="cpu")), set(), time.monotonic() + 60

    def poll() -> None:
        everybody.update(descendants(pool.launcher_pid))
        assert time.monotonic() < deadline, "the start hangs"

    with pytest.raises(exits.StartError, match="Resource temporarily unavailable"), pool.session(poll):
        pass
    assert everybody and not wait_until_gone(everybody, 5)


def test_nobody_with_full_folders_and_a_home_that_is_read_only_gets_results(checkpoint, tmp_path):
    if os.getuid() != 0 or shutil.which("setpriv") is None:
        pytest.skip("needs root, to mount folders and to become another user, and setpriv")
    for name in ("tmp", "home"):
        (tmp_path / name).mkdir()
    script = f"""
        for folder in /dev/shm {tmp_path}/tmp; do
            mount -t tmpfs -o size=64k full $folder || exit 77
            head -c 65536 /dev/zero > $folder/all
        done
        mount -t tmpfs -o ro home {tmp_path}/home
        exec setpriv {" ".join((*NOBODY, *READS_ALL))} "$@"
    """
    folders = {"TMPDIR": f"{tmp_path}/tmp", "HOME": f"{tmp_path}/home"}
    ended = client(checkpoint, "unshare", "-m", "sh", "-c", script, "sh", **folders)
    if ended.returncode == 77:
        pytest.skip("this machine lets root mount nothing")
    assert ended.returncode == 0 and '"sum"' in ended.stdout, ended.stderr


def test_a_client_that_can_start_nothing_says_so(monkeypatch):
    def refused(*_arguments: object, **_options: object) -> None:
        raise OSError(errno.EAGAIN, os.strerror(errno.EAGAIN))

    pool = Pool(PoolSettings(ParallelPlan(1), device="cpu"))
    monkeypatch.setattr(subprocess, "Popen", refused)
    with pytest.raises(exits.StartError, match=r"cannot be started: .*\. The system starts no more processes"):
        pool.session().__enter__()
    monkeypatch.undo()
    with pool.session():
        assert len(pool.worker_pids) == 1
    everybody = descendants(os.getpid()) & {pool.launcher_pid, *pool.worker_pids}
    pool.close()
    assert everybody and not wait_until_gone(everybody, 5)


@pytest.mark.parametrize("number", range(1, 65))
def test_every_signal_has_a_name(number):
    death = exits.death_of("Worker rank 1", 7, -number)
    assert str(death).startswith("Worker rank 1 (pid 7) was ended by ") and sentences(str(death)) == 1
    assert exits.signal_name(int(signal.SIGRTMIN) + 6) == "SIGRTMIN+6"
    assert exits.signal_name(signal.SIGTERM) == "SIGTERM"


def test_the_last_words_of_a_process_that_a_library_ended_are_in_the_message():
    aborted = exits.deaths([exits.death_of("Worker rank 0", 7, -signal.SIGABRT)])
    told = exits.with_cause(aborted, ["loading", "terminate called: no such kernel"], starting=False)
    assert told.text == (
        'Worker rank 0 (pid 7) was ended by SIGABRT. Last on the console: "terminate called: no such kernel".'
    )
    assert isinstance(told.for_the_user(), WorkerDied)


def test_words_of_others_are_not_taken_for_the_cause():
    killed = exits.deaths([exits.death_of("Worker rank 0", 7, -signal.SIGKILL)])
    assert exits.with_cause(killed, ["OSError: Too many open files"], starting=True) == killed
    refused = Failure.of(PoolError("Too many open files are not the matter. Do something else."))
    assert exits.with_cause(refused, [], starting=True) == refused


@pytest.mark.parametrize(
    ("words", "remedy"),
    [
        ("RuntimeError: can't start new thread", "ulimit -u"),
        ("[enforce fail] std::bad_alloc", "memory"),
        ("Error while creating shared memory segment /dev/shm/nccl-x: No space left on device (28)", "/dev/shm "),
        ("OSError: [Errno 30] Read-only file system: '/home/x/.triton'", "TMPDIR and HOME"),
    ],
)
def test_what_libraries_say_is_understood(words, remedy):
    told = exits.with_cause(Failure(f"Rank 0 could not start: {words}", ("RuntimeError",), False), [], starting=True)
    assert remedy in told.text and sentences(told.text) >= 2
    assert isinstance(told.for_the_user(), exits.StartError)


def test_a_disk_without_room_for_any_temporary_file_is_told_all_the_same(monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", None)
    monkeypatch.setattr(tempfile, "_candidate_tempdir_list", list)
    assert "Free space on this machine" in exits.remedy_of("OSError: [Errno 28] No space left on device")
    assert "The workers write temporary files to" in exits.remedy_of("[Errno 30] Read-only file system: '/tmp/x'")


def test_what_processes_write_reaches_the_console_and_its_last_lines_are_kept(capfd):
    console = Console()
    for text in (b"first\n[WanParallel rank 0] Loading.\nhal", b"f a line\n", b"x" * 10**6, b"\nlast"):
        os.write(console.descriptor, text)
    console.given()
    lines = console.last_lines(5)
    assert lines[:2] == ["first", "half a line"] and lines[-1] == "last" and len(lines) == 4
    assert len(lines[2]) == 300
    assert capfd.readouterr().err == "first\n[WanParallel rank 0] Loading.\nhalf a line\n" + "x" * 10**6 + "\nlast"
