"""The shapes of weights that a file has flattened, as GGUF tensors have at most four dimensions.

A patch embedding has five. Converters note its shape (see gguf_header.py), leave the tensor out, or merge neighbouring
dimensions: the numbers then keep their order, and the shape is known from the model.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from itertools import accumulate
from operator import mul

from ..base.shapes import Shapes
from ..base.tensor_info import elements
from ..quant.format import LogicalTensor, PaddedTensor

PATCH_EMBEDDING = "patch_embedding.weight"
_PATCH = (1, 2, 2)
_PATCH_EMBEDDINGS = re.compile(r"(\w+_)?patch_embedding(_\w+)?\.weight")
_DIMENSIONS = 2 + len(_PATCH)


def with_patch_shapes(tensors: Mapping[str, LogicalTensor], like: str) -> dict[str, LogicalTensor]:
    """The tensors of a Wan DiT with all patch embeddings in five dimensions, [width, channels, 1, 2, 2].

    Args:
        like: the name of a tensor whose last dimension is the model's width.
    """
    wide = tensors.get(like)
    width = wide.shape[-1] if wide is not None and wide.shape else 0
    shapes: Shapes = {}
    for name, info in tensors.items():
        channels, rest = divmod(elements(info.shape), 4 * width or 1)
        if _PATCH_EMBEDDINGS.fullmatch(name) and channels and not rest:
            shapes[name] = (width, channels, *_PATCH)
    return with_shapes(tensors, shapes)


def with_shapes(tensors: Mapping[str, LogicalTensor], shapes: Shapes) -> dict[str, LogicalTensor]:
    """The tensors, with the dimensions of `shapes` where a file has neighbouring dimensions merged, or lacks those of
    size 1."""
    return {name: _shaped(info, shapes.get(name, info.shape)) for name, info in tensors.items()}


def with_channels(tensors: Mapping[str, LogicalTensor], in_dim: int) -> dict[str, LogicalTensor]:
    """The tensors of a Wan DiT, with a patch embedding of `in_dim` channels: those of the file, and zeros."""
    return {**tensors, PATCH_EMBEDDING: PaddedTensor.of(tensors[PATCH_EMBEDDING], in_dim)}


def _shaped(info: LogicalTensor, shape: tuple[int, ...]) -> LogicalTensor:
    if info.shape == shape or elements(info.shape) != elements(shape):
        return info
    without_ones = [size for size in info.shape if size > 1] == [size for size in shape if size > 1]
    merged = len(info.shape) < len(shape) == _DIMENSIONS and _strides(info.shape) <= _strides(shape)
    return replace(info, shape=shape) if without_ones or merged else info


def _strides(shape: tuple[int, ...]) -> set[int]:
    """The counts of numbers at which a dimension ends; merging neighbours leaves some of these counts out."""
    return set(accumulate(shape, mul))
