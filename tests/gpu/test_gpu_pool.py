"""The pool on real GPUs: every way to share a sequence gives the result of one GPU in float32."""

from __future__ import annotations

import gc
import os
import signal
import time
from dataclasses import dataclass

import pytest
import torch
from testkit import tiny
from testkit.processes import LOOPBACK, descendants, listening
from testkit.tiny import relative_error
from wan_parallel.distributed.client.failures import WorkerDied
from wan_parallel.distributed.client.pool import acquire
from wan_parallel.distributed.parallel import xfuser_backend
from wan_parallel.distributed.parallel.model_division import held_parameters
from wan_parallel.distributed.parallel.xfuser_backend import BackendError
from wan_parallel.distributed.plan.degrees import ParallelPlan
from wan_parallel.distributed.protocol.specs import ModelSpec, PoolSettings
from wan_parallel.distributed.weights.lora_transfer import LoraSet
from wan_parallel.wanvideo.base.config import PRESETS, WanConfig
from wan_parallel.wanvideo.base.lora import LowRank
from wan_parallel.wanvideo.model.model import WanModel

if not torch.cuda.is_available():
    pytest.skip("needs a CUDA GPU", allow_module_level=True)

FOUR_HEADS = WanConfig(dim=512, ffn_dim=1024, num_heads=4, num_layers=3)
FIVE_HEADS = WanConfig(dim=640, ffn_dim=1280, num_heads=5, num_layers=3)
ODD_COLUMNS = WanConfig(dim=512, ffn_dim=1026, num_heads=4, num_layers=3)
EVEN = (5, 16, 16)  # latent frames, rows, columns: 320 tokens
UNEVEN = (3, 9, 5)  # 45 tokens
LONG = (21, 90, 160)  # seconds of work for the 1.3B


@dataclass(frozen=True)
class Shared:
    """One way to share the GPUs."""

    backend: str
    ulysses: int
    ring: int
    data: int = 1
    tensor: int = 1
    pipeline: int = 1
    speeds: tuple[int, ...] = ()

    @property
    def gpus(self) -> int:
        return self.ulysses * self.ring * self.data * self.tensor * self.pipeline

    def settings(self) -> PoolSettings:
        plan = ParallelPlan(
            num_gpus=self.gpus,
            data_parallel=self.data,
            pipeline_parallel=self.pipeline,
            tensor_parallel=self.tensor,
            ulysses_degree=self.ulysses,
            ring_degree=self.ring,
            speeds=self.speeds,
        )
        return PoolSettings(plan, device="cuda", usp_backend=self.backend)

    def __str__(self) -> str:
        speeds = f"at{''.join(map(str, self.speeds))}" if self.speeds else ""
        return f"{self.backend}-u{self.ulysses}r{self.ring}d{self.data}t{self.tensor}p{self.pipeline}{speeds}"


NATIVE = [Shared("native", *degrees) for degrees in ((2, 1), (1, 2), (4, 1), (2, 2), (1, 4), (2, 1, 2))]
NATIVE += [Shared("native", *degrees, speeds=(5, 2)) for degrees in ((2, 1), (1, 2))]
NATIVE += [Shared("native", *degrees, speeds=(1, 4, 2, 2)) for degrees in ((4, 1), (2, 2))]
XFUSER = [Shared("xfuser", *degrees) for degrees in ((2, 1), (1, 2), (4, 1), (2, 2), (2, 1, 2))]
TWO = Shared("native", 2, 1)
TENSOR, PIPELINE = Shared("native", 1, 1, tensor=2), Shared("native", 1, 1, pipeline=2)
DIVIDED = [
    TENSOR,
    PIPELINE,
    Shared("native", 1, 1, tensor=4),
    Shared("native", 2, 1, tensor=2),
    Shared("native", 1, 2, tensor=2),
    Shared("native", 1, 1, 2, tensor=2),
    Shared("native", 2, 1, pipeline=2),
    Shared("native", 1, 1, 2, pipeline=2),
    Shared("native", 1, 1, tensor=2, pipeline=2),
]


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoints")
    return {
        config: tiny.write_checkpoint(folder / f"{config.num_heads}-{config.ffn_dim}.safetensors", config)
        for config in (FOUR_HEADS, FIVE_HEADS, ODD_COLUMNS)
    }


@pytest.fixture(scope="module")
def shared(request):
    """A pool; tests that use the same one run one after the other."""
    if request.param.backend == "xfuser" and not xfuser_backend.installed():
        pytest.skip("xfuser is not installed")
    pool = acquire(request.param.settings())
    yield pool
    pool.close()
    gc.collect()


