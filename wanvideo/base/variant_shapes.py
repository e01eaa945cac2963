"""Dimensions and tensors of what only one variant has, read off a file's header; without torch's modules.

Sources: Wan 2.2 `wan/modules/animate/` and `wan/modules/s2v/`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

FACE_STRIDE = 5
"""Animate's face adapters act behind every fifth block."""

SOUND_LAYERS = (0, 4, 8, 12, 16, 20, 24, 27, 30, 33, 36, 39)
"""S2V hears the sound behind these blocks; a file has an injector for each of them, whatever blocks it has."""

MUSIC_LAYERS = (0, 4, 8, 12, 16, 20, 24, 27)
"""WanDancer adds music behind these blocks."""

PACKED = {"proj": (1, 2, 2), "proj_2x": (2, 4, 4), "proj_4x": (4, 8, 8)}
"""S2V's convolutions of the video so far, by their size (= stride) in frames, rows and columns of the latent."""

Shape = Callable[[str, int], tuple[int, ...]]
"""(name, dimensions) to the shape of a tensor that must be there."""


@dataclass(frozen=True)
class Hearing:
    """What a token attends to beside the video, the text and an image: `tokens` of its frame, of `width` numbers each,
    in or behind a `share` of the blocks."""

    share: float = 0.0
    tokens: int = 0
    width: int = 0


