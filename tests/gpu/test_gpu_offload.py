"""On real GPUs: weights that are shared, in host memory or offloaded give the same bits, and the memory is free."""

from __future__ import annotations

import gc
import time
from dataclasses import dataclass, replace

import pytest
import torch
from testkit import tiny
from wan_parallel.distributed.client.pool import Pool, acquire
from wan_parallel.distributed.plan.degrees import ParallelPlan
from wan_parallel.distributed.plan.placement import PlacementError
from wan_parallel.distributed.protocol.specs import ModelSpec, PoolSettings
from wan_parallel.distributed.weights.lora_transfer import LoraSet
from wan_parallel.wanvideo.base.config import PRESETS, WanConfig
from wan_parallel.wanvideo.base.lora import LowRank

if not torch.cuda.is_available():
    pytest.skip("needs a CUDA GPU", allow_module_level=True)

CONFIG = WanConfig(dim=512, ffn_dim=1024, num_heads=4, num_layers=5)
BIG = ModelSpec("random:1.3b", shard_weights="off", offload="off")
LONG = (21, 60, 104)  # 81 frames at 480p
GIB = 2**30


@dataclass(frozen=True)
class Shared:
    """So many GPUs, for sequences or, with `data`, for batch items; a cap in GiB on each."""

    gpus: int
    data: int = 1
    cap: float = 0

    def settings(self) -> PoolSettings:
        total = torch.cuda.get_device_properties(0).total_memory
        fraction = self.cap * GIB / total if self.cap else 0.9
        return PoolSettings(ParallelPlan(self.gpus, self.data), device="cuda", memory_fraction=fraction)

    def __str__(self) -> str:
        return f"{self.gpus} GPUs, data {self.data}" + (f", {self.cap} GiB" if self.cap else "")


ONE, TWO, FOUR, DATA = Shared(1), Shared(2), Shared(4), Shared(2, 2)
WAYS = [("off", "on"), ("on", "off"), ("on", "on"), ("on", "auto")]
over = pytest.mark.parametrize


@pytest.fixture(scope="module")
def shared(request):
    pool = acquire(request.param.settings())
    yield pool
    pool.close()
    gc.collect()


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return tiny.write_checkpoint(tmp_path_factory.mktemp("residence") / "five.safetensors", CONFIG)


def inputs(config=CONFIG, latent=(5, 16, 16), batch=1):
    return tuple(tensor.cuda() for tensor in tiny.inputs(config, latent, batch, text_tokens=512))


def on_gpu(pool: Pool, spec: ModelSpec) -> list[int]:
    return [pool.models.held(spec, [rank])[0] for rank in range(pool.settings.plan.num_gpus)]


def used(pool: Pool) -> list[int]:
    return [worker.used for worker in pool.status().workers]


@over("dtype", ["fp32", "bf16"])
@over("shared", [ONE, TWO, FOUR, DATA], indirect=True, ids=str)
def test_every_place_of_the_weights_gives_the_same_bits(shared, checkpoint, dtype):
    whole = ModelSpec(checkpoint, dtype, dtype, shard_weights="off", offload="off")
    for batch in (1, 3):
        expected = shared.forward(whole, *inputs(batch=batch))
        for shard, offload in WAYS:
            spec = replace(whole, shard_weights=shard, offload=offload)
            for _ in range(3):
                assert torch.equal(shared.forward(spec, *inputs(batch=batch)), expected), (shard, offload)


@over("shared", [ONE, TWO], indirect=True, ids=str)
def test_a_big_model_under_way_gives_the_same_bits_again_and_again(shared):
    """Large blocks, so that a gather or a copy that came too early or too late would show."""
    given = inputs(PRESETS["1.3b"], LONG, batch=2)
    expected = shared.forward(BIG, *given)
    for shard, offload in WAYS:
        spec = replace(BIG, shard_weights=shard, offload=offload)
        for turn in range(3):
            assert torch.equal(shared.forward(spec, *given), expected), (shard, offload, turn)
        print(f"shard {shard}, offload {offload}: {shared.status().last_forward_seconds:.3f} s")
        shared.unload(spec)


PARTS = [
    ParallelPlan(4, tensor_parallel=2),
    ParallelPlan(4, pipeline_parallel=2),
    ParallelPlan(4, pipeline_parallel=2, data_parallel=2),
]


@over("plan", PARTS, ids=lambda plan: plan.describe(4))
def test_gpus_with_the_same_part_of_a_divided_model_share_it(checkpoint, plan):
    pool = acquire(PoolSettings(plan, device="cuda"))
    try:
        for path, config, latent in ((checkpoint, CONFIG, (5, 16, 16)), ("random:1.3b", PRESETS["1.3b"], (6, 60, 104))):
            whole = ModelSpec(path, "bf16", "bf16", shard_weights="off", offload="off")
            given = inputs(config, latent, batch=3)
            expected = pool.forward(whole, *given)
            for shard, offload in WAYS:
                spec = replace(whole, shard_weights=shard, offload=offload)
                for turn in range(3):
                    assert torch.equal(pool.forward(spec, *given), expected), (path, shard, offload, turn)
            pool.unload()
    finally:
        pool.close()


@over("shared", [TWO], indirect=True, ids=str)
def test_each_gpu_holds_its_share(shared):
    spec = replace(BIG, shard_weights="on")
    shared.ensure_ready(spec)  # starts the workers, and connects those that will share
    shared.unload()
    before = used(shared)
    shared.ensure_ready(BIG)
    shared.trim()  # the random weights' way into the blocks took room as well
    whole = [after - was for after, was in zip(used(shared), before, strict=True)]
    shared.unload()
    shared.ensure_ready(spec)
    shared.trim()
    half = [after - was for after, was in zip(used(shared), before, strict=True)]
    print(f"whole {[n / GIB for n in whole]}, shared {[n / GIB for n in half]} GiB")
    # half of the blocks, and the embeddings, which are 2 % of this model; segments of 2 MiB for each share
    assert all(part <= 0.55 * all_ for part, all_ in zip(half, whole, strict=True))


