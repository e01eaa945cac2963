"""The encoder of Wan 2.1's video VAE on one device, out of the layers of vae.py.

It takes the first frame of a video alone and the others by four, so pieces end at such a four.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping

import torch
from torch.nn import functional as F

from .vae import FRAMES, PIECE_BYTES, SCALE, Attention, CausalConv, Frame, NormConv, Pass, Residual, Weights
from .vae_ops import VAEError, VAEOps

_LIVE = 4
"""Tensors of the largest size that a residual block has at a time."""


class Downsample:
    """Half the rows and columns, and half the frames where there is a convolution over time.

    The first frame of a video passes that as it is.
    """

    def __init__(self, name: str, weights: Weights):
        self.name = name
        self.weight, self.bias = (weights.tensors[f"{name}.resample.1.{part}"] for part in ("weight", "bias"))
        self.weight = self.weight.contiguous(memory_format=torch.channels_last)
        temporal = f"{name}.time_conv.weight" in weights
        self.time_weight = weights.tensors[f"{name}.time_conv.weight"] if temporal else None
        self.time_bias = weights.tensors[f"{name}.time_conv.bias"] if temporal else None

    def __call__(self, x: torch.Tensor, run: Pass) -> torch.Tensor:
        frames, rows, columns, channels = x.shape
        buffer = x.new_empty(frames, rows + 2, columns + 2, channels)
        buffer[:, 1:-1, 1:-1] = x
        run.frame.fill_border(buffer)
        seen = buffer[:, 1:, 1:].permute(0, 3, 1, 2)  # nothing above, and nothing to the left
        y = F.conv2d(seen, self.weight, self.bias, stride=2).permute(0, 2, 3, 1).contiguous()
        return y if self.time_weight is None else self._halve_frames(y, run)

    def _halve_frames(self, y: torch.Tensor, run: Pass) -> torch.Tensor:
        before = run.past.pop(self.name, None)
        run.past[self.name] = y[-1:].clone()
        first = y[:1] if before is None else y[:0]
        seen = y if before is None else torch.cat([before, y])
        if len(seen) < 3:
            return first
        frames = seen.permute(3, 0, 1, 2).unsqueeze(0)
        later = F.conv3d(frames, self.time_weight, self.time_bias, stride=(2, 1, 1))[0].permute(1, 2, 3, 0)
        return torch.cat([first, later])


class Encoder:
    """From video to latents.

    Args:
        tensors: the VAE's weights under their names in Wan's files, on one device and in one dtype.
        ops: the kernels for that device.

    Raises:
        VAEError: these are not the weights of such a VAE.
    """

    def __init__(self, tensors: Mapping[str, torch.Tensor], ops: VAEOps):
        weights = Weights(tensors, ops)
        shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        check_encoder(shapes)
        self.layers = [_layer(name, weights) for name in _layer_names(shapes)]
        self.head, self.last = NormConv("encoder.head.0", "encoder.head.2", weights), weights.linear("conv1")
        self.device = tensors["conv1.weight"].device
        self.dtype, self.width = tensors["conv1.weight"].dtype, shapes["encoder.conv1.weight"][0]
        self.channels = shapes["conv1.weight"][0] // 2

    def encode(
        self,
        video: torch.Tensor,
        frame: Frame,
        piece_bytes: int = PIECE_BYTES,
        before_piece: Callable[[], None] | None = None,
    ) -> Iterator[torch.Tensor]:
        """The mean of the latent in pieces of some frames [t, h, w, C].

        Args:
            video: this part of one video, from 0 to 1, [T, 8 * h, 8 * w, 3], on any device; what is left of the last
                four frames is not read.
            frame: what surrounds it; its `size` counts latent rows and columns.
            piece_bytes: how large a tensor may become, unless four frames are larger.
            before_piece: called before each piece, equally often on all ranks; it may raise.
        """
        run = Pass(frame, {})
        video = video[: 1 + FRAMES * ((len(video) - 1) // FRAMES)]
        for piece in video.split(_piece_frames(len(video), frame.size, self.width, self.dtype.itemsize, piece_bytes)):
            if before_piece is not None:
                before_piece()
            x = piece.to(self.device).float().mul(2).sub(1).to(self.dtype).contiguous()
            for layer in self.layers:
                x = layer(x, run)
            yield self.last(self.head(x, run))[..., : self.channels]


def latent_frames(frames: int) -> int:
    """Latent frames of a video; what is left of the last four is not encoded."""
    return 1 + (frames - 1) // FRAMES


def encoding_bytes(
    shapes: Mapping[str, tuple[int, ...]], size: tuple[int, int], itemsize: int, piece_bytes: int = PIECE_BYTES
) -> int:
    """As `vae.working_bytes`, of encoding."""
    width = shapes["encoder.conv1.weight"][0]
    pixel = (size[0] * SCALE + 2) * (size[1] * SCALE + 2) * itemsize
    kept, scale = 0, 1
    for name in _layer_names(shapes):
        inputs = [shapes[weight][1] for weight in shapes if weight.startswith(f"{name}.") and len(shapes[weight]) == 5]
        kept += sum(inputs) * 2 * pixel // scale**2
        scale *= 2 if f"{name}.resample.1.weight" in shapes else 1
    return kept + _LIVE * max(piece_bytes, (FRAMES + 3) * pixel * width)


def check_encoder(shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Raise VAEError unless the encoder of Wan 2.1's VAE is among weights of these shapes."""
    if not all(name in shapes for name in ("conv1.weight", "encoder.conv1.weight", "encoder.head.2.weight")):
        raise VAEError("This VAE has no encoder of Wan 2.1's. Choose Wan 2.1's VAE in Load VAE, or use VAE Encode.")


def _piece_frames(frames: int, size: tuple[int, int], width: int, itemsize: int, piece_bytes: int) -> list[int]:
    """How many frames each piece has: the first one more than a multiple of 4, the others multiples."""
    frame_bytes = (size[0] * SCALE + 2) * (size[1] * SCALE + 2) * width * itemsize
    at_once = FRAMES * max(1, piece_bytes // (frame_bytes * FRAMES))
    later = frames - 1
    sizes = [1 + min(at_once, later)]
    while sum(sizes) < frames:
        sizes.append(min(at_once, frames - sum(sizes)))
    return sizes


def _layer_names(shapes: Mapping[str, tuple[int, ...]]) -> list[str]:
    found = {int(match[1]) for name in shapes if (match := re.match(r"encoder\.downsamples\.(\d+)\.", name))}
    blocks = [f"encoder.downsamples.{i}" for i in sorted(found)]
    return ["encoder.conv1", *blocks, *(f"encoder.middle.{i}" for i in range(3))]


def _layer(name: str, weights: Weights) -> Callable[[torch.Tensor, Pass], torch.Tensor]:
    if f"{name}.weight" in weights:
        return CausalConv(name, weights)
    if f"{name}.to_qkv.weight" in weights:
        return Attention(name, weights)
    return Downsample(name, weights) if f"{name}.resample.1.weight" in weights else Residual(name, weights)
