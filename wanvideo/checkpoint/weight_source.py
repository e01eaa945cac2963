"""Weights of a Wan DiT, read from a file or random for benchmarks, and the types in which a model holds weights."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Protocol

import torch

from ..base.config import PRESETS, WanConfig
from ..base.lora import LoraDelta, merge
from ..base.regular_file import changed
from ..base.tensor_info import CheckpointError, TensorInfo
from ..base.variant import is_rounded
from ..quant.formats.fp8 import FLOAT8, Fp8Weight
from ..quant.formats.registry import format_name
from ..quant.quantized import QuantizedWeight, Weight, as_tensor
from .file_header import is_gguf, read_file_header
from .header import Header
from .mapped_file import MappedFile
from .vace_module import read_model

RANDOM_PREFIX = "random:"
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
WEIGHT_DTYPES = DTYPES | FLOAT8

_BIAS_OF_BLOCK = re.compile(r"blocks\.\d+\.((self|cross)_attn\.(q|k|v|o|k_img|v_img)|ffn\.[02])\.bias$")


class WeightSource(Protocol):
    """A source of the tensors of one model, by their names without prefix."""

    @property
    def config(self) -> WanConfig:
        """The model's dimensions."""

    @property
    def header(self) -> Header | None:
        """The header of the model's file; None without a file."""

    def tensor(self, name: str) -> Weight:
        """The weight `name` as the source has it, to be given to `cast_and_move`."""

    def check_unchanged(self) -> None:
        """Raise CheckpointError if a file has been written since its header was read."""


class Checkpoint:
    """A model's file or files, each opened once and memory-mapped: processes that read a file share its pages.

    Args:
        path: a file, a folder of shards, or one shard.
        module: the file of a module beside the model, VACE's or InfiniteTalk's.
        stamp: the stamp of the header by which the model was chosen (see `Header`); "" takes the files as they are.

    Raises:
        CheckpointError: see `read_model`; or the files are not those of the stamp.
    """

    def __init__(self, path: str, module: str = "", stamp: str = ""):
        self.header = read_model(path, module)
        if stamp not in ("", self.header.stamp):
            raise changed(path, "after it was queued")
        self.config = self.header.config
        self._files: dict[str, MappedFile] = {}

    def tensor(self, name: str) -> Weight:
        """The weight `name` as its file has it, on the CPU.

        Raises:
            CheckpointError: a file has been replaced or written since its header was read.
        """
        return self.header.tensors[name].load(self._read)

    def check_unchanged(self) -> None:
        """Raise CheckpointError if a file that was read has been written since: weights on the CPU are mapped, and
        change with it."""
        for file in self._files.values():
            file.check_unchanged()

    def _read(self, info: TensorInfo) -> torch.Tensor:
        if info.file not in self._files:
            self._files[info.file] = MappedFile(info.file, is_gguf(info.file), self.header.identities[info.file])
        return self._files[info.file].tensor(info)


def random_config(size: str) -> WanConfig:
    """Dimensions of the released model of a size, such as 14b.

    Raises:
        CheckpointError: no model of this size was released.
    """
    if size not in PRESETS:
        raise CheckpointError(f"There is no Wan of size {size}. Known sizes: {', '.join(PRESETS)}.")
    return PRESETS[size]


class RandomWeights:
    """Normal weights of a released size (`random:14b`), for measuring speed without a file of 28 GB."""

    header: Header | None = None

    def __init__(self, size: str, device: torch.device | str):
        self.config = random_config(size)
        self._device = torch.device(device)
        self._shapes = self.config.shapes()
        self._seeds = {name: seed for seed, name in enumerate(self._shapes)}

    def tensor(self, name: str) -> torch.Tensor:
        """Normal numbers with deviation 0.02 in bf16, the same on every device of one kind and in every call."""
        generator = torch.Generator(self._device).manual_seed(self._seeds[name])
        weight = torch.randn(self._shapes[name], generator=generator, device=self._device, dtype=torch.bfloat16)
        return weight * 0.02

    def check_unchanged(self) -> None:
        """Do nothing: there is no file."""


def open_weights(path: str, device: torch.device | str = "cpu", module: str = "", stamp: str = "") -> WeightSource:
    """Open a checkpoint file (`module` and `stamp`: see `Checkpoint`), or random weights for a path such as
    `random:14b`.

    Raises:
        CheckpointError: see `Checkpoint`.
    """
    if path.startswith(RANDOM_PREFIX):
        return RandomWeights(path.removeprefix(RANDOM_PREFIX), device)
    return Checkpoint(path, module, stamp)


def model_config(path: str, module: str = "", stamp: str = "") -> WanConfig:
    """Dimensions of a checkpoint (`module` and `stamp`: see `Checkpoint`) or of random weights, from the headers alone.

    Raises:
        CheckpointError: see `Checkpoint`.
    """
    if path.startswith(RANDOM_PREFIX):
        return random_config(path.removeprefix(RANDOM_PREFIX))
    return Checkpoint(path, module, stamp).config


