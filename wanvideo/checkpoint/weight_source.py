"""Weights of a Wan DiT: from its file through the page cache, or random ones for benchmarks."""

from __future__ import annotations

import functools
import math
import os
import re
from collections.abc import Sequence
from typing import Protocol

import torch
from safetensors import safe_open

from ..base.config import PRESETS, WanConfig
from ..base.lora import WeightPatch, merge
from ..base.tensor_info import CheckpointError, TensorInfo
from ..base.variant import is_rounded
from ..quant.formats import format_name, is_quantized, quantized_bytes, weight_of
from ..quant.quantized import FLOAT8, Fp8Weight, QuantizedWeight, Weight, as_tensor
from .files import is_gguf, model_files
from .gguf_file import gguf_tensor, map_file
from .header import Header
from .vace_module import read_model

RANDOM_PREFIX = "random:"
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
WEIGHT_DTYPES = DTYPES | FLOAT8

_BIAS_OF_BLOCK = re.compile(r"blocks\.\d+\.((self|cross)_attn\.(q|k|v|o|k_img|v_img)|ffn\.[02])\.bias$")


class WeightSource(Protocol):
    """Where the tensors of one model come from, by their names without prefix. `header` is None without a file."""

    config: WanConfig
    header: Header | None

    def tensor(self, name: str) -> Weight: ...


class Checkpoint:
    """A model's file or files, each opened once and memory-mapped: processes that read it share its pages.

    `module` is the file of a module beside it, VACE's or InfiniteTalk's.
    """

    def __init__(self, path: str, module: str = ""):
        self.header = read_model(path, module)
        self.config = self.header.config
        self._safetensors = functools.cache(functools.partial(safe_open, framework="pt", device="cpu"))
        self._mapped = functools.cache(map_file)

    def tensor(self, name: str) -> Weight:
        """The weight as it stands in the file, on the CPU."""
        info = self.header.tensors[name]
        return weight_of(info, *(self._read(part) if part else None for part in (info, info.scale, info.whole_scale)))

    def _read(self, info: TensorInfo) -> torch.Tensor:
        if is_gguf(info.file):
            return gguf_tensor(info, self._mapped(info.file))
        return self._safetensors(info.file).get_tensor(info.key)


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

    header = None

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


def open_weights(path: str, device: torch.device | str = "cpu", module: str = "") -> WeightSource:
    """Open a checkpoint file (`module`: a file beside it), or random weights for a path such as `random:14b`.

    Raises:
        CheckpointError: see `read_model`.
    """
    if path.startswith(RANDOM_PREFIX):
        return RandomWeights(path.removeprefix(RANDOM_PREFIX), device)
    return Checkpoint(path, module)


def model_config(path: str, module: str = "") -> WanConfig:
    """Dimensions of a checkpoint (`module`: a file beside it) or of random weights, from the headers alone.

    Raises:
        CheckpointError: see `read_model`.
    """
    if path.startswith(RANDOM_PREFIX):
        return random_config(path.removeprefix(RANDOM_PREFIX))
    return read_model(path, module).config


def file_stamp(path: str) -> str:
    """Changes when the file does, or one of a folder's; "" for random weights."""
    if path.startswith(RANDOM_PREFIX):
        return ""
    stats = [os.stat(file) for file in model_files(path)]
    return f"{max(stat.st_mtime_ns for stat in stats)}-{sum(stat.st_size for stat in stats)}"


def held_as(header: Header | None, weight_dtype: str) -> str:
    """How the weights of a model are held, such as bf16, or GGUF Q4_K and bf16; random weights have no header."""
    quantized = {name: info for name, info in header.tensors.items() if is_quantized(info)} if header else {}
    if not quantized:
        return f"{weight_dtype} and bf16" if weight_dtype in FLOAT8 else weight_dtype
    return f"{format_name(quantized)} and {'bf16' if weight_dtype in FLOAT8 else weight_dtype}"


def held_sizes(config: WanConfig, header: Header | None, weight_dtype: torch.dtype) -> dict[str, int]:
    """Bytes of each weight of a model as `place` holds it; reads none. Random weights have no header."""
    sizes = {name: _held(name, shape, weight_dtype) for name, shape in config.shapes().items()}
    tensors = header.tensors if header else {}
    return sizes | {name: quantized_bytes(info) for name, info in tensors.items() if is_quantized(info)}


def held_sizes_of(path: str, weight_dtype: torch.dtype, module: str = "") -> dict[str, int]:
    """`held_sizes` of a checkpoint or of random weights.

    Raises:
        CheckpointError: see `open_weights`.
    """
    if path.startswith(RANDOM_PREFIX):
        return held_sizes(random_config(path.removeprefix(RANDOM_PREFIX)), None, weight_dtype)
    header = read_model(path, module)
    return held_sizes(header.config, header, weight_dtype)


def held_bytes(path: str, weight_dtype: torch.dtype) -> int:
    """Bytes that a model takes on a device where it is held in `weight_dtype`.

    Raises:
        CheckpointError: see `open_weights`.
    """
    return sum(held_sizes_of(path, weight_dtype).values())


def _held(name: str, shape: tuple[int, ...], weight_dtype: torch.dtype) -> int:
    if is_quantized_at_load(name, len(shape), weight_dtype):
        return math.prod(shape) + shape[0] * 4
    return math.prod(shape) * held_dtype(name, len(shape), weight_dtype).itemsize


def place(weight: Weight, weight_dtype: torch.dtype, device: torch.device | str, name: str) -> Weight:
    """A weight as the model holds it on `device`.

    Matrices and 2-D convolutions are in `weight_dtype`; norms, modulation and the patch embedding in float32: these are
    0.1 % of the bytes, and the residual stream they act on is float32. Biases go with their matrices in the blocks,
    whose products are 16-bit and would convert them each time. What the file has quantised stays as it is. An fp8
    `weight_dtype` quantises the matrices of the blocks, with a scale for each output channel; the embeddings and the
    head, 2 % of the bytes, whose errors would reach every block, are in bf16, much as in kijai's fp8 files. (ComfyUI's
    own weight_dtype fp8_e4m3fn casts all of them, norms and biases too, and has no scales.)
    """
    if isinstance(weight, QuantizedWeight):
        return weight.to(device)
    if is_quantized_at_load(name, weight.ndim, weight_dtype):
        return Fp8Weight.quantize(weight.to(device), weight_dtype)
    return weight.to(device, held_dtype(name, weight.ndim, weight_dtype))


def is_quantized_at_load(name: str, ndim: int, weight_dtype: torch.dtype) -> bool:
    """Whether `place` quantises a float weight: in fp8, the matrices of the blocks, which are 98 % of the bytes."""
    return weight_dtype in FLOAT8.values() and ndim == 2 and ("blocks." in name or is_rounded(name))


def held_dtype(name: str, ndim: int, weight_dtype: torch.dtype) -> torch.dtype:
    """The dtype in which `place` holds a weight of so many dimensions that is not quantised."""
    if ndim not in (2, 4) and not _BIAS_OF_BLOCK.search(name):
        return torch.float32
    return torch.bfloat16 if weight_dtype in FLOAT8.values() else weight_dtype


def change(weight: Weight, patches: Sequence[WeightPatch]) -> Weight:
    """A file's weight with `patches` merged in float32 (see `merge`): in float32, or quantised as it was."""
    merged = merge(as_tensor(weight, torch.float32), patches)
    return weight.requantize(merged) if isinstance(weight, QuantizedWeight) else merged
