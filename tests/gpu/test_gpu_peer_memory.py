"""Both kinds of peer memory between real GPUs: what NCCL's exchange gives, again and again, whatever came in
between."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest
import torch
from testkit import tiny
from wan_parallel.distributed.client.pool import Pool
from wan_parallel.distributed.plan.degrees import ParallelPlan
from wan_parallel.distributed.protocol.specs import ModelSpec, PoolSettings
from wan_parallel.wanvideo.base.config import PRESETS, WanConfig

GPUS = 2
if torch.cuda.device_count() < GPUS:
    pytest.skip("needs two CUDA GPUs", allow_module_level=True)

FIVE_HEADS = WanConfig(dim=640, ffn_dim=1280, num_heads=5, num_layers=3)
SIZES = [((3, 9, 5), 1), ((9, 30, 52), 2), ((2, 2, 2), 1), ((5, 16, 16), 3)]  # it grows, and is used otherwise again
BIG, LONG = ModelSpec("random:1.3b"), (21, 60, 104)


class Cancelled(BaseException):
    """Like ComfyUI's InterruptProcessingException."""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> str:
    return tiny.write_checkpoint(tmp_path_factory.mktemp("peer_memory") / "five.safetensors", FIVE_HEADS)


def inputs(config: WanConfig, latent: tuple[int, int, int], batch: int) -> tuple[torch.Tensor, ...]:
    return tuple(tensor.cuda() for tensor in tiny.inputs(config, latent, batch, text_tokens=512))


@pytest.fixture(scope="module", params=[(), (5, 2)], ids=["alike", "unlike"])
def pools(request) -> Iterator[dict[str, Pool]]:
    """With exchanges by NCCL, between GPUs that reach each other, and through host memory."""
    plan = ParallelPlan(GPUS, speeds=request.param)
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("NCCL_P2P_DISABLE", "1")
        staged = Pool(PoolSettings(plan, device="cuda"))
        staged.ensure_ready(BIG)  # starts the workers, which keep what they inherit
    made = {
        "nccl": Pool(PoolSettings(plan, device="cuda", overlap=False)),
        "peers": Pool(PoolSettings(plan, device="cuda")),
        "staged": staged,
    }
    yield made
    for pool in made.values():
        pool.close()


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_every_way_gives_the_same_whatever_came_before(pools, checkpoint, dtype):
    spec = ModelSpec(checkpoint, dtype, dtype)
    for _ in range(2):
        for latent, batch in SIZES:
            given = inputs(FIVE_HEADS, latent, batch)
            results = {name: pool.forward(spec, *given) for name, pool in pools.items()}
            assert torch.equal(results["peers"], results["staged"]), latent
            # a batch's output lies otherwise in memory, and a product of it may round otherwise
            assert tiny.relative_error(results["staged"], results["nccl"]) <= (1e-5 if dtype == "fp32" else 2e-2)
        for pool in pools.values():
            pool.trim()


def test_a_big_model_gives_the_same_bits_again_and_again(pools):
    given = inputs(PRESETS["1.3b"], LONG, batch=1)
    expected = pools["nccl"].forward(BIG, *given)
    for name in ("peers", "staged"):
        for turn in range(6):
            assert torch.equal(pools[name].forward(BIG, *given), expected), (name, turn)
        status = pools[name].status()
        model = next(model for model in status.workers[0].models if model.name == BIG.name)
        assert model.overlapped
        print(name, f"{status.last_forward_seconds:.3f} s", {worker.link for worker in status.workers})


@pytest.mark.parametrize("name", ["peers", "staged"])
def test_after_cancel_the_next_result_is_right(pools, name):
    given, work = inputs(PRESETS["1.3b"], (5, 16, 16), 1), inputs(PRESETS["1.3b"], (21, 90, 160), 1)
    expected = pools[name].forward(BIG, *given)
    for delay in (0.0, 0.2, 0.4):
        deadline = time.perf_counter() + delay

        def poll(deadline: float = deadline) -> None:
            if time.perf_counter() > deadline:
                raise Cancelled

        with pytest.raises(Cancelled):
            pools[name].forward(BIG, *work, poll=poll)
        assert torch.equal(pools[name].forward(BIG, *given), expected)
