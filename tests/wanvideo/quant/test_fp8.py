"""fp8 mode: rows and heads are rounded as they say, products are exact on what was rounded, and a model stays close."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from dataclasses import replace
from importlib.util import find_spec

import pytest
import testkit
import torch
from testkit import tiny, worker_group
from testkit.format_files import write_gguf, written
from wan_parallel.distributed.plan.degrees import ParallelPlan
from wan_parallel.distributed.protocol.specs import ModelSpec
from wan_parallel.distributed.weights.lora_transfer import LoraSet
from wan_parallel.wanvideo.attention import fp8_attention, kernels
from wan_parallel.wanvideo.attention.kernels import AttentionError
from wan_parallel.wanvideo.base.lora import LowRank, merge
from wan_parallel.wanvideo.checkpoint.header import read_header
from wan_parallel.wanvideo.model import fp8_mode
from wan_parallel.wanvideo.model.layers import Linear
from wan_parallel.wanvideo.model.model import WanModel
from wan_parallel.wanvideo.quant import fp8_linear
from wan_parallel.wanvideo.quant.formats.fp8 import Fp8Weight
from wan_parallel.wanvideo.quant.fp8_linear import Fp8Error

CPU = torch.device("cpu")
GIVEN = tiny.inputs(size=(3, 8, 10))
LINEAR, ATTENTION = fp8_mode.MODES[1:]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def in_mode(checkpoint: str, mode: str, **options: object) -> WanModel:
    model = WanModel.from_checkpoint(checkpoint, torch.float8_e4m3fn, **options)
    fp8_mode.use_fp8(model, mode, CPU)
    return model


# Rows.


@pytest.mark.parametrize("size", [1e-20, 1e-3, 1.0, 448.0, 1e20])
def test_a_row_is_divided_by_the_smallest_power_of_two_that_brings_it_into_the_format(size):
    x = normal(64, 96) * size * torch.logspace(-3, 3, 64)[:, None]
    rows = fp8_linear.to_rows(x)
    largest = rows.data.float().abs().amax(-1)
    assert ((largest > 208) & (largest <= 448)).all()  # 224, of which rounding takes the last half step
    assert torch.equal(torch.frexp(rows.scale)[0], torch.full_like(rows.scale, 0.5))
    assert tiny.relative_error(rows.dequantize(), x) < 0.03


@pytest.mark.parametrize(
    "largest, scale", [(448.0, 1.0), (448.5, 2.0), (224.0, 0.5), (1.75, 2.0**-8), (0.0, 2.0**-100)]
)
def test_the_scale_leaves_no_room_and_never_overflows(largest, scale):
    assert float(fp8_linear.power_of_two(torch.tensor([largest]))) == scale


def test_rows_of_zeros_stay_zeros():
    assert not fp8_linear.to_rows(torch.zeros(3, 32)).dequantize().any()


def test_a_part_of_a_row_is_rounded_as_in_the_whole():
    x = normal(16, 512)
    x[:, 300] *= 50
    whole, part = fp8_linear.to_rows(x).dequantize()[:, :256], fp8_linear.to_rows(x[:, :256].contiguous()).dequantize()
    least = 2**-13 * x.abs().amax(-1, keepdim=True)
    assert torch.equal(part[x[:, :256].abs() > least], whole[x[:, :256].abs() > least])
    assert ((part - whole).abs() <= least * 2**-4).all()


def test_norm_and_gelu_are_rounded_once():
    x, scale, shift = normal(2, 30, 128), normal(2, 1, 128, seed=1), normal(2, 1, 128, seed=2)
    exact = torch.nn.functional.layer_norm(x, (128,), eps=1e-6) * scale + shift
    assert torch.equal(fp8_linear.norm_rows(x, scale, shift, 1e-6, x.dtype).data, fp8_linear.to_rows(exact).data)
    gelu = torch.nn.functional.gelu(x, approximate="tanh")
    assert torch.equal(fp8_linear.gelu_rows(x).data, fp8_linear.to_rows(gelu).data)


# Products.


WIDE = Fp8Weight.quantize(normal(48, 192, seed=3), torch.float8_e4m3fn)
WEIGHTS = {
    "a scale for each channel": Fp8Weight.quantize(normal(48, 96, seed=3), torch.float8_e4m3fn),
    "a scale for the matrix": Fp8Weight(normal(48, 96, seed=3).to(torch.float8_e4m3fn), torch.full((1, 1), 0.37)),
    "no scale": Fp8Weight(normal(48, 96, seed=3).to(torch.float8_e4m3fn)),
    "some columns of a wider matrix": WIDE.narrow(1, 96, 96),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", WEIGHTS)
def test_a_product_is_that_of_the_rounded_numbers(kind, dtype):
    weight, bias = WEIGHTS[kind], normal(48, seed=4)
    rows = fp8_linear.to_rows(normal(2, 7, 96).to(dtype))
    got = fp8_linear.product(rows, weight, bias)
    numbers = rows.data.double() * rows.scale.double()
    expected = numbers @ weight.dequantize(torch.float32).double().t() + bias.double()
    assert got.dtype == dtype and got.shape == (2, 7, 48)
    assert tiny.relative_error(got, expected) <= {torch.float32: 1e-6, torch.float16: 5e-4, torch.bfloat16: 4e-3}[dtype]


def test_a_product_of_random_matrices_is_off_by_what_rounding_both_is():
    x, w, bias = normal(64, 1024), normal(96, 1024, seed=1) * 0.02, normal(96, seed=2) * 0.02
    got = fp8_linear.product(fp8_linear.to_rows(x), Fp8Weight.quantize(w, torch.float8_e4m3fn), bias)
    assert 0.02 < tiny.relative_error(got, x.double() @ w.double().t() + bias) < 0.045


def test_a_rank_without_tokens_has_an_empty_product():
    rows = fp8_linear.to_rows(torch.empty(2, 0, 96))
    assert fp8_linear.product(rows, WEIGHTS["no scale"], normal(48)).shape == (2, 0, 48)


def test_a_linear_rounds_its_input_only_in_fp8_mode():
    linear, x = Linear(96, 48), normal(5, 96)
    linear.bias.data.zero_()
    del linear._parameters["weight"]
    linear.weight = WEIGHTS["a scale for each channel"]
    plain = linear(x)
    assert tiny.relative_error(plain, x @ linear.weight.dequantize(torch.float32).t()) < 1e-6
    linear.fp8 = True
    assert torch.equal(linear(x), linear(fp8_linear.to_rows(x)))
    assert 0.01 < tiny.relative_error(linear(x), plain) < 0.04


def test_rows_meet_a_weight_that_the_file_has_not_quantised():
    linear, rows = Linear(96, 48), fp8_linear.to_rows(normal(5, 96))
    linear.fp8 = True
    linear.weight.data, linear.bias.data = normal(48, 96, seed=1), normal(48, seed=2)
    assert torch.equal(linear(rows), torch.nn.functional.linear(rows.dequantize(), linear.weight, linear.bias))


# Attention.


def exact_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    scores = torch.einsum("bqhd,bkhd->bhqk", q.double(), k.double()) / math.sqrt(q.shape[-1])
    return torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), v.double()), scores.logsumexp(-1)


def qkv(length: int = 300, keys: float = 0.0, values: float = 0.0) -> list[torch.Tensor]:
    """Normal queries, keys and values; the latter two have a vector of that size in common."""
    q, k, v = (normal(2, n, 3, 64, seed=n + i) for i, n in enumerate((40, length, length)))
    return [q, k + keys * normal(2, 1, 3, 64, seed=8), v + values * normal(2, 1, 3, 64, seed=9)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_fp8_attention_is_off_by_what_rounding_is(dtype):
    q, k, v = (x.to(dtype) for x in qkv())
    kernel = kernels.get_fp8_kernel(CPU, dtype)
    assert kernel.lossy
    (out, lse), (expected, expected_lse) = kernel.with_lse(q, k, v), exact_attention(q, k, v)
    assert out.dtype == dtype and torch.equal(out, kernel(q, k, v))
    assert 1e-2 < tiny.relative_error(out, expected) < kernel.bound
    assert float((lse - expected_lse).abs().max()) < 5e-2


@pytest.mark.parametrize("common", [{"keys": 20.0}, {"values": 20.0}])
def test_what_keys_or_values_have_in_common_costs_nothing(common):
    kernel = kernels.get_fp8_kernel(CPU, torch.float32)
    errors = []
    for given in (qkv(), qkv(**common)):
        (out, lse), (expected, expected_lse) = kernel.with_lse(*given), exact_attention(*given)
        errors.append(float((out - expected).norm()))
        assert float((lse - expected_lse).abs().max()) < 5e-2
    assert errors[1] < 1.1 * errors[0]


def test_blocks_of_keys_merge_by_their_log_sum_exps():
    kernel = kernels.get_fp8_kernel(CPU, torch.float32)
    q, k, v = qkv(keys=5.0)
    blocks = [kernel.with_lse(q, *kv) for kv in zip(k.split(100, 1), v.split(100, 1), strict=True)]
    shares = torch.stack([lse for _, lse in blocks]).softmax(0).transpose(2, 3).unsqueeze(-1)
    merged = sum(share * out for share, (out, _) in zip(shares, blocks, strict=True))
    assert tiny.relative_error(merged, exact_attention(q, k, v)[0]) < kernel.bound


def test_rounding_leaves_the_mean_of_the_values_alone():
    v = (normal(1, 4000, 2, 64) + 0.004).bfloat16()
    rounded = fp8_attention.to_smoothed_heads(v, unbiased=True)
    got = (rounded.dequantize() + rounded.mean[:, None]).mean(1)
    assert float((got - v.float().mean(1)).abs().max()) < 1e-6


# Triton's kernels, where the package is installed: its interpreter needs no GPU. It rounds to fp8 wrongly, so numbers
# stay in float32 here; gpu/test_gpu_fp8.py has the real ones.

INTERPRETED = """
import sys
sys.path.insert(0, {tests!r})
import testkit, torch
from torch.nn import functional as F
from wan_parallel.wanvideo.quant import fp8_linear as fp8, fp8_linear_triton as fp8_triton
torch.manual_seed(0)

