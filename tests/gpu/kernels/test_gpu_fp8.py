"""fp8 mode on a GPU that has it: kernels, products and attention against exact arithmetic, models against the CPU's."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from functools import partial

import pytest
import torch
from testkit import tiny
from wan_parallel.distributed.client.pool import acquire
from wan_parallel.distributed.plan.degrees import ParallelPlan
from wan_parallel.distributed.protocol.specs import ModelSpec, PoolSettings
from wan_parallel.wanvideo.attention import flash3, fp8_attention, kernels
from wan_parallel.wanvideo.base.config import WanConfig
from wan_parallel.wanvideo.checkpoint.weight_source import model_config
from wan_parallel.wanvideo.model import fp8_mode
from wan_parallel.wanvideo.model.model import WanModel
from wan_parallel.wanvideo.ops import pointwise
from wan_parallel.wanvideo.quant import fp8_linear
from wan_parallel.wanvideo.quant.formats.fp8 import Fp8Weight
from wan_parallel.wanvideo.quant.fp8_linear import Fp8Error

if not torch.cuda.is_available():
    pytest.skip("needs a CUDA GPU", allow_module_level=True)

CUDA = torch.device("cuda")
SIXTEEN_BIT = [torch.float16, torch.bfloat16]
LINEAR, ATTENTION = fp8_mode.MODES[1:]
HOPPER = torch.cuda.get_device_capability() == (9, 0)
needs_fa3 = pytest.mark.skipif(not HOPPER or not flash3.installed(), reason="needs FlashAttention-3 on a Hopper GPU")


@pytest.fixture(autouse=True)
def fp8_products():
    if torch.cuda.get_device_capability() < fp8_linear.CAPABILITY:
        with pytest.raises(Fp8Error, match="fp8_mode needs"):
            fp8_linear.check_device(CUDA, torch.bfloat16)
        pytest.skip("this GPU has no fp8, and fp8 mode says so")
    if not pointwise.use_triton(CUDA):
        pytest.skip("Triton does not work on this machine")


@pytest.fixture
def plain(monkeypatch):
    """Call a function without Triton."""

    def call(function, *arguments, **options):
        with monkeypatch.context() as patch:
            patch.setattr(pointwise, "_kernels", None)
            return function(*arguments, **options)

    return call


def normal(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, device=CUDA, generator=torch.Generator(CUDA).manual_seed(seed)).to(dtype)


def share_of_equal(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a.float() == b.float()).float().mean())


# The fused kernels.


@pytest.mark.parametrize("dtype", [torch.float32, *SIXTEEN_BIT], ids=str)
@pytest.mark.parametrize("width", [512, 1536, 5120, 13824])
def test_rows_are_rounded_to_the_same_bits(dtype, width, plain):
    x = (normal(2, 30, width) * torch.logspace(-3, 3, 30, device=CUDA)[:, None]).to(dtype)
    x[1, 7] = 0
    fused, reference = fp8_linear.to_rows(x), plain(fp8_linear.to_rows, x)
    assert torch.equal(fused.scale, reference.scale)
    assert torch.equal(fused.data.view(torch.uint8), reference.data.view(torch.uint8))


@pytest.mark.parametrize("width", [1536, 5120])
@pytest.mark.parametrize("rows", [None, 1, 30])
def test_norm_and_rounding_in_one_pass(width, rows, plain):
    x = normal(2, 37, width)[:, 3:33]
    shape = (width,) if rows is None else (2, rows, width)
    given = x, normal(*shape, seed=1), normal(*shape, seed=2), 1e-6, torch.bfloat16
    fused, reference = fp8_linear.norm_rows(*given), plain(fp8_linear.norm_rows, *given)
    assert share_of_equal(fused.data, reference.data) > 0.999
    assert tiny.relative_error(fused.data.float() * fused.scale, reference.data.float() * reference.scale) < 1e-2


@pytest.mark.parametrize("dtype", SIXTEEN_BIT, ids=str)
def test_gelu_and_rounding_in_one_pass(dtype, plain):
    x = normal(50, 13824, dtype=dtype) * 3
    fused, reference = fp8_linear.gelu_rows(x), plain(fp8_linear.gelu_rows, x)
    assert share_of_equal(fused.data, reference.data) > 0.998
    assert tiny.relative_error(fused.dequantize(), reference.dequantize()) < 1e-2


@pytest.mark.parametrize("smooth, unbiased", [(False, False), (True, False), (True, True)])
def test_heads_are_rounded_as_in_plain_torch(smooth, unbiased, plain):
    packed = normal(3001, 2, 3, 5, 128, dtype=torch.bfloat16) + 0.5  # as an exchange leaves them
    v = packed[:, :, 2].transpose(0, 1)
    rounding = partial(fp8_attention.to_smoothed_heads, unbiased=unbiased) if smooth else fp8_attention.to_heads
    fused, reference = rounding(v), plain(rounding, v)
    assert torch.equal(fused.scale, reference.scale)
    assert share_of_equal(fused.data, reference.data) > (0.999 if smooth else 1 - 1e-9)
    if smooth:
        torch.testing.assert_close(fused.mean, reference.mean, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", SIXTEEN_BIT, ids=str)
def test_the_mean_comes_back_as_in_plain_torch(dtype, plain):
    out, mean = normal(2, 3001, 5, 128, dtype=dtype), normal(2, 5, 128, dtype=torch.float32)
    fused = fp8_attention.add_mean_(out.clone(), mean)
    exact = out.float() + mean[:, None]
    assert tiny.relative_error(fused, exact) <= tiny.relative_error(plain(fp8_attention.add_mean_, out, mean), exact)


# Products.


@pytest.mark.parametrize("multiply", [fp8_linear._rowwise, fp8_linear._rowwise_fp16, fp8_linear._tensorwise])
@pytest.mark.parametrize("shape", [(1, 256, 256), (77, 5120, 5120), (513, 13824, 5120), (8192, 5120, 13824)], ids=str)
def test_a_product_is_that_of_the_rounded_numbers(multiply, shape):
    n, columns, rows = shape
    x = fp8_linear.to_rows(normal(n, columns, dtype=torch.bfloat16))
    weight, bias = Fp8Weight.quantize(normal(rows, columns, seed=1) * 0.02, fp8_linear.FP8), normal(rows, seed=2)
    try:
        got = multiply(x.data, x.scale, weight.data, weight.scale.t(), bias)
    except (RuntimeError, ValueError) as refusal:
        if multiply is fp8_linear._rowwise and HOPPER:
            raise
        pytest.skip(f"not on this GPU with this torch: {str(refusal).splitlines()[0]}")
    part = slice(0, 128)
    expected = (x.data[part].double() * x.scale[part]) @ weight.dequantize(torch.float32).double().t() + bias
    error = tiny.relative_error(got[part], expected)
    print(f"{multiply.__name__} {shape}: {error:.1e}")
    assert error < 5e-3


@pytest.mark.parametrize("dtype", [torch.float32, *SIXTEEN_BIT], ids=str)
def test_a_way_to_multiply_is_found(dtype):
    how = fp8_linear.check_device(CUDA, dtype)
    print(how)
    assert how == "scaled by rows" or not HOPPER


# Attention.


def exact_attention(q, k, v):
    scores = torch.einsum("bqhd,bkhd->bhqk", q.double(), k.double()) / math.sqrt(q.shape[-1])
    return torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), v.double()), scores.logsumexp(-1)


@needs_fa3
@pytest.mark.parametrize("dtype", SIXTEEN_BIT, ids=str)
@pytest.mark.parametrize("lengths", [(512, 512), (1000, 777), (33, 4096), (64, 20000)], ids=str)
def test_fp8_attention_stays_within_its_bound(dtype, lengths):
    kernel = kernels.get_fp8_kernel(CUDA, dtype)
    q, k, v = (normal(2, n, 3, 128, seed=i).to(dtype) for i, n in enumerate((lengths[0], lengths[1], lengths[1])))
    (out, lse), (expected, expected_lse) = kernel.with_lse(q, k, v), exact_attention(q, k, v)
    error = tiny.relative_error(out, expected)
    print(f"{lengths}: {error:.1e}, log-sum-exp {float((lse - expected_lse).abs().max()):.1e}")
    assert out.dtype == dtype and torch.equal(out, kernel(q, k, v))
    assert error < kernel.bound and lse.shape == expected_lse.shape
    assert float((lse - expected_lse).abs().max()) < 5e-2
    assert tiny.relative_error(out, fp8_attention.reference(q, k, v, False)[0].double()) < 0.6 * error


@needs_fa3
def test_what_keys_and_values_have_in_common_costs_nothing_over_many_tokens():
    kernel = kernels.get_fp8_kernel(CUDA, torch.bfloat16)
    q, k, v = (normal(1, n, 2, 128, seed=i) for i, n in enumerate((64, 20000, 20000)))
    errors = []
    for common in (0.0, 4.0):
        given = [q, k + common * normal(1, 1, 2, 128, seed=8), v + common * normal(1, 1, 2, 128, seed=9)]
        given = [x.bfloat16() for x in given]
        errors.append(float((kernel(*given).float() - exact_attention(*given)[0]).norm()))
    print(errors)
    rounding = 2**-8 * 4 * (64 * 2 * 128) ** 0.5  # of an output of about 4 in bf16
    assert errors[1] < errors[0] + rounding


# Models.

CONFIG = WanConfig(dim=512, ffn_dim=1024, num_heads=4, num_layers=3)


@pytest.fixture(scope="module")
def path(tmp_path_factory) -> str:
    return tiny.write_checkpoint(tmp_path_factory.mktemp("fp8") / "model.safetensors", CONFIG)


@pytest.mark.parametrize("mode", [LINEAR, pytest.param(ATTENTION, marks=needs_fa3)])
def test_a_model_is_as_far_from_the_exact_one_as_the_reference_is(path, mode):
    given = tiny.inputs(CONFIG, (5, 16, 16))
    exact = WanModel.from_checkpoint(path)(*given)
    outputs = {}
    for device in ("cpu", "cuda"):
        model = WanModel.from_checkpoint(path, fp8_linear.FP8, torch.bfloat16, device)
        fp8_mode.use_fp8(model, mode, torch.device(device))
        with torch.inference_mode():
            outputs[device] = model(*(t.to(device) for t in given)).cpu()
    errors = {device: tiny.relative_error(out, exact) for device, out in outputs.items()}
    print(errors)
    assert 0.8 * errors["cpu"] < errors["cuda"] < 1.25 * errors["cpu"] < 0.08


@dataclass(frozen=True)
class Shared:
    """One way to share the GPUs."""

    gpus: int
    degrees: tuple[tuple[str, int], ...] = ()

    def __str__(self) -> str:
        return " x ".join(f"{name} {size}" for name, size in self.degrees) or "1 GPU"


SHARED = [
    Shared(1),
    Shared(2, (("ulysses_degree", 2),)),
    Shared(2, (("tensor_parallel", 2),)),
    Shared(4, (("ulysses_degree", 2), ("ring_degree", 2))),
]


@needs_fa3
@pytest.mark.parametrize("shared", SHARED, ids=str)
def test_gpus_together_are_as_close_to_float32_as_one(path, shared):
    given = tiny.inputs(CONFIG, (5, 16, 16))
    exact = WanModel.from_checkpoint(path)(*given)
    pool = acquire(PoolSettings(ParallelPlan(shared.gpus, **dict(shared.degrees)), device="cuda"))
    try:
        got = pool.forward(ModelSpec(path, "fp8_e4m3fn", "bf16", fp8_mode=ATTENTION), *given)
        status = pool.status().workers[0].models[0]
    finally:
        pool.close()
    error = tiny.relative_error(got.cpu(), exact)
    print(f"{shared}: {error:.2e}, {status.fp8}")
    assert 1e-3 < error < 0.08 and "flash_attn_3_fp8" in status.fp8


def test_a_1_3b_in_fp8_mode_takes_half_the_weights_and_less_time():
    config, modes = model_config("random:1.3b"), (fp8_mode.DISABLED, LINEAR, *([ATTENTION] if HOPPER else []))
    x, context = normal(1, 16, 21, 60, 104, dtype=torch.bfloat16), normal(1, 512, config.text_dim, dtype=torch.bfloat16)
    pool = acquire(PoolSettings(ParallelPlan(1), device="cuda"))
    outputs, seconds, held = {}, {}, {}
    try:
        for mode in modes:
            if mode == ATTENTION and not flash3.installed():
                continue
            weights = fp8_mode.weights_for(None, mode, "bf16")
            spec = ModelSpec("random:1.3b", weights, "bf16", fp8_mode=mode)
            for _ in range(3):
                start = time.perf_counter()
                outputs[mode] = pool.forward(spec, x, torch.full((1,), 500.0), context).float().cpu()
                seconds[mode] = time.perf_counter() - start
            held[mode] = pool.status().workers[0].models[-1].device_bytes
            pool.unload(spec)
    finally:
        pool.close()
    errors = {mode: tiny.relative_error(out, outputs[fp8_mode.DISABLED]) for mode, out in outputs.items()}
    print(errors, seconds, held)
    assert held[LINEAR] < 0.6 * held[fp8_mode.DISABLED]
    assert all(0 < error < 0.3 for mode, error in errors.items() if mode != fp8_mode.DISABLED)
    assert seconds[LINEAR] < seconds[fp8_mode.DISABLED]
