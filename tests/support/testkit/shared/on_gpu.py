"""What the tests of Wan variants on real GPUs share."""

from __future__ import annotations

from dataclasses import fields, replace

import torch
from wan_parallel.wanvideo.base.conditioning import Conditioning

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
SIZE = (5, 16, 16)


def on_gpu(conditioning: Conditioning) -> Conditioning:
    moved = {f.name: getattr(conditioning, f.name) for f in fields(conditioning) if f.name != "options"}
    return replace(conditioning, **{name: tensor.cuda() for name, tensor in moved.items() if tensor is not None})
