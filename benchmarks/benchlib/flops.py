"""How much arithmetic one DiT forward is: the one place for the formula and for what a resolution means."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Protocol

TEXT_TOKENS = 512

# Latent frames, rows and columns of the clips that the models were made for: 81 frames at 16 fps with the
# Wan 2.1 VAE (8 x 8 pixels, 4 frames), 121 frames at 24 fps with the Wan 2.2 VAE of the 5B (16 x 16 pixels).
CLIPS = {
    "480p": (21, 60, 104),
    "720p": (21, 90, 160),
    "720p-5b": (31, 44, 80),
}
MODELS = {"2.1": "14b", "2.2": "5b"}
"""A model whose videos a VAE decodes."""


class Dimensions(Protocol):
    """The fields of `WanConfig` that the formula needs."""

    dim: int
    ffn_dim: int
    num_layers: int


def latent_size(res: str, size: str) -> tuple[int, int, int]:
    """Frames, rows and columns of the latent for a name such as `720p`, or for sizes such as `21x90x160`."""
    if re.fullmatch(r"\d+x\d+x\d+", res):
        frames, rows, columns = (int(n) for n in res.split("x"))
        return frames, rows, columns
    name = f"{res}-5b" if size == "5b" else res
    if name not in CLIPS:
        raise ValueError(f"There is no resolution {res} for {size}. Use 480p, 720p, or FRAMESxROWSxCOLUMNS.")
    return CLIPS[name]


def tokens_of(latent: tuple[int, int, int]) -> int:
    """Tokens of a latent: patches of 1 x 2 x 2, odd sizes rounded up."""
    frames, rows, columns = latent
    return frames * math.ceil(rows / 2) * math.ceil(columns / 2)


def forward_flops(config: Dimensions, tokens: int) -> int:
    """Floating-point operations of one forward at batch 1; a multiply and an add are two.

    Counts the projections and the feed-forward of every block, self-attention over all tokens and
    cross-attention to 512 text tokens. Embeddings, the head, norms and RoPE are left out: together they are
    under 1 % at 480p and above.
    """
    d, f = config.dim, config.ffn_dim
    projections = 2 * tokens * (6 * d * d + 2 * d * f)
    text_projections = 2 * TEXT_TOKENS * 2 * d * d
    self_attention = 4 * tokens * tokens * d
    cross_attention = 4 * tokens * TEXT_TOKENS * d
    return config.num_layers * (projections + text_projections + self_attention + cross_attention)


def vae_decode_flops(shapes: Mapping[str, tuple[int, ...]], latent: tuple[int, int, int]) -> int:
    """Floating-point operations of one decode by Wan's VAE, the weights of whose decoder have these shapes.

    Counts every convolution at the size of its output, and the attention of the middle block.
    """
    frames, rows, columns = latent
    total, scale, count = 0, 1, frames
    for name, shape in sorted(shapes.items(), key=lambda item: _place(item[0])):
        if not name.endswith(".weight"):
            continue
        if ".time_conv." in name:  # of all frames but the first, which it doubles
            total += 2 * math.prod(shape) * (count - 1) * rows * columns * scale**2
            count = 2 * count - 1
            continue
        if ".resample." in name:
            scale *= 2
        total += 2 * math.prod(shape) * count * rows * columns * scale**2
    channels = shapes["decoder.middle.1.proj.weight"][0]
    return total + 4 * frames * (rows * columns) ** 2 * channels


def _place(name: str) -> tuple[int, list[int], bool]:
    """Where a weight of the decoder comes, convolutions over time before the resampling of their layer."""
    order = {"conv2": 0, "conv1": 1, "middle": 2, "upsamples": 3, "head": 4}
    kind = next(order[part] for part in name.split(".") if part in order)
    numbers = [int(number) for number in re.findall(r"(?<=upsamples\.)\d+", name)]  # of the group, and in it
    return kind, numbers, ".time_conv." not in name