def close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)

for d, gelu in ((200, False), (200, True), (128, False), (24, True)):
    x = torch.randn(2, 5, d).bfloat16()
    numbers, scale = fp8_triton.to_rows(x, gelu, torch.float32)
    exact = F.gelu(x.float(), approximate="tanh") if gelu else x.float()
    close(numbers * scale, exact)
    assert torch.equal(scale, fp8_linear.power_of_two((numbers * scale).abs().amax(-1, keepdim=True)))
stream = torch.randn(2, 9, 200)[:, 2:7]
scale, shift = torch.randn(2, 1, 200), torch.randn(2, 5, 3, 200)[:, :, 1]
numbers, scales = fp8_triton.norm_rows(stream, scale, shift, 1e-6, torch.float32)
close(numbers * scales, F.layer_norm(stream, (200,), eps=1e-6) * scale + shift)
assert torch.equal(scales, fp8_linear.power_of_two((numbers * scales).abs().amax(-1, keepdim=True)))
packed = torch.randn(1100, 2, 3, 2, 64) + 3
v = packed[:, :, 2].transpose(0, 1)
for smooth in (False, True):
    numbers, scale, mean = fp8_triton.to_heads(v, smooth, torch.float32)
    close(numbers * scale[:, None, :, None] + (mean[:, None] if smooth else 0), v)
    taken = v.mean(1) if smooth else torch.zeros(2, 2, 64)
    close(scale, fp8_linear.power_of_two(v.abs().amax((1, 3)) + taken.abs().amax(-1)))
    if smooth:
        close(mean, taken)
        close(fp8_triton.sum_heads(v) / v.shape[1], taken)
        out = packed[:, :, 1].transpose(0, 1).clone()
        close(fp8_triton.add_mean_(out.clone(), mean), out + mean[:, None])
