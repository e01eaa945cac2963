"""The fused kernels compute what plain torch does."""

from __future__ import annotations

import pytest
import torch
from testkit.tiny import relative_error
from torch.nn import functional as F
from wan_parallel.wanvideo.ops import pointwise
from wan_parallel.wanvideo.ops.pointwise import ByToken, written_out
from wan_parallel.wanvideo.ops.rope import rope_table

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="Triton's kernels run on a CUDA GPU"),
]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
GRID = (2, 3, 5)
TOKENS = 30


@pytest.fixture(autouse=True)
def triton_kernels():
    if not pointwise.use_triton(torch.device("cuda")):
        pytest.skip("Triton does not work on this machine")


@pytest.fixture
def plain(monkeypatch):
    """Call a function of pointwise.py without Triton."""

    def call(function, *arguments):
        with monkeypatch.context() as patch:
            patch.setattr(pointwise, "_kernels", None)
            return function(*arguments)

    return call


def normal(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, device="cuda").to(dtype)


def agree(fused: torch.Tensor, reference: torch.Tensor) -> None:
    assert fused.dtype == reference.dtype
    tolerance = 1e-5 if fused.dtype == torch.float32 else torch.finfo(fused.dtype).eps
    torch.testing.assert_close(fused, reference, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [512, 1536, 5120])
@pytest.mark.parametrize("rows", [None, 1, TOKENS])
def test_norm_modulates_every_token_of_a_slice(dtype, width, rows, plain):
    x = normal(2, TOKENS + 7, width)[:, 3 : 3 + TOKENS]  # not contiguous, as a slice of the tokens is
    shape = (width,) if rows is None else (2, rows, width)
    scale = normal(*shape)
    shift = normal(*shape[:-1], 3, width)[..., 1, :]  # one of several vectors in one tensor, as the modulation is
    arguments = x, scale, shift, 1e-6, dtype
    agree(pointwise.norm(*arguments), plain(pointwise.norm, *arguments))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [512, 1536, 5120])
@pytest.mark.parametrize("rotated", [False, True])
def test_rms_norm_rotates_each_head(dtype, width, rotated, plain):
    rope = rope_table(GRID, 128, "cuda") if rotated else None
    arguments = normal(2, TOKENS, width, dtype=dtype), normal(width), 1e-6, rope
    agree(pointwise.rms_norm(*arguments), plain(pointwise.rms_norm, *arguments))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rotated", [False, True])
def test_rms_norm_of_a_part_of_the_width_takes_the_mean_square_of_the_whole(dtype, rotated, plain):
    rope, whole = rope_table(GRID, 128, "cuda") if rotated else None, normal(2, TOKENS, 5120, dtype=dtype)
    weight, mean_square = normal(5120), whole.float().square().mean(-1)
    parts = [
        pointwise.rms_norm(whole[..., s].contiguous(), weight[s], 1e-6, rope, mean_square)
        for s in (slice(0, 1280), slice(1280, 5120))
    ]
    agree(torch.cat(parts, dim=-1), plain(pointwise.rms_norm, whole, weight, 1e-6, rope))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [None, 1, TOKENS])
def test_add_changes_the_slice_and_nothing_beside_it(dtype, rows, plain):
    whole = normal(2, TOKENS + 7, 1536)
    y = normal(2, TOKENS, 1536, dtype=dtype)
    gate = None if rows is None else normal(2, rows, 3, 1536)[:, :, 1]
    fused, reference = whole.clone(), whole.clone()
    pointwise.add_(fused[:, 3 : 3 + TOKENS], y, gate)
    plain(pointwise.add_, reference[:, 3 : 3 + TOKENS], y, gate)
    agree(fused, reference)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [512, 5120])
@pytest.mark.parametrize("rows", [None, 1, TOKENS])
def test_a_sum_and_its_norm_in_one_pass_are_those_of_two(dtype, width, rows):
    whole, y = normal(2, TOKENS + 7, width), normal(2, TOKENS + 9, width, dtype=dtype)[:, 4 : 4 + TOKENS]
    gate = None if rows is None else normal(2, rows, 3, width)[:, :, 1]
    scale, shift = normal(2, rows or 1, width), normal(width)
    apart, together = whole.clone(), whole.clone()
    pointwise.add_(apart[:, 3 : 3 + TOKENS], y, gate)
    expected = pointwise.norm(apart[:, 3 : 3 + TOKENS], scale, shift, 1e-6, dtype)
    got = pointwise.add_norm(together[:, 3 : 3 + TOKENS], y, gate, scale, shift, 1e-6, dtype)
    agree(together, apart)
    agree(got, expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("part", [slice(0, TOKENS), slice(4, TOKENS - 3)], ids=["all", "some"])
def test_few_vectors_give_what_one_for_each_token_gives(dtype, part):
    row = torch.arange(TOKENS, device="cuda") // 7
    gate, scale, shift = (ByToken(normal(2, 3, 5, 1536)[:, 1], row).of(part) for _ in range(3))
    x, y = normal(2, TOKENS, 1536)[:, part], normal(2, TOKENS, 1536, dtype=dtype)[:, part]
    weights = normal(1536), normal(1536)
    for scales in ((scale, shift), weights):
        whole = tuple(written_out(v) for v in scales)
        assert torch.equal(pointwise.norm(x, *scales, 1e-6, dtype), pointwise.norm(x, *whole, 1e-6, dtype))
        for g in (None, gate):
            one, other = x.clone(), x.clone()
            dense = None if g is None else written_out(g)
            got = pointwise.add_norm(one, y, g, *scales, 1e-6, dtype)
            assert torch.equal(got, pointwise.add_norm(other, y, dense, *whole, 1e-6, dtype))
            assert torch.equal(one, other)
            assert torch.equal(pointwise.add_(one, y, g), pointwise.add_(other, y, dense))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, TOKENS])
def test_gelu_in_the_product_is_no_less_exact_than_behind_it(dtype, rows, monkeypatch):
    monkeypatch.setattr(pointwise, "_ROWS_OF_GELU", 16)
    x, weight, bias = normal(2, rows, 512, dtype=dtype), normal(1024, 512, dtype=dtype) / 20, normal(1024, dtype=dtype)
    exact = F.gelu(F.linear(x.double(), weight.double(), bias.double()), approximate="tanh")
    behind = F.gelu(F.linear(x, weight, bias), approximate="tanh")
    fused = pointwise.gelu_product(x, weight, bias)
    assert fused.shape == behind.shape and fused.dtype == dtype
    assert relative_error(fused, exact) <= 1.05 * relative_error(behind, exact)


def test_what_was_compiled_for_aligned_addresses_is_not_launched_on_others(plain):
    """A vector of 16 bytes cannot be loaded from them."""
    numbers = normal(2 * TOKENS * 512 + 3)
    vectors = normal(512), normal(512)
    for offset in (0, 0, 1, 1, 3, 0):
        x = numbers[offset : offset + 2 * TOKENS * 512].view(2, TOKENS, 512)
        arguments = x, *vectors, 1e-6, torch.float32
        agree(pointwise.norm(*arguments), plain(pointwise.norm, *arguments))
