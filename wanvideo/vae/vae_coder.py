"""Decoder and encoder of Wan's video VAEs on one device, which run the layers of vae_layers.py piece by piece."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import torch

from .vae_layers import Frame, NormConv, Pass, Weights, channels_to_pixels, make_layer, pixels_to_channels
from .vae_layout import FRAMES, LATENT_CONV, PIECE_BYTES, Half, frames_at_once, kind_of, latent_frames, stages_of
from .vae_ops import VAEOps

BeforePiece = Callable[[], None] | None
"""Called before each piece of each stage, equally often on all ranks; it may raise."""


class Coder:
    """One half of a VAE.

    Args:
        tensors: the VAE's weights under their names in Wan's files, on one device and in one dtype.
        ops: the kernels for that device.

    Raises:
        VAEError: the tensors are not the weights of one of Wan's VAEs.
    """

    half: Half

    def __init__(self, tensors: Mapping[str, torch.Tensor], ops: VAEOps):
        shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        self.kind, self.stages = kind_of(shapes, self.half), stages_of(shapes, self.half)
        weights, latent = Weights(tensors, ops), LATENT_CONV[self.half]
        self.layers = [[make_layer(name, weights) for name in stage.names] for stage in self.stages]
        self.head = NormConv(f"{self.half}.head.0", f"{self.half}.head.2", weights)
        self.latent_conv, self.like = weights.linear(latent), tensors[f"{latent}.weight"]


class Decoder(Coder):
    """From latents to video."""

    half = "decoder"

    def decode(
        self, latent: torch.Tensor, frame: Frame, piece_bytes: int = PIECE_BYTES, before_piece: BeforePiece = None
    ) -> Iterator[torch.Tensor]:
        """The video in pieces of some frames [t, scale * h, scale * w, 3], about from -1 to 1.

        Args:
            latent: this part of one latent, [C, T, h, w].
            frame: what surrounds it.
            piece_bytes: how large a tensor may become, unless one frame is larger.
        """
        run = Pass(frame, {})
        x = self.latent_conv(latent.permute(1, 2, 3, 0).to(self.like).contiguous())
        yield from self._stage(0, x, run, piece_bytes, before_piece)

    def _stage(
        self, index: int, x: torch.Tensor, run: Pass, piece_bytes: int, before_piece: BeforePiece
    ) -> Iterator[torch.Tensor]:
        at_once = frames_at_once(self.stages[index], run.frame.size, x.element_size(), piece_bytes)
        for y in x.split(at_once):
            if before_piece is not None:
                before_piece()
            for layer in self.layers[index]:
                y = layer(y, run)
            if index + 1 < len(self.stages):
                yield from self._stage(index + 1, y, run, piece_bytes, before_piece)
            else:
                yield channels_to_pixels(self.head(y, run), self.kind.patch)


class Encoder(Coder):
    """From video to latents.

    The first frame of a video is encoded alone and the others four at a time, so every piece ends with such a group.
    """

    half = "encoder"

    def encode(
        self, video: torch.Tensor, frame: Frame, piece_bytes: int = PIECE_BYTES, before_piece: BeforePiece = None
    ) -> Iterator[torch.Tensor]:
        """The mean of the latent in pieces of some frames [t, h, w, C].

        Args:
            video: this part of one video, from 0 to 1, [T, scale * h, scale * w, 3], on any device; what is left of
                the last four frames is not read.
            frame: what surrounds it; its `size` counts latent rows and columns.
            piece_bytes: how large a tensor may become, unless four frames are larger.
        """
        run, channels = Pass(frame, {}), len(self.like) // 2
        video = video[: 1 + FRAMES * (latent_frames(len(video)) - 1)]
        at_once = frames_at_once(self.stages[0], frame.size, self.like.element_size(), piece_bytes)
        for piece in video.split(_whole_fours(len(video), at_once)):
            if before_piece is not None:
                before_piece()
            x = piece.to(self.like.device).float().mul(2).sub(1)
            x = pixels_to_channels(x, self.kind.patch).to(self.like.dtype).contiguous()
            for layer in self.layers[0]:
                x = layer(x, run)
            yield self.latent_conv(self.head(x, run))[..., :channels]


def _whole_fours(frames: int, at_once: int) -> list[int]:
    """How many frames each piece has: the first one more than a multiple of 4, the others multiples."""
    at_once = max(FRAMES, at_once // FRAMES * FRAMES)
    sizes = [1 + min(at_once, frames - 1)]
    while sum(sizes) < frames:
        sizes.append(min(at_once, frames - sum(sizes)))
    return sizes
