"""NVFP4 and MXFP8 dequantised by Triton's kernel, to the bit what plain torch gives.

On a GPU; and in Triton's interpreter, which needs none, where the package is installed: the last test runs this file
there.
"""

from __future__ import annotations

import os
import subprocess
import sys
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType

import pytest
import torch
from wan_parallel.wanvideo import pointwise
from wan_parallel.wanvideo.block_scaled import GROUPS, BlockScaledWeight

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = torch.device("cpu" if INTERPRETED else "cuda")
DTYPES = [torch.float32, torch.float16, torch.bfloat16]

on_triton = [] if INTERPRETED else [pytest.mark.gpu]
on_triton.append(
    pytest.mark.skipif(not (INTERPRETED or torch.cuda.is_available()), reason="Triton's kernels run on a CUDA GPU")
)


@pytest.fixture(scope="module")
def kernels() -> ModuleType:
    if not (INTERPRETED or pointwise.use_triton(DEVICE)):
        pytest.skip("Triton does not work on this machine")
    return import_module("wan_parallel.wanvideo.block_scaled_triton")


def random_weight(kind: str, rows: int, columns: int) -> BlockScaledWeight:
    """Any bytes: scales are of every size, some no numbers; those of MXFP8 as far as torch does not round to zero."""
    generator = torch.Generator().manual_seed(0)
    nbytes, groups = columns // (2 if kind == "NVFP4" else 1), columns // GROUPS[kind]
    data = torch.randint(256, (rows, nbytes), dtype=torch.uint8, generator=generator)
    scales = torch.randint(256, (rows, groups), dtype=torch.uint8, generator=generator)
    if kind == "MXFP8":
        scales = scales.clamp(20, 200)
    scale = torch.full((1, 1), 0.37)
    return BlockScaledWeight(kind, *(x.to(DEVICE) for x in (data, scales, scale)), columns)


def same(kernels: ModuleType, weight: BlockScaledWeight, dtype: torch.dtype) -> None:
    got, expected = kernels.dequantize(weight, dtype), weight.dequantize_by_torch(dtype)
    assert got.dtype == dtype and got.shape == expected.shape and got.is_contiguous()
    bits = torch.int32 if dtype == torch.float32 else torch.int16
    expected_bits = expected.contiguous().view(bits)
    if INTERPRETED and dtype == torch.bfloat16:  # which cuts off what it should round
        expected = weight.dequantize_by_torch(torch.float32).contiguous()
        expected_bits = (expected.view(torch.int32) >> 16).to(bits)
    assert ((got.view(bits) == expected_bits) | (got.isnan() & expected.isnan())).all()


@pytest.mark.parametrize("kind", GROUPS)
class TestKernel:
    pytestmark = on_triton

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_every_byte_means_what_it_means_to_torch(self, kernels, kind, dtype):
        same(kernels, random_weight(kind, 33, 1536), dtype)

    @pytest.mark.parametrize("rows, columns", [(0, 64), (1, 32), (3, 96), (130, 32), (16, 5120)])
    def test_any_number_of_groups(self, kernels, kind, rows, columns):
        same(kernels, random_weight(kind, rows, columns), torch.bfloat16)

    @pytest.mark.parametrize("start, length", [(0, 512), (512, 512), (16, 96), (1, 700), (100, 301), (31, 1), (12, 0)])
    def test_slices_of_rows_and_columns(self, kernels, kind, start, length):
        part = random_weight(kind, 9, 1024).narrow(1, start, length)
        for weight in (part, part.narrow(0, 2, 5), part.contiguous().narrow(0, 3, 2), part.narrow(1, length // 3, 0)):
            same(kernels, weight, torch.bfloat16)

    @pytest.mark.skipif(INTERPRETED, reason="torch is taken on a CPU")
    def test_weights_on_a_gpu_take_the_kernel_which_needs_no_room_of_its_own(self, kernels, kind):
        weight = random_weight(kind, 512, 5120)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        dequantised = weight.dequantize(torch.bfloat16)
        assert torch.cuda.max_memory_allocated() - before == dequantised.nbytes


def test_the_kernel_in_tritons_interpreter():
    if INTERPRETED or find_spec("triton") is None:
        pytest.skip("in it already" if INTERPRETED else "triton is not installed")
    command = [sys.executable, "-W", "ignore", "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__]
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=170)
    assert done.returncode == 0 and "passed" in done.stdout, done.stdout
