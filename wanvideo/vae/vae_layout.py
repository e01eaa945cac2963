"""Reads from the shapes of a VAE's weights which of Wan's VAEs it is, its layers, its pieces and their memory.

Wan 2.1 and Wan 2.2 A14B have the same VAE (arXiv 2503.20314, section 4.1). The VAE of Wan 2.2 5B is made of the same
layers, in groups with a shortcut around each, and takes 2 x 2 pixels as one pixel with four times the channels.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal, TypeVar

from .vae_ops import VAEError

_Weight = TypeVar("_Weight")
Half = Literal["decoder", "encoder"]
HALVES: tuple[Half, ...] = ("decoder", "encoder")
Shapes = Mapping[str, tuple[int, ...]]
"""Shapes of the weights of a VAE, or of one half of it, by their names in Wan's files."""

FRAMES = 4
"""Video frames for each latent frame after the first latent frame, which stands for one video frame."""
PIECE_BYTES = 2**29
"""Bytes of the largest tensor of a piece; larger pieces keep a GPU no busier."""
LATENT_CONV = {"decoder": "conv2", "encoder": "conv1"}
"""The convolution next to the latent that belongs to a half, under a name outside of the half."""
BLOCKS = {"decoder": "upsamples", "encoder": "downsamples"}
"""The name in each half of the layers between the finest resolution and the coarsest."""

_CONVOLUTIONS = {".resample.1.weight": 4, ".time_conv.weight": 5}
"""The dimensions of the weights of convolutions that change the resolution, by the ends of their names."""
_FINEST = 8
"""Rows of a half's finest resolution for each row of the latent."""
_LIVE = 4
"""Tensors of the largest size that a residual block has at a time: its input, a buffer, and two results."""


@dataclass(frozen=True)
class VAEKind:
    """One of Wan's VAEs.

    Args:
        patch: rows and columns of pixels that are one pixel to the layers.
        groups: whether its layers come in groups with a shortcut around each.
    """

    patch: int
    groups: bool

    @property
    def scale(self) -> int:
        """Pixels of a row or column for each position of a row or column of the latent."""
        return _FINEST * self.patch


KINDS = {"2.1": VAEKind(1, False), "2.2": VAEKind(2, True)}


@dataclass(frozen=True)
class ConvShape:
    """The sizes of a convolution that decide its memory.

    Args:
        scale: rows of its larger tensor for each row of the latent.
        before, after: channels of its input and of its output.
        kept: earlier frames that the convolution keeps.
    """

    scale: int
    before: int
    after: int
    kept: int


@dataclass(frozen=True)
class VAEStage:
    """Layers that a piece goes through together.

    Args:
        names: the names of its layers, in their order; a group counts as one layer.
        convs: the convolutions larger than a pixel in space or time.
        frames: the number of frames that come out for each frame that goes in.
        least: frames of its largest tensor for the smallest piece, with those of its border.
    """

    names: tuple[str, ...]
    convs: tuple[ConvShape, ...]
    frames: int
    least: int

    def frame_bytes(self, size: tuple[int, int], itemsize: int) -> int:
        """Bytes of one frame of its largest tensor, for a latent of `size` rows and columns."""
        return itemsize * max(max(conv.before, conv.after) * _positions(size, conv.scale) for conv in self.convs)

    def kept_bytes(self, size: tuple[int, int], itemsize: int) -> int:
        """Bytes of all earlier frames that its convolutions keep."""
        return itemsize * sum(conv.kept * conv.before * _positions(size, conv.scale) for conv in self.convs)


def kind_of(shapes: Shapes, half: Half) -> VAEKind:
    """Which of Wan's VAEs has a half with weights of these shapes.

    Raises:
        VAEError: none of Wan's VAEs has such weights.
    """
    kind = next((kind for kind in KINDS.values() if _belongs(shapes, half, kind)), None)
    if kind is None:
        raise VAEError(
            f"This VAE has no {half} of Wan 2.1's or Wan 2.2's VAE, the only ones that run in parallel. Choose one of "
            f"these in Load VAE, or use VAE {half[:-1].capitalize()}."
        )
    return kind


def weights_of(half: Half, weights: Mapping[str, _Weight]) -> dict[str, _Weight]:
    """The weights of a VAE that its `half` needs, by name."""
    mine = f"{half}.", f"{LATENT_CONV[half]}."
    return {name: weight for name, weight in weights.items() if name.startswith(mine)}


def check_latent(shapes: Shapes, latent: tuple[int, ...]) -> None:
    """Raise VAEError unless a latent of this size [B, C, T, h, w] can be decoded."""
    channels = shapes["conv2.weight"][1]
    if len(latent) != 5 or latent[1] != channels:
        raise VAEError(
            f"The latent has the shape {list(latent)}, but this VAE decodes [batch, {channels}, frames, height, "
            "width]. Connect the latent of a Wan video, and the VAE that belongs to its model."
        )
    if not all(latent):
        raise VAEError(f"The latent is empty: its shape is {list(latent)}. Connect the latent of a Wan video.")


def frames_of(latent_frames: int) -> int:
    """How many video frames `latent_frames` latent frames decode to."""
    return 1 + FRAMES * (latent_frames - 1)


def latent_frames(frames: int) -> int:
    """How many latent frames `frames` video frames encode to; an incomplete last four is dropped."""
    return 1 + (frames - 1) // FRAMES


def inner_layers(name: str, weights: Iterable[str]) -> tuple[str, ...]:
    """Names of the layers in the group `name`; none if `name` is a layer by itself.

    Args:
        weights: names of all weights.
    """
    return _numbered(f"{name}.{BLOCKS[_half_of(name)]}", weights)


