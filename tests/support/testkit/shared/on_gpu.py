"""What the tests of Wan variants on real GPUs share."""

from __future__ import annotations

from dataclasses import replace

import torch
from wan_parallel.wanvideo.base.conditioning import Conditioning

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
SIZE = (5, 16, 16)


def on_gpu(conditioning: Conditioning) -> Conditioning:
    return replace(conditioning, given={name: tensor.cuda() for name, tensor in conditioning.given.items()})
