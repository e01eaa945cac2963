"""What dies or is given up ends cleanly and soon, and the next forward is right.

`--repeat-faults 10` runs every test here ten times.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import json
import os
import random
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import testkit
import torch
from testkit import tiny
from testkit.processes import alive, cpu_seconds, descendants, open_files, wait_until_gone
from wan_parallel.distributed.client.failures import PoolError, WorkerDied
from wan_parallel.distributed.client.pool import Pool
from wan_parallel.distributed.plan.degrees import ParallelPlan
from wan_parallel.distributed.protocol.requests import LoadVAE
from wan_parallel.distributed.protocol.specs import ModelSpec, PoolSettings
from wan_parallel.distributed.shm.arena import Arena
from wan_parallel.distributed.shm.cancel import CancelBarrier, Cancelled, CancelMemory
from wan_parallel.wanvideo.base.config import WanConfig
from wan_parallel.wanvideo.model.model import WanModel

pytestmark = pytest.mark.usefixtures("repetition")

MANY_LAYERS = WanConfig(dim=256, ffn_dim=512, num_heads=2, num_layers=8, text_dim=64)
GONE_SECONDS = 5
CANCEL_SECONDS = 1


class Interrupted(BaseException):
    """As ComfyUI's, no Exception."""


def interrupt() -> None:
    raise Interrupted


@pytest.fixture(scope="module")
def many_layers(tmp_path_factory) -> ModelSpec:
    path = tmp_path_factory.mktemp("faults") / "many-layers.safetensors"
    return ModelSpec(tiny.write_checkpoint(path, MANY_LAYERS), "fp32", "fp32")


@pytest.fixture(scope="module")
def long(own_pool, many_layers) -> tuple[tiny.Inputs, float]:
    """Inputs whose forward takes about a second or more on this machine, and how long it takes."""
    for frames in (2, 4, 8, 16, 32, 64):
        given = tiny.inputs(MANY_LAYERS, (frames, 40, 40))
        own_pool.forward(many_layers, *given)
        seconds = own_pool.status().last_forward_seconds
        if seconds > 0.8:
            break
    return given, seconds


@pytest.fixture(scope="module")
def right(many_layers) -> Callable[[Pool], None]:
    """Checks that a forward of the pool is right, and that it stays so."""
    given = tiny.inputs(MANY_LAYERS, batch=2)
    expected = WanModel.from_checkpoint(many_layers.path)(*given)

    def check(pool: Pool) -> None:
        for _ in range(2):
            assert tiny.relative_error(pool.forward(many_layers, *given), expected) <= 2e-6

    return check


def everybody(pool: Pool) -> set[int]:
    return {pool.launcher_pid, *descendants(pool.launcher_pid)}


# Death of a worker or the launcher.


def test_the_death_of_a_worker_fails_the_forward_by_rank_and_cause(own_pool, many_layers, long, right):
    right(own_pool)
    before, victim, killed = everybody(own_pool), own_pool.worker_pids[1], []

    def kill() -> None:
        if not killed:
            killed.append(time.monotonic())
            os.kill(victim, signal.SIGKILL)

    with pytest.raises(WorkerDied, match=rf"rank 1 \(pid {victim}\) was ended by SIGKILL") as death:
        own_pool.forward(many_layers, *long[0], poll=kill)
    assert time.monotonic() - killed[0] < GONE_SECONDS
    assert tiny.sentences(str(death.value)) == 2
    assert not wait_until_gone(before, GONE_SECONDS)
    right(own_pool)
    assert before.isdisjoint(everybody(own_pool))


def test_the_death_of_the_launcher_fails_the_forward_and_ends_the_workers(own_pool, many_layers, long, right):
    right(own_pool)
    before, killed = everybody(own_pool), []

    def kill() -> None:
        if not killed:
            killed.append(time.monotonic())
            os.kill(own_pool.launcher_pid, signal.SIGKILL)

    with pytest.raises(WorkerDied, match=r"launcher .* was ended by SIGKILL") as death:
        own_pool.forward(many_layers, *long[0], poll=kill)
    assert time.monotonic() - killed[0] < GONE_SECONDS
    assert tiny.sentences(str(death.value)) == 2
    assert not wait_until_gone(before, GONE_SECONDS - (time.monotonic() - killed[0]))
    right(own_pool)


