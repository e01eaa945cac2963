"""The models of one worker: this rank's part of each model is loaded, changed by LoRAs, and kept where it fits.

model_placement.py decides where a model's weights go, and loaded.py which model leaves for another one; offload.py and
prefetch.py move the blocks. Methods that all ranks must call together are said to be collective.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist

from ...wanvideo.attention.kernels import get_kernel
from ...wanvideo.checkpoint.weight_source import DTYPES, WeightSource, open_weights
from ...wanvideo.model.fp8_mode import use_fp8
from ...wanvideo.model.model import WanModel, model_class
from ...wanvideo.model.text_keys import TextKeys
from ..comm.collectives import ShareGroup, gather_rows, join_share_group
from ..parallel.pipeline import Stage
from ..parallel.tensor import TensorShard
from ..plan.placement import Demand, Placement, activation_bytes, fitting_blocks, needed_bytes
from ..protocol.pool_errors import AnotherRankRefused
from ..protocol.requests import ApplyLora, Offload
from ..protocol.specs import ModelSpec, PoolSettings
from ..shm import signs
from ..shm.arena import ArenaReader
from ..shm.host import HostShare, check_host_room, host_room
from ..shm.signs import Activity
from .base_weights import BaseWeights
from .block_store import BlockStore
from .device_memory import release_cache
from .loaded import LoadedModel, ModelMemory
from .lora_merge import LoraMerge
from .model_placement import activations_on_rank, place_model, resident_blocks, sizes_on_rank
from .offload import BlockOffloader
from .prefetch import BlockPrefetcher
from .weight_reader import WeightReader

log = logging.getLogger(__name__)


class Models:
    """The models that a worker has loaded.

    Args:
        shard, stage: the rank's part of the matrices and of the blocks.

    Attributes:
        memory: this rank's memory, with the loaded models in it.
        loaded: the models by spec, in the order of their last use.
        share_groups: this rank's groups for sharing blocks, by the number of shares.
        peak_private: the most bytes of host memory of its own that this process had while it loaded weights.
    """

    def __init__(self, rank: int, settings: PoolSettings, device: torch.device, shard: TensorShard, stage: Stage):
        self.rank, self.settings, self.device = rank, settings, device
        self.shard, self.stage = shard, stage
        self.memory = ModelMemory(device, settings.memory_fraction)
        self.loaded = self.memory.models
        self.share_groups: dict[int, ShareGroup] = {1: ShareGroup()}
        self.peak_private = 0

    def load(self, spec: ModelSpec, tokens: int, join: Callable[[int], None]) -> None:
        """Load this rank's part of a model to where its weights fit, unless all ranks have loaded the model.
        Collective.

        Args:
            tokens: length of the first video, beside which the weights must fit; 0 is 81 frames at 480p.
            join: makes the process groups for a number of heads; a collective call.

        Raises:
            CheckpointError, AttentionError, PlanError: the model cannot run like this, or its file has changed.
            PlacementError: the model does not fit, or the models that leave for it do not fit into host memory.
        """
        rooms, host = self._agree_on_rooms(spec)
        if not rooms:
            return
        with self._all_or_none():  # GPUs may be unlike
            source, model = self._empty_model(spec)
        join(source.config.num_heads)
        demand, placement = self._place(source, spec, tokens, rooms, host)
        resident = resident_blocks(spec, demand, placement, rooms[self.rank])
        self._make_room(spec, demand, placement, resident, host)
        release_cache(self.device)
        blocks, reader = self._read(source, spec, model, placement, resident)
        with self._all_or_none():  # a rank may have read before the file changed, and another rank after
            source.check_unchanged()
        self.shard.apply(model)
        if self.shard.size == 1 and self.device.type != "meta":  # a norm of shards is collective; meta has no numbers
            model.text_keys = TextKeys(functools.partial(self.memory.room_for_texts, spec))
        base_weights = BaseWeights(functools.partial(self.memory.spare, spec))
        offloader, prefetcher = BlockOffloader(blocks), BlockPrefetcher(blocks, self.memory.buffers)
        self.loaded[spec] = LoadedModel(
            reader, model.eval(), blocks, offloader, prefetcher, placement, demand, resident, base_weights
        )
        if self.rank == 0:
            log.info("Weights of %s: %s.", spec.name, placement.reason)

    def apply_lora(self, request: ApplyLora, arena: ArenaReader) -> None:
        """Merge LoRAs into a loaded model, in place of the LoRAs merged before.

        Args:
            arena: where the LoRAs' tensors lie.

        Raises:
            LoraError: a LoRA does not fit the model, which is forgotten: the next load reads it again.
            CheckpointError: the model's file has changed since it was loaded. The model is forgotten likewise.
            PlacementError: a changed block has grown beyond host memory. The model is forgotten likewise.
        """
        merge = LoraMerge(self.loaded[request.spec], request, arena, self.shard, self.stage, self.device)
        try:
            merge.run(self._host_share())
            self.loaded[request.spec].source.check_unchanged()
        except BaseException:
            del self.loaded[request.spec]  # half patched
            raise

    def drop(self, specs: Iterable[ModelSpec]) -> None:
        """Forget these models."""
        for spec in specs:
            self.loaded.pop(spec, None)

    def offload(self, request: Offload) -> None:
        """Move weights of a model to host memory, where this rank is asked to. Not collective.

        Raises:
            PlacementError: host memory has no room for the weights of all ranks that are asked.
        """
        loaded = self.loaded.get(request.spec)
        if loaded is None or self.rank not in request.ranks:
            return
        self.memory.forget_texts()  # their keys and values, which count as activations
        self._offload(loaded, request.nbytes - self.memory.drop_base_weights(), HostShare(len(request.ranks)))
        self.memory.release()

    def settle(self, spec: ModelSpec, tokens: int, more: int = 0, contexts: int = 0, keep_texts: bool = True) -> None:
        """Bring weights back from host memory as far as they fit beside a forward of `tokens` tokens on this rank.

        Args:
            more: bytes that the forward takes beside its activations.
            contexts: control videos of VACE.
            keep_texts: whether keys and values of texts may take the room that is left once all weights are back.

        Raises:
            PlacementError: the models that must leave for the forward do not fit into host memory.
        """
        loaded = self.loaded[spec]
        itemsize = DTYPES[spec.compute_dtype].itemsize
        activations = activation_bytes(
            loaded.model.config, tokens, spec.max_batch, itemsize, spec.slice_tokens, contexts=contexts
        )
        loaded.coming, loaded.keep_texts = activations + more, False
        if spec.offload == "on":
            return
        demand, share, host = loaded.demand, loaded.placement.share, self._host_share()
        demand = replace(demand, activations=loaded.coming + loaded.reserve)
        self.memory.evict_for(spec, needed_bytes(demand, share, demand.blocks) - loaded.device_bytes, host)
        loaded.resident = demand.blocks
        if spec.offload == "auto":
            loaded.resident = max(0, fitting_blocks(demand, self.memory.room() + loaded.device_bytes, share))
        if (beyond := loaded.offloader.bytes_beyond(loaded.resident)) > 0:
            self._offload(loaded, beyond, host)
        loaded.offloader.onload(loaded.resident)
        loaded.keep_texts = keep_texts and loaded.resident == demand.blocks

    def learn(self, spec: ModelSpec) -> None:
        """Let later forwards of a model leave more memory to activations, after a forward that ran out of memory."""
        self.memory.drop_spared()
        if spec in self.loaded:
            self.loaded[spec].reserve += max(2**28, self.loaded[spec].demand.activations // 2)

    def evict(self, nbytes: int) -> None:
        """Offload models until this rank's device has `nbytes` of room. All ranks may do so at the same time.

        Raises:
            PlacementError: host memory has no room for the models.
        """
        self.memory.evict_for(None, nbytes, self._host_share())

    def process_groups(self) -> list[dist.ProcessGroup]:
        """The groups of ranks that share blocks, which this rank is in."""
        return [joined.group for joined in self.share_groups.values() if joined.group is not None]

    # Loading.

    def _agree_on_rooms(self, spec: ModelSpec) -> tuple[list[int], int]:
        """Bytes that each rank's device has for this model, and bytes that the host has for all ranks. Collective.

        The list of the devices is empty where all ranks have loaded the model. A rank whose load or change by a LoRA
        failed has lost the model while other ranks have it: then all ranks load it again.
        """
        others = sum(m.blocks.device_bytes for key, m in self.loaded.items() if key != spec)
        mine = self.loaded[spec].device_bytes if spec in self.loaded else 0
        told = [int(spec in self.loaded), self.memory.room() + others + mine, host_room()]
        present, rooms, host_rooms = zip(*self._gather(told), strict=True)
        if all(present):
            return [], 0
        self.loaded.pop(spec, None)
        return list(rooms), min(host_rooms)

    def _empty_model(self, spec: ModelSpec) -> tuple[WeightSource, WanModel]:
        """The source of the weights, and the model without weights as it runs on this rank's device."""
        dtype = DTYPES[spec.compute_dtype]
        kernel = get_kernel(spec.attention, self.device, dtype, spec.allow_flash, spec.allow_sdpa)
        source = open_weights(spec.path, self.device, spec.module, spec.stamp)
        with torch.device("meta"):
            model = model_class(source.config)(source.config, kernel, dtype, spec.slice_tokens)
        use_fp8(model, spec.fp8_mode, self.device)
        model.span = self.stage.span(source.config.num_layers)
        return source, model

    def _place(
        self, source: WeightSource, spec: ModelSpec, tokens: int, rooms: Sequence[int], host: int
    ) -> tuple[Demand, Placement]:
        """Demand and placement of this rank's part of a model. Collective: makes the groups of ranks that share
        blocks."""
        plan = self.settings.plan
        placed = place_model(source, spec, plan, tokens, rooms, host, self.device)
        most = max(placement.share for _, placement in placed.values())
        if most not in self.share_groups:
            self.share_groups[most] = join_share_group(plan.replicas(), self.rank)
        demand, placement = next(mine for ranks, mine in placed.items() if self.rank in ranks)
        activations = activations_on_rank(spec, source.config, plan, tokens, self.rank)
        return replace(demand, activations=activations), placement

    def _make_room(self, spec: ModelSpec, demand: Demand, placement: Placement, resident: int, host: int) -> None:
        """Let other models leave for this model. Collective: if host memory lacks room for any rank, all ranks refuse.

        Args:
            resident: how many blocks of this model will be on the device; host memory needs room for its other blocks
                too.
            host: bytes of host memory that are free.
        """
        share = self.share_groups[placement.share].ranks
        needed = needed_bytes(demand, share, resident)
        hosted = demand.parts(share, demand.blocks) - demand.parts(share, resident)
        evicted = self.memory.host_bytes_to_evict(spec, needed)
        rows = self._gather([evicted, hosted])
        if any(evicted for evicted, _ in rows):
            check_host_room(sum(map(sum, rows)), host)
        self.memory.evict_for(spec, needed, HostShare(1))

    def _read(
        self, source: WeightSource, spec: ModelSpec, model: WanModel, placement: Placement, resident: int
    ) -> tuple[BlockStore, WeightReader]:
        """Read this rank's part of all weights; `resident` blocks go to the device, the others to host memory."""
        reader = WeightReader(source, spec.weight_dtype, self.shard, self.device)
        names = sizes_on_rank(source, spec, self.settings.plan, self.rank)
        config = source.config
        signs.begin(Activity.LOADING, len(names))
        blocks = BlockStore(
            names,
            reader.unconverted,
            model.set_weight,
            self.device,
            self.share_groups[placement.share],
            number_of=config.block_number,
            order=config.run_order(model.span),
        )
        for name in names:
            if not blocks.owns(name):
                model.set_weight(name, reader.read(name))
        blocks.load(resident, self._note_peak)
        return blocks, reader

    @contextmanager
    def _all_or_none(self) -> Iterator[None]:
        """Let all ranks fail if any rank fails within the `with` block: the others would wait for it. Collective.

        Raises:
            AnotherRankRefused: another rank has failed, and this one has not.
        """
        error: Exception | None = None
        try:
            yield
        except Exception as failed:  # raised below, once all ranks know
            error = failed
        failures = self._gather([int(error is not None)])
        if error is not None:
            raise error
        if any(failed for (failed,) in failures):
            raise AnotherRankRefused("Another worker cannot do this. See what that one says.")

    def _gather(self, row: Sequence[int]) -> list[list[int]]:
        """Every rank's row of numbers, by rank. Collective."""
        return gather_rows(row, self.device, self.settings.plan.num_gpus)

    def _host_share(self) -> HostShare:
        """The part of host memory that this rank may take while every rank may take some at the same time."""
        return HostShare(self.settings.plan.num_gpus)

    def _offload(self, loaded: LoadedModel, nbytes: float, host: HostShare) -> None:
        """Move a model's blocks to host memory until `nbytes` have left the device, where host memory has room."""
        host.take(loaded.offloader.host_bytes_for(nbytes))
        loaded.offloader.offload(nbytes)

    def _note_peak(self) -> None:
        self.peak_private = max(self.peak_private, _private_bytes())


def _private_bytes() -> int:
    """Host memory of this process that no other shares."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    return 0
