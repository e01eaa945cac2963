"""How much arithmetic one DiT forward is: the one place for the formula and for what a resolution means."""

from __future__ import annotations

import math
import re
from typing import Protocol

TEXT_TOKENS = 512

# Latent frames, rows and columns of the clips that the models were made for: 81 frames at 16 fps with the
# Wan 2.1 VAE (8 x 8 pixels, 4 frames), 121 frames at 24 fps with the Wan 2.2 VAE of the 5B (16 x 16 pixels).
CLIPS = {
    "480p": (21, 60, 104),
    "720p": (21, 90, 160),
    "720p-5b": (31, 44, 80),
}


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
