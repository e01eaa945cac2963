"""The layers of Wan's video VAEs on one device (see vae_layout.py).

Every convolution is causal in time: it sees two earlier frames, which are kept from piece to piece. So a video can
be decoded in pieces of any number of frames with the same result, and a piece of coarse frames can be cut again
where the frames are larger. In space a layer sees one row and column around a pixel, save one attention at the
coarsest resolution. A `Frame` supplies the pixels around this rank's part, so that the same code decodes a strip.

Activations are [frames, rows, columns, channels], in the dtype of the weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch.nn import functional as F

from .vae_layout import inner_layers
from .vae_ops import Convolution, VAEOps, norm


class Frame(Protocol):
    """Surroundings of the part of each frame that is decoded or encoded on this rank."""

    size: tuple[int, int]
    """Rows and columns of the latent on the rank that has most of it: all ranks cut pieces by this size."""

    def fill_border(self, frames: torch.Tensor) -> None:
        """Fill the first and last row and column of `frames` [T, H + 2, W + 2, C] with the pixels of the neighbours, or
        with zeros at the edge of the video."""

    def gather(self, x: torch.Tensor) -> torch.Tensor:
        """Whole frames, put together from the part `x` [T, H, W, C] of every rank."""


class WholeFrame:
    """A `Frame` without neighbours: this rank has the whole frame."""

    def __init__(self, size: tuple[int, int]):
        self.size = size

    def fill_border(self, frames: torch.Tensor) -> None:
        """Fill the border with zeros, as nothing lies around a whole frame."""
        for edge in (frames[:, 0], frames[:, -1], frames[:, :, 0], frames[:, :, -1]):
            edge.zero_()

    def gather(self, x: torch.Tensor) -> torch.Tensor:
        """x itself, as all of each frame is here."""
        return x


@dataclass
class Pass:
    """One video on its way through a half: its surroundings, and the earlier frames that the layers keep."""

    frame: Frame
    past: dict[str, torch.Tensor]

    def buffer(self, name: str, like: torch.Tensor, write: Callable[[torch.Tensor], object]) -> torch.Tensor:
        """The input of a 3x3x3 convolution with its border, [T + 2, H + 2, W + 2, C].

        Args:
            name: of the convolution, under which its last two frames are kept.
            like: [T, H, W, C], of the size of what `write` puts into its argument.
        """
        frames, rows, columns, channels = like.shape
        buffer = like.new_empty(frames + 2, rows + 2, columns + 2, channels)
        self._take_past(name, buffer)
        write(buffer[2:, 1:-1, 1:-1])
        self.frame.fill_border(buffer[2:])
        self._keep(name, buffer)
        return buffer

    def frames_before(self, name: str, x: torch.Tensor) -> torch.Tensor:
        """x [T, H, W, C] behind the two frames before it, [T + 2, H, W, C]: for a convolution over time alone."""
        buffer = x.new_empty(len(x) + 2, *x.shape[1:])
        self._take_past(name, buffer)
        buffer[2:] = x
        self._keep(name, buffer)
        return buffer

    def _take_past(self, name: str, buffer: torch.Tensor) -> None:
        past = self.past.pop(name, None)
        if past is None:
            buffer[:2].zero_()
        else:
            buffer[:2] = past

    def _keep(self, name: str, buffer: torch.Tensor) -> None:
        self.past[name] = buffer[-2:].clone()


class CausalConv:
    """A 3x3x3 convolution without a norm before it."""

    def __init__(self, name: str, weights: Weights):
        self.name, self.conv = name, weights.conv(name)

    def __call__(self, x: torch.Tensor, run: Pass) -> torch.Tensor:
        return self.conv(run.buffer(self.name, x, lambda interior: interior.copy_(x)), None)


class NormConv:
    """RMSNorm, SiLU and a 3x3x3 convolution, to whose result `residual` is added."""

    def __init__(self, norm_name: str, conv_name: str, weights: Weights):
        self.name, self.ops = conv_name, weights.ops
        self.gamma, self.conv = weights.gamma(norm_name), weights.conv(conv_name)

    def __call__(self, x: torch.Tensor, run: Pass, residual: torch.Tensor | None = None) -> torch.Tensor:
        buffer = run.buffer(self.name, x, lambda interior: self.ops.norm_silu(x, self.gamma, interior))
        return self.conv(buffer, residual)


class Residual:
    """Two `NormConv` beside a shortcut."""

    def __init__(self, name: str, weights: Weights):
        self.first = NormConv(f"{name}.residual.0", f"{name}.residual.2", weights)
        self.second = NormConv(f"{name}.residual.3", f"{name}.residual.6", weights)
        self.shortcut = weights.linear(f"{name}.shortcut") if f"{name}.shortcut.weight" in weights.tensors else None

    def __call__(self, x: torch.Tensor, run: Pass) -> torch.Tensor:
        y = self.first(x, run)
        return self.second(y, run, x if self.shortcut is None else self.shortcut(x))


class FrameAttention:
    """Each pixel of a frame attends to all of the frame, with one head."""

    def __init__(self, name: str, weights: Weights):
        self.gamma = weights.gamma(f"{name}.norm")
        self.qkv, self.out = weights.linear(f"{name}.to_qkv"), weights.linear(f"{name}.proj")

    def __call__(self, x: torch.Tensor, run: Pass) -> torch.Tensor:
        channels = x.shape[-1]
        q, kv = self.qkv(norm(x, self.gamma)).split([channels, 2 * channels], dim=-1)
        k, v = run.frame.gather(kv.contiguous()).flatten(1, 2).unsqueeze(1).split(channels, dim=-1)
        y = F.scaled_dot_product_attention(q.flatten(1, 2).unsqueeze(1), k, v)
        return x + self.out(y.view(x.shape))


class Upsample:
    """Doubles rows and columns and, in a layer with a convolution over time, the frames.

    The first frame of a video is not doubled, nor seen by the frames after it.
    """

    def __init__(self, name: str, weights: Weights):
        self.name, self.conv = name, weights.conv(f"{name}.resample.1")
        self.time_conv = weights.conv(f"{name}.time_conv") if f"{name}.time_conv.weight" in weights.tensors else None

    @property
    def temporal(self) -> bool:
        """Whether the layer doubles the frames."""
        return self.time_conv is not None

    def __call__(self, x: torch.Tensor, run: Pass) -> torch.Tensor:
        frames, rows, columns, channels = x.shape
        if self.time_conv is None:
            first, later = x, None
        else:
            count = 0 if self.name in run.past else 1
            first, later = x[:count], self._doubled(self.time_conv, x[count:], run)
            frames = count + 2 * (frames - count)
        buffer = x.new_empty(frames, 2 * rows + 2, 2 * columns + 2, channels)
        interior = buffer[:, 1:-1, 1:-1].unflatten(1, (rows, 2)).unflatten(3, (columns, 2))
        interior[: len(first)] = first[:, :, None, :, None]
        if later is not None and len(later):
            halves = later.unflatten(-1, (2, channels)).permute(0, 3, 1, 2, 4)  # of each frame, [T, 2, H, W, C]
            interior[len(first) :].unflatten(0, (-1, 2)).copy_(halves[:, :, :, None, :, None])
        run.frame.fill_border(buffer)
        return self.conv(buffer, None)

    def _doubled(self, time_conv: Convolution, x: torch.Tensor, run: Pass) -> torch.Tensor | None:
        """Two frames for each frame of x, side by side in the channels."""
        if not len(x):
            run.past[self.name] = x.new_zeros(2, *x.shape[1:])
            return None
        return time_conv(run.frames_before(self.name, x), None)


class Downsample:
    """Halves rows and columns and, in a layer with a convolution over time, the frames.

    The first frame of a video is not halved.
    """

    def __init__(self, name: str, weights: Weights):
        self.name = name
        self.weight, self.bias = (weights.tensors[f"{name}.resample.1.{part}"] for part in ("weight", "bias"))
        self.weight = self.weight.contiguous(memory_format=torch.channels_last)
        self.time_conv: tuple[torch.Tensor, torch.Tensor] | None = None  # weight and bias
        if f"{name}.time_conv.weight" in weights.tensors:
            self.time_conv = weights.tensors[f"{name}.time_conv.weight"], weights.tensors[f"{name}.time_conv.bias"]

    @property
    def temporal(self) -> bool:
        """Whether the layer halves the frames."""
        return self.time_conv is not None

    def __call__(self, x: torch.Tensor, run: Pass) -> torch.Tensor:
        frames, rows, columns, channels = x.shape
        buffer = x.new_empty(frames, rows + 2, columns + 2, channels)
        buffer[:, 1:-1, 1:-1] = x
        run.frame.fill_border(buffer)
        seen = buffer[:, 1:, 1:].permute(0, 3, 1, 2)  # nothing above, and nothing to the left
        y = F.conv2d(seen, self.weight, self.bias, stride=2).permute(0, 2, 3, 1).contiguous()
        return y if self.time_conv is None else self._halve_frames(*self.time_conv, y, run)

    def _halve_frames(self, weight: torch.Tensor, bias: torch.Tensor, y: torch.Tensor, run: Pass) -> torch.Tensor:
        before = run.past.pop(self.name, None)
        run.past[self.name] = y[-1:].clone()
        first = y[:1] if before is None else y[:0]
        seen = y if before is None else torch.cat([before, y])
        if len(seen) < 3:
            return first
        frames = seen.permute(3, 0, 1, 2).unsqueeze(0)
        later = F.conv3d(frames, weight, bias, stride=(2, 1, 1))[0].permute(1, 2, 3, 0)
        return torch.cat([first, later])


class Weights:
    """The weights of a VAE on its device, in the forms in which its layers use them."""

    def __init__(self, tensors: Mapping[str, torch.Tensor], ops: VAEOps):
        self.tensors, self.ops = tensors, ops

    def gamma(self, name: str) -> torch.Tensor:
        """The factors [C] of the norm `name`."""
        return self.tensors[f"{name}.gamma"].flatten()

    def conv(self, name: str) -> Convolution:
        """The convolution `name` with its bias."""
        return self.ops.conv(self.tensors[f"{name}.weight"], self.tensors[f"{name}.bias"])

    def linear(self, name: str) -> Callable[[torch.Tensor], torch.Tensor]:
        """The convolution `name` of single pixels, as a function of [..., C]."""
        weight, bias = self.tensors[f"{name}.weight"].flatten(1), self.tensors[f"{name}.bias"]
        return lambda x: F.linear(x, weight, bias)


class LayerGroup:
    """Layers with a shortcut around them, which copies or averages neighbours where they change the resolution."""

    def __init__(self, name: str, inner: Iterable[str], weights: Weights):
        self.layers = [make_layer(layer, weights) for layer in inner]
        self.grows = name.startswith("decoder.")
        resampling = [layer for layer in self.layers if isinstance(layer, Upsample | Downsample)]
        self.pixels = 2 if resampling else 1
        self.frames = 2 if any(layer.temporal for layer in resampling) else 1

    def __call__(self, x: torch.Tensor, run: Pass) -> torch.Tensor:
        y = x
        for layer in self.layers:
            y = layer(y, run)
        if not self.grows:
            return y.add_(average_neighbours(x, y.shape[-1], self.frames, self.pixels))
        return y if self.pixels == 1 else add_to_neighbours(y, x, self.frames, self.pixels)


Layer = Callable[[torch.Tensor, Pass], torch.Tensor]


def make_layer(name: str, weights: Weights) -> Layer:
    """Build the layer, or the group of layers, called `name`."""
    if f"{name}.weight" in weights.tensors:
        return CausalConv(name, weights)
    if f"{name}.to_qkv.weight" in weights.tensors:
        return FrameAttention(name, weights)
    if f"{name}.resample.1.weight" in weights.tensors:
        return Upsample(name, weights) if name.startswith("decoder.") else Downsample(name, weights)
    inner = inner_layers(name, weights.tensors)
    return LayerGroup(name, inner, weights) if inner else Residual(name, weights)


def add_to_neighbours(y: torch.Tensor, x: torch.Tensor, frames: int, pixels: int) -> torch.Tensor:
    """Add each pixel of x [T, H, W, C] to all pixels of y [frames * T, pixels * H, pixels * W, O] that it covers.

    Where x has more channels than y, its channels go to different pixels of y. The first frame of a video may be
    missing in y.
    """
    parts = _different(x.shape[-1] // y.shape[-1], frames, pixels)
    x = x.unflatten(-1, (-1, *parts)).permute(0, 4, 1, 5, 2, 6, 3)
    missing = frames * len(x) - len(y)
    if missing:
        _neighbours(y[:1], 1, pixels).add_(x[:1, -1:])
    _neighbours(y[missing:], frames, pixels).add_(x[missing:])
    return y


def average_neighbours(x: torch.Tensor, channels: int, frames: int, pixels: int) -> torch.Tensor:
    """Means of x [frames * T, pixels * H, pixels * W, C] in [T, H, W, channels].

    Where `channels` is more than C, the channels are means of different pixels. A frame of zeros goes before the first
    frame of a video.
    """
    if len(x) % frames:
        x = F.pad(x, (0, 0, 0, 0, 0, 0, -len(x) % frames, 0))
    x = _neighbours(x, frames, pixels)
    parts = _different(channels // x.shape[-1], frames, pixels)
    x = x.mean([dim for dim, part in zip((1, 3, 5), parts, strict=True) if part == 1], keepdim=True)
    return x.permute(0, 2, 4, 6, 1, 3, 5).flatten(3)


def _neighbours(x: torch.Tensor, frames: int, pixels: int) -> torch.Tensor:
    """A view of x as [T, frames, H, pixels, W, pixels, C]."""
    return x.unflatten(2, (-1, pixels)).unflatten(1, (-1, pixels)).unflatten(0, (-1, frames))


def _different(times: int, frames: int, pixels: int) -> tuple[int, int, int]:
    """How many neighbours in time, in rows and in columns get channels of their own, out of `times` as many."""
    in_time = min(frames, times)
    rows = min(pixels, times // in_time)
    return in_time, rows, min(pixels, times // in_time // rows)


def pixels_to_channels(x: torch.Tensor, patch: int) -> torch.Tensor:
    """Patches of x [T, patch * H, patch * W, C] as channels, in the order: channel, column, row."""
    x = x.unflatten(2, (-1, patch)).unflatten(1, (-1, patch))
    return x.permute(0, 1, 3, 5, 4, 2).flatten(3)


def channels_to_pixels(x: torch.Tensor, patch: int) -> torch.Tensor:
    """The reverse of `pixels_to_channels`."""
    x = x.unflatten(-1, (-1, patch, patch))
    return x.permute(0, 1, 5, 2, 4, 3).flatten(3, 4).flatten(1, 2)
