"""Which GPUs the ranks live on: as the user names them, of those that are there. Only the GPUs are made up."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from testkit.tiny import sentences
from wan_parallel.distributed.approximate.displaced_memory_estimate import capacity
from wan_parallel.distributed.client import pool as pools
from wan_parallel.distributed.executors.local import LocalExecutor
from wan_parallel.distributed.plan.degrees import ParallelPlan, PlanError
from wan_parallel.distributed.protocol.specs import PoolSettings

UUIDS = ("1234abcd-0000-0000-0000-000000000000", "12ff0000-0000-0000-0000-000000000001", "9abc0000-11", "77770000-3")


@pytest.fixture(autouse=True)
def four_gpus(monkeypatch):
    found = [SimpleNamespace(uuid=uuid, total_memory=(index + 1) << 30) for index, uuid in enumerate(UUIDS)]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(found))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: found[index])
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: f"Card {index}")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


def settings(*gpus: str, num_gpus: int = 2, device: str = "cuda") -> PoolSettings:
    return PoolSettings(ParallelPlan(num_gpus), device, gpus=gpus)


def devices(*gpus: str, num_gpus: int = 2) -> list[int]:
    executor = LocalExecutor()
    resolved = executor.resolve(settings(*gpus, num_gpus=num_gpus))
    return [at.device for at in executor.locations(resolved)]


@pytest.mark.parametrize(
    ("named", "expected"),
    [
        ((), [0, 1]),
        (("2", "3"), [2, 3]),
        (("3", "0"), [3, 0]),
        (("cuda:1", "2"), [1, 2]),
        (("GPU-9abc", "GPU-1234ABCD"), [2, 0]),
        ((f"GPU-{UUIDS[3]}", "1"), [3, 1]),
        (("MIG-7777", "1"), [3, 1]),
        (("1", "2", "3"), [1, 2]),
    ],
    ids=str,
)
def test_ranks_live_on_the_gpus_that_are_named_in_their_order(named, expected):
    assert devices(*named) == expected


@pytest.mark.parametrize(
    ("named", "said"),
    [
        (("4", "1"), "gpus names 4, which is no GPU that ComfyUI sees. Choose among 0 (Card 0, GPU-1234abcd), 1 (Card"),
        (("-1", "1"), "gpus has -1, which is neither an index nor a UUID"),
        (("one", "1"), "gpus has one, which is neither"),
        (("1", "9" * 5000), "which is no GPU that ComfyUI sees"),
        (("٣", "1"), "which is neither an index nor a UUID"),
        (("1", "1"), "gpus names GPU 1 twice (1, 1). Name each GPU once."),
        (("GPU-9abc", "cuda:2"), "gpus names GPU 2 twice (GPU-9abc, cuda:2)"),
        (("GPU-12", "1"), "GPU-12, which the UUIDs of GPUs 0 and 1 begin with. Write more of it."),
        (("GPU-ffff", "1"), "gpus names GPU-ffff, which is no GPU that ComfyUI sees. Choose among 0 (Card 0"),
        (("3",), "gpus names 1 GPU, and num_gpus is 2. Name 2, or set num_gpus to 1."),
    ],
    ids=lambda words: "".join(words)[:20],
)
def test_what_does_not_exist_is_double_or_too_few_is_refused_with_what_there_is(named, said):
    with pytest.raises(PlanError) as refusal:
        LocalExecutor().resolve(settings(*named))
    assert said in str(refusal.value) and sentences(str(refusal.value)) >= 2
    assert len(str(refusal.value)) < 400


def test_a_refusal_says_which_gpus_are_hidden(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-1234abcd,3,0,2")
    with pytest.raises(PlanError, match=r"CUDA_VISIBLE_DEVICES, .*, is GPU-1234abcd,3,0,2\)"):
        LocalExecutor().resolve(settings("7", "1"))


def test_indices_need_no_cuda_in_comfyuis_process(monkeypatch):
    for name in ("get_device_properties", "get_device_name"):
        monkeypatch.setattr(torch.cuda, name, lambda index: pytest.fail("CUDA would start"))
    assert devices("2", "0") == [2, 0]


def test_gpus_for_workers_on_the_cpu_are_refused():
    with pytest.raises(PlanError, match="gpus is 0,1, but the workers run on the CPU") as refusal:
        LocalExecutor().resolve(settings("0", "1", device="cpu"))
    assert sentences(str(refusal.value)) == 2


def test_pools_on_the_same_gpus_are_one_and_pools_on_others_are_not():
    first = pools.acquire(settings())
    assert pools.acquire(settings("0", "1")) is first and pools.acquire(settings("cuda:0", "GPU-12ff", "3")) is first
    assert pools.acquire(settings("1", "0")) is not first
    elsewhere = pools.acquire(settings("2", "GPU-7777"))
    assert elsewhere is pools.acquire(settings("GPU-9abc", "3")) and elsewhere is not first
    assert [at.device for at in elsewhere.locations] == [2, 3]


def test_memory_is_estimated_of_the_gpus_that_are_used():
    used = LocalExecutor().resolve(settings("3", "2"))
    assert capacity("cuda", used.gpu_indices, 0.5) == 3 << 29
