"""The decoder of Wan 2.1's video VAE on one device, written from its architecture (Wan, arXiv 2503.20314, section 4.1).

Every convolution is causal in time: it sees two earlier frames, which are kept from piece to piece. So a video can
be decoded in pieces of any number of frames with the same result, and a piece of coarse frames can be cut again
where the frames are larger. In space a layer sees one row and column around a pixel, save one attention at the
coarsest resolution. A `Frame` says what lies there, so that the same code decodes a strip of a video.

Activations are [frames, rows, columns, channels], in the dtype of the weights.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch.nn import functional as F

from .vae_ops import VAEError, VAEOps, norm

SCALE = 8
"""Pixels of a row or column for each of the latent."""
FRAMES = 4
"""Video frames for each latent frame after the first, which is one."""
PIECE_BYTES = 2**29
"""Bytes of the largest tensor of a piece; larger pieces keep a GPU no busier."""

_LIVE = 4
"""Tensors of the largest size that a residual block has at a time: its input, a buffer, and two results."""


class Frame(Protocol):
    """What lies around the part of each frame that is decoded here."""

    size: tuple[int, int]
    """Rows and columns of the latent on the rank that has most, by which pieces are cut alike on all."""

    def fill_border(self, frames: torch.Tensor) -> None:
        """Fill the first and last row and column of [T, H + 2, W + 2, C] with what lies there; zeros outside."""

    def gather(self, x: torch.Tensor) -> torch.Tensor:
        """All of each frame, from the part [T, H, W, C] of every rank."""


class WholeFrame:
    """A `Frame` that is decoded here as a whole."""

    def __init__(self, size: tuple[int, int]):
        self.size = size

    def fill_border(self, frames: torch.Tensor) -> None:
        for edge in (frames[:, 0], frames[:, -1], frames[:, :, 0], frames[:, :, -1]):
            edge.zero_()

    def gather(self, x: torch.Tensor) -> torch.Tensor:
        return x


@dataclass
class Pass:
    """One video on its way through the decoder: what surrounds it, and what the layers keep of its earlier frames."""

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
    """A 3x3x3 convolution of a tensor as it is."""

    def __init__(self, name: str, weights: Weights):
        self.name, self.conv = name, weights.conv(name)

    def __call__(self, x: torch.Tensor, run: Pass) -> torch.Tensor:
        return self.conv(run.buffer(self.name, x, lambda interior: interior.copy_(x)), None)


class NormConv:
    """RMSNorm, SiLU and a 3x3x3 convolution, and `residual` on top."""

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
        self.shortcut = weights.linear(f"{name}.shortcut") if f"{name}.shortcut.weight" in weights else None

    def __call__(self, x: torch.Tensor, run: Pass) -> torch.Tensor:
        y = self.first(x, run)
        return self.second(y, run, x if self.shortcut is None else self.shortcut(x))


class Attention:
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
    """Twice the rows and columns, and twice the frames where there is a convolution over time.

    The first frame of a video is not doubled, nor seen by the frames after it.
    """

    def __init__(self, name: str, weights: Weights):
        self.name, self.conv = name, weights.conv(f"{name}.resample.1")
        temporal = f"{name}.time_conv.weight" in weights
        self.time_conv = weights.conv(f"{name}.time_conv") if temporal else None

    def __call__(self, x: torch.Tensor, run: Pass) -> torch.Tensor:
        frames, rows, columns, channels = x.shape
        if self.time_conv is None:
            first, later = x, None
        else:
            count = 0 if self.name in run.past else 1
            first, later = x[:count], self._doubled(x[count:], run)
            frames = count + 2 * (frames - count)
        buffer = x.new_empty(frames, 2 * rows + 2, 2 * columns + 2, channels)
        interior = buffer[:, 1:-1, 1:-1].unflatten(1, (rows, 2)).unflatten(3, (columns, 2))
        interior[: len(first)] = first[:, :, None, :, None]
        if later is not None and len(later):
            halves = later.unflatten(-1, (2, channels)).permute(0, 3, 1, 2, 4)  # of each frame, [T, 2, H, W, C]
            interior[len(first) :].unflatten(0, (-1, 2)).copy_(halves[:, :, :, None, :, None])
        run.frame.fill_border(buffer)
        return self.conv(buffer, None)

    def _doubled(self, x: torch.Tensor, run: Pass) -> torch.Tensor | None:
        """Two frames for each one of x, side by side in the channels."""
        if not len(x):
            run.past[self.name] = x.new_zeros(2, *x.shape[1:])
            return None
        return self.time_conv(run.frames_before(self.name, x), None)


Layer = Callable[[torch.Tensor, Pass], torch.Tensor]


@dataclass(frozen=True)
class Stage:
    """Layers at one resolution.

    Args:
        scale: rows of a frame for each of the latent.
        frames: how many frames come out for each that goes in.
        width: channels of its largest tensor.
        kept: channels of all inputs of its convolutions, of which two frames are kept.
    """

    names: tuple[str, ...]
    scale: int
    frames: int
    width: int
    kept: int


class Weights:
    """The weights of a decoder on its device, as the layers want them."""

    def __init__(self, tensors: Mapping[str, torch.Tensor], ops: VAEOps):
        self.tensors, self.ops = tensors, ops

    def __contains__(self, name: str) -> bool:
        return name in self.tensors

    def gamma(self, name: str) -> torch.Tensor:
        return self.tensors[f"{name}.gamma"].flatten()

    def conv(self, name: str) -> Callable[[torch.Tensor, torch.Tensor | None], torch.Tensor]:
        return self.ops.conv(self.tensors[f"{name}.weight"], self.tensors[f"{name}.bias"])

    def linear(self, name: str) -> Callable[[torch.Tensor], torch.Tensor]:
        weight, bias = self.tensors[f"{name}.weight"].flatten(1), self.tensors[f"{name}.bias"]
        return lambda x: F.linear(x, weight, bias)


class Decoder:
    """From latents to video.

    Args:
        tensors: the VAE's weights under their names in Wan's files, on one device and in one dtype.
        ops: the kernels for that device.

    Raises:
        VAEError: these are not the weights of such a VAE.
    """

    def __init__(self, tensors: Mapping[str, torch.Tensor], ops: VAEOps):
        weights = Weights(tensors, ops)
        self.stages = decoder_stages({name: tuple(tensor.shape) for name, tensor in tensors.items()})
        self.layers = [[_layer(name, weights) for name in stage.names] for stage in self.stages]
        self.first, self.head = weights.linear("conv2"), NormConv("decoder.head.0", "decoder.head.2", weights)
        self.dtype = tensors["conv2.weight"].dtype

    def decode(
        self,
        latent: torch.Tensor,
        frame: Frame,
        piece_bytes: int = PIECE_BYTES,
        before_piece: Callable[[], None] | None = None,
    ) -> Iterator[torch.Tensor]:
        """The video in pieces of some frames [t, 8 * h, 8 * w, 3], about from -1 to 1.

        Args:
            latent: this part of one latent, [C, T, h, w].
            frame: what surrounds it.
            piece_bytes: how large a tensor may become, unless one frame is larger.
            before_piece: called before each piece of each stage, equally often on all ranks; it may raise.
        """
        run = Pass(frame, {})
        x = self.first(latent.permute(1, 2, 3, 0).to(self.dtype).contiguous())
        yield from self._stage(0, x, run, piece_bytes, before_piece)

    def _stage(
        self, index: int, x: torch.Tensor, run: Pass, piece_bytes: int, before_piece: Callable[[], None] | None
    ) -> Iterator[torch.Tensor]:
        at_once = _frames_at_once(self.stages[index], run.frame.size, x.element_size(), piece_bytes)
        for y in x.split(at_once):
            if before_piece is not None:
                before_piece()
            for layer in self.layers[index]:
                y = layer(y, run)
            if index + 1 < len(self.stages):
                yield from self._stage(index + 1, y, run, piece_bytes, before_piece)
            else:
                yield self.head(y, run)


def frames_of(latent_frames: int) -> int:
    """Video frames of so many latent ones."""
    return 1 + FRAMES * (latent_frames - 1)


def working_bytes(
    shapes: Mapping[str, tuple[int, ...]], size: tuple[int, int], itemsize: int, piece_bytes: int = PIECE_BYTES
) -> int:
    """Expected memory of decoding a part of `size` latent rows and columns, beside the weights and the latent.

    What the layers keep of earlier frames, one piece of each coarser stage, and the tensors of the finest.
    """
    stages = decoder_stages(shapes)
    largest = [
        max(piece_bytes, _frame_bytes(stage, size, itemsize) * stage.frames * 2) for stage in stages
    ]  # two frames more than a piece has, at worst, are its border
    kept = sum(2 * _frame_bytes(stage, size, itemsize) // stage.width * stage.kept for stage in stages)
    return kept + sum(largest[:-1]) + _LIVE * largest[-1]


def decoder_stages(shapes: Mapping[str, tuple[int, ...]]) -> tuple[Stage, ...]:
    """The layers of a decoder, cut where the resolution grows, from the shapes of a VAE's weights.

    Raises:
        VAEError: these are not the weights of such a VAE.
    """
    check_vae(shapes)
    found = {int(match[1]) for name in shapes if (match := re.match(r"decoder\.upsamples\.(\d+)\.", name))}
    names = ["decoder.conv1", *(f"decoder.middle.{i}" for i in range(3))]
    stages, scale, frames = [], 1, 1
    for name in (f"decoder.upsamples.{i}" for i in sorted(found)):
        if f"{name}.resample.1.weight" in shapes:
            stages.append(_stage(tuple(names), scale, frames, shapes))
            names, scale, frames = [], scale * 2, 2 if f"{name}.time_conv.weight" in shapes else 1
        names.append(name)
    stages.append(_stage(tuple(names), scale, frames, shapes, more=shapes["decoder.head.2.weight"][1]))
    return tuple(stages)


def check_latent(shapes: Mapping[str, tuple[int, ...]], latent: tuple[int, ...]) -> None:
    """Raise VAEError unless a latent of this size [B, C, T, h, w] can be decoded."""
    channels = shapes["conv2.weight"][1]
    if len(latent) != 5 or latent[1] != channels:
        raise VAEError(
            f"The latent has the shape {list(latent)}, but this VAE decodes [batch, {channels}, frames, height, "
            "width]. Connect the latent of a Wan video, and the VAE that belongs to its model."
        )
    if not all(latent):
        raise VAEError(f"The latent is empty: its shape is {list(latent)}. Connect the latent of a Wan video.")


def check_vae(shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Raise VAEError unless weights of these shapes are those of Wan 2.1's VAE."""
    if any(name.startswith("decoder.upsamples.0.upsamples.") for name in shapes):
        raise VAEError(
            "This is Wan 2.2's VAE (of the 5B model), which does not run in parallel yet. Decode with VAE Decode."
        )
    needed = ("conv2.weight", "decoder.conv1.weight", "decoder.middle.1.to_qkv.weight", "decoder.head.2.weight")
    if not all(name in shapes for name in needed) or len(shapes["decoder.conv1.weight"]) != 5:
        raise VAEError(
            "This VAE is not that of Wan 2.1, the only one that runs in parallel. Choose Wan 2.1's VAE in Load VAE, or "
            "decode with VAE Decode."
        )


