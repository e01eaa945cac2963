"""What a mailbox counts. tests/distributed/parallel/test_sequence.py has it between processes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
import torch.distributed as dist
from wan_parallel.distributed.comm.peer_memory import HostMailbox, Letter


class Noted(HostMailbox):
    """Notes down the flags that it would raise."""

    def _write(self, letters: Sequence[Letter], values: Sequence[int], tensor: torch.Tensor) -> None:
        self.flags = [(letter.rank, letter.channel, value) for letter, value in zip(letters, values, strict=True)]


def test_each_letter_raises_its_flag_by_one_also_where_several_leave_together(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        mailbox = Noted(dist.group.WORLD, torch.device("cpu"))
        mailbox.arrange(None, 64)
        letter, one = Letter(0, 3, (1, 1, 4), 0, (4, 4), 0, (4, 4), 0), torch.ones(1)
        mailbox.send([letter, replace(letter, channel=4, offset=8), letter], one)
        assert mailbox.flags == [(0, 3, 1), (0, 4, 1), (0, 3, 2)]
        mailbox.send([letter], one)
        assert mailbox.flags == [(0, 3, 3)]
        mailbox.close()
    finally:
        dist.destroy_process_group()
