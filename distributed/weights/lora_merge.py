"""Merges LoRAs into a model's weights: always into the weights of the file, so that no earlier LoRA leaves a trace."""

from __future__ import annotations

import torch

from ...wanvideo.checkpoint.weight_source import change
from ...wanvideo.quant.quantized import Weight
from ..parallel.pipeline import Stage
from ..parallel.tensor import TensorShard
from ..protocol.requests import ApplyLora
from ..shm import signs
from ..shm.arena import ArenaReader
from ..shm.host import HostShare
from ..shm.signs import Activity
from .base_weights import as_in_file
from .loaded import LoadedModel
from .lora_transfer import read_delta


class LoraMerge:
    """One request to merge LoRAs, on one rank.

    Args:
        arena: where the LoRAs' tensors lie.
        shard, stage: the rank's part of the matrices and of the blocks.
        device: where the model runs.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        request: ApplyLora,
        arena: ArenaReader,
        shard: TensorShard,
        stage: Stage,
        device: torch.device,
    ):
        self._loaded, self._request, self._arena = loaded, request, arena
        self._shard, self._stage, self._device = shard, stage, device
        self._shapes = loaded.source.config.shapes()

    def run(self, host: HostShare) -> None:
        """Set every weight that the LoRAs merged before, or the LoRAs of this request, change.

        Afterwards the LoRAs of this request are merged, and no others.

        Args:
            host: what this rank may take of host memory, where changed blocks lie there.

        Raises:
            LoraError: a LoRA does not fit the model. Some weights have changed then.
            PlacementError: a changed block has grown beyond host memory. Some weights have changed then.
        """
        loaded = self._loaded
        loaded.forget_texts()
        loaded.base_weights.look_for_room()
        names = sorted(loaded.patched | self._request.weights.keys())
        held = [name for name in names if self._holds(name)]
        signs.begin(Activity.MERGING, len(held))
        loaded.blocks.update(held, self._merged, host)
        loaded.patched, loaded.uuid = set(self._request.weights), self._request.uuid

    def _holds(self, name: str) -> bool:
        return name not in self._shapes or self._stage.holds(name, self._loaded.source.config)

    def _merged(self, name: str) -> Weight:
        """This rank's part of a weight with the LoRAs merged, as the model holds it."""
        signs.step()
        whole = [read_delta(self._arena, self._request.arena, ref) for ref in self._request.weights.get(name, ())]
        weight = self._base(name)
        deltas = self._shard.take_deltas(name, self._shapes.get(name, ()), whole)
        if deltas:
            return self._loaded.reader.as_held(name, change(weight.to(self._device), deltas))
        self._loaded.base_weights.release(name)
        return self._loaded.reader.as_held(name, weight)

    def _base(self, name: str) -> Weight:
        """This rank's part of a weight as it is in the file: from the device if the device has it, else from the
        file."""
        loaded = self._loaded
        kept = loaded.base_weights.get(name)
        if kept is not None:
            return kept
        held, overwritten = loaded.blocks.resident_weight(name)
        if held is not None and name not in loaded.patched and as_in_file(held, loaded.source, name):
            loaded.base_weights.keep(name, held, copy=overwritten)
            return held
        weight = loaded.reader.base(name)
        if held is not None:
            weight = weight.to(self._device)
            loaded.base_weights.keep(name, weight, copy=False)
        return weight