"""


def test_the_fused_kernels_scale_and_smooth_as_plain_torch_does():
    if find_spec("triton") is None:
        pytest.skip("triton is not installed")
    code = INTERPRETED.format(tests=str(testkit.ROOT / "tests" / "support"))
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


# Models.


@pytest.mark.parametrize("mode", [LINEAR, ATTENTION])
def test_a_model_in_fp8_mode_stays_close_to_the_exact_one(checkpoint, model, mode):
    exact, lossy = model(*GIVEN), in_mode(checkpoint, mode)
    held = WanModel.from_checkpoint(checkpoint, torch.float8_e4m3fn)(*GIVEN)
    error = tiny.relative_error(lossy(*GIVEN), exact)
    assert tiny.relative_error(held, exact) < error < 0.06
    sliced = in_mode(checkpoint, mode, slice_tokens=10)
    assert tiny.relative_error(sliced(*GIVEN), lossy(*GIVEN)) < 1e-3
    assert all(module.ready is None for module in sliced.modules() if isinstance(module, Linear))
    assert (lossy.self_kernel is lossy.kernel) == (mode == LINEAR)


def test_only_the_products_of_blocks_are_in_fp8(checkpoint):
    linears = {name: m for name, m in in_mode(checkpoint, LINEAR).named_modules() if isinstance(m, Linear)}
    assert {name for name, linear in linears.items() if linear.fp8} == {n for n in linears if n.startswith("blocks.")}


@pytest.mark.parametrize("stored", ["kijai's", "int8 convrot", "Q4_K"])
def test_formats_that_cannot_be_multiplied_are_refused_by_name(tmp_path, stored):
    path = write_gguf(tmp_path / "wan.gguf", stored)[0] if stored == "Q4_K" else written(tmp_path, stored)[0]
    with pytest.raises(Fp8Error, match=r"e5m2|int8|Q4_K") as refusal:
        fp8_mode.weights_for(read_header(path), LINEAR, "bf16")
    assert tiny.sentences(str(refusal.value)) == 2
    assert fp8_mode.weights_for(read_header(path), fp8_mode.DISABLED, "bf16") == "bf16"


def test_float_files_are_rounded_at_load_and_fp8_files_taken_as_they_are(tmp_path, checkpoint):
    assert fp8_mode.weights_for(read_header(checkpoint), LINEAR, "bf16") == "fp8_e4m3fn"
    assert fp8_mode.weights_for(None, ATTENTION, "fp16") == "fp8_e4m3fn"
    path, _ = written(tmp_path, "ComfyUI's older scaled")
    assert fp8_mode.weights_for(read_header(path), LINEAR, "fp16") == "fp16"


def test_a_gpu_without_fp8_is_refused_by_name(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _device=None: (8, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _device=None: "A100")
    with pytest.raises(Fp8Error, match=r"A100 has 8\.0") as refusal:
        fp8_linear.check_device(torch.device("cuda", 3), torch.bfloat16)
    assert tiny.sentences(str(refusal.value)) == 2
    with pytest.raises(AttentionError, match=r"fp8_mode linear\+attention needs FlashAttention-3") as refusal:
        kernels.get_fp8_kernel(torch.device("cuda", 3), torch.bfloat16)
    assert tiny.sentences(str(refusal.value)) == 2


def test_fp8_attention_that_cannot_be_loaded_says_what_else_to_choose(monkeypatch):
    def broken() -> None:
        raise OSError("undefined symbol")

    broken_source = replace(kernels._FP8_SOURCES["cpu"], load=broken)
    monkeypatch.setitem(kernels._FP8_SOURCES, "cpu", broken_source)
    with pytest.raises(AttentionError, match=r"undefined symbol.*\. Set fp8_mode to linear\.") as refusal:
        kernels.get_fp8_kernel(CPU, torch.float32)
    assert tiny.sentences(str(refusal.value)) == 2


# Workers.

HEADS = replace(tiny.TINY, dim=512, ffn_dim=768, num_heads=4, num_layers=3)
PLANS = {
    "ulysses": ParallelPlan(2, ulysses_degree=2),
    "ring": ParallelPlan(2, ring_degree=2),
    "tensor": ParallelPlan(2, tensor_parallel=2),
    "pipeline": ParallelPlan(2, pipeline_parallel=2),
    "ulysses x ulysses": ParallelPlan(4, ulysses_degree=4),
    "ring x ulysses": ParallelPlan(4, ulysses_degree=2, ring_degree=2),
    "tensor x pipeline": ParallelPlan(4, tensor_parallel=2, pipeline_parallel=2),
}
CASES = [(plan, ATTENTION) for plan in PLANS] + [(plan, LINEAR) for plan in ("ulysses", "tensor")]
ELSEWHERE = {"shared": {"shard_weights": "on"}, "host": {"offload": "on"}}


def mode_spec(path: str, mode: str, **options: str) -> ModelSpec:
    return ModelSpec(path, "fp8_e4m3fn", "fp32", fp8_mode=mode, **options)


@pytest.fixture(scope="module")
def heads_file(tmp_path_factory) -> str:
    return tiny.write_checkpoint(tmp_path_factory.mktemp("fp8") / "heads.safetensors", HEADS)


@pytest.fixture(scope="module")
def together(tmp_path_factory, heads_file) -> dict[tuple[str, str], torch.Tensor]:
    """What the ranks of each plan give, by plan and mode, and by where the weights are."""
    given, results = tiny.inputs(HEADS, (3, 8, 10)), {}
    for ranks in (2, 4):
        jobs = {
            (plan, mode): worker_group.Job(PLANS[plan], mode_spec(heads_file, mode), given)
            for plan, mode in CASES
            if PLANS[plan].num_gpus == ranks
        }
        for where, options in ELSEWHERE.items() if ranks == 2 else ():
            spec = mode_spec(heads_file, ATTENTION, **options)
            jobs[where, ATTENTION] = worker_group.Job(PLANS["ulysses"], spec, given)
        outcome = worker_group.run(ranks, list(jobs.values()), tmp_path_factory.mktemp("gloo"))
        results |= dict(zip(jobs, outcome.latents, strict=True))
    return results


@pytest.fixture(scope="module")
def alone(heads_file) -> dict[str, torch.Tensor]:
    given = tiny.inputs(HEADS, (3, 8, 10))
    results = {mode: in_mode(heads_file, mode)(*given) for mode in (LINEAR, ATTENTION)}
    return results | {"exact": WanModel.from_checkpoint(heads_file)(*given)}


@pytest.mark.parametrize("plan, mode", CASES)
def test_ranks_together_are_as_close_to_one_as_rounding_lets_them(together, alone, plan, mode):
    """A number on the edge between two of e4m3 falls to either side by the last bit of float32, and moves the rest.

    Tensor-parallel ranks also scale the rows of matrices divided by columns for themselves, and a ring rounds its
    exponentials block by block.
    """
    own = tiny.relative_error(alone[mode], alone["exact"])
    error = tiny.relative_error(together[plan, mode], alone[mode])
    divides_rounding = "tensor" in plan or ("ring" in plan and mode == ATTENTION)
    assert error < (own if divides_rounding else 0.2 * own)
    assert tiny.relative_error(together[plan, mode], alone["exact"]) < 1.2 * own


@pytest.mark.parametrize("where", ELSEWHERE)
def test_where_the_weights_are_changes_nothing(together, where):
    assert torch.equal(together[where, ATTENTION], together["ulysses", ATTENTION])


def test_a_pool_says_what_runs_in_fp8_and_takes_loras(pool_of, checkpoint):
    spec, pool = mode_spec(checkpoint, ATTENTION), pool_of(2)
    plain = pool.forward(spec, *GIVEN)
    model = in_mode(checkpoint, ATTENTION)
    assert tiny.relative_error(plain, model(*GIVEN)) < 5e-3
    status = pool.status().workers[0].models[-1]
    assert status.fp8 == "products computed in float32, self-attention fp8_reference" and status.kernel == "sdpa"
    name, d = "blocks.0.self_attn.q.weight", tiny.TINY.dim
    changes = {name: [LowRank(normal(d, 4) * 0.2, normal(4, d, seed=1) * 0.2, 0.7)]}
    patched = pool.forward(spec, *GIVEN, LoraSet("fp8-mode-lora", lambda: changes))
    merged = merge(tiny.random_weights(tiny.TINY)[name], changes[name])
    model.set_weight(name, Fp8Weight.quantize(merged, torch.float8_e4m3fn))
    assert tiny.relative_error(patched, model(*GIVEN)) < 5e-3 < 1e-2 < tiny.relative_error(patched, plain)
    assert torch.equal(pool.forward(spec, *GIVEN), plain)


def test_fp8_files_run_in_fp8_mode_on_the_numbers_that_they_have(pool_of, tmp_path):
    path, meant = written(tmp_path, "ComfyUI's newer scaled")
    exact = WanModel.from_checkpoint(meant)(*GIVEN)
    got = pool_of(2).forward(ModelSpec(path, "fp32", "fp32", fp8_mode=LINEAR), *GIVEN)
    assert 5e-3 < tiny.relative_error(got, exact) < 0.05
