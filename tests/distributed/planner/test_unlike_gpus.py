"""GPUs of different kinds in one pool: what one of them cannot do is refused by all, in its words."""

from __future__ import annotations

from unittest import mock

import pytest
import testkit  # noqa: F401 (registers wan_parallel, also in the processes of the group)
import torch
from testkit import gloo_group, tiny
from wan_parallel.distributed.client.failures import error_among
from wan_parallel.distributed.plan.degrees import ParallelPlan
from wan_parallel.distributed.protocol.messages import decode, encode
from wan_parallel.distributed.protocol.replies import Reply
from wan_parallel.distributed.protocol.requests import Load
from wan_parallel.distributed.protocol.specs import ModelSpec, PoolSettings, on_one_host
from wan_parallel.distributed.shm.cancel import CancelBarrier, CancelMemory
from wan_parallel.distributed.weights import models
from wan_parallel.distributed.worker.worker import Worker
from wan_parallel.wanvideo.attention.kernels import AttentionError
from wan_parallel.wanvideo.base.config import WanConfig

CONFIG = WanConfig(dim=256, ffn_dim=512, num_heads=2, num_layers=2, text_dim=64)
REFUSAL = AttentionError("The attention kernel does not run on this GPU. Use auto.")


@pytest.mark.parametrize("what", ["get_kernel", "use_fp8"])
def test_what_one_rank_refuses_ends_on_all_and_the_next_load_is_right(tmp_path, what):
    path = tiny.write_checkpoint(tmp_path / "model.safetensors", CONFIG)
    results = gloo_group.run(2, _loads, tmp_path, CancelMemory(2).path, ModelSpec(path, "fp32", "fp32"), what)
    refused, loaded = ([_reply(rank[name]) for rank in results] for name in ("refused", "loaded"))
    assert [reply.failure.kinds for reply in refused] == [("AnotherRankRefused",), ("AttentionError",)]
    error = error_among(refused)
    assert isinstance(error, AttentionError) and str(error) == str(REFUSAL)
    assert error_among(loaded) is None


def _loads(rank: int, _world: int, barrier: str, spec: ModelSpec, what: str) -> gloo_group.Results:
    worker = Worker(rank, PoolSettings(ParallelPlan(2), device="cpu"), CancelBarrier(barrier), on_one_host(2))
    with mock.patch.object(models, what, side_effect=REFUSAL if rank == 1 else None, wraps=getattr(models, what)):
        refused = worker.handle(Load(1, spec, 36))
    assert not worker.models.loaded
    loaded = worker.handle(Load(2, spec, 36))
    return {"refused": _bytes(refused), "loaded": _bytes(loaded)}


def _bytes(reply: Reply) -> torch.Tensor:
    return torch.frombuffer(bytearray(encode(reply)), dtype=torch.uint8)


def _reply(data: torch.Tensor) -> Reply:
    return decode(data.numpy().tobytes())
