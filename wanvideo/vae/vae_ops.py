"""The operations of the layers of Wan's VAEs, on activations laid out as [frames, rows, columns, channels].

A convolution reads a buffer that contains its border: two earlier frames, and a row and a column on each side. The one
pass that writes the buffer replaces all padding and joining.
"""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType

import torch
from torch.nn import functional as F

from ..base.user_error import UserError
from ..ops.triton_probe import tried_out

CONVOLUTIONS = ("auto", "triton", "conv3d", "conv3d_ncdhw", "conv2d")
"""Ways to compute a 3x3x3 convolution: kernels of our own, torch's with channels last and first, and torch's 2-D one on
three frames side by side in the channels. auto is triton where that works, else conv3d."""

Convolution = Callable[[torch.Tensor, torch.Tensor | None], torch.Tensor]
"""From a buffer [T + kt - 1, H + kh - 1, W + kw - 1, C], and a tensor to add or None, to [T, H, W, out_channels]."""

_EPS = 1e-30  # below float32's rounding of any mean square that matters; a pixel of zeros stays one


class VAEError(UserError, ValueError):
    """The VAE, its input or its options cannot be run here. The text says which, and what to do."""


class VAEOps:
    """The kernels to use on a device.

    Args:
        convolution: one of `CONVOLUTIONS`.
    """

    def __init__(self, device: torch.device, dtype: torch.dtype, convolution: str = "auto"):
        self.triton = _triton(device) if dtype in (torch.bfloat16, torch.float16) else None
        if convolution == "auto":
            convolution = "triton" if self.triton is not None else "conv3d"
        if convolution == "triton" and self.triton is None:
            raise VAEError(
                f"The VAE's convolutions are to run in Triton, which does not work on {device} in {dtype}. "
                "Use a CUDA GPU with bf16 or fp16, or another convolution."
            )
        self.convolution = convolution

    def conv(self, weight: torch.Tensor, bias: torch.Tensor) -> Convolution:
        """A convolution without padding, of weight [O, C, kt, kh, kw] or [O, C, kh, kw] and bias [O]."""
        flat = weight.ndim == 4
        if self.triton is not None and self.convolution == "triton" and self.triton.fits(weight):
            return self.triton.Conv(weight.unsqueeze(2) if flat else weight, bias)
        if flat:
            return _Conv2d(weight, bias)
        if self.convolution == "conv2d":
            return _FramesInChannels(weight, bias)
        return _Conv3d(weight, bias, self.convolution != "conv3d_ncdhw")

    def norm_silu(self, x: torch.Tensor, gamma: torch.Tensor, out: torch.Tensor) -> None:
        """Write SiLU(RMSNorm(x) * gamma) into `out`, a view of a buffer. x: [T, H, W, C], gamma: [C]."""
        if self.triton is not None and x.is_cuda:
            self.triton.norm_silu(x, gamma, out)
        else:
            out.copy_(F.silu(norm(x, gamma)))


def norm(x: torch.Tensor, gamma: torch.Tensor) -> torch.Tensor:
    """RMSNorm over the channels, the last dimension; computed in float32."""
    return F.rms_norm(x.float(), gamma.shape, gamma.float(), _EPS).to(x.dtype)


class _Conv3d:
    def __init__(self, weight: torch.Tensor, bias: torch.Tensor, channels_last: bool):
        self.layout = torch.channels_last_3d if channels_last else torch.contiguous_format
        self.weight, self.bias = weight.contiguous(memory_format=self.layout), bias

    def __call__(self, buffer: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
        x = buffer.permute(3, 0, 1, 2).unsqueeze(0).contiguous(memory_format=self.layout)
        y = F.conv3d(x, self.weight, self.bias)[0].permute(1, 2, 3, 0).contiguous()
        return y if residual is None else y.add_(residual)


class _Conv2d:
    def __init__(self, weight: torch.Tensor, bias: torch.Tensor):
        self.weight, self.bias = weight.contiguous(memory_format=torch.channels_last), bias

    def __call__(self, buffer: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
        y = F.conv2d(buffer.permute(0, 3, 1, 2), self.weight, self.bias).permute(0, 2, 3, 1).contiguous()
        return y if residual is None else y.add_(residual)


class _FramesInChannels:
    """A convolution over kt frames as a 2-D one over kt times the channels."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor):
        self.frames = weight.shape[2]
        self.conv = _Conv2d(weight.transpose(1, 2).flatten(1, 2), bias)

    def __call__(self, buffer: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
        count = len(buffer) - self.frames + 1
        return self.conv(torch.cat([buffer[i : i + count] for i in range(self.frames)], dim=-1), residual)


def _triton(device: torch.device) -> ModuleType | None:
    """The module of Triton kernels; None where the kernels do not work on the device."""
    global _kernels
    if device.type == "cuda" and _kernels is None:
        _kernels = tried_out(".vae_triton", __package__, device)
    return _kernels if device.type == "cuda" else None


_kernels: ModuleType | None = None
