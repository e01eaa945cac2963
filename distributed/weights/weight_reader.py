"""A rank's part of each weight of a model, read from the file, in the form in which the model holds it."""

from __future__ import annotations

import torch

from ...wanvideo.checkpoint.weight_source import (
    WEIGHT_DTYPES,
    WeightSource,
    cast_and_move,
    is_quantized_at_load,
    storage_dtype,
)
from ...wanvideo.quant.quantized import QuantizedWeight, Weight
from ..parallel.tensor import TensorShard
from ..shm import signs


class WeightReader:
    """Reads the weights of one model on one rank.

    Args:
        source: the file, or random weights.
        weight_dtype: see `ModelSpec`.
        shard: the rank's part of the matrices.
        device: where the model runs.
    """

    def __init__(self, source: WeightSource, weight_dtype: str, shard: TensorShard, device: torch.device):
        self.source, self._dtype, self._shard, self._device = source, WEIGHT_DTYPES[weight_dtype], shard, device

    def read(self, name: str) -> Weight:
        """This rank's part of a weight, as the model holds it on its device."""
        signs.step()
        return self.as_held(name, self.base(name))

    def base(self, name: str) -> Weight:
        """This rank's part of a weight as it is in the file."""
        return self._shard.take(name, self.source.tensor(name))

    def as_held(self, name: str, weight: Weight) -> Weight:
        """This rank's part of a weight, changed by a LoRA or not, in the form in which the model holds it."""
        weight = cast_and_move(weight, self._dtype, self._device, name)
        if isinstance(weight, QuantizedWeight):
            return weight
        if self._device.type == "cuda" and weight.untyped_storage().nbytes() > weight.nbytes:
            return weight.clone()  # a view of rows would keep the whole random weight in memory
        return weight.contiguous()  # a view of columns would be read from the mapped file with every use

    def unconverted(self, name: str) -> tuple[Weight, torch.dtype | None]:
        """This rank's part of a weight, and the dtype to which the caller must convert the weight when storing it.

        The dtype is None where the weight is stored as returned. Weights that are quantised at load are returned
        quantised.
        """
        signs.step()
        whole = self.source.tensor(name)
        weight = self._shard.take(name, whole)
        if isinstance(weight, QuantizedWeight) or isinstance(whole, QuantizedWeight):
            return weight, None
        if weight.numel() < whole.numel():
            weight = weight.clone()  # else the whole would stay in memory, or be read with every use
        if is_quantized_at_load(name, weight.ndim, self._dtype):
            return cast_and_move(weight, self._dtype, self._device, name), None
        return weight, storage_dtype(name, weight.ndim, self._dtype)
