"""Exchange through host memory, which two processes can try on one GPU: what arrives, and what if nothing does."""

from __future__ import annotations

import itertools
import time
from unittest import mock

import pytest
import testkit  # noqa: F401 (registers wan_parallel, also in the processes of the group)
import torch
import torch.distributed as dist
from testkit import gloo_group
from wan_parallel.distributed.comm import peer_memory_cuda
from wan_parallel.distributed.comm.peer_memory import Transfer
from wan_parallel.distributed.comm.peer_memory_cuda import PeerMemoryError, StagedPeerMemory

if not torch.cuda.is_available():
    pytest.skip("needs a CUDA GPU", allow_module_level=True)

RANKS, TURNS, ROWS, WIDTH = 2, 3, 5, 64
SECONDS = 3.0


@pytest.mark.timeout(120)
def test_letters_arrive_by_way_of_the_host(tmp_path):
    for rank, got in enumerate(gloo_group.run(RANKS, _send, tmp_path)):
        for turn, sender in itertools.product(range(TURNS), range(RANKS)):
            assert (got["arrived"][turn, sender] == _number(turn, sender, rank)).all()


@pytest.mark.timeout(120)
def test_a_driver_that_never_raises_a_flag_is_given_up_and_the_gpu_goes_on(tmp_path):
    for got in gloo_group.run(RANKS, _wait_in_vain, tmp_path):
        assert got["refused"] and got["seconds"] < 5 * SECONDS and got["sum"] == 6


def _open() -> StagedPeerMemory:
    """Both ranks on the first GPU."""
    torch.cuda.set_device(0)
    properties = torch.cuda.get_device_properties(0)
    with mock.patch.object(torch.cuda, "get_device_properties", lambda _rank: properties):
        return StagedPeerMemory(dist.group.WORLD, torch.device("cuda", 0))


def _send(rank: int, _world: int) -> gloo_group.Results:
    memory = _open()
    memory.reserve(RANKS * ROWS * WIDTH)
    arrived = []
    for turn in range(TURNS):
        mine = [torch.full((ROWS, WIDTH), _number(turn, rank, to), dtype=torch.uint8) for to in range(RANKS)]
        mine = torch.stack(mine).cuda()
        memory.hold(mine)
        memory.put([_transfer(to, of=to, at=rank) for to in range(RANKS)], mine)
        memory.wait_signal([_transfer(sender, of=0, at=sender) for sender in range(RANKS)])
        arrived.append(memory.own(0, (RANKS, ROWS, WIDTH), torch.uint8).cpu())
        dist.barrier()  # all have read it
    memory.close()
    return {"arrived": torch.stack(arrived)}


def _wait_in_vain(rank: int, _world: int) -> gloo_group.Results:
    started, refused = time.monotonic(), False
    lost = mock.patch.object(peer_memory_cuda.StreamMemory, "write", lambda *_words: None)
    with mock.patch.object(peer_memory_cuda, "_TRY_SECONDS", SECONDS):
        if rank == 0:  # whose signals all wait for, itself too
            lost.start()
        try:
            _open()
        except PeerMemoryError as error:
            refused = "did not arrive within" in str(error)
    torch.cuda.synchronize()
    seconds = time.monotonic() - started
    return {"refused": torch.tensor(refused), "seconds": torch.tensor(seconds), "sum": torch.ones(6).cuda().sum().cpu()}


def _number(turn: int, sender: int, receiver: int) -> int:
    return 100 * turn + 10 * sender + receiver


def _transfer(rank: int, of: int, at: int) -> Transfer:
    """Matrix `of` of what is sent, which lies at place `at` where it arrives."""
    size = ROWS * WIDTH
    return Transfer(rank, 0, (1, ROWS, WIDTH), of * size, (size, WIDTH), at * size, (size, WIDTH), at * size)
