"""Weights that are shared among the ranks or lie in host memory give the result of whole ones, bit for bit."""

from __future__ import annotations

import itertools
import math
import os
import re
import signal
import time
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from testkit import tiny
from testkit.format_files import plain_fp8
from testkit.patch_runs import sample, through
from testkit.processes import private_bytes
from testkit.shared.lora_changes import lora_set, some_lora
from wan_parallel.distributed.approximate.schedule import PatchSettings
from wan_parallel.distributed.client.failures import WorkerDied
from wan_parallel.distributed.client.pool import Pool
from wan_parallel.distributed.plan.degrees import ParallelPlan
from wan_parallel.distributed.plan.placement import ALIGN
from wan_parallel.distributed.protocol.specs import ModelSpec, PoolSettings
from wan_parallel.distributed.shm.host import HostShare
from wan_parallel.distributed.weights.block_store import BlockStore
from wan_parallel.distributed.weights.flat_block import FlatBlock, HostBuffer, components, on_meta
from wan_parallel.distributed.weights.offload import BlockOffloader
from wan_parallel.distributed.weights.prefetch import BlockPrefetcher, PrefetchBuffers
from wan_parallel.wanvideo.base.config import WanConfig
from wan_parallel.wanvideo.base.lora import LowRank

FIVE_LAYERS = WanConfig(dim=256, ffn_dim=512, num_heads=2, num_layers=5, text_dim=64)
HEAVY = WanConfig(dim=512, ffn_dim=4096, num_heads=4, num_layers=8, text_dim=64)
WAYS = [way for way in itertools.product(("off", "on"), ("off", "on")) if way != ("off", "off")]
ids = "shard {0[0]}, offload {0[1]}".format


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> ModelSpec:
    path = tmp_path_factory.mktemp("offload") / "five-layers.safetensors"
    return ModelSpec(tiny.write_checkpoint(path, FIVE_LAYERS), "bf16", "fp32", shard_weights="off", offload="off")


def living(spec: ModelSpec, way: tuple[str, str]) -> ModelSpec:
    return replace(spec, shard_weights=way[0], offload=way[1])


def bytes_of(pool: Pool, spec: ModelSpec) -> list[int]:
    return [pool.models.held(spec, [rank])[0] for rank in range(pool.settings.plan.num_gpus)]


# The same results.


@pytest.mark.parametrize("way", WAYS, ids=ids)
@pytest.mark.parametrize("workers", [1, 2, 4])
def test_every_place_of_the_weights_gives_the_same_bits(pool_of, base, workers, way):
    pool = pool_of(workers)
    for given in (tiny.inputs(FIVE_LAYERS), tiny.inputs(FIVE_LAYERS, batch=3), tiny.inputs(FIVE_LAYERS, (1, 1, 1))):
        assert torch.equal(pool.forward(living(base, way), *given), pool.forward(base, *given))


@pytest.mark.parametrize("batch", [1, 2, 3])
@pytest.mark.parametrize("max_batch", [1, 2])
def test_data_parallel_groups_with_uneven_work_gather_together(pool_of, base, batch, max_batch):
    pool, given = pool_of(4, data_parallel=2), tiny.inputs(FIVE_LAYERS, batch=batch)
    whole = replace(base, max_batch=max_batch)
    expected = pool.forward(whole, *given)
    for way in WAYS:
        assert torch.equal(pool.forward(living(whole, way), *given), expected)


def test_a_model_of_one_block_and_one_in_float32_run_too(pool_of, spec, tmp_path):
    one = replace(tiny.TINY, num_layers=1)
    single = ModelSpec(tiny.write_checkpoint(tmp_path / "one.safetensors", one), "fp32", "fp32")
    pool = pool_of(2)
    for model, way in itertools.product((single, spec), WAYS):
        assert torch.equal(pool.forward(living(model, way), *tiny.inputs()), pool.forward(model, *tiny.inputs()))
    pool.unload()