@dataclass(frozen=True)
class FaceDims:
    """What Animate has beside an image-to-video model.

    Args:
        pose_dim: channels of the pose video's latent.
        channels: of the convolutions of the face's encoder, each of which but the first halves the image.
        style: width behind the convolutions.
        directions: of motion, in which a face is described.
        motion: width of a description.
        hidden: width of the encoder over time.
        heads: tokens that it makes of four frames, beside a learned one.
    """

    pose_dim: int = 16
    channels: tuple[int, ...] = (32, 64, 128, 256, 512, 512, 512, 512)
    style: int = 512
    directions: int = 20
    motion: int = 512
    hidden: int = 1024
    heads: int = 4

    MARKER = "face_adapter.fuser_blocks.0.k_norm.weight"

    @property
    def pixels(self) -> int:
        """Height and width of the face video."""
        return 4 * 2 ** (len(self.channels) - 1)

    @classmethod
    def read(cls, tensors: Mapping[str, object], shape: Shape) -> FaceDims | None:
        """The dimensions in a header; None where it is of another variant."""
        if cls.MARKER not in tensors:
            return None
        convolutions, encoder = "motion_encoder.enc.net_app.convs", "face_encoder"
        blocks = sum(name.startswith(f"{convolutions}.") and name.endswith(".skip.1.weight") for name in tensors)
        hidden = shape(f"{encoder}.conv2.conv.weight", 3)[0]
        outputs = [shape(f"{convolutions}.{i}.skip.1.weight", 4)[0] for i in range(1, blocks + 1)]
        directions = shape("motion_encoder.dec.direction.weight", 2)
        return cls(
            pose_dim=shape("pose_patch_embedding.weight", 5)[1],
            channels=(shape(f"{convolutions}.0.0.weight", 4)[0], *outputs),
            style=shape(f"{convolutions}.{blocks + 1}.weight", 4)[0],
            directions=directions[1],
            motion=directions[0],
            hidden=hidden,
            heads=shape(f"{encoder}.conv1_local.conv.weight", 3)[0] // hidden,
        )

    def shapes(self, dim: int, layers: int) -> dict[str, tuple[int, ...]]:
        """Names and shapes for a model of that width and number of blocks.

        The blur kernels in the file of Wan's authors are constants, and left out (see `is_constant`).
        """
        head_dim, convolutions, previous = 128, "motion_encoder.enc.net_app.convs", self.channels[0]
        shapes: dict[str, tuple[int, ...]] = {
            "pose_patch_embedding.weight": (dim, self.pose_dim, 1, 2, 2),
            "pose_patch_embedding.bias": (dim,),
            f"{convolutions}.0.0.weight": (previous, 3, 1, 1),
            f"{convolutions}.0.1.bias": (1, previous, 1, 1),
        }
        for i, channels in enumerate(self.channels[1:], 1):
            block = f"{convolutions}.{i}"
            shapes[f"{block}.conv1.0.weight"] = (previous, previous, 3, 3)
            shapes[f"{block}.conv1.1.bias"] = (1, previous, 1, 1)
            shapes[f"{block}.conv2.1.weight"] = (channels, previous, 3, 3)
            shapes[f"{block}.conv2.2.bias"] = (1, channels, 1, 1)
            shapes[f"{block}.skip.1.weight"] = (channels, previous, 1, 1)
            previous = channels
        shapes[f"{convolutions}.{len(self.channels)}.weight"] = (self.style, previous, 4, 4)
        for i in range(5):
            rows = self.style if i < 4 else self.directions
            shapes |= _linear(f"motion_encoder.enc.fc.{i}", self.style, rows)
        shapes["motion_encoder.dec.direction.weight"] = (self.motion, self.directions)
        shapes |= causal_encoder_shapes(
            "face_encoder", self.motion, (self.hidden, self.hidden, self.hidden), self.heads, dim
        )
        shapes |= _linear("face_encoder.out_proj", self.hidden, dim)
        for i in range(layers // FACE_STRIDE):
            adapter = f"face_adapter.fuser_blocks.{i}"
            shapes |= _linear(f"{adapter}.linear1_kv", dim, 2 * dim)
            shapes |= _linear(f"{adapter}.linear1_q", dim, dim)
            shapes |= _linear(f"{adapter}.linear2", dim, dim)
            shapes[f"{adapter}.q_norm.weight"] = shapes[f"{adapter}.k_norm.weight"] = (head_dim,)
        return shapes


@dataclass(frozen=True)
class SoundDims:
    """What S2V has beside a text-to-video model.

    Args:
        features: width of the sound's features.
        layers: of the sound's encoder, whose outputs all are features.
        heads: tokens that the sound of a latent frame becomes, beside a learned one.
        control_dim: channels of a control video's latent.
    """

    features: int = 1024
    layers: int = 25
    heads: int = 4
    control_dim: int = 16

    MARKER = "casual_audio_encoder.encoder.final_linear.weight"

    @classmethod
    def read(cls, tensors: Mapping[str, object], shape: Shape) -> SoundDims | None:
        """The dimensions in a header; None where it is of another variant."""
        if cls.MARKER not in tensors:
            return None
        local = shape("casual_audio_encoder.encoder.conv1_local.conv.weight", 3)
        return cls(
            features=local[1],
            layers=shape("casual_audio_encoder.weights", 4)[1],
            heads=local[0] * 4 // shape(cls.MARKER, 2)[0],
            control_dim=shape("cond_encoder.weight", 5)[1],
        )

    def shapes(self, dim: int, channels: int) -> dict[str, tuple[int, ...]]:
        """Names and shapes for a model of that width, whose latent has `channels`."""
        encoder = "casual_audio_encoder.encoder"
        shapes: dict[str, tuple[int, ...]] = {
            "trainable_cond_mask.weight": (3, dim),
            "casual_audio_encoder.weights": (1, self.layers, 1, 1),
            "cond_encoder.weight": (dim, self.control_dim, 1, 2, 2),
            "cond_encoder.bias": (dim,),
        }
        shapes |= causal_encoder_shapes(encoder, self.features, (dim // 4, dim // 2, dim), self.heads, dim)
        shapes |= causal_convolution_shapes(f"{encoder}.conv1_global", self.features, dim // 4)
        shapes |= _linear(f"{encoder}.final_linear", dim, dim)
        for i in range(len(SOUND_LAYERS)):
            for projection in "qkvo":
                shapes |= _linear(f"audio_injector.injector.{i}.{projection}", dim, dim)
            for norm in "qk":
                shapes[f"audio_injector.injector.{i}.norm_{norm}.weight"] = (dim,)
            shapes |= _linear(f"audio_injector.injector_adain_layers.{i}.linear", dim, 2 * dim)
        for name, size in PACKED.items():
            shapes[f"frame_packer.{name}.weight"] = (dim, channels, *size)
            shapes[f"frame_packer.{name}.bias"] = (dim,)
        return shapes


def causal_encoder_shapes(
    name: str, columns: int, widths: tuple[int, int, int], heads: int, token: int
) -> dict[str, tuple[int, ...]]:
    """The tensors of a `frames.CausalEncoder`."""
    convolutions = {"conv1_local": (widths[0] * heads, columns), "conv2": widths[1::-1], "conv3": widths[2:0:-1]}
    shapes: dict[str, tuple[int, ...]] = {f"{name}.padding_tokens": (1, 1, 1, token)}
    for convolution, (rows, inputs) in convolutions.items():
        shapes |= causal_convolution_shapes(f"{name}.{convolution}", inputs, rows)
    return shapes


def causal_convolution_shapes(name: str, columns: int, rows: int) -> dict[str, tuple[int, ...]]:
    """The tensors of a `frames.CausalConvolution`."""
    return {f"{name}.conv.weight": (rows, columns, 3), f"{name}.conv.bias": (rows,)}


def is_constant(name: str) -> bool:
    """Whether a tensor of a file has the same numbers in every file, which the code knows."""
    return name.startswith("motion_encoder.") and name.endswith(".kernel")


def acts_behind(name: str) -> int | None:
    """The block of the video that a tensor outside the blocks acts behind; None for one that acts elsewhere."""
    part, _, rest = name.partition(".")
    if part == "face_adapter":
        return int(rest.split(".")[1]) * FACE_STRIDE
    layers = {"audio_injector": SOUND_LAYERS, "music_injector": MUSIC_LAYERS}.get(part)
    return layers[int(rest.split(".")[1])] if layers else None


def _linear(name: str, columns: int, rows: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (rows, columns), f"{name}.bias": (rows,)}