@over("shared", [Shared(1, cap=2.6)], indirect=True, ids=str)
def test_under_a_cap_as_many_blocks_as_fit_stay_and_the_others_stream(shared):
    auto, given = replace(BIG, offload="auto", slice_tokens=2048), inputs(PRESETS["1.3b"], (6, 60, 104))
    got = shared.forward(auto, *given)
    status = shared.status().workers[0]
    model = next(m for m in status.models if "host memory" in m.placement)
    print(model.placement, f"peak {status.peak_allocated / GIB:.2f} GiB")
    assert model.host_bytes > 0 and model.device_bytes < PRESETS["1.3b"].parameters * 2
    assert status.peak_allocated <= 2.6 * GIB
    free = acquire(ONE.settings())
    try:
        assert torch.equal(got, free.forward(replace(auto, offload="off"), *given))
    finally:
        free.close()


@over("shared", [Shared(1, cap=0.4)], indirect=True, ids=str)
def test_what_can_not_fit_is_refused_with_what_is_missing(shared):
    with pytest.raises(PlacementError, match=r"GPU of rank 0 has .* GiB are missing") as refusal:
        shared.ensure_ready(replace(BIG, offload="auto"))
    assert tiny.sentences(str(refusal.value)) == 2


@over("shard", ["off", "on"])
@over("shared", [TWO], indirect=True, ids=str)
def test_weights_step_out_of_one_gpu_and_come_back(shared, shard):
    spec, given = replace(BIG, shard_weights=shard), inputs(PRESETS["1.3b"], (5, 16, 16))
    expected = shared.forward(spec, *given)
    shared.trim()
    before, here = used(shared), on_gpu(shared, spec)
    for turn in range(3):
        started = time.perf_counter()
        freed = shared.offload(spec, [0], 1e30)
        seconds = time.perf_counter() - started
        now = used(shared)
        assert before[0] - now[0] >= 0.9 * freed > 0.7 * here[0] and abs(now[1] - before[1]) < 0.1 * GIB
        started = time.perf_counter()
        assert torch.equal(shared.forward(spec, *given), expected)
        print(f"turn {turn}: out {seconds:.2f} s, forward with the way in {time.perf_counter() - started:.2f} s")
        assert on_gpu(shared, spec) == here
        shared.trim()
    assert 0 < shared.offload(spec, [0], 0.3 * GIB) < 0.6 * here[0]
    assert torch.equal(shared.forward(spec, *given), expected)
    shared.unload(spec)


@over("shared", [Shared(1, cap=4)], indirect=True, ids=str)
def test_two_experts_take_turns_on_a_gpu_that_holds_one(shared):
    low = replace(BIG, slice_tokens=4096)  # another model to the workers, with the same weights
    given = inputs(PRESETS["1.3b"], (5, 16, 16))
    expected = shared.forward(BIG, *given)
    other = shared.forward(low, *given)
    for turn in range(10):
        assert torch.equal(shared.forward(BIG, *given), expected), turn
        assert torch.equal(shared.forward(low, *given), other), turn
    worker = shared.status().workers[0]
    assert len(worker.models) == 2 and worker.peak_allocated <= 4 * GIB
    assert all(model.host_bytes for model in worker.models)


@over("way", WAYS, ids=str)
@over("shared", [TWO], indirect=True, ids=str)
def test_a_lora_is_merged_and_undone_exactly(shared, checkpoint, way):
    whole = ModelSpec(checkpoint, "bf16", "bf16", shard_weights="off", offload="off")
    generator = torch.Generator().manual_seed(3)
    up, down = (torch.randn(size, generator=generator) * 0.3 for size in ((512, 8), (8, 512)))
    patches = LoraSet("lora", lambda: {"blocks.1.self_attn.q.weight": [LowRank(up, down, scale=0.7)]})
    spec = replace(whole, shard_weights=way[0], offload=way[1])
    plain, merged = shared.forward(whole, *inputs()), shared.forward(whole, *inputs(), loras=patches)
    assert not torch.equal(plain, merged)
    for _ in range(2):
        assert torch.equal(shared.forward(spec, *inputs(), loras=patches), merged)
        shared.offload(spec, [0, 1], 1e30)
        assert torch.equal(shared.forward(spec, *inputs()), plain)


class Cancelled(BaseException):
    """Like ComfyUI's InterruptProcessingException."""


@over("way", WAYS, ids=str)
@over("shared", [TWO, DATA], indirect=True, ids=str)
def test_cancel_is_quick_and_the_next_result_is_right(shared, way):
    spec, given = replace(BIG, shard_weights=way[0], offload=way[1]), inputs(PRESETS["1.3b"], (5, 16, 16), batch=3)
    expected, work = shared.forward(spec, *given), inputs(PRESETS["1.3b"], (21, 90, 160), batch=3)
    pids = shared.worker_pids
    for delay in (0.0, 0.5, 1.0):
        deadline = time.perf_counter() + delay

        def poll(deadline=deadline):
            if time.perf_counter() > deadline:
                raise Cancelled

        with pytest.raises(Cancelled):
            shared.forward(spec, *work, poll=poll)
        assert torch.equal(shared.forward(spec, *given), expected)
    assert shared.worker_pids == pids
    shared.unload(spec)