@pytest.mark.parametrize("victim", ["zygote", "worker", "launcher", "launcher beside the zygote"])
def test_a_death_during_the_start_is_told_and_the_next_start_works(victim, right):
    pool, killed, everyone = Pool(PoolSettings(ParallelPlan(2), device="cpu")), [], set()
    zygotes = []

    def kill() -> None:
        children = descendants(pool.launcher_pid)
        everyone.update(children | {pool.launcher_pid})
        python = sorted(pid for pid in children if "spawn_main" in Path(f"/proc/{pid}/cmdline").read_text())
        zygotes.extend(python[:1] if not zygotes else [])
        workers = [pid for pid in python if pid not in zygotes]
        present = zygotes if "zygote" in victim else workers[1:]
        if not killed and present:
            killed.append(time.monotonic())
            os.kill(pool.launcher_pid if "launcher" in victim else present[0], signal.SIGKILL)

    with pytest.raises(WorkerDied, match="SIGKILL"):
        pool.ensure_ready(ModelSpec("random:1.3b"), poll=kill)
    assert time.monotonic() - killed[0] < GONE_SECONDS
    assert not wait_until_gone(everyone, GONE_SECONDS - (time.monotonic() - killed[0]))
    right(pool)
    pool.close()


def test_a_rank_that_fails_alone_ends_the_pool_with_its_error(own_pool, many_layers, long, right):
    right(own_pool)
    worker = own_pool.worker_pids[1]
    pages = int(Path(f"/proc/{worker}/statm").read_text().split()[0])
    limit = (pages + 100) * resource.getpagesize()
    resource.prlimit(worker, resource.RLIMIT_AS, (limit, resource.RLIM_INFINITY))  # no memory for this latent
    started = time.monotonic()
    with pytest.raises(PoolError, match=r"(?i)rank 1") as failure:
        own_pool.forward(many_layers, *long[0])
    assert time.monotonic() - started < GONE_SECONDS + long[1]
    assert "memory" in str(failure.value)
    right(own_pool)


def test_an_error_on_all_ranks_leaves_the_workers_as_they_were(own_pool, many_layers, right):
    right(own_pool)
    pids = own_pool.worker_pids
    told = own_pool.models._told
    told[replace(many_layers, slice_tokens=5)] = told[many_layers]  # the workers have no such model
    with pytest.raises(PoolError):
        own_pool.forward(replace(many_layers, slice_tokens=5), *tiny.inputs(MANY_LAYERS))
    right(own_pool)
    assert own_pool.worker_pids == pids


def test_a_refusal_of_one_rank_alone_ends_no_pool_where_the_others_do_not_wait_for_it(own_pool, many_layers, right):
    right(own_pool)
    pids, arena = own_pool.worker_pids, Arena(2**24)
    weights = {"decoder.weight": arena.allocate(torch.float32, (2**22,))}
    pages = int(Path(f"/proc/{pids[0]}/statm").read_text().split()[0])
    limit = pages * resource.getpagesize()
    unlimited = resource.prlimit(pids[0], resource.RLIMIT_AS, (limit, resource.RLIM_INFINITY))  # no arena
    with standing_still(pids[1]), pytest.raises(PoolError, match="Worker rank 0 failed with"):
        own_pool.ask(lambda number: LoadVAE(number, "vae", "vae-decoder", "fp32", arena.ref, weights), (arena,))
    resource.prlimit(pids[0], resource.RLIMIT_AS, unlimited)
    right(own_pool)
    assert own_pool.worker_pids == pids


# Cancel.


def test_cancel_returns_at_once_and_the_workers_drop_the_forward(own_pool, many_layers, long, right):
    right(own_pool)
    pids, given = own_pool.worker_pids, long[0]
    before = cpu_seconds(pids)
    own_pool.forward(many_layers, *given)
    right(own_pool)
    whole = cpu_seconds(pids) - before
    for _ in range(3):
        started, before = time.monotonic(), cpu_seconds(pids)
        with pytest.raises(Interrupted):
            own_pool.forward(many_layers, *given, poll=interrupt)
        assert time.monotonic() - started < CANCEL_SECONDS
        right(own_pool)
        assert cpu_seconds(pids) - before < 0.8 * whole  # it was not worked through to its end
    assert own_pool.worker_pids == pids


def test_cancel_after_cancel_after_cancel_is_right_in_the_end(own_pool, many_layers, long, right):
    pids = own_pool.worker_pids
    for _ in range(5):
        with pytest.raises(Interrupted):
            own_pool.forward(many_layers, *long[0], poll=interrupt)
    right(own_pool)
    assert own_pool.worker_pids == pids