def inputs(config, latent, batch=1):
    return tuple(tensor.cuda() for tensor in tiny.inputs(config, latent, batch, text_tokens=512))


def spec(path, dtype="bf16", **options):
    return ModelSpec(path, weight_dtype=dtype, compute_dtype=dtype, **options)


def one_gpu(path, dtype=torch.float32):
    return WanModel.from_checkpoint(path, dtype, dtype, "cuda")


def errors(pool, path, config, latent, dtype, batch=1):
    """Of the pool and of one GPU in that dtype, to one GPU in float32."""
    with torch.inference_mode():
        expected = one_gpu(path)(*inputs(config, latent, batch))
        alone = one_gpu(path, {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[dtype])
        error_alone = relative_error(alone(*inputs(config, latent, batch)), expected)
    got = pool.forward(spec(path, dtype), *inputs(config, latent, batch))
    assert got.shape == expected.shape and got.dtype == torch.float32 and got.device.type == "cuda"
    error = relative_error(got, expected)
    print(f"{dtype} error {error:.2e}, one GPU {error_alone:.2e}")
    return error, error_alone


@pytest.mark.parametrize("shared", [*NATIVE, *XFUSER, *DIVIDED], indirect=True, ids=str)
def test_float32_is_the_result_of_one_gpu(shared, checkpoints):
    error, _ = errors(shared, checkpoints[FOUR_HEADS], FOUR_HEADS, EVEN, "fp32", batch=2)
    assert error <= 1e-5


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
@pytest.mark.parametrize("shared", [*NATIVE, *XFUSER, *DIVIDED], indirect=True, ids=str)
def test_16_bit_is_as_exact_as_on_one_gpu(shared, checkpoints, dtype):
    error, alone = errors(shared, checkpoints[FOUR_HEADS], FOUR_HEADS, EVEN, dtype)
    ranks = shared.settings.plan.tensor_parallel  # each rounds its part of a sum
    assert error <= (1.25 if ranks == 1 else 1.25 + 0.1 * ranks) * alone


@pytest.mark.parametrize("shared", DIVIDED, indirect=True, ids=str)
def test_uneven_tokens_and_columns_are_exact_on_a_divided_model(shared, checkpoints):
    error, _ = errors(shared, checkpoints[ODD_COLUMNS], ODD_COLUMNS, UNEVEN, "fp32", batch=3)
    assert error <= 1e-5


@pytest.mark.parametrize("shared", [TENSOR, PIPELINE], indirect=True, ids=str)
def test_each_gpu_holds_its_part_of_the_weights(shared):
    shared.ensure_ready(spec("random:1.3b"))
    before = max(worker.used for worker in shared.status().workers)
    shared.unload()
    freed = before - max(worker.used for worker in shared.status().workers)
    part = 2 * held_parameters(PRESETS["1.3b"], shared.settings.plan)
    print(f"freed {freed / 2**30:.2f} GiB, a part has {part / 2**30:.2f} GiB")
    assert 0.9 * part <= freed <= 1.2 * part


@pytest.mark.parametrize("shared", [*NATIVE, *XFUSER, *DIVIDED], indirect=True, ids=str)
def test_the_status_says_which_path_runs(shared, checkpoints, request):
    shared.forward(spec(checkpoints[FOUR_HEADS]), *inputs(FOUR_HEADS, EVEN))
    asked = request.node.callspec.params["shared"]
    for worker in shared.status().workers:
        model = worker.models[0]
        assert (model.backend, model.ulysses, model.ring) == (asked.backend, asked.ulysses, asked.ring)
        assert (model.tensor, model.pipeline) == (asked.tensor, asked.pipeline)


@pytest.mark.parametrize("dtype, limit", [("fp32", 1e-5), ("bf16", None)])
@pytest.mark.parametrize("shared", NATIVE, indirect=True, ids=str)
def test_uneven_tokens_and_heads_are_exact_on_the_native_path(shared, checkpoints, dtype, limit):
    error, alone = errors(shared, checkpoints[FIVE_HEADS], FIVE_HEADS, UNEVEN, dtype)
    assert error <= (limit or 1.25 * alone)


@pytest.mark.parametrize("shared", XFUSER, indirect=True, ids=str)
def test_xfuser_refuses_uneven_tokens_and_stays_usable(shared, checkpoints):
    with pytest.raises(BackendError, match="Set usp_backend to native"):
        shared.forward(spec(checkpoints[FOUR_HEADS]), *inputs(FOUR_HEADS, UNEVEN))
    shared.forward(spec(checkpoints[FOUR_HEADS]), *inputs(FOUR_HEADS, EVEN))


@pytest.mark.parametrize("shared", [TWO, TENSOR, PIPELINE, DIVIDED[-1]], indirect=True, ids=str)
def test_a_lora_is_merged_and_undone_exactly(shared, checkpoints):
    path, name = checkpoints[FOUR_HEADS], "blocks.1.self_attn.q.weight"
    generator = torch.Generator().manual_seed(3)
    up, down = (torch.randn(size, generator=generator) * 0.3 for size in ((512, 8), (8, 512)))
    patches = LoraSet("lora", lambda: {name: [LowRank(up, down, scale=0.7)]})
    x = inputs(FOUR_HEADS, EVEN)
    before = shared.forward(spec(path, "fp32"), *x)
    patched = shared.forward(spec(path, "fp32"), *x, loras=patches)
    after = shared.forward(spec(path, "fp32"), *x)
    with torch.inference_mode():
        model = one_gpu(path)
        model.get_parameter(name).add_((0.7 * (up @ down)).cuda())
        expected = model(*x)
    assert relative_error(before, expected) > 1e-3
    assert relative_error(patched, expected) <= 1e-5
    assert torch.equal(before, after)


class Cancelled(BaseException):
    """Like ComfyUI's InterruptProcessingException."""


@pytest.mark.parametrize("shared", [Shared("native", 1, 1), TWO, TENSOR, PIPELINE, DIVIDED[-1]], indirect=True, ids=str)
def test_cancel_is_quick_and_the_next_result_is_right(shared, checkpoints):
    tiny_model, big = spec(checkpoints[FOUR_HEADS], "fp32"), spec("random:1.3b")
    expected = shared.forward(tiny_model, *inputs(FOUR_HEADS, EVEN))
    work = inputs(PRESETS["1.3b"], LONG)
    shared.ensure_ready(big)
    asked = []

    def poll():
        asked.append(time.perf_counter())
        raise Cancelled

    with pytest.raises(Cancelled):
        shared.forward(big, *work, poll=poll)
    assert time.perf_counter() - asked[0] <= 1.0
    started = time.perf_counter()
    again = shared.forward(tiny_model, *inputs(FOUR_HEADS, EVEN))
    print(f"back after {time.perf_counter() - started:.2f} s")
    assert torch.equal(again, expected)


@pytest.mark.parametrize("shared", [TWO, TENSOR, PIPELINE], indirect=True, ids=str)
def test_a_killed_worker_fails_the_prompt_and_the_next_one_starts_a_new_pool(shared, checkpoints):
    expected = shared.forward(spec(checkpoints[FOUR_HEADS], "fp32"), *inputs(FOUR_HEADS, EVEN))
    big = spec("random:1.3b")
    work = inputs(PRESETS["1.3b"], LONG)
    shared.forward(big, *work)  # all is in place, so that exchanges are under way when it is killed
    pids = shared.worker_pids
    started, killed = time.perf_counter(), []

    def poll():
        if not killed and time.perf_counter() - started > 0.3:  # of 0.9 on two H200s
            killed.append(time.perf_counter())
            os.kill(pids[1], signal.SIGKILL)

    with pytest.raises(WorkerDied, match="rank 1"):
        shared.forward(big, *work, poll=poll)
    assert time.perf_counter() - killed[0] <= 5.0
    again = shared.forward(spec(checkpoints[FOUR_HEADS], "fp32"), *inputs(FOUR_HEADS, EVEN))
    assert torch.equal(again, expected)
    assert set(shared.worker_pids).isdisjoint(pids)


@pytest.mark.parametrize("shared", [TWO], indirect=True, ids=str)
def test_unload_gives_the_gpu_memory_back(shared):
    shared.ensure_ready(spec("random:1.3b"))
    held = min(worker.used for worker in shared.status().workers)
    shared.unload()
    assert held - min(worker.used for worker in shared.status().workers) >= 2 * 2**30


def test_ranks_live_on_the_gpus_that_are_named_and_listen_on_the_loopback_alone(monkeypatch, spec, model):
    if torch.cuda.device_count() < 2:
        pytest.skip("needs 2 CUDA GPUs")
    for name, value in {"NCCL_SOCKET_IFNAME": "nowhere9", "NCCL_COMM_ID": "192.0.2.1:29500"}.items():
        monkeypatch.setenv(name, value)
    first = f"GPU-{torch.cuda.get_device_properties(0).uuid}"
    pool, given = acquire(PoolSettings(ParallelPlan(2), device="cuda", gpus=("1", first))), tiny.inputs()
    assert relative_error(pool.forward(spec, *given), model(*given)) <= 1e-3
    assert [at.device for at in pool.locations] == [1, 0]
    assert set(listening({pool.launcher_pid, *descendants(pool.launcher_pid)})) <= LOOPBACK
    pool.close()
