"""Quantised weights on a GPU: the same numbers as on the CPU, in the bytes of their format, and at what cost."""

from __future__ import annotations

import numpy
import pytest
import torch
from testkit import tiny
from testkit.format_files import STORED, write_gguf, written
from testkit.tiny import relative_error
from wan_parallel.distributed.client.pool import acquire
from wan_parallel.distributed.plan.degrees import ParallelPlan
from wan_parallel.distributed.protocol.specs import ModelSpec, PoolSettings
from wan_parallel.wanvideo.checkpoint.weight_source import total_storage_bytes
from wan_parallel.wanvideo.model.model import WanModel
from wan_parallel.wanvideo.quant.formats.block_scaled import GROUPS, BlockScaledWeight
from wan_parallel.wanvideo.quant.formats.fp8 import Fp8Weight
from wan_parallel.wanvideo.quant.formats.gguf_blocks import BLOCKS, GgufWeight
from wan_parallel.wanvideo.quant.formats.int8 import Int8Weight
from wan_parallel.wanvideo.quant.quantized import QuantizedWeight

if not torch.cuda.is_available():
    pytest.skip("needs a CUDA GPU", allow_module_level=True)

GIVEN = tiny.inputs()
COMPUTE = [torch.float32, torch.float16, torch.bfloat16]
ROWS, COLUMNS = 13824, 5120  # of the largest matrix of a 14B


def quantised(kind: str, rows: int, columns: int) -> QuantizedWeight:
    generator = torch.Generator().manual_seed(0)
    if kind in BLOCKS:
        width = columns // BLOCKS[kind].numbers * BLOCKS[kind].nbytes
        raw = numpy.random.default_rng(0).integers(0, 256, (rows, width), dtype=numpy.uint8)
        return GgufWeight(kind, torch.from_numpy(raw), columns)
    plain = torch.randn(rows, columns, generator=generator)
    if kind in GROUPS:
        groups, nbytes = columns // GROUPS[kind].numbers, GROUPS[kind].nbytes
        data = torch.randint(120, (rows, groups * nbytes), dtype=torch.uint8, generator=generator)
        scales = torch.randint(100, 120, (rows, groups), dtype=torch.uint8, generator=generator)
        return BlockScaledWeight(kind, data, scales, torch.full((1, 1), 0.03), columns)
    if kind == "int8 convrot":
        return Int8Weight(plain.mul(30).to(torch.int8), torch.full((rows, 1), 0.03), 256)
    return Fp8Weight.quantize(plain, torch.float8_e4m3fn if kind == "e4m3" else torch.float8_e5m2)


KINDS = ["e4m3", "e5m2", "int8 convrot", *GROUPS, *BLOCKS]


@pytest.mark.parametrize("dtype", COMPUTE, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_a_gpu_dequantises_as_the_cpu_does(kind, dtype):
    weight = quantised(kind, 96, 1024)
    on_cpu, on_gpu = weight.dequantize(dtype), weight.to("cuda").dequantize(dtype).cpu()
    tolerance = 1e-2 if kind == "int8 convrot" else 0  # a product with a matrix of signs
    assert torch.allclose(on_gpu, on_cpu, rtol=tolerance, atol=tolerance, equal_nan=True)


@pytest.mark.parametrize("kind", KINDS)
def test_what_dequantising_the_largest_matrix_costs(kind):
    weight = quantised(kind, ROWS, COLUMNS).to("cuda")
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    weight.dequantize(torch.bfloat16)
    peak = torch.cuda.max_memory_allocated() - before
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(5):
        weight.dequantize(torch.bfloat16)
    end.record()
    torch.cuda.synchronize()
    milliseconds = start.elapsed_time(end) / 5
    print(f"{kind}: {milliseconds:.2f} ms for {ROWS} x {COLUMNS}, {peak / 2**20:.0f} MiB at its peak")
    assert peak < 8 * ROWS * COLUMNS + 2**30


@pytest.mark.parametrize("kind", ["e4m3", *STORED, "Q4_K", "Q8_0"])
def test_a_model_takes_the_bytes_of_its_format_and_computes_what_they_mean(tmp_path, kind):
    if kind == "e4m3":
        path, weight_dtype = tiny.write_checkpoint(tmp_path / "tiny.safetensors"), torch.float8_e4m3fn
    elif kind in BLOCKS:
        path, weight_dtype = write_gguf(tmp_path / "wan.gguf", kind)[0], torch.bfloat16
    else:
        path, weight_dtype = written(tmp_path, kind)[0], torch.bfloat16
    torch.ones(1, 1, device="cuda") @ torch.ones(1, 1, device="cuda")  # has cuBLAS take its memory
    before = torch.cuda.memory_allocated()
    model = WanModel.from_checkpoint(path, weight_dtype, torch.float32, "cuda")
    taken = torch.cuda.memory_allocated() - before
    rounding = 512 * 1024  # torch rounds each tensor up to 512 bytes
    assert taken <= total_storage_bytes(path, weight_dtype) * 1.1 + rounding
    on_cpu = WanModel.from_checkpoint(path, weight_dtype, torch.float32)
    with torch.inference_mode():
        assert relative_error(model(*(t.cuda() for t in GIVEN)).cpu(), on_cpu(*GIVEN)) <= 1e-5


def test_a_14b_in_fp8_takes_half_the_memory_of_bf16():
    pool = acquire(PoolSettings(ParallelPlan(num_gpus=1), device="cuda"))
    used = {}
    try:
        for dtype in ("bf16", "fp8_e4m3fn"):
            spec = ModelSpec("random:14b", dtype, "bf16")
            pool.ensure_ready(spec)
            used[dtype] = pool.status().workers[0].used
            pool.unload(spec)
        empty = pool.status().workers[0].used
    finally:
        pool.close()
    taken = {dtype: (value - empty) / 2**30 for dtype, value in used.items()}
    print(taken)
    assert 26 < taken["bf16"] < 29 and 13 < taken["fp8_e4m3fn"] < 15.5  # with what torch caches