def test_poll_is_called_ten_times_a_second(own_pool, many_layers, long):
    calls = [time.monotonic()]
    own_pool.forward(many_layers, *long[0], poll=lambda: calls.append(time.monotonic()))
    seconds = time.monotonic() - calls[0]  # of this forward: another one may take twice as long beside others' work
    assert len(calls) >= 0.8 * seconds / 0.1 / 2
    assert sorted(b - a for a, b in itertools.pairwise(calls))[len(calls) // 2] < 0.15


def test_cancel_between_groups_that_share_a_batch_is_right(pool_of, many_layers, long, right):
    pool, (given, _) = pool_of(4, data_parallel=2), long
    right(pool)
    pids = pool.worker_pids
    two = tiny.Inputs(*(torch.cat([part, part]) for part in given))
    for _ in range(2):
        with pytest.raises(Interrupted):
            pool.forward(many_layers, *two, poll=interrupt)
        right(pool)
    assert pool.worker_pids == pids


def test_cancel_during_a_load_is_right(own_pool, many_layers, right):
    right(own_pool)
    own_pool.unload()
    pids = own_pool.worker_pids
    os.kill(pids[1], signal.SIGSTOP)  # a load that takes long
    started = time.monotonic()
    with pytest.raises(Interrupted):
        own_pool.forward(many_layers, *tiny.inputs(MANY_LAYERS), poll=interrupt)
    assert time.monotonic() - started < CANCEL_SECONDS
    threading.Timer(0.3, os.kill, (pids[1], signal.SIGCONT)).start()
    right(own_pool)
    assert own_pool.worker_pids == pids


@contextlib.contextmanager
def standing_still(pid: int) -> Iterator[None]:
    """A worker that is slow to answer: for the block, or for three seconds where the client waits for it."""
    os.kill(pid, signal.SIGSTOP)
    goes_on = threading.Timer(3, os.kill, (pid, signal.SIGCONT))
    goes_on.start()
    try:
        yield
    finally:
        goes_on.cancel()
        os.kill(pid, signal.SIGCONT)


def test_cancel_while_the_workers_tidy_up_is_right(own_pool, many_layers, long, right):
    right(own_pool)
    pids = own_pool.worker_pids
    with pytest.raises(Interrupted):
        own_pool.forward(many_layers, *long[0], poll=interrupt)
    for _ in range(2):  # the second time after one that was given up itself
        own_pool.status()  # they have answered, and the next forward begins with tidying up
        with standing_still(pids[1]):
            started = time.monotonic()
            with pytest.raises(Interrupted):
                own_pool.forward(many_layers, *tiny.inputs(MANY_LAYERS), poll=interrupt)
            assert time.monotonic() - started < CANCEL_SECONDS
    right(own_pool)
    assert own_pool.worker_pids == pids


def test_cancel_while_a_model_makes_room_is_right(own_pool, many_layers, right):
    right(own_pool)
    pids, leaving, coming = own_pool.worker_pids, *(replace(many_layers, slice_tokens=n) for n in (6, 7))
    own_pool.models.keep(leaving)
    own_pool.ensure_ready(leaving)
    own_pool.models.drop(leaving)
    with standing_still(pids[1]):
        started = time.monotonic()
        with pytest.raises(Interrupted):
            own_pool.ensure_ready(coming, poll=interrupt)
        assert time.monotonic() - started < CANCEL_SECONDS
    own_pool.ensure_ready(coming)
    own_pool.unload(coming)
    right(own_pool)
    assert own_pool.worker_pids == pids


def test_cancel_while_a_slow_worker_tells_its_status_or_lets_weights_out_is_right(own_pool, many_layers, right):
    own_pool.unload()
    right(own_pool)
    pids, other = own_pool.worker_pids, replace(many_layers, slice_tokens=8)
    for wait in (own_pool.status, functools.partial(own_pool.offload_others, other)):
        with standing_still(pids[1]):
            started = time.monotonic()
            with pytest.raises(Interrupted):
                wait(poll=interrupt)
            assert time.monotonic() - started < CANCEL_SECONDS
        assert own_pool.status().state == "ready"
    now, whole = own_pool.models.held(many_layers, range(2))
    assert now < whole  # they left all the same
    right(own_pool)
    assert own_pool.models.held(many_layers, range(2)) == (whole, whole)
    assert own_pool.worker_pids == pids


def test_cancel_during_the_start_is_right(right):
    pool = Pool(PoolSettings(ParallelPlan(1), device="cpu"))
    with pytest.raises(Interrupted):
        pool.ensure_ready(ModelSpec("random:1.3b"), poll=interrupt)
    launcher = pool.launcher_pid
    right(pool)
    assert pool.launcher_pid == launcher
    pool.close()


def test_all_ranks_of_a_group_leave_at_the_same_block():
    memory, rng = CancelMemory(4), random.Random(0)
    barriers = [CancelBarrier(memory.path) for _ in range(4)]
    leaders = [0, 0, 2, 2]  # two groups

    def work(rank: int, request: int, left_at: list[int]) -> None:
        pauses = random.Random(100 * request + rank)
        barriers[rank].begin(request)
        for block in range(30):
            try:
                barriers[rank].check(rank, leaders[rank])
            except Cancelled:
                left_at[rank] = block
                return
            time.sleep(pauses.random() * 4e-4)

    places = []
    for request in range(1, 41):
        left_at = [-1] * 4
        ranks = [threading.Thread(target=work, args=(rank, request, left_at)) for rank in range(4)]
        for rank in ranks:
            rank.start()
        time.sleep(rng.random() * 8e-3)
        memory.cancel(request)
        for rank in ranks:
            rank.join(10)
            assert not rank.is_alive()
        assert left_at[0] == left_at[1] and left_at[2] == left_at[3]
        places += left_at
    assert len(set(places)) > 3  # at the first, in the middle, never


# Death of the client.


class Client:
    """A process that uses a pool of two workers; see pool_client.py."""

    def __init__(self, checkpoint: str, mode: str, folder: Path):
        self.temp = folder / "tmp"
        self.temp.mkdir()
        self.log = folder / "log"
        with open(self.log, "wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "testkit.pool_client", checkpoint, "2", mode],
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env={**os.environ, "TMPDIR": str(self.temp), "PYTHONPATH": str(testkit.ROOT / "tests" / "support")},
            )
        line = self.process.stdout.readline()
        assert line, self.log.read_text()
        self.said = json.loads(line)
        if mode == "starting":
            time.sleep(0.5)  # let the workers begin to import
        self.pool = {self.said["launcher"], *descendants(self.said["launcher"])}
        self.files = {
            name
            for pid in self.pool
            for name in open_files(pid)
            if name.startswith(("/tmp/", "/dev/shm/", str(self.temp)))
            and not name.startswith((str(testkit.ROOT), sys.prefix))  # a checkout in /tmp
            and name not in (str(self.log), checkpoint)
        }


@pytest.fixture
def client_of(many_layers, tmp_path):
    clients = []

    def start(mode: str) -> Client:
        clients.append(Client(many_layers.path, mode, tmp_path))
        return clients[-1]

    yield start
    for client in clients:
        client.process.kill()
        client.process.wait()
        client.process.stdout.close()
        for pid in client.pool:  # none, unless the test failed
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


@pytest.mark.parametrize("mode", ["idle", "busy", "starting", "forked"])
def test_when_the_client_is_killed_nothing_of_the_pool_is_left(client_of, mode):
    client = client_of(mode)
    assert all(alive(pid) for pid in client.pool)
    assert mode == "starting" or set(client.said["workers"]) <= client.pool
    client.process.kill()
    client.process.wait()
    try:
        assert not wait_until_gone(client.pool, GONE_SECONDS)
    finally:
        if mode == "forked":  # it holds what the client had open, as a data loader of another node might
            os.kill(client.said["child"], signal.SIGKILL)
    assert list(client.temp.iterdir()) == []
    assert [name for name in client.files if Path(name).exists()] == []


@pytest.mark.parametrize("end", [signal.SIGTERM, signal.SIGINT])
def test_when_the_client_is_asked_to_end_the_pool_ends_with_it(ctrl_c_works, client_of, end):
    client = client_of("busy")
    client.process.send_signal(end)
    client.process.wait(10)
    assert not wait_until_gone(client.pool, GONE_SECONDS)


@pytest.mark.parametrize("launcher_is_stopped", [False, True])
def test_a_client_that_ends_while_a_thread_waits_ends_the_pool_without_a_word(client_of, launcher_is_stopped):
    client = client_of("leaving")
    if launcher_is_stopped:
        os.kill(client.said["launcher"], signal.SIGSTOP)
    client.process.send_signal(signal.SIGUSR1)
    assert client.process.wait(10) == 0
    assert not wait_until_gone(client.pool, GONE_SECONDS)
    assert "Traceback" not in client.log.read_text()


def test_a_worker_that_hangs_does_not_outlive_the_client(client_of):
    client = client_of("idle")
    os.kill(client.said["workers"][0], signal.SIGSTOP)
    client.process.kill()
    client.process.wait()
    assert not wait_until_gone(client.pool, GONE_SECONDS)