def test_quantised_weights_are_shared_and_moved_as_they_are(pool_of, base):
    pool, given, patches = pool_of(2), tiny.inputs(FIVE_LAYERS), lora_set(some_lora(0.5))
    fp8 = replace(base, weight_dtype="fp8_e4m3fn")
    plain, merged = pool.forward(fp8, *given), pool.forward(fp8, *given, patches)
    assert not torch.equal(plain, merged)
    for way in WAYS:
        model = living(fp8, way)
        assert torch.equal(pool.forward(model, *given, patches), merged)
        pool.offload(model, [0, 1], 1e30)
        assert torch.equal(pool.forward(model, *given), plain)


def test_models_that_live_in_different_places_alternate(pool_of, base, spec):
    pool, given = pool_of(2), tiny.inputs(FIVE_LAYERS, batch=2)
    models = [living(base, way) for way in WAYS]
    expected, other = pool.forward(base, *given), pool.forward(spec, *tiny.inputs())
    for model in (*models, *models):
        assert torch.equal(pool.forward(model, *given), expected)
        shared = replace(spec, shard_weights="on")  # of another size, through the same two buffers
        assert torch.equal(pool.forward(shared, *tiny.inputs()), other)


@pytest.mark.parametrize("way", WAYS, ids=ids)
def test_a_lora_is_merged_and_undone_exactly(pool_of, base, way):
    pool, given, model = pool_of(2), tiny.inputs(FIVE_LAYERS), living(base, way)
    plain, patches = pool.forward(base, *given), lora_set(some_lora(0.7))
    expected = pool.forward(base, *given, patches)
    assert not torch.equal(plain, expected)
    for _ in range(2):
        assert torch.equal(pool.forward(model, *given, patches), expected)
        assert torch.equal(pool.forward(model, *given), plain)


@pytest.fixture(scope="module")
def vace(tmp_path_factory) -> ModelSpec:
    """A model in fp8 whose VACE blocks, in a file of their own, are larger than the others."""
    folder, weights = tmp_path_factory.mktemp("vace"), tiny.random_weights(tiny.VACE)
    module = {name: weight for name, weight in weights.items() if name.startswith("vace_")}
    stored, _ = plain_fp8({k: v for k, v in weights.items() if k not in module}, torch.float8_e4m3fn)
    path = tiny.write_weights(folder / "base.safetensors", stored)
    beside = tiny.write_weights(folder / "module.safetensors", {k: v.bfloat16() for k, v in module.items()})
    return ModelSpec(path, "bf16", "fp32", shard_weights="off", offload="off", module=beside)


def test_vace_blocks_live_where_the_others_do(pool_of, vace):
    pool, given = pool_of(2), tiny.inputs(tiny.VACE, batch=2)
    conditioning = tiny.conditioning(tiny.VACE, given.x, contexts=2)
    dim, names = tiny.VACE.dim, ("vace_blocks.0.self_attn.q", "vace_blocks.1.after_proj", "blocks.3.self_attn.o")
    changes = {f"{name}.weight": [LowRank(torch.randn(dim, 4), torch.randn(4, dim), 0.05)] for name in names}
    patches = lora_set(changes)
    plain, merged = (pool.forward(vace, *given, lora, conditioning=conditioning) for lora in (None, patches))
    without = pool.forward(vace, *given)
    assert not torch.equal(plain, merged) and not torch.equal(plain, without)
    for way in WAYS:
        model = living(vace, way)
        assert torch.equal(pool.forward(model, *given, patches, conditioning=conditioning), merged)
        pool.offload(model, [0, 1], 1e30)
        assert torch.equal(pool.forward(model, *given, conditioning=conditioning), plain)
        assert torch.equal(pool.forward(model, *given), without)
    whole, shared, outside = (bytes_of(pool, living(vace, way))[0] for way in (("off", "off"), WAYS[1], WAYS[0]))
    blocks = sum(math.prod(s) for n, s in tiny.VACE.shapes().items() if tiny.VACE.block_number(n) is not None)
    assert whole - outside > blocks and shared - outside == pytest.approx((whole - outside) / 2, rel=0.02)
    pool.unload()