def stages_of(shapes: Shapes, half: Half) -> tuple[VAEStage, ...]:
    """The layers of a half; those of a decoder are cut where the resolution grows.

    Raises:
        VAEError: the weights are of none of Wan's VAEs.
    """
    kind_of(shapes, half)
    blocks = _numbered(f"{half}.{BLOCKS[half]}", shapes)
    first, middle = f"{half}.conv1", tuple(f"{half}.middle.{i}" for i in range(3))
    if half == "encoder":
        cuts = [[first, *blocks, *middle]]
    else:
        cuts = [[first, *middle]]
        for block in blocks:
            if any(_resamples(layer, shapes) for layer in (block, *inner_layers(block, shapes))):
                cuts.append([])
            cuts[-1].append(block)
    stages, scale = [], 1 if half == "decoder" else _FINEST
    for names in cuts:
        stage, scale = _stage(half, tuple(names), scale, shapes, with_head=names is cuts[-1])
        stages.append(stage)
    return tuple(stages)


def frames_at_once(stage: VAEStage, size: tuple[int, int], itemsize: int, piece_bytes: int) -> int:
    """How many frames a stage takes at a time, for a latent of `size` rows and columns."""
    return max(1, piece_bytes // (stage.frame_bytes(size, itemsize) * stage.frames))


def working_bytes(
    shapes: Shapes, half: Half, size: tuple[int, int], itemsize: int, piece_bytes: int = PIECE_BYTES
) -> int:
    """Expected bytes for decoding or encoding a part of `size` latent rows and columns, without weights and input.

    The sum of the earlier frames that the layers keep, one piece of each coarser stage, and the tensors of the finest
    stage.
    """
    stages = stages_of(shapes, half)
    kept = sum(stage.kept_bytes(size, itemsize) for stage in stages)
    *coarser, finest = (max(piece_bytes, stage.frame_bytes(size, itemsize) * stage.least) for stage in stages)
    live = _LIVE + (half == "encoder" and kind_of(shapes, half).groups)  # a group's input is as large as its tensors
    return kept + sum(coarser) + live * finest


def _belongs(shapes: Shapes, half: Half, kind: VAEKind) -> bool:
    block = f"{half}.{BLOCKS[half]}.0"
    first = (inner_layers(block, shapes) or (block,))[0]
    needed = (LATENT_CONV[half], *(f"{half}.{name}" for name in ("conv1", "middle.1.to_qkv", "head.2")))
    if any(len(shapes.get(f"{name}.weight", ())) < 4 for name in (*needed, f"{first}.residual.2")):
        return False
    if any(len(shape) != dims for end, dims in _CONVOLUTIONS.items() for shape in _ending(shapes, end)):
        return False
    pixels = shapes["decoder.head.2.weight"][0] if half == "decoder" else shapes["encoder.conv1.weight"][1]
    in_group = first != block
    return in_group == kind.groups and pixels == 3 * kind.patch**2 and len(shapes[f"{half}.conv1.weight"]) == 5


def _ending(shapes: Shapes, end: str) -> list[tuple[int, ...]]:
    return [shape for name, shape in shapes.items() if name.endswith(end)]


def _positions(size: tuple[int, int], scale: int) -> int:
    """Positions of a frame and its border, at `scale` times the resolution of a latent of `size` rows and columns."""
    return (size[0] * scale + 2) * (size[1] * scale + 2)


def _half_of(name: str) -> Half:
    return "decoder" if name.startswith("decoder.") else "encoder"


def _numbered(name: str, weights: Iterable[str]) -> tuple[str, ...]:
    """The names `name`.0, `name`.1 and so on, up to the last one with which the name of a weight begins."""
    found = {int(match[1]) for weight in weights if (match := re.match(rf"{re.escape(name)}\.(\d+)\.", weight))}
    return tuple(f"{name}.{i}" for i in sorted(found))


def _resamples(name: str, shapes: Shapes) -> bool:
    return f"{name}.resample.1.weight" in shapes


def _stage(half: Half, names: tuple[str, ...], scale: int, shapes: Shapes, with_head: bool) -> tuple[VAEStage, int]:
    """The stage of the layers `names` that begins at `scale` times the latent's resolution, and its final scale."""
    layers = [layer for name in names for layer in inner_layers(name, shapes) or (name,)]
    convs: list[ConvShape] = []
    frames = 1
    for layer in layers:
        if _resamples(layer, shapes):
            convs += _resampling(layer, scale, shapes)
            grows = half == "decoder"
            scale = scale * 2 if grows else scale // 2
            frames *= 2 if grows and f"{layer}.time_conv.weight" in shapes else 1
        else:
            convs += _convs_of(layer, scale, shapes)
    convs += _convs_of(f"{half}.head.2", scale, shapes) if with_head else ()
    least = 2 * frames if half == "decoder" else FRAMES + 3  # an encoder takes four frames, and the first one apart
    return VAEStage(names, tuple(convs), frames, least), scale


def _convs_of(layer: str, scale: int, shapes: Shapes) -> Iterator[ConvShape]:
    for name, shape in shapes.items():
        if name.startswith(f"{layer}.") and len(shape) == 5 and shape[2] == 3:
            yield ConvShape(scale, shape[1], shape[0], 2)


def _resampling(layer: str, scale: int, shapes: Shapes) -> Iterator[ConvShape]:
    """The convolution in space and, where the layer has one, the convolution over time at the coarser resolution."""
    after, before = shapes[f"{layer}.resample.1.weight"][:2]
    grows = _half_of(layer) == "decoder"
    yield ConvShape(scale * 2 if grows else scale, before, after, 0)
    if f"{layer}.time_conv.weight" in shapes:
        after, before = shapes[f"{layer}.time_conv.weight"][:2]
        yield ConvShape(scale if grows else scale // 2, before, after, 2 if grows else 1)
