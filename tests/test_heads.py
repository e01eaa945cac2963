"""Heads dealt out to several tensors and put together again."""

from __future__ import annotations

import pytest
import torch
from wan_parallel.distributed.heads import gather_heads, scatter_heads
from wan_parallel.wanvideo import pointwise

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
SPLITS = [(4, 4), (3, 2, 1, 1), (7,)]


@pytest.fixture(params=DEVICES)
def device(request) -> torch.device:
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("Triton's kernels run on a CUDA GPU")
    device = torch.device(request.param)
    pointwise.use_triton(device)
    return device


@pytest.mark.parametrize("head_dim", [128, 24])
@pytest.mark.parametrize("batch, tokens", [(1, 45), (3, 70), (2, 0)])
@pytest.mark.parametrize("split", SPLITS, ids=str)
def test_every_head_goes_where_it_belongs_and_comes_back(device, split, batch, tokens, head_dim):
    x = torch.randn(batch, tokens, sum(split), head_dim, device=device).bfloat16()
    parts = [torch.empty(tokens, batch, heads, head_dim, device=device, dtype=x.dtype) for heads in split]
    scatter_heads(x, parts)
    assert torch.equal(torch.cat(parts, dim=2).transpose(0, 1), x)
    back = torch.empty_like(x)
    gather_heads(parts, back)
    assert torch.equal(back, x)