@pytest.mark.parametrize("plan", [{"num_gpus": 2}, {"num_gpus": 4, "data_parallel": 2}], ids=str)
def test_displaced_patches_run_on_weights_that_are_elsewhere(pool_of, base, plan):
    pool = pool_of(**plan)
    settings, how = PatchSettings(warmup_steps=2), {"batch": 3, "steps": 4, "config": FIVE_LAYERS}
    expected = sample(through(pool, base), settings, **how)
    assert "s" in expected.kinds
    for way in WAYS:
        assert torch.equal(sample(through(pool, living(base, way)), settings, **how).last, expected.last)


# What is held.


def test_each_rank_holds_its_share(pool_of, base):
    pool = pool_of(4)
    for way in ((("off", "off")), *WAYS):
        pool.ensure_ready(living(base, way))
    blocks = sum(bytes_of(pool, base)) - sum(bytes_of(pool, living(base, ("off", "on"))))
    fixed = bytes_of(pool, living(base, ("off", "on")))[0]  # embeddings and head alone
    parameters = FIVE_LAYERS.parameters * 2
    assert parameters <= blocks / 4 + fixed <= 1.05 * parameters
    shared = bytes_of(pool, living(base, ("on", "off")))
    assert all(held - fixed <= 1.02 * blocks / 16 for held in shared)
    assert bytes_of(pool, living(base, ("on", "on"))) == [fixed] * 4
    status = {model.placement: model for model in pool.status().workers[2].models}
    model = next(model for text, model in status.items() if text.startswith("1/4 of each block on each of 4 GPUs, 5"))
    assert model.device_bytes == fixed and model.host_bytes == shared[0] - fixed


def test_a_rank_reads_its_share_of_the_file_alone(pool_of, tmp_path):
    path = tmp_path / "heavy.safetensors"
    tiny.write_layout(path, tiny.layout(HEAVY, "F32"))
    size, pool = path.stat().st_size, pool_of(4)
    pool.unload()
    before = [private_bytes(pid) for pid in pool.worker_pids]
    pool.ensure_ready(ModelSpec(str(path), "fp32", "fp32", shard_weights="on"))
    read = [mapped_and_touched(pid, path) for pid in pool.worker_pids]
    grown = [private_bytes(pid) - was for pid, was in zip(pool.worker_pids, before, strict=True)]
    pool.unload()
    assert size > 200e6
    fixed = 4 * sum(math.prod(shape) for name, shape in HEAVY.shapes().items() if not name.startswith("blocks."))
    assert sum(read) - 3 * fixed <= 1.05 * size, read  # embeddings and head are everybody's, through one page cache
    assert max(grown) <= 0.35 * size, grown


def mapped_and_touched(pid: int, path: Path) -> int:
    """Bytes of a file that the process has mapped and used."""
    text = Path(f"/proc/{pid}/smaps").read_text()
    return sum(int(kib) * 1024 for kib in re.findall(rf" {re.escape(str(path))}\n(?:.*\n)*?Rss: +(\d+) kB", text))


# Stepping out.


@pytest.mark.parametrize("way", [("off", "off"), ("on", "off"), ("on", "auto"), ("auto", "auto")], ids=ids)
def test_weights_step_out_and_come_back_with_the_next_forward(pool_of, base, way):
    pool, given, model = pool_of(2), tiny.inputs(FIVE_LAYERS, batch=2), living(base, way)
    expected = pool.forward(base, *given)
    assert torch.equal(pool.forward(model, *given), expected)
    here = bytes_of(pool, model)
    for _ in range(2):
        assert 0 < pool.offload(model, [1], 1000) < here[1] / 2  # one block
        assert pool.offload(model, [1], 1e30) > 0
        assert bytes_of(pool, model)[0] == here[0]
        assert bytes_of(pool, model)[1] < 0.4 * here[1]  # embeddings and head stay
        assert pool.models.held(model, [1])[1] == here[1]
        assert pool.offload(model, [1], 1e30) == 0
        assert torch.equal(pool.forward(model, *given), expected)
        assert bytes_of(pool, model) == here


