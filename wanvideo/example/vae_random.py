"""Random weights of Wan's VAEs, of their released sizes or smaller ones: for tests and benchmarks."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from ..vae.vae_layout import BLOCKS, KINDS, LATENT_CONV, Half

_Named = Iterator[tuple[str, tuple[int, ...]]]


@dataclass(frozen=True)
class Widths:
    """Channels at the finest resolution of either half, and of the latent."""

    decoder: int
    encoder: int
    latent: int


RELEASED = {"2.1": Widths(96, 96, 16), "2.2": Widths(256, 160, 48)}


def random_weights(vae: str = "2.1", half: Half = "decoder", dim: int | None = None) -> dict[str, torch.Tensor]:
    """Random float32 weights, always the same, with which activations stay near 1. Arguments as of `vae_shapes`."""
    generator = torch.Generator().manual_seed(0)
    return {name: _random(name, shape, generator) for name, shape in vae_shapes(vae, half, dim).items()}


def vae_shapes(vae: str = "2.1", half: Half = "decoder", dim: int | None = None) -> dict[str, tuple[int, ...]]:
    """Shapes of the weights of one half of a VAE, under their names in Wan's files.

    Args:
        vae: "2.1" or "2.2".
        dim: channels at the finest resolution, where they are not those of the released VAE.
    """
    dim = dim or getattr(RELEASED[vae], half)
    return dict(_decoder(vae, dim) if half == "decoder" else _encoder(vae, dim))


def _random(name: str, shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    values = torch.randn(shape, generator=generator)
    if name.endswith("gamma"):
        return 1 + values / 10
    fan_in = 1 if name.endswith("bias") else values[0].numel()
    return values / fan_in**0.5 if fan_in > 1 else values / 10


def _decoder(vae: str, dim: int) -> _Named:
    kind, latent = KINDS[vae], RELEASED[vae].latent
    yield from _conv("conv2", latent, latent, 1, 1, 1)
    yield from _conv("decoder.conv1", 4 * dim, latent, 3, 3, 3)
    yield from _middle("decoder", 4 * dim)
    before, names = 4 * dim, _block_names("decoder", kind.groups, 4)
    for level, width in enumerate((4 * dim, 4 * dim, 2 * dim, dim)):
        for _ in range(3):
            yield from _residual(next(names), before, width)
            before = width
        name = next(names)
        if level < 3:
            before = width if kind.groups else width // 2
            yield from _conv(f"{name}.resample.1", before, width, 3, 3)
            if level < 2:
                yield from _conv(f"{name}.time_conv", 2 * width, width, 3, 1, 1)
    yield "decoder.head.0.gamma", (dim, 1, 1, 1)
    yield from _conv("decoder.head.2", 3 * kind.patch**2, dim, 3, 3, 3)


def _encoder(vae: str, dim: int) -> _Named:
    kind, latent = KINDS[vae], RELEASED[vae].latent
    yield from _conv("encoder.conv1", dim, 3 * kind.patch**2, 3, 3, 3)
    before, names = dim, _block_names("encoder", kind.groups, 3)
    for level, width in enumerate((dim, 2 * dim, 4 * dim, 4 * dim)):
        for _ in range(2):
            yield from _residual(next(names), before, width)
            before = width
        name = next(names)
        if level < 3:
            yield from _conv(f"{name}.resample.1", width, width, 3, 3)
            if level > 0:
                yield from _conv(f"{name}.time_conv", width, width, 3, 1, 1)
    yield from _middle("encoder", 4 * dim)
    yield "encoder.head.0.gamma", (4 * dim, 1, 1, 1)
    yield from _conv("encoder.head.2", 2 * latent, 4 * dim, 3, 3, 3)
    yield from _conv(LATENT_CONV["encoder"], 2 * latent, 2 * latent, 1, 1, 1)


def _block_names(half: Half, groups: bool, layers: int) -> Iterator[str]:
    """Names of the layers between input and middle or middle and output, so many for each resolution."""
    kind = BLOCKS[half]
    for number in range(4 * layers):
        yield f"{half}.{kind}.{number // layers}.{kind}.{number % layers}" if groups else f"{half}.{kind}.{number}"


def _middle(half: Half, width: int) -> _Named:
    yield from _residual(f"{half}.middle.0", width, width)
    yield f"{half}.middle.1.norm.gamma", (width, 1, 1)
    yield from _conv(f"{half}.middle.1.to_qkv", 3 * width, width, 1, 1)
    yield from _conv(f"{half}.middle.1.proj", width, width, 1, 1)
    yield from _residual(f"{half}.middle.2", width, width)


def _residual(name: str, before: int, after: int) -> _Named:
    yield f"{name}.residual.0.gamma", (before, 1, 1, 1)
    yield from _conv(f"{name}.residual.2", after, before, 3, 3, 3)
    yield f"{name}.residual.3.gamma", (after, 1, 1, 1)
    yield from _conv(f"{name}.residual.6", after, after, 3, 3, 3)
    if before != after:
        yield from _conv(f"{name}.shortcut", after, before, 1, 1, 1)


def _conv(name: str, *shape: int) -> _Named:
    yield f"{name}.weight", shape
    yield f"{name}.bias", shape[:1]
