"""The attention kernels of GPUs against float64, those that are installed."""

from __future__ import annotations

import math

import pytest
import torch
from wan_parallel.wanvideo.attention.kernels import KERNEL_NAMES, AttentionError, available_kernels, get_kernel

if not torch.cuda.is_available():
    pytest.skip("needs a CUDA GPU", allow_module_level=True)

CUDA = torch.device("cuda")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
OUT_TOLERANCE = {torch.float32: 2e-5, torch.float16: 1e-3, torch.bfloat16: 6e-3}
LSE_TOLERANCE = 5e-4
LOSSY_TOLERANCE = 5e-2
LENGTHS = ((512, 512), (1000, 777), (33, 4096), (2000, 512))  # of the queries and of the keys


def tensors(q_length, k_length, heads, head_dim, dtype):
    return tuple(
        torch.randn(2, length, heads, head_dim, device=CUDA).to(dtype) for length in (q_length, k_length, k_length)
    )


def relative_error(got, expected):
    return float((got.double() - expected).norm() / expected.norm())


def check(kernel, q, k, v):
    scores = torch.einsum("bqhd,bkhd->bhqk", q.double(), k.double()) / math.sqrt(q.shape[-1])
    expected = torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), v.double())
    tolerance = LOSSY_TOLERANCE if kernel.lossy else OUT_TOLERANCE[q.dtype]
    out = kernel(q, k, v)
    assert out.shape == q.shape and out.dtype == q.dtype
    assert relative_error(out, expected) <= tolerance
    if kernel.has_lse:
        out, lse = kernel.with_lse(q, k, v)
        assert relative_error(out, expected) <= tolerance
        assert lse.shape == scores.shape[:3] and lse.dtype == torch.float32
        error = float((lse.double() - scores.logsumexp(-1)).abs().max())
        assert error <= (LOSSY_TOLERANCE if kernel.lossy else LSE_TOLERANCE)


def installed(name, dtype):
    if name != "auto" and name not in available_kernels(CUDA, dtype):
        pytest.skip(f"{name} is not installed, or does not do {dtype} on this GPU")
    try:
        return get_kernel(name, CUDA, dtype)
    except AttentionError as refusal:  # SageAttention 1.0.6 lets keys beyond the last one take part
        if name != "sageattn":
            raise
        pytest.skip(str(refusal))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", KERNEL_NAMES)
def test_a_kernel_matches_float64_at_any_lengths(name, dtype):
    kernel = installed(name, dtype)
    for q_length, k_length in LENGTHS:
        check(kernel, *tensors(q_length, k_length, 3, 128, dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", KERNEL_NAMES)
def test_a_kernel_takes_what_an_exchange_leaves_behind(name, dtype):
    """The exchange packs q, k and v token by token, with the batch inside."""
    kernel = installed(name, dtype)
    packed = torch.randn(700, 2, 3, 5, 128, device=CUDA).to(dtype)
    check(kernel, *(packed[:, :, i].transpose(0, 1) for i in range(3)))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", [12, 32, 64])
def test_sdpa_takes_other_head_sizes(dtype, head_dim):
    check(get_kernel("sdpa", CUDA, dtype), *tensors(300, 200, 2, head_dim, dtype))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_auto_is_a_kernel_for_this_gpu(dtype):
    kernel = get_kernel("auto", CUDA, dtype)
    assert kernel.name in available_kernels(CUDA, dtype) and not kernel.lossy