def test_what_stepped_out_is_not_read_again(pool_of, tmp_path):
    path = tmp_path / "gone.safetensors"
    spec = ModelSpec(tiny.write_checkpoint(path), "bf16", "fp32")
    pool = pool_of(2)
    expected, before = pool.forward(spec, *tiny.inputs()), path.stat()
    with open(path, "r+b") as file:
        file.seek(-200_000, 2)
        file.write(bytes(200_000))  # the mapped file changes under the workers,
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))  # who are not to notice and refuse it
    assert pool.offload(spec, [0, 1], 1e30) > 0
    assert torch.equal(pool.forward(spec, *tiny.inputs()), expected)
    pool.unload(spec)


@pytest.mark.parametrize("way", [("off", "off"), *WAYS], ids=ids)
def test_a_lora_and_stepping_out_do_not_disturb_each_other(pool_of, base, way):
    pool, given, model = pool_of(2), tiny.inputs(FIVE_LAYERS), living(base, way)
    plain, patches = pool.forward(base, *given), lora_set(some_lora(0.3))
    merged = pool.forward(base, *given, patches)
    everything = ([0, 1], 1e30)
    pool.forward(model, *given, patches)
    pool.offload(model, *everything)
    assert torch.equal(pool.forward(model, *given, patches), merged)
    pool.offload(model, *everything)
    assert torch.equal(pool.forward(model, *given), plain)
    assert torch.equal(pool.forward(model, *given, patches), merged)
    pool.offload(model, *everything)
    pool.offload(model, *everything)
    assert torch.equal(pool.forward(model, *given), plain)
    pool.unload(model)
    assert torch.equal(pool.forward(model, *given), plain)


def test_the_others_step_aside_for_one_model(pool_of, base):
    pool, given = pool_of(2), tiny.inputs(FIVE_LAYERS)
    other = living(base, ("on", "off"))
    expected = pool.forward(base, *given)
    pool.ensure_ready(other)
    was = bytes_of(pool, other)
    assert pool.offload_others(base) > 0
    assert bytes_of(pool, other) < was
    assert torch.equal(pool.forward(other, *given), expected)


def test_trim_leaves_the_weights_and_the_next_forward_right(pool_of, base):
    pool, given, model = pool_of(2), tiny.inputs(FIVE_LAYERS), living(base, ("on", "on"))
    expected = pool.forward(base, *given)
    for _ in range(2):
        pool.trim()
        assert torch.equal(pool.forward(model, *given), expected)


def test_nothing_is_asked_of_a_pool_that_is_not_there(base):
    pool = Pool(PoolSettings(ParallelPlan(2), device="cpu"))
    pool.trim()
    assert pool.offload(base, [0, 1], 1e30) == pool.offload_others(base) == 0
    assert pool.models.held(base, [0]) == (0, 0)
    assert not pool.alive


# Cancel and death, in the middle of a gather.


class Interrupted(BaseException):
    """As ComfyUI's, no Exception."""


def interrupt() -> None:
    raise Interrupted


@pytest.mark.parametrize("plan", [{"num_gpus": 2}, {"num_gpus": 4, "data_parallel": 2}], ids=str)
def test_cancel_between_blocks_leaves_no_gather_unmatched(pool_of, base, plan):
    pool, short = pool_of(**plan), tiny.inputs(FIVE_LAYERS, batch=3)
    long = tiny.inputs(FIVE_LAYERS, (8, 40, 40), batch=3)
    expected = pool.forward(base, *short)
    pids = pool.worker_pids
    for way in WAYS:
        model = living(base, way)
        pool.ensure_ready(model)
        for delay in (0.0, 0.12, 0.31):
            deadline = time.monotonic() + delay

            def poll(deadline=deadline) -> None:
                if time.monotonic() >= deadline:
                    interrupt()

            with pytest.raises(Interrupted):
                pool.forward(model, *long, poll=poll)
            pool.trim()  # must not wait for the workers
            assert torch.equal(pool.forward(model, *short), expected)
    assert pool.worker_pids == pids