def file_stamp(path: str) -> str:
    """The stamp of a model's header, which changes whenever the model's file, or a file of its folder, changes; "" for
    random weights.

    Raises:
        CheckpointError: see `read_file_header`.
    """
    return "" if path.startswith(RANDOM_PREFIX) else read_file_header(path).stamp


def storage_format(header: Header | None, weight_dtype: str) -> str:
    """The user's names for the formats in which workers hold the weights of a model: bf16, or GGUF Q4_K and bf16.

    Args:
        header: the header of the model's file; None for random weights.
        weight_dtype: a name of `WEIGHT_DTYPES`.
    """
    quantized = {name: info for name, info in header.tensors.items() if info.is_quantized} if header else {}
    if not quantized:
        return f"{weight_dtype} and bf16" if weight_dtype in FLOAT8 else weight_dtype
    return f"{format_name(quantized)} and {'bf16' if weight_dtype in FLOAT8 else weight_dtype}"


def storage_bytes(config: WanConfig, header: Header | None, weight_dtype: torch.dtype) -> dict[str, int]:
    """The bytes that each weight of a model takes in memory after `cast_and_move`, by name; reads no weight.

    Args:
        header: the header of the model's file; None for random weights.
    """
    sizes = {name: _cast_bytes(name, shape, weight_dtype) for name, shape in config.shapes().items()}
    tensors = header.tensors if header else {}
    return sizes | {name: info.storage_bytes for name, info in tensors.items() if info.is_quantized}


def storage_bytes_of(path: str, weight_dtype: torch.dtype, module: str = "") -> dict[str, int]:
    """`storage_bytes` of the checkpoint `path` (`module`: a file beside it) or of random weights.

    Raises:
        CheckpointError: see `open_weights`.
    """
    if path.startswith(RANDOM_PREFIX):
        return storage_bytes(random_config(path.removeprefix(RANDOM_PREFIX)), None, weight_dtype)
    header = read_model(path, module)
    return storage_bytes(header.config, header, weight_dtype)


def total_storage_bytes(path: str, weight_dtype: torch.dtype) -> int:
    """Bytes of all weights of a model in memory: quantised as in its file, or cast to `weight_dtype`.

    Raises:
        CheckpointError: see `open_weights`.
    """
    return sum(storage_bytes_of(path, weight_dtype).values())


def _cast_bytes(name: str, shape: tuple[int, ...], weight_dtype: torch.dtype) -> int:
    if is_quantized_at_load(name, len(shape), weight_dtype):
        return Fp8Weight.quantized_bytes(shape)
    return math.prod(shape) * storage_dtype(name, len(shape), weight_dtype).itemsize


def cast_and_move(weight: Weight, weight_dtype: torch.dtype, device: torch.device | str, name: str) -> Weight:
    """Convert the weight `name` of a file to the type in which the model holds this weight, and move it to `device`.

    Matrices and 2-D convolutions get `weight_dtype`. Norms, modulation and the patch embedding get float32: they are
    0.1 % of the bytes, and act on the float32 residual stream. Biases in the blocks get the type of their matrices, as
    the 16-bit products would otherwise convert the biases each time. Weights that the file has quantised stay as they
    are. An fp8 `weight_dtype` quantises the matrices of the blocks, with a scale for each output channel; embeddings
    and head, 2 % of the bytes, whose errors would reach every block, get bf16, much as in kijai's fp8 files.
    (ComfyUI's own weight_dtype fp8_e4m3fn casts all weights, norms and biases too, and has no scales.)
    """
    if isinstance(weight, QuantizedWeight):
        return weight.to(device)
    if is_quantized_at_load(name, weight.ndim, weight_dtype):
        return Fp8Weight.quantize(weight.to(device), weight_dtype)
    return weight.to(device, storage_dtype(name, weight.ndim, weight_dtype))


def is_quantized_at_load(name: str, ndim: int, weight_dtype: torch.dtype) -> bool:
    """Whether `cast_and_move` quantises the float weight `name`: an fp8 `weight_dtype` quantises the matrices of the
    blocks, which are 98 % of the bytes."""
    return weight_dtype in FLOAT8.values() and ndim == 2 and ("blocks." in name or is_rounded(name))


def storage_dtype(name: str, ndim: int, weight_dtype: torch.dtype) -> torch.dtype:
    """The dtype to which `cast_and_move` casts the weight `name` of `ndim` dimensions, if it does not quantise it."""
    if ndim not in (2, 4) and not _BIAS_OF_BLOCK.search(name):
        return torch.float32
    return torch.bfloat16 if weight_dtype in FLOAT8.values() else weight_dtype


def change(weight: Weight, deltas: Sequence[LoraDelta]) -> Weight:
    """Merge `deltas` into a file's weight in float32 (see `merge`). A float weight gives a float32 tensor; a quantised
    weight gives a weight of about as many bits (see `QuantizedWeight.requantize`)."""
    merged = merge(as_tensor(weight, torch.float32), deltas)
    return weight.requantize(merged) if isinstance(weight, QuantizedWeight) else merged
