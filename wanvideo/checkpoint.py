"""Weights of a Wan DiT: from a safetensors file through the page cache, or random ones for benchmarks."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

import torch
from safetensors import safe_open

from .config import PRESETS, CheckpointError, WanConfig, read_header

RANDOM_PREFIX = "random:"
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


class WeightSource(Protocol):
    """Where the tensors of one model come from, by their names without prefix."""

    config: WanConfig

    def tensor(self, name: str) -> torch.Tensor: ...


class Checkpoint:
    """A safetensors file, opened once and memory-mapped: processes that read it share its pages."""

    def __init__(self, path: str):
        self.header = read_header(path)
        self.config = self.header.config
        self._file = safe_open(path, framework="pt", device="cpu")

    def tensor(self, name: str) -> torch.Tensor:
        """The tensor as it stands in the file, on the CPU."""
        return self._file.get_tensor(self.header.prefix + name)


def random_config(size: str) -> WanConfig:
    """Dimensions of a released size, such as 14b.

    Raises:
        CheckpointError: there is no such size.
    """
    if size not in PRESETS:
        raise CheckpointError(f"There is no Wan of size {size}. Known sizes: {', '.join(PRESETS)}.")
    return PRESETS[size]


class RandomWeights:
    """Normal weights of a released size (`random:14b`): what a speed needs, without a file of 28 GB."""

    def __init__(self, size: str, device: torch.device | str):
        self.config = random_config(size)
        self._device = torch.device(device)
        self._shapes = self.config.shapes()
        self._seeds = {name: seed for seed, name in enumerate(self._shapes)}

    def tensor(self, name: str) -> torch.Tensor:
        """Normal with deviation 0.02, bf16, the same on every device of one kind and in every call."""
        generator = torch.Generator(self._device).manual_seed(self._seeds[name])
        weight = torch.randn(self._shapes[name], generator=generator, device=self._device, dtype=torch.bfloat16)
        return weight * 0.02


def open_weights(path: str, device: torch.device | str = "cpu") -> WeightSource:
    """Open a checkpoint file, or random weights for a path such as `random:14b`.

    Raises:
        CheckpointError: see `read_header`.
    """
    if path.startswith(RANDOM_PREFIX):
        return RandomWeights(path.removeprefix(RANDOM_PREFIX), device)
    return Checkpoint(path)


def placed(
    source: WeightSource, weight_dtype: torch.dtype, device: torch.device | str
) -> Iterator[tuple[str, torch.Tensor]]:
    """Every tensor of `source` on `device`, one at a time (see `place`)."""
    for name in source.config.shapes():
        yield name, place(source.tensor(name), weight_dtype, device)


def place(tensor: torch.Tensor, weight_dtype: torch.dtype, device: torch.device | str) -> torch.Tensor:
    """Matrices in `weight_dtype`; norms, biases, modulation and the patch embedding in float32.

    The small tensors are 0.1 % of the bytes, and the residual stream they act on is float32.
    """
    return tensor.to(device=device, dtype=held_dtype(tensor.ndim, weight_dtype))


def held_dtype(ndim: int, weight_dtype: torch.dtype) -> torch.dtype:
    """The dtype in which `place` holds a tensor of so many dimensions."""
    return weight_dtype if ndim == 2 else torch.float32
