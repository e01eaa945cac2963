"""The kernels of heads.py. Imported where Triton is known to work.

Every head has an address of its own in a table, so that one kernel serves any number of tensors.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
import triton
import triton.language as tl

from ..wanvideo.triton_launch import Launcher

_ROWS = 32


@triton.jit
def _copy_kernel(x, table, n, batch, heads, head_dim, ROWS: tl.constexpr, BLOCK: tl.constexpr, TO_TABLE: tl.constexpr):
    """Some rows of one head: between x [batch, n, heads, head_dim] and rows [n, batch] at the head's address."""
    head, columns = tl.program_id(1), tl.arange(0, BLOCK)
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = (rows < n * batch)[:, None] & (columns < head_dim)[None, :]
    there = (tl.load(table + 2 * head)).to(x.dtype)
    stride = tl.load(table + 2 * head + 1)
    here = (rows // n).to(tl.int64) * n + rows % n  # rows count items first, the others count tokens first
    there_rows = ((rows % n) * batch + rows // n).to(tl.int64)
    inner = x + (here * heads + head)[:, None] * head_dim + columns[None, :]
    outer = tl.multiple_of(there, 16) + (there_rows * tl.multiple_of(stride, 8))[:, None] + columns[None, :]
    if TO_TABLE:
        tl.store(outer, tl.load(inner, mask=inside), mask=inside)
    else:
        tl.store(inner, tl.load(outer, mask=inside), mask=inside)


_launch = Launcher(_copy_kernel)


def scatter(x: torch.Tensor, parts: Sequence[torch.Tensor]) -> None:
    """See `heads.scatter_heads`."""
    _copy(x, parts, to_parts=True)


def gather(parts: Sequence[torch.Tensor], out: torch.Tensor) -> None:
    """See `heads.gather_heads`."""
    _copy(out, parts, to_parts=False)


def _copy(x: torch.Tensor, parts: Sequence[torch.Tensor], to_parts: bool) -> None:
    batch, n, heads, head_dim = x.shape
    if not x.numel():
        return
    places = tuple((part.data_ptr(), part.shape[2]) for part in parts)
    table = _table(places, head_dim, x.element_size(), x.device)
    block = triton.next_power_of_2(head_dim)
    grid = (triton.cdiv(batch * n, _ROWS), heads)
    _launch(grid, (x, table), (n, batch, heads, head_dim), (_ROWS, block, to_parts))


@lru_cache(maxsize=256)
def _table(
    places: tuple[tuple[int, int], ...], head_dim: int, itemsize: int, device: torch.device
) -> torch.Tensor:
    """Address and row stride (in elements) of each head, int64 [heads, 2]."""
    rows = [
        (address + i * head_dim * itemsize, count * head_dim) for address, count in places for i in range(count)
    ]
    return torch.tensor(rows, dtype=torch.int64).pin_memory().to(device, non_blocking=True)  # the host goes on at once
