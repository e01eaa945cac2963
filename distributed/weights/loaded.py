"""The models in one rank's memory: how much room they leave on its device, and which model leaves for another one."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from ...wanvideo.checkpoint.weight_source import WeightSource
from ...wanvideo.model.model import WanModel
from ..plan.placement import Demand, Placement
from ..protocol.reports import HeldWeights
from ..protocol.specs import ModelSpec
from ..shm.host import HostShare, host_room
from .base_weights import BaseWeights
from .block_store import BlockStore
from .device_memory import allocated_on, release_cache
from .offload import BlockOffloader
from .prefetch import BlockPrefetcher, PrefetchBuffers
from .weight_reader import WeightReader

GPU_MARGIN = 2**26
"""Bytes of a GPU that placements leave free, for allocations outside of torch (NCCL's buffers) and for fragments."""


@dataclass
class LoadedModel:
    """A model in one rank's memory.

    Args:
        resident: how many blocks belong on the device: as many as fitted last.
        reserve: bytes that activations took beyond their estimate, learned by running out of memory.
        coming: bytes that the last forward was expected to take beside weights.
        keep_texts: whether keys and values of texts may be kept.
        patched: names of the weights that LoRAs have changed.
        uuid: the uuid of the LoRAs that are merged; "" where none is.
    """

    reader: WeightReader
    model: WanModel
    blocks: BlockStore
    offloader: BlockOffloader
    prefetcher: BlockPrefetcher
    placement: Placement
    demand: Demand
    resident: int
    base_weights: BaseWeights
    reserve: int = 0
    coming: int = 0
    keep_texts: bool = True
    patched: set[str] = field(default_factory=set)
    uuid: str = ""

    @property
    def source(self) -> WeightSource:
        """The model's file, or random weights."""
        return self.reader.source

    @property
    def text_bytes(self) -> int:
        """Bytes of keys and values of texts."""
        return self.model.text_keys.nbytes if self.model.text_keys is not None else 0

    @property
    def spared_bytes(self) -> int:
        """Bytes that are kept only to save time: base weights behind a LoRA, and keys and values of texts."""
        return self.base_weights.nbytes + self.text_bytes

    def drop_spared(self) -> int:
        """Free all bytes that are kept only to save time; returns how many were freed."""
        freed = self.spared_bytes
        self.base_weights.drop()
        self.forget_texts()
        return freed

    def forget_texts(self) -> None:
        """Free the keys and values of texts, which are wrong once the weights change."""
        if self.model.text_keys is not None:
            self.model.text_keys.clear()

    @property
    def fixed(self) -> int:
        """Bytes of the weights that belong to no block: embeddings, encoders, head."""
        return self.demand.fixed

    @property
    def device_bytes(self) -> int:
        """Bytes of the model's weights on the device, the prefetch buffers not counted."""
        return self.fixed + self.blocks.device_bytes

    @property
    def whole_bytes(self) -> int:
        """Bytes of the model's weights on the device once all blocks that belong on the device are back."""
        return max(self.device_bytes, self.fixed + self.offloader.bytes_of_staying(self.resident))


class ModelMemory:
    """The models in one rank's memory, in the order of their last use, and the room that they leave on its device.

    Args:
        memory_fraction: share of the GPU that this worker may take.

    Attributes:
        models: by spec.
        buffers: the prefetch buffers, through which blocks pass that are not whole on the device.
    """

    def __init__(self, device: torch.device, memory_fraction: float):
        self.device, self._fraction = device, memory_fraction
        self.models: dict[ModelSpec, LoadedModel] = {}
        self.buffers = PrefetchBuffers(device)

    @property
    def device_bytes(self) -> int:
        """Bytes of all weights on the device, prefetch buffers and base weights included."""
        weights = sum(loaded.device_bytes + loaded.base_weights.nbytes for loaded in self.models.values())
        return weights + self.buffers.nbytes

    def held(self) -> tuple[HeldWeights, ...]:
        """Bytes of each model's weights on the device, base weights included."""
        held = []
        for spec, loaded in self.models.items():
            now = loaded.device_bytes + loaded.base_weights.nbytes
            held.append(HeldWeights(spec, now, max(now, loaded.whole_bytes), loaded.uuid))
        return tuple(held)

    def rooms(self) -> tuple[int, int, int]:
        """Three figures in bytes, for a `DeviceProfile`.

        The bytes of this rank's device that a model may take if the other models leave, the bytes of host memory that
        are free, and the bytes of host memory that loaded models take.
        """
        loaded = self.models.values()
        here, host = sum(m.device_bytes for m in loaded), sum(m.blocks.host_bytes for m in loaded)
        return self.room() + here, host_room(), host

    def free(self) -> int:
        """Bytes that this rank's tensors may still take on its device; no limit on a CPU."""
        if self.device.type != "cuda":
            return 2**50
        free, total = torch.cuda.mem_get_info(self.device)
        there = allocated_on(self.device)
        most = min(int(total * self._fraction) - there.now, free + there.reserved - there.now)
        return most - GPU_MARGIN + self.buffers.nbytes

    def room(self) -> int:
        """Bytes that this rank's tensors may take on its device beside the weights on the device."""
        return self.free() + sum(loaded.spared_bytes for loaded in self.models.values())

    def spare(self, spec: ModelSpec) -> int:
        """Bytes of the device that neither weights nor the activations of this model need."""
        loaded = self.models[spec]
        return self.free() - max(loaded.demand.activations, loaded.coming) - loaded.reserve

    def room_for_texts(self, spec: ModelSpec) -> int:
        """Bytes that keys and values of texts may take: half of the bytes that are to spare.

        Keys and values of texts lie among activations, which then find several holes in place of one large piece.
        """
        return self.spare(spec) // 2 if self.models[spec].keep_texts else 0

    def forget_texts(self) -> None:
        """Free the keys and values of texts of all models."""
        for loaded in self.models.values():
            loaded.forget_texts()

    def drop_base_weights(self) -> int:
        """Free the base weights of all models; returns their bytes."""
        return sum(loaded.base_weights.drop() for loaded in self.models.values())

    def drop_spared(self) -> int:
        """Free the bytes of all models that are kept only to save time; returns how many were freed."""
        return sum(loaded.drop_spared() for loaded in self.models.values())

    def release(self) -> None:
        """Free the prefetch buffers, and torch's cache. Not during a forward."""
        for loaded in self.models.values():
            loaded.prefetcher.leave_buffers()
        self.buffers.release()
        release_cache(self.device)

    def evict_for(self, spec: ModelSpec | None, nbytes: int, host: HostShare) -> None:
        """Offload other models until the device has `nbytes` more room, the one used longest ago first. Not collective.

        Args:
            spec: the model that stays, and counts as used last from now on; None where all models may leave.
            host: what this rank may take of host memory.

        Raises:
            PlacementError: host memory has no room for the models that would leave. Nothing has moved then.
        """
        if nbytes > self.free():
            self.drop_spared()
        evicted = self._evicted_for(spec, nbytes)
        host.take(sum(loaded.offloader.host_bytes_for(leaving) for loaded, leaving in evicted))
        for loaded, leaving in evicted:
            loaded.offloader.offload(leaving)
        if spec is not None and spec in self.models:
            self.models[spec] = self.models.pop(spec)

    def host_bytes_to_evict(self, spec: ModelSpec, nbytes: int) -> int:
        """Bytes of host memory that `evict_for(spec, nbytes)` would take."""
        evicted = self._evicted_for(spec, nbytes)
        return sum(loaded.offloader.host_bytes_for(leaving) for loaded, leaving in evicted)

    def _evicted_for(self, spec: ModelSpec | None, nbytes: int) -> list[tuple[LoadedModel, int]]:
        """The models to offload, and for each the bytes of the device that it is to free."""
        evicted, missing = [], nbytes - self.room()
        for other, loaded in self.models.items():
            if other != spec and missing > 0 and loaded.blocks.device_bytes:
                evicted.append((loaded, missing))
                missing -= loaded.offloader.bytes_leaving(missing)
        return evicted
