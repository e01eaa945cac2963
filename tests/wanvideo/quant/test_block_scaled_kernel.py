"""NVFP4 and MXFP8 dequantised by Triton's kernel, to the bit what plain torch gives.

On a GPU; and in Triton's interpreter, which needs none, where the package is installed: the last test runs this file
there.
"""

from __future__ import annotations

from types import ModuleType

import pytest
import torch
from testkit.interpreted import DEVICE, INTERPRETED, assert_same_bits, kernels_of, on_triton, run_interpreted
from wan_parallel.wanvideo.quant.formats.block_scaled import GROUPS, BlockScaledWeight

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@pytest.fixture(scope="module")
def kernels() -> ModuleType:
    return kernels_of("block_scaled_triton")


def random_weight(kind: str, rows: int, columns: int) -> BlockScaledWeight:
    """Any bytes: scales are of every size, some no numbers; those of MXFP8 as far as torch does not round to zero."""
    generator = torch.Generator().manual_seed(0)
    groups = columns // GROUPS[kind].numbers
    data = torch.randint(256, (rows, groups * GROUPS[kind].nbytes), dtype=torch.uint8, generator=generator)
    scales = torch.randint(256, (rows, groups), dtype=torch.uint8, generator=generator)
    if kind == "MXFP8":
        scales = scales.clamp(20, 200)
    scale = torch.full((1, 1), 0.37)
    return BlockScaledWeight(kind, *(x.to(DEVICE) for x in (data, scales, scale)), columns)


@pytest.mark.parametrize("kind", GROUPS)
class TestKernel:
    pytestmark = on_triton

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_every_byte_means_what_it_means_to_torch(self, kernels, kind, dtype):
        assert_same_bits(kernels, random_weight(kind, 33, 1536), dtype)

    @pytest.mark.parametrize("rows, columns", [(0, 64), (1, 32), (3, 96), (130, 32), (16, 5120)])
    def test_any_number_of_groups(self, kernels, kind, rows, columns):
        assert_same_bits(kernels, random_weight(kind, rows, columns), torch.bfloat16)

    @pytest.mark.parametrize("start, length", [(0, 512), (512, 512), (16, 96), (1, 700), (100, 301), (31, 1), (12, 0)])
    def test_slices_of_rows_and_columns(self, kernels, kind, start, length):
        part = random_weight(kind, 9, 1024).narrow(1, start, length)
        for weight in (part, part.narrow(0, 2, 5), part.contiguous().narrow(0, 3, 2), part.narrow(1, length // 3, 0)):
            assert_same_bits(kernels, weight, torch.bfloat16)

    @pytest.mark.parametrize("offset", [1, 2, 4, 8, 20, 256])
    @pytest.mark.parametrize("apart", [0, 3, 8])
    def test_numbers_anywhere_in_a_buffer(self, kernels, kind, offset, apart):
        plain = random_weight(kind, 3, 512)
        width = plain.data.shape[1] + apart
        buffer = torch.zeros(offset + 3 * width, dtype=torch.uint8, device=DEVICE)
        there = buffer[offset:].view(3, width)[:, : plain.data.shape[1]].copy_(plain.data)
        assert_same_bits(kernels, plain.replace({**plain.components(), "data": there}), torch.bfloat16)

    @pytest.mark.skipif(INTERPRETED, reason="torch is taken on a CPU")
    def test_weights_on_a_gpu_take_the_kernel_which_needs_no_room_of_its_own(self, kernels, kind):
        weight = random_weight(kind, 512, 5120)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        dequantised = weight.dequantize(torch.bfloat16)
        assert torch.cuda.max_memory_allocated() - before == dequantised.nbytes


def test_the_kernel_in_tritons_interpreter():
    run_interpreted(__file__)