def test_a_rank_that_dies_during_a_gather_ends_the_forward(own_pool, base):
    model, given = living(base, ("on", "on")), tiny.inputs(FIVE_LAYERS, (8, 40, 40), batch=4)
    expected = own_pool.forward(base, *tiny.inputs(FIVE_LAYERS))
    own_pool.ensure_ready(model)
    killed = []

    def kill() -> None:
        if not killed:
            killed.append(time.monotonic())
            os.kill(own_pool.worker_pids[1], signal.SIGKILL)

    with pytest.raises(WorkerDied, match="rank 1"):
        own_pool.forward(model, *given, poll=kill)
    assert time.monotonic() - killed[0] < 5
    assert own_pool.models.held(model, [0, 1]) == (0, 0)
    assert torch.equal(own_pool.forward(model, *tiny.inputs(FIVE_LAYERS)), expected)


# The parts, in this process.


@dataclass(frozen=True)
class Scaled:
    """A quantised weight as files have them: bytes and a scale."""

    values: torch.Tensor
    scale: torch.Tensor

    def components(self) -> dict[str, torch.Tensor]:
        return {"values": self.values, "scale": self.scale}

    def replace(self, tensors: dict[str, torch.Tensor]) -> Scaled:
        return Scaled(tensors["values"], tensors["scale"])


def weights_of(seed: int) -> dict[str, object]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "blocks.0.a.weight": torch.randn(7, 5, generator=generator),
        "blocks.0.a.bias": torch.randn(7, generator=generator),
        "blocks.0.b.weight": Scaled(
            torch.randint(0, 255, (9, 11), dtype=torch.uint8, generator=generator), torch.tensor(0.5)
        ),
    }


@pytest.mark.parametrize("shares", [1, 2, 3, 8])
def test_the_shares_of_a_layout_make_the_whole(shares):
    weights = weights_of(0)
    held = {"blocks.0.a.weight": torch.bfloat16}
    flat = FlatBlock.of({name: on_meta(weight, held.get(name)) for name, weight in weights.items()}, shares)
    assert flat.nbytes % (shares * ALIGN) == 0
    size = flat.nbytes // shares
    parts = [torch.zeros(size, dtype=torch.uint8) for _ in range(shares)]
    for index, part in enumerate(parts):
        for name, weight in weights.items():
            flat.write(part, index * size, name, weight)
    for name, view in flat.views(torch.cat(parts)).items():
        for key, tensor in components(view).items():
            expected = components(weights[name])[key]
            assert torch.equal(tensor, expected.to(held.get(name, expected.dtype)))
            assert tensor.data_ptr() % 64 == 0
    assert not flat.holds("blocks.0.b.weight", torch.zeros(9, 11))
    assert flat.holds("blocks.0.b.weight", weights_of(1)["blocks.0.b.weight"])


@pytest.mark.parametrize("resident", [0, 1])
def test_a_weight_that_changes_its_kind_changes_its_block(resident):
    weights, model = weights_of(0), {}
    device = torch.device("cpu")
    store = BlockStore(
        weights,
        lambda name: (weights[name], None),
        model.__setitem__,
        device,
        number_of=FIVE_LAYERS.block_number,
        order=[0],
    )
    offloader, prefetcher = BlockOffloader(store), BlockPrefetcher(store, PrefetchBuffers(device))
    store.load(resident)
    merged = torch.randn(9, 11)
    changed = {**weights, "blocks.0.b.weight": merged}
    for state in (changed, weights, changed):
        store.update(["blocks.0.b.weight"], state.get, HostShare(1))
        for step in (lambda: None, lambda: offloader.offload(1e9), lambda: offloader.onload(1)):
            step()
            with prefetcher.prefetching(1):
                prefetcher.await_block(0)
                for name, weight in state.items():
                    for key, tensor in components(model[name]).items():
                        assert torch.equal(tensor, components(weight)[key])


def test_host_memory_is_of_the_size_that_is_asked_for():
    buffer = HostBuffer(3_000_001, pin=False)
    assert len(buffer.bytes) == 3_000_001 and not buffer.bytes.any()
