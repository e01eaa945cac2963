"""The base weights behind a LoRA: weights as they were before a LoRA changed them, kept while the device has room.

A LoRA is merged into the weights of the file, so that nothing of an earlier LoRA remains. The base weights are still on
the device when the first LoRA comes. While they are kept there, the next LoRA, another strength, or no LoRA needs the
device alone. Without them each rank reads its part of the file again, 27 GB for the 14B in 16 bit.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from ...wanvideo.checkpoint.weight_source import WeightSource
from ...wanvideo.quant.quantized import QuantizedWeight, Weight

_DTYPES = {"F16": torch.float16, "BF16": torch.bfloat16}


class BaseWeights:
    """Base weights of one model on this rank: the weights of the file in place of which the model has merged weights.

    Args:
        room: gives the bytes of the device that base weights, or changed weights beside them, may still take.
    """

    def __init__(self, room: Callable[[], int]):
        self._room = room
        self._left = 0
        self._weights: dict[str, Weight] = {}

    @property
    def nbytes(self) -> int:
        """Bytes of all base weights that are kept."""
        return sum(weight.nbytes for weight in self._weights.values())

    def look_for_room(self) -> None:
        """Measure how many bytes `keep` may take.

        To be called once before a LoRA is merged: to measure for every weight takes longer than to change the weight.
        """
        self._left = self._room()

    def get(self, name: str) -> Weight | None:
        """The base weight of this name, or None if it is not kept."""
        return self._weights.get(name)

    def keep(self, name: str, weight: Weight, copy: bool) -> None:
        """Keep a weight of the device, or with `copy` a copy, if the device has room for the weight a second time."""
        if name not in self._weights and weight.nbytes <= self._left:
            self._left -= weight.nbytes
            self._weights[name] = _copied(weight) if copy else weight

    def release(self, name: str) -> None:
        """Forget a base weight that the model itself uses again."""
        self._weights.pop(name, None)

    def drop(self) -> int:
        """Forget all base weights; returns the bytes that they took."""
        freed = self.nbytes
        self._weights.clear()
        return freed


def as_in_file(weight: Weight, source: WeightSource, name: str) -> bool:
    """Whether an unchanged weight of the model has every digit that it has in its file."""
    if source.header is None:  # random weights
        return isinstance(weight, torch.Tensor) and weight.dtype in (torch.bfloat16, torch.float32)
    info = source.header.tensors[name]
    if isinstance(weight, QuantizedWeight):
        return info.is_quantized
    return weight.dtype in (torch.float32, _DTYPES.get(info.dtype)) and info.dtype != "F64"


def _copied(weight: Weight) -> Weight:
    if isinstance(weight, QuantizedWeight):
        return weight.replace({key: tensor.clone() for key, tensor in weight.components().items()})
    return weight.clone()
