"""What a mailbox counts. tests/test_sequence.py has it between processes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from wan_parallel.distributed.mailbox import HostMailbox, Letter


class Noted(HostMailbox):
    """Notes down the flags that it would raise."""

    def _write(self, letters: Sequence[Letter], values: Sequence[int]) -> None:
        self.flags = [(letter.rank, letter.channel, value) for letter, value in zip(letters, values, strict=True)]


def test_each_letter_raises_its_flag_by_one_also_where_several_leave_together(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        mailbox = Noted(dist.group.WORLD, torch.device("cpu"))
        mailbox.arrange(None, 64)
        letter = Letter(0, 0, torch.ones(1), 3)
        mailbox.send([letter, Letter(0, 8, torch.ones(1), 4), letter])
        assert mailbox.flags == [(0, 3, 1), (0, 4, 1), (0, 3, 2)]
        mailbox.send([letter])
        assert mailbox.flags == [(0, 3, 3)]
        mailbox.close()
    finally:
        dist.destroy_process_group()
