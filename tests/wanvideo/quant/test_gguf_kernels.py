"""The blocks of GGUF dequantised by Triton's kernels, to the bit what plain torch gives.

On a GPU; and in Triton's interpreter, which needs none, where the package is installed: the last test runs this file
there.
"""

from __future__ import annotations

from types import ModuleType

import pytest
import torch
from testkit.interpreted import DEVICE, INTERPRETED, assert_same_bits, kernels_of, on_triton, run_interpreted
from wan_parallel.wanvideo.quant.formats.gguf_blocks import BLOCKS, GgufWeight

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
COLUMNS = 1536  # of the 1.3B's narrower matrices


@pytest.fixture(scope="module")
def kernels() -> ModuleType:
    return kernels_of("gguf_triton")


def random_bytes(*shape: int) -> torch.Tensor:
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0)).to(DEVICE)


def random_weight(kind: str, rows: int, columns: int) -> GgufWeight:
    """Any bytes: scales are of every size, some no numbers."""
    block = BLOCKS[kind]
    return GgufWeight(kind, random_bytes(rows, columns // block.numbers * block.nbytes), columns)


class TestKernels:
    pytestmark = on_triton

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("kind", BLOCKS)
    def test_every_byte_means_what_it_means_to_torch(self, kernels, kind, dtype):
        assert_same_bits(kernels, random_weight(kind, 7, COLUMNS), dtype)

    @pytest.mark.parametrize("kind", BLOCKS)
    @pytest.mark.parametrize("rows, blocks", [(0, 2), (1, 1), (1, 3), (65, 1)])
    def test_any_number_of_blocks(self, kernels, kind, rows, blocks):
        assert_same_bits(kernels, random_weight(kind, rows, blocks * BLOCKS[kind].numbers), torch.bfloat16)

    @pytest.mark.parametrize("kind", BLOCKS)
    def test_shares_of_rows_and_columns(self, kernels, kind):
        weight = random_weight(kind, 8, 1792)  # 7 large blocks
        assert_same_bits(kernels, weight.narrow(0, 2, 5), torch.bfloat16)
        for start, length in ((0, 448), (448, 448), (256, 512), (8, 40)):
            assert_same_bits(kernels, weight.narrow(1, start, length), torch.bfloat16)
            assert_same_bits(kernels, weight.narrow(1, start, length).contiguous().narrow(0, 3, 2), torch.bfloat16)

    @pytest.mark.parametrize("kind", BLOCKS)
    @pytest.mark.parametrize("start, length", [(1, 700), (100, 301), (31, 1), (0, 44), (12, 0)])
    def test_slices_of_odd_width(self, kernels, kind, start, length):
        assert_same_bits(kernels, random_weight(kind, 3, 1024).narrow(1, start, length), torch.bfloat16)

    @pytest.mark.parametrize("kind", ["Q4_K", "Q5_1", "Q2_K", "Q6_K"])  # whose blocks begin at 16, 8, 4 and 2 bytes
    @pytest.mark.parametrize("offset", [1, 2, 4, 8, 18, 256])
    def test_blocks_anywhere_in_a_buffer(self, kernels, kind, offset):
        plain = random_weight(kind, 3, 512)
        width = plain.blocks.shape[1]
        buffer = random_bytes(offset + 3 * (width + 6))
        for blocks in (buffer[offset:][: 3 * width].view(3, width), buffer[offset:].view(3, -1)[:, :width]):
            assert_same_bits(kernels, plain.replace({"blocks": blocks.copy_(plain.blocks)}), torch.bfloat16)
        apart = buffer[offset:].as_strided((2, width), (width + 3, 1))
        assert_same_bits(kernels, plain.replace({"blocks": apart}), torch.bfloat16)

    @pytest.mark.parametrize("kind", ["Q4_K", "Q6_K", "Q8_0"])
    def test_rows_more_than_2_gib_apart(self, kernels, kind):
        block = BLOCKS[kind]
        width = 512 // block.numbers * block.nbytes
        rows = torch.empty(2**31 + 2 * width, dtype=torch.uint8, device=DEVICE).as_strided((2, width), (2**31, 1))
        assert_same_bits(kernels, GgufWeight(kind, rows.copy_(random_bytes(2, width)), 512), torch.bfloat16)

    @pytest.mark.skipif(INTERPRETED, reason="needs 6 GiB and a GPU's speed")
    def test_more_than_2_31_numbers(self, kernels):
        if torch.cuda.mem_get_info()[0] < 8 * 2**30:
            pytest.skip("needs 8 GiB")
        columns = 2**16
        rows = 2**31 // columns + 3
        width = columns // 256 * BLOCKS["Q4_K"].nbytes
        weight = GgufWeight("Q4_K", torch.randint(0, 256, (rows, width), dtype=torch.uint8, device=DEVICE), columns)
        got = kernels.dequantize(weight, torch.bfloat16)
        for start in (0, rows - 8):
            expected = weight.narrow(0, start, 8).dequantize_by_torch(torch.bfloat16)
            torch.testing.assert_close(got[start : start + 8], expected, rtol=0, atol=0, equal_nan=True)

    @pytest.mark.skipif(INTERPRETED, reason="torch is taken on a CPU")
    @pytest.mark.parametrize("kind", BLOCKS)
    def test_weights_on_a_gpu_take_the_kernels_which_need_no_room_of_their_own(self, kernels, kind):
        weight = random_weight(kind, 512, 5120)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        dequantised = weight.dequantize(torch.bfloat16)
        assert torch.cuda.max_memory_allocated() - before == dequantised.nbytes


def test_the_kernels_in_tritons_interpreter():
    run_interpreted(__file__)
