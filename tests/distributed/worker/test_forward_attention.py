"""The kernels of one forward: what a worker shows of itself while it loads one."""

from __future__ import annotations

from testkit import tiny
from testkit.shared.one_rank import Rank
from wan_parallel.distributed.shm import signs
from wan_parallel.distributed.shm.signs import Mark, SignsTable
from wan_parallel.distributed.worker import forward_attention
from wan_parallel.distributed.worker.forward_attention import AttentionKernels
from wan_parallel.wanvideo.base.attention_choice import AttentionChoice
from wan_parallel.wanvideo.base.grid import grid_of
from wan_parallel.wanvideo.base.options import PLAIN


def test_a_kernel_that_is_tried_out_is_announced_as_what_may_take_long(spec, monkeypatch):
    rank, table, seen = Rank(spec), SignsTable.create(1), []
    signs.show_in(table.path, 0)
    get_kernel = forward_attention.get_kernel

    def load(*given: object) -> object:
        seen.append(table.read(0).marks)
        return get_kernel(*given)

    monkeypatch.setattr(forward_attention, "get_kernel", load)
    kernels, grid = AttentionKernels(rank.models), grid_of(tiny.inputs().x)
    for _ in range(2):
        kernels.of(AttentionChoice(kernel="sdpa"), rank.loaded.model, grid, PLAIN, 2, 1)
    assert seen == [Mark.FIRST] and table.read(0).marks == Mark.NONE
    table.close()
