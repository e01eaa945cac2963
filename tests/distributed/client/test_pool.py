"""A pool of workers behaves like one model in this process: same results, plain refusals, nothing left over."""

from __future__ import annotations

import contextlib
import gc
import json
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
import testkit
import torch
from testkit import tiny
from testkit.processes import LOOPBACK, alive, descendants, listening, private_bytes, wait_until_gone
from wan_parallel.distributed.client.failures import WorkerDied
from wan_parallel.distributed.client.pool import Pool, acquire
from wan_parallel.distributed.plan.degrees import ParallelPlan, PlanError
from wan_parallel.distributed.protocol.specs import ModelSpec, PoolSettings
from wan_parallel.wanvideo.attention.kernels import AttentionError
from wan_parallel.wanvideo.base.config import WanConfig
from wan_parallel.wanvideo.base.tensor_info import CheckpointError
from wan_parallel.wanvideo.checkpoint.weight_source import file_stamp
from wan_parallel.wanvideo.model.model import WanModel

THREE_HEADS = WanConfig(dim=384, ffn_dim=256, num_heads=3, num_layers=1, text_dim=64)


@pytest.fixture(scope="module")
def other(tmp_path_factory) -> ModelSpec:
    """A model of other dimensions, in bf16."""
    path = tmp_path_factory.mktemp("other") / "three-heads.safetensors"
    return ModelSpec(tiny.write_checkpoint(path, THREE_HEADS, seed=9), "bf16", "fp32")


def assert_right(pool: Pool, spec: ModelSpec, model: WanModel, given: tiny.Inputs) -> None:
    out = pool.forward(spec, *given)
    assert out.shape == given.x.shape and out.dtype == torch.float32
    assert tiny.relative_error(out, model(*given)) <= 2e-6


# The same results.


@pytest.mark.parametrize("workers", [1, 2, 4])
@pytest.mark.parametrize("size, batch", [((3, 6, 8), 1), ((2, 5, 7), 2), ((1, 2, 2), 3), ((1, 1, 1), 1)], ids=str)
def test_a_forward_on_several_workers_is_that_of_one_model(pool_of, spec, model, workers, size, batch):
    assert_right(pool_of(workers), spec, model, tiny.inputs(size=size, batch=batch))


@pytest.mark.parametrize("batch", [1, 2, 3])
@pytest.mark.parametrize("max_batch", [1, 2])
def test_data_parallel_groups_share_the_batch_and_all_workers_a_single_item(pool_of, spec, model, max_batch, batch):
    pool = pool_of(4, data_parallel=2)
    assert_right(pool, replace(spec, max_batch=max_batch), model, tiny.inputs(batch=batch))


def test_a_timestep_for_each_frame_reaches_the_workers(pool_of, spec, model):
    given = tiny.inputs(batch=2)
    assert_right(pool_of(2), spec, model, given._replace(timestep=torch.linspace(0, 900, 6).view(2, 3)))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_inputs_of_any_float_type_and_layout_arrive(pool_of, spec, model, dtype):
    x, timestep, context = tiny.inputs(batch=2)
    rough = tiny.Inputs(x.to(dtype).transpose(3, 4), timestep.to(dtype), context.to(dtype)[:, ::2])
    exact = tiny.Inputs(*(part.float() for part in rough))
    out = pool_of(2).forward(spec, *rough)
    assert out.dtype == torch.float32
    assert tiny.relative_error(out, model(*exact)) <= 2e-6


def test_two_models_in_one_pool_alternate(pool_of, spec, model, other):
    pool, second = pool_of(2), WanModel.from_checkpoint(other.path, torch.bfloat16, torch.float32)
    for _ in range(3):
        assert_right(pool, spec, model, tiny.inputs())
        assert_right(pool, other, second, tiny.inputs(THREE_HEADS))
    names = {loaded.name for loaded in pool.status().workers[1].models}
    assert {Path(spec.path).name, Path(other.path).name} <= names


def test_small_and_large_latents_alternate(pool_of, spec, model):
    for size in ((1, 2, 2), (5, 20, 20), (1, 2, 2), (6, 24, 22), (3, 6, 8)):
        assert_right(pool_of(2), spec, model, tiny.inputs(size=size))


