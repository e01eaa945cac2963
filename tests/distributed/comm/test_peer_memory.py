"""What peer memory counts. tests/distributed/parallel/test_sequence.py has it between processes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
import torch.distributed as dist
from wan_parallel.distributed.comm.peer_memory import HostPeerMemory, Transfer


class Noted(HostPeerMemory):
    """Notes down the signals that it would write."""

    def _put(self, transfers: Sequence[Transfer], values: Sequence[int], tensor: torch.Tensor) -> None:
        self.signals = [(sent.rank, sent.signal, value) for sent, value in zip(transfers, values, strict=True)]


def test_each_letter_raises_its_flag_by_one_also_where_several_leave_together(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        memory = Noted(dist.group.WORLD, torch.device("cpu"))
        memory.arrange(None, 64)
        transfer, one = Transfer(0, 3, (1, 1, 4), 0, (4, 4), 0, (4, 4), 0), torch.ones(1)
        memory.put([transfer, replace(transfer, signal=4, offset=8), transfer], one)
        assert memory.signals == [(0, 3, 1), (0, 4, 1), (0, 3, 2)]
        memory.put([transfer], one)
        assert memory.signals == [(0, 3, 3)]
        memory.close()
    finally:
        dist.destroy_process_group()
