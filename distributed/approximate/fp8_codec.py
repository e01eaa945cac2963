"""Vectors in eight bits: float8 e4m3 numbers with a float32 scale for each vector.

On CUDA Triton's kernels convert in one pass over memory, where they are in use and the GPU knows the format; elsewhere
plain torch converts. Both compute in float32.
"""

from __future__ import annotations

import functools
from importlib import import_module

import torch

from ...wanvideo.ops import pointwise

FP8 = torch.float8_e4m3fn
FP8_MAX = torch.finfo(FP8).max
_SMALLEST = 1e-12  # scale of a vector of zeros


def to_fp8(x: torch.Tensor, out: torch.Tensor, scales: torch.Tensor) -> None:
    """Write x [n, d] as numbers (out [n, d], float8 e4m3) and their scales (float32 [n]): x = out * scale."""
    if _fused(x.device):
        import_module(".fp8_codec_triton", __package__).to_fp8(x, out, scales)
        return
    values = x.float()
    torch.div(values.abs().amax(-1), FP8_MAX, out=scales).clamp_min_(_SMALLEST)
    out.copy_((values / scales.unsqueeze(-1)).clamp_(-FP8_MAX, FP8_MAX))


def from_fp8(x: torch.Tensor, scales: torch.Tensor, out: torch.Tensor) -> None:
    """Write numbers x [n, d] times their scales (float32 [n]) into out [n, d] of any float dtype."""
    if _fused(x.device):
        import_module(".fp8_codec_triton", __package__).from_fp8(x, scales, out)
        return
    out.copy_(x.float() * scales.unsqueeze(-1))


@functools.cache
def _fused(device: torch.device) -> bool:
    """Whether Triton's kernels convert on this device: Triton converts to e4m3 from compute capability 8.9 on."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 9) and pointwise.triton_in_use()