def _stage(
    names: tuple[str, ...], scale: int, frames: int, shapes: Mapping[str, tuple[int, ...]], more: int = 0
) -> Stage:
    mine = {name: shape for name, shape in shapes.items() if name.startswith(tuple(f"{n}." for n in names))}
    inputs = [shape[1] for name, shape in mine.items() if len(shape) == 5 and shape[2] == 3 and shape[3] == 3]
    widest = max(max(shape[:2]) for name, shape in mine.items() if len(shape) >= 4 and shape[-1] == 3)
    return Stage(names, scale, frames, widest, sum(inputs) + more)


def _frame_bytes(stage: Stage, size: tuple[int, int], itemsize: int) -> int:
    """Bytes of one frame of the largest tensor of a stage."""
    return (size[0] * stage.scale + 2) * (size[1] * stage.scale + 2) * stage.width * itemsize


def _frames_at_once(stage: Stage, size: tuple[int, int], itemsize: int, piece_bytes: int) -> int:
    """How many frames a stage takes at a time."""
    return max(1, piece_bytes // (_frame_bytes(stage, size, itemsize) * stage.frames))


def _layer(name: str, weights: Weights) -> Layer:
    if f"{name}.weight" in weights:
        return CausalConv(name, weights)
    if f"{name}.to_qkv.weight" in weights:
        return Attention(name, weights)
    return Upsample(name, weights) if f"{name}.resample.1.weight" in weights else Residual(name, weights)


def random_weights(
    dim: int = 96, z_dim: int = 16, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32
) -> dict[str, torch.Tensor]:
    """Random weights of a decoder of Wan 2.1's architecture (whose `dim` is 96), for tests and benchmarks."""
    generator = torch.Generator(device).manual_seed(0)
    shapes = decoder_shapes(dim, z_dim)
    return {name: _random(name, shape, generator, device).to(dtype) for name, shape in shapes.items()}


def _random(
    name: str, shape: tuple[int, ...], generator: torch.Generator, device: str | torch.device
) -> torch.Tensor:
    values = torch.randn(shape, generator=generator, device=device)
    if name.endswith("gamma"):
        return 1 + values / 10
    fan_in = 1 if name.endswith("bias") else values[0].numel()
    return values / fan_in**0.5 if fan_in > 1 else values / 10


def decoder_shapes(dim: int = 96, z_dim: int = 16) -> dict[str, tuple[int, ...]]:
    """Shapes of the weights of a decoder of Wan 2.1's architecture, under their names in Wan's files."""
    return dict(_named_shapes(dim, z_dim))


def _named_shapes(dim: int, z_dim: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    def conv(name: str, *shape: int) -> Iterator[tuple[str, tuple[int, ...]]]:
        yield f"{name}.weight", shape
        yield f"{name}.bias", shape[:1]

    def residual(name: str, before: int, after: int) -> Iterator[tuple[str, tuple[int, ...]]]:
        yield f"{name}.residual.0.gamma", (before, 1, 1, 1)
        yield from conv(f"{name}.residual.2", after, before, 3, 3, 3)
        yield f"{name}.residual.3.gamma", (after, 1, 1, 1)
        yield from conv(f"{name}.residual.6", after, after, 3, 3, 3)
        if before != after:
            yield from conv(f"{name}.shortcut", after, before, 1, 1, 1)

    top = 4 * dim
    yield from conv("conv2", z_dim, z_dim, 1, 1, 1)
    yield from conv("decoder.conv1", top, z_dim, 3, 3, 3)
    yield from residual("decoder.middle.0", top, top)
    yield "decoder.middle.1.norm.gamma", (top, 1, 1)
    yield from conv("decoder.middle.1.to_qkv", 3 * top, top, 1, 1)
    yield from conv("decoder.middle.1.proj", top, top, 1, 1)
    yield from residual("decoder.middle.2", top, top)
    before, number = top, 0
    for level, width in enumerate((4 * dim, 4 * dim, 2 * dim, dim)):
        for _ in range(3):
            yield from residual(f"decoder.upsamples.{number}", before, width)
            before, number = width, number + 1
        if level < 3:
            name, before = f"decoder.upsamples.{number}", width // 2
            yield from conv(f"{name}.resample.1", before, width, 3, 3)
            if level < 2:
                yield from conv(f"{name}.time_conv", 2 * width, width, 3, 1, 1)
            number += 1
    yield "decoder.head.0.gamma", (dim, 1, 1, 1)
    yield from conv("decoder.head.2", 3, dim, 3, 3, 3)