def test_threads_take_turns(pool_of, spec, model):
    pool, wrong = pool_of(2), []

    def use(seed: int) -> None:
        for _ in range(5):
            given = tiny.inputs(seed=seed)
            if tiny.relative_error(pool.forward(spec, *given), model(*given)) > 2e-6:
                wrong.append(seed)

    threads = [threading.Thread(target=use, args=(seed,)) for seed in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_a_file_that_was_replaced_is_read_again(pool_of, tmp_path):
    path, new, pool = tmp_path / "model.safetensors", tmp_path / "new.safetensors", pool_of(2)
    for seed in (0, 1):
        tiny.write_checkpoint(new, seed=seed)
        new.replace(path)
        spec = ModelSpec(str(path), "fp32", "fp32", stamp=file_stamp(str(path)))
        assert_right(pool, spec, WanModel.from_checkpoint(str(path)), tiny.inputs())
    pool.unload()


# Lifetime.


def test_equal_settings_share_a_pool():
    settings = PoolSettings(ParallelPlan(2), device="cpu", memory_fraction=0.5)
    pool = acquire(settings)
    assert acquire(PoolSettings(ParallelPlan(2), device="cpu", memory_fraction=0.5)) is pool
    assert acquire(replace(settings, memory_fraction=0.4)) is not pool
    assert not pool.alive and pool.status().state == "not started"


@pytest.mark.parametrize("same", [{"device": "auto"}, {"usp_backend": "native"}, {"usp_backend": "auto"}], ids=str)
def test_settings_that_mean_the_same_share_a_pool(same):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    settings = PoolSettings(ParallelPlan(1), device=device, memory_fraction=0.6)
    assert acquire(replace(settings, **same)) is acquire(settings)


def test_the_workers_stay_between_requests(pool_of, spec):
    pool = pool_of(2)
    pool.forward(spec, *tiny.inputs())
    pids = (pool.launcher_pid, *pool.worker_pids)
    for size in ((1, 2, 2), (3, 8, 8)):
        pool.forward(spec, *tiny.inputs(size=size))
    pool.ensure_ready(spec)
    pool.status()
    assert (pool.launcher_pid, *pool.worker_pids) == pids and all(alive(pid) for pid in pids)


def test_unload_drops_the_models_and_the_next_forward_loads_again(pool_of, spec, model):
    pool = pool_of(2)
    assert_right(pool, spec, model, tiny.inputs())
    pids = pool.worker_pids
    pool.unload()
    assert all(worker.models == () for worker in pool.status().workers)
    assert_right(pool, spec, model, tiny.inputs())
    assert pool.worker_pids == pids


def test_a_model_that_nobody_uses_makes_room_for_the_next(pool_of, spec, other):
    pool = pool_of(2)
    pool.unload()
    pool.models.keep(spec)
    pool.models.keep(spec)
    pool.ensure_ready(spec)
    pool.models.drop(spec)
    pool.ensure_ready(other)
    assert len(pool.status().workers[0].models) == 2  # one user is left
    pool.unload()
    pool.ensure_ready(spec)
    pool.models.drop(spec)
    pool.ensure_ready(other)
    assert [loaded.name for loaded in pool.status().workers[0].models] == [Path(other.path).name]


def test_a_pool_that_died_while_idle_comes_back_in_the_forward(own_pool, spec, model):
    assert_right(own_pool, spec, model, tiny.inputs())
    for victim in ("worker", "launcher"):
        before = {own_pool.launcher_pid, *own_pool.worker_pids}
        os.kill(own_pool.worker_pids[1] if victim == "worker" else own_pool.launcher_pid, signal.SIGKILL)
        assert not wait_until_gone(before, 5)
        assert_right(own_pool, spec, model, tiny.inputs())
        assert before.isdisjoint({own_pool.launcher_pid, *own_pool.worker_pids})


def test_a_pool_is_closed_and_used_again(own_pool, spec, model):
    own_pool.ensure_ready(spec)
    pids = {own_pool.launcher_pid, *descendants(own_pool.launcher_pid)}
    own_pool.close()
    assert not wait_until_gone(pids, 5)
    assert own_pool.worker_pids == () and not own_pool.alive
    assert own_pool.status().state == "not started"
    assert_right(own_pool, spec, model, tiny.inputs())


def test_a_pool_ends_when_nobody_holds_it(spec):
    def arenas() -> int:
        links = []
        for descriptor in Path("/proc/self/fd").iterdir():
            with contextlib.suppress(FileNotFoundError):  # that of the listing
                links.append(os.readlink(descriptor))
        return sum(link.startswith("/memfd:wan-parallel ") for link in links)

    before = arenas()
    pool = acquire(PoolSettings(ParallelPlan(1), device="cpu", memory_fraction=0.3))
    pool.forward(spec, *tiny.inputs())
    assert arenas() > before
    pids = {pool.launcher_pid, *pool.worker_pids}
    del pool
    gc.collect()
    assert all(alive(pid) for pid in pids)  # the one asked for last is kept for the next prompt
    acquire(PoolSettings(ParallelPlan(2), device="cpu", memory_fraction=0.3))  # at once, before any garbage collection
    assert not wait_until_gone(pids, 5)
    assert arenas() == before


# Refusals that leave the pool as usable as before.


def refused(pool: Pool, spec: ModelSpec, error: type[Exception], given: tiny.Inputs) -> str:
    with pytest.raises(error) as refusal:
        pool.forward(spec, *given)
    text = str(refusal.value)
    assert tiny.sentences(text) == 2, text
    return text


def test_inputs_of_the_wrong_shape_are_refused_and_the_pool_goes_on(pool_of, spec, model):
    pool, good = pool_of(2), tiny.inputs(batch=2)
    assert_right(pool, spec, model, good)
    pids = pool.worker_pids
    x, timestep, context = good
    assert "takes [batch, 16, frames" in refused(pool, spec, ValueError, good._replace(x=torch.randn(2, 48, 3, 6, 8)))
    assert "takes [batch, 16, frames" in refused(pool, spec, ValueError, good._replace(x=x[0]))
    assert "[2, tokens, 64]" in refused(pool, spec, ValueError, good._replace(context=torch.randn(2, 32, 4096)))
    assert "[2, tokens, 64]" in refused(pool, spec, ValueError, good._replace(context=context[:1]))
    assert "3 latent frames" in refused(pool, spec, ValueError, good._replace(timestep=timestep[:1]))
    assert "3 latent frames" in refused(pool, spec, ValueError, good._replace(timestep=torch.zeros(2, 4)))
    assert_right(pool, spec, model, good)
    assert pool.worker_pids == pids


def test_a_file_that_cannot_run_is_refused_before_anything_starts(tmp_path, spec):
    pool = Pool(PoolSettings(ParallelPlan(2), device="cpu"))
    for path in (str(tmp_path / "gone.safetensors"), "random:15b"):
        refused(pool, replace(spec, path=path), CheckpointError, tiny.inputs())
    assert not pool.alive


def test_a_kernel_that_is_missing_is_refused_and_the_pool_goes_on(pool_of, spec, model):
    pool = pool_of(2)
    assert_right(pool, spec, model, tiny.inputs())
    pids = pool.worker_pids
    text = refused(pool, replace(spec, attention="flash_attn_3"), AttentionError, tiny.inputs())
    assert "flash_attn_3 does not run on cpu" in text
    assert_right(pool, spec, model, tiny.inputs())
    assert pool.worker_pids == pids


def test_a_degree_beyond_the_heads_is_refused_and_the_pool_goes_on(pool_of, spec, other):
    pool, second = pool_of(3, ulysses_degree=3), WanModel.from_checkpoint(other.path, torch.bfloat16, torch.float32)
    assert_right(pool, other, second, tiny.inputs(THREE_HEADS))
    pids = pool.worker_pids
    assert "2 heads cannot be shared by ulysses_degree 3" in refused(pool, spec, PlanError, tiny.inputs())
    assert_right(pool, other, second, tiny.inputs(THREE_HEADS))
    assert pool.worker_pids == pids
    pool.close()


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has GPUs")
def test_more_gpus_than_there_are_are_refused():
    with pytest.raises(PlanError, match="device is cuda, but torch finds no CUDA GPU") as refusal:
        acquire(PoolSettings(ParallelPlan(2), device="cuda"))
    assert tiny.sentences(str(refusal.value)) == 2


# What the status tells, and what the processes hold.


def test_the_status_tells_what_runs(pool_of, spec):
    pool = pool_of(4)
    mixed = replace(spec, weight_dtype="bf16", compute_dtype="fp16")
    pool.forward(mixed, *tiny.inputs())
    status = pool.status()
    assert status.state == "ready" and status.settings.device == "cpu"
    assert status.launcher_pid == pool.launcher_pid and status.torch == torch.__version__
    assert [worker.rank for worker in status.workers] == [0, 1, 2, 3]
    assert tuple(worker.pid for worker in status.workers) == pool.worker_pids
    for worker in status.workers:
        assert worker.device == "CPU"
        assert 10**6 < worker.used < worker.total
        assert 10**6 < worker.peak_private < worker.total
        loaded = {(model.weight_dtype, model.compute_dtype): model for model in worker.models}["bf16", "fp16"]
        assert loaded.name == Path(spec.path).name
        assert (loaded.kernel, loaded.backend, loaded.lora_uuid) == ("sdpa", "native", "")
        assert (loaded.ulysses, loaded.ring) == (2, 2)  # two heads on four workers
    assert status.last_forward_seconds > 0
    assert 0 <= status.last_hop_seconds < 1


def test_weights_are_read_through_the_page_cache_by_all(pool_of, tmp_path):
    config = WanConfig(dim=512, ffn_dim=4096, num_heads=4, num_layers=8, text_dim=64)
    path = tiny.write_layout(tmp_path / "large.safetensors", tiny.layout(config, "F32"))
    size, pool = path.stat().st_size, pool_of(4)
    assert size > 200e6
    pool.status()
    before = [private_bytes(pid) for pid in pool.worker_pids]
    pool.forward(ModelSpec(str(path), "fp32", "fp32"), *tiny.inputs(config))
    grown = [private_bytes(pid) - was for pid, was in zip(pool.worker_pids, before, strict=True)]
    pool.unload()
    assert sum(grown) < size / 2, grown


def test_nothing_listens_beyond_this_machine(pool_of, spec):
    pool = pool_of(4)
    pool.ensure_ready(spec)
    pids = {pool.launcher_pid, *descendants(pool.launcher_pid)}
    assert set(pool.worker_pids) < pids
    assert set(listening(pids)) <= LOOPBACK
    assert listening(pool.worker_pids)  # gloo's: the test sees what it looks for


def test_make_room_is_not_asked_for_a_cpu(own_pool, spec):
    own_pool.unload()
    own_pool.ensure_ready(spec, make_room=lambda nbytes: pytest.fail("asked for room on a GPU"))


# Clean processes (traps 1 to 3).

SHADOWS = ["nodes", "logging", "distributed", "wanvideo", "comfy", "server", "random", "torch"]
if sys.version_info >= (3, 11):  # before, `python -c` can't be kept from looking into the working directory
    SHADOWS += ["socket", "selectors"]


def test_workers_import_neither_the_client_nor_what_lies_in_its_folders(tmp_path, checkpoint, model):
    folder, trace = tmp_path / "ComfyUI", tmp_path / "trace"
    folder.mkdir()
    for name in SHADOWS:
        (folder / f"{name}.py").write_text(f"open({str(trace)!r}, 'a').write('{name} ')\n")
    client = tmp_path / "main.py"
    client.write_text(
        f"open({str(tmp_path / 'imports')!r}, 'a').write('x')\n"
        f"import sys; sys.path.insert(0, {str(testkit.ROOT / 'tests' / 'support')!r})\n"
        "from testkit import pool_client\n"
        "if __name__ == '__main__': pool_client.main(*sys.argv[1:])\n"
    )
    ran = subprocess.run(
        [sys.executable, str(client), checkpoint, "2", "once", str(folder)],
        cwd=folder,
        env={**os.environ, "PYTHONPROFILEIMPORTTIME": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert ran.returncode == 0, ran.stderr[-3000:]
    answer = json.loads(ran.stdout.splitlines()[-1])
    assert answer["sum"] == pytest.approx(float(model(*tiny.inputs()).double().sum()), abs=1e-2)
    assert not trace.exists(), trace.read_text()
    assert (tmp_path / "imports").read_text() == "x"  # multiprocessing would run it again in each worker
    imported = {line.rpartition("|")[2].strip() for line in ran.stderr.splitlines() if line.startswith("import time:")}
    assert "wan_parallel.distributed.worker.worker" in imported
    assert not imported & {"comfy", "nodes", "wan_parallel.nodes", "xfuser", "diffusers", "transformers"}
    assert not wait_until_gone([answer["launcher"], *answer["workers"]], 5)


def test_the_launcher_needs_no_torch(pool_of, spec):
    pool = pool_of(2)
    pool.ensure_ready(spec)
    assert "libtorch" not in Path(f"/proc/{pool.launcher_pid}/maps").read_text()
    assert "libtorch" in Path(f"/proc/{pool.worker_pids[0]}/maps").read_text()


def test_a_request_in_the_moment_of_a_death_fails_or_is_right(own_pool, spec, model):
    assert_right(own_pool, spec, model, tiny.inputs())
    os.kill(own_pool.worker_pids[0], signal.SIGKILL)
    start = time.monotonic()
    try:
        assert_right(own_pool, spec, model, tiny.inputs())
    except WorkerDied:
        assert time.monotonic() - start < 5
    assert_right(own_pool, spec, model, tiny.inputs())
