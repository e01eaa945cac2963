"""The models in one worker's memory: this rank's part of each is read, patched, and kept where it fits.

Where that is placement.py decides, and offload.py does it. Methods that all ranks call together say so.
"""

from __future__ import annotations

import functools
import logging
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
import torch.distributed as dist

from ...wanvideo.attention.kernels import get_kernel
from ...wanvideo.base.config import WanConfig
from ...wanvideo.checkpoint.weight_source import (
    DTYPES,
    WEIGHT_DTYPES,
    WeightSource,
    cast_and_move,
    change,
    is_quantized_at_load,
    open_weights,
    storage_bytes,
    storage_dtype,
)
from ...wanvideo.model.fp8_mode import use_fp8
from ...wanvideo.model.model import WanModel, model_class
from ...wanvideo.model.text_keys import TextKeys
from ...wanvideo.quant.quantized import QuantizedWeight, Weight
from ..parallel.pipeline import Stage
from ..parallel.tensor import TensorShard
from ..plan.placement import (
    REFERENCE_TOKENS,
    Demand,
    Placement,
    PlacementError,
    activation_bytes,
    demand_of,
    fitting_blocks,
    needed_bytes,
    place_weights,
    room_beside,
)
from ..protocol.errors import AnotherRankRefused
from ..protocol.reports import HeldWeights
from ..protocol.requests import Patch, StepOut
from ..protocol.specs import ModelSpec, PoolSettings
from ..shm.arena import ArenaReader
from ..shm.host import host_room
from .base_weights import Originals, as_in_file
from .lora_transfer import read_patch
from .memory_use import allocated_on
from .offload import Residence, ShareGroup, Slots, gather_rows, join_share_group, release_cache, unit_of

log = logging.getLogger(__name__)
_MARGIN = 2**26
"""Bytes of a GPU that placements leave alone, for what is not torch's: NCCL's buffers and fragments."""


@dataclass
class LoadedModel:
    """A model in this worker's memory."""

    source: WeightSource
    model: WanModel
    residence: Residence
    placement: Placement
    demand: Demand
    resident: int  # blocks that belong on the device, as they fitted last
    originals: Originals
    reserve: int = 0  # bytes that activations took beyond their estimate, learned by running out of memory
    coming: int = 0  # bytes beside weights that the last forward was expected to take
    keep_texts: bool = True
    patched: set[str] = field(default_factory=set)
    uuid: str = ""

    @property
    def text_bytes(self) -> int:
        """Bytes of keys and values of texts."""
        return self.model.text_keys.nbytes if self.model.text_keys is not None else 0

    @property
    def spared_bytes(self) -> int:
        """Bytes of what only saves time."""
        return self.originals.nbytes + self.text_bytes

    def drop_spared(self) -> int:
        """Give that back; returns its bytes."""
        freed = self.spared_bytes
        self.originals.drop()
        self.forget_texts()
        return freed

    def forget_texts(self) -> None:
        """Give back the keys and values of texts, as where the weights change."""
        if self.model.text_keys is not None:
            self.model.text_keys.clear()

    @property
    def fixed(self) -> int:
        """Bytes of what belongs to no block: embeddings, encoders, head."""
        return self.demand.fixed

    @property
    def device_bytes(self) -> int:
        return self.fixed + self.residence.device_bytes


class Models:
    """What a worker has loaded, the model used last at the end.

    Args:
        shard, stage: the rank's part of the matrices and of the blocks.
    """

    def __init__(self, rank: int, settings: PoolSettings, device: torch.device, shard: TensorShard, stage: Stage):
        self.rank, self.settings, self.device = rank, settings, device
        self.shard, self.stage = shard, stage
        self.loaded: dict[ModelSpec, LoadedModel] = {}
        self.slots = Slots(device)
        self.share_groups: dict[int, ShareGroup] = {1: ShareGroup()}
        self.peak_private = 0

    def load(self, spec: ModelSpec, tokens: int, join: Callable[[int], None]) -> None:
        """Read this worker's part of a model, tensor by tensor, to where its weights fit, unless it is there.

        Args:
            tokens: of the video to come, beside which the weights must fit; 0 is 81 frames at 480p.
            join: makes the process groups for a number of heads; a collective call, as this one is.

        Raises:
            CheckpointError, AttentionError, PlanError: the model cannot run like this.
            PlacementError: it does not fit.
        """
        rooms, free = self._agree(spec)
        if not rooms:
            return
        with self._all_or_none():  # GPUs may be unlike
            source, model = self._empty_model(spec)
        join(source.config.num_heads)
        demand, placement = self._place(source, spec, tokens, rooms, free)
        group = self.share_groups[placement.share]
        resident = self._fitting(spec, demand, placement, rooms[self.rank])
        self._make_way(spec, needed_bytes(demand, group.ranks, resident))
        release_cache(self.device)
        read, sizes = functools.partial(self._unplaced, source, spec), self._held_sizes(source, spec, self.rank)
        residence = Residence(
            sizes,
            read,
            model.set_weight,
            self.device,
            self.slots,
            group,
            number_of=source.config.block_number,
            order=source.config.in_turn(model.span),
        )
        for name in sizes:
            if not residence.owns(name):
                model.set_weight(name, self._weight(source, spec, name))
        residence.load(resident, self._note_peak)
        self.shard.apply(model)
        if self.shard.size == 1 and self.device.type != "meta":  # a norm of shards is collective; meta has no numbers
            model.text_keys = TextKeys(functools.partial(self._room_for_texts, spec))
        originals = Originals(functools.partial(self._spare, spec))
        self.loaded[spec] = LoadedModel(source, model.eval(), residence, placement, demand, resident, originals)
        if self.rank == 0:
            log.info("Weights of %s: %s.", spec.name, placement.reason)

    def _empty_model(self, spec: ModelSpec) -> tuple[WeightSource, WanModel]:
        """The model without its weights, as it runs on this rank's device, and where they are."""
        dtype = DTYPES[spec.compute_dtype]
        kernel = get_kernel(spec.attention, self.device, dtype, spec.allow_flash, spec.allow_sdpa)
        source = open_weights(spec.path, self.device, spec.module)
        with torch.device("meta"):
            model = model_class(source.config)(source.config, kernel, dtype, spec.slice_tokens)
        use_fp8(model, spec.fp8_mode, self.device)
        model.span = self.stage.span(source.config.num_layers)
        return source, model

    @contextmanager
    def _all_or_none(self) -> Iterator[None]:
        """What one rank fails with in here ends the request on all of them, which else would wait for it. Collective.

        Raises:
            AnotherRankRefused: not this one.
        """
        error: Exception | None = None
        try:
            yield
        except Exception as failed:  # told below, once all know
            error = failed
        failures = gather_rows([int(error is not None)], self.device, self.settings.plan.num_gpus)
        if error is not None:
            raise error
        if any(failed for (failed,) in failures):
            raise AnotherRankRefused("Another worker cannot do this. See what that one says.")

    def patch(self, request: Patch, arena: ArenaReader) -> None:
        """Set the patched weights anew from the file, so that nothing of an earlier patch remains."""
        loaded = self.loaded[request.spec]
        loaded.forget_texts()
        shapes = loaded.source.config.shapes()
        patched = functools.partial(self._patched, loaded, request, arena, shapes)
        loaded.originals.look_for_room()
        try:
            held = [
                name
                for name in sorted(loaded.patched | request.weights.keys())
                if name not in shapes or self.stage.holds(name, loaded.source.config)
            ]
            loaded.residence.update(held, patched)
        except BaseException:
            del self.loaded[request.spec]  # half patched: the next forward reads it again
            raise
        loaded.patched, loaded.uuid = set(request.weights), request.uuid

    def _patched(
        self, loaded: LoadedModel, request: Patch, arena: ArenaReader, shapes: Mapping[str, tuple[int, ...]], name: str
    ) -> Weight:
        patches = [read_patch(arena, request.arena, ref) for ref in request.weights.get(name, ())]
        weight = self._original(loaded, name)
        patches = self.shard.take_patches(name, shapes.get(name, ()), patches)
        if patches:
            return self._finished(request.spec, name, change(weight.to(self.device), patches))
        loaded.originals.release(name)
        return self._finished(request.spec, name, weight)

    def _original(self, loaded: LoadedModel, name: str) -> Weight:
        """This worker's part of a weight with the numbers of the file: from the device if they are there."""
        kept = loaded.originals.get(name)
        if kept is not None:
            return kept
        held, overwritten = loaded.residence.whole(name)
        if held is not None and name not in loaded.patched and as_in_file(held, loaded.source, name):
            loaded.originals.keep(name, held, copy=overwritten)
            return held
        weight = self.shard.take(name, loaded.source.tensor(name))
        if held is not None:
            weight = weight.to(self.device)
            loaded.originals.keep(name, weight, copy=False)
        return weight

    def drop(self, specs: Iterable[ModelSpec]) -> None:
        """Forget these models."""
        for spec in specs:
            self.loaded.pop(spec, None)

    def forget_texts(self) -> None:
        """Give back what all models keep of texts."""
        for loaded in self.loaded.values():
            loaded.forget_texts()

    def give_back(self) -> None:
        """Free the blocks in passing, and torch's cache."""
        for loaded in self.loaded.values():
            loaded.residence.leave_slots()
        self.slots.release()
        release_cache(self.device)

    def step_out(self, request: StepOut) -> None:
        """Move weights to host memory, where this rank is asked to. Not collective."""
        loaded = self.loaded.get(request.spec)
        if loaded is None or self.rank not in request.ranks:
            return
        self.forget_texts()  # which count as activations
        originals = sum(other.originals.drop() for other in self.loaded.values())
        _step_out(loaded.residence, request.nbytes - originals)
        self.give_back()

    def process_groups(self) -> list[dist.ProcessGroup]:
        """The groups of ranks that share blocks, which this rank is in."""
        return [joined.group for joined in self.share_groups.values() if joined.group is not None]

    def held(self) -> tuple[HeldWeights, ...]:
        """Bytes of each model's weights on this worker's device."""
        held = []
        for spec, loaded in self.loaded.items():
            whole = max(loaded.device_bytes, loaded.fixed + loaded.residence.bytes_of_staying(loaded.resident))
            now = loaded.device_bytes + loaded.originals.nbytes
            held.append(HeldWeights(spec, now, max(now, whole), loaded.uuid))
        return tuple(held)

    @property
    def device_bytes(self) -> int:
        """Bytes of all weights on this worker's device, the blocks that pass through included."""
        weights = sum(loaded.device_bytes + loaded.originals.nbytes for loaded in self.loaded.values())
        return weights + self.slots.nbytes

    # Where weights live.

    def _agree(self, spec: ModelSpec) -> tuple[list[int], int]:
        """Bytes that each rank's device has for this model, and their host, known to all; none where all have it.

        A rank whose load or patch failed has lost it alone: then all read it again.
        """
        others = sum(m.residence.device_bytes for key, m in self.loaded.items() if key != spec)
        mine = self.loaded[spec].device_bytes if spec in self.loaded else 0
        told = [int(spec in self.loaded), self._room() + others + mine, host_room()]
        present, rooms, host_rooms = zip(*gather_rows(told, self.device, self.settings.plan.num_gpus), strict=True)
        if all(present):
            return [], 0
        self.loaded.pop(spec, None)
        return list(rooms), min(host_rooms)

    def rooms(self) -> tuple[int, int, int]:
        """Bytes that a model may take on this rank's device if the others leave it; that are free in host memory; that
        loaded models take there."""
        loaded = self.loaded.values()
        here, host = sum(m.device_bytes for m in loaded), sum(m.residence.host_bytes for m in loaded)
        return self._room() + here, host_room(), host

    def _room(self) -> int:
        """Bytes that this rank's tensors may take on its device beside the weights that are there."""
        return self._free() + sum(loaded.spared_bytes for loaded in self.loaded.values())

    def _spare(self, spec: ModelSpec) -> int:
        """Bytes that neither weights nor the activations of this model need."""
        loaded = self.loaded[spec]
        return self._free() - max(loaded.demand.activations, loaded.coming) - loaded.reserve

    def _room_for_texts(self, spec: ModelSpec) -> int:
        """Half of what is to spare: they lie among activations, which then find holes in place of one piece."""
        return self._spare(spec) // 2 if self.loaded[spec].keep_texts else 0

    def _drop_spared(self) -> int:
        """Free what only saves time, of all models; returns its bytes."""
        return sum(loaded.drop_spared() for loaded in self.loaded.values())

    def _free(self) -> int:
        """Bytes that this rank's tensors may still take on its device; no limit on a CPU."""
        if self.device.type != "cuda":
            return 2**50
        free, total = torch.cuda.mem_get_info(self.device)
        there = allocated_on(self.device)
        most = min(int(total * self.settings.memory_fraction) - there.now, free + there.reserved - there.now)
        return most - _MARGIN + self.slots.nbytes

    def _activations(self, spec: ModelSpec, config: WanConfig, tokens: int, rank: int) -> int:
        share = self.settings.plan.tokens_of(rank, tokens or REFERENCE_TOKENS)
        return activation_bytes(config, share, spec.max_batch, DTYPES[spec.compute_dtype].itemsize, spec.slice_tokens)

    def _place(
        self, source: WeightSource, spec: ModelSpec, tokens: int, rooms: Sequence[int], free: int
    ) -> tuple[Demand, Placement]:
        """What this rank's part of a model asks for, and where it goes. A collective call.

        Every rank does the arithmetic for all parts: so all refuse alike, and know whether somebody shares.
        """
        plan, placed = self.settings.plan, {}
        for ranks in plan.replicas():
            sizes = self._held_sizes(source, spec, ranks[0])
            activations = {rank: self._activations(spec, source.config, tokens, rank) for rank in ranks}
            demand = demand_of(sizes, source.config, max(activations.values()), unit_of(self.device))
            there = room_beside([rooms[rank] for rank in ranks], list(activations.values()))
            on_host = free * len(ranks) // plan.num_gpus
            choices = spec.shard_weights, spec.offload
            placed[ranks] = demand, place_weights(demand, there, len(ranks), *choices, on_host, ranks)
        most = max(placement.share for _, placement in placed.values())
        if most not in self.share_groups:
            self.share_groups[most] = join_share_group(plan.replicas(), self.rank)
        demand, placement = next(mine for ranks, mine in placed.items() if self.rank in ranks)
        return replace(demand, activations=self._activations(spec, source.config, tokens, self.rank)), placement

    def _fitting(self, spec: ModelSpec, demand: Demand, placement: Placement, room: int) -> int:
        """How many blocks stay on this rank's device, which may have more room than the tightest."""
        if spec.offload == "on" or placement.resident == demand.blocks:
            return placement.resident
        return max(0, fitting_blocks(demand, room, placement.share))

    def settle(
        self, spec: ModelSpec, tokens: int, more: int = 0, contexts: int = 0, keep_texts: bool = True
    ) -> None:
        """Before a forward of `tokens` tokens on this rank: weights that stepped out come back as far as they fit.

        Args:
            more: bytes that the forward takes beside its activations.
            contexts: of VACE.
            keep_texts: whether keys and values of texts may take what is left where all weights have come.
        """
        loaded = self.loaded[spec]
        residence, share = loaded.residence, loaded.placement.share
        itemsize = DTYPES[spec.compute_dtype].itemsize
        activations = activation_bytes(
            loaded.model.config, tokens, spec.max_batch, itemsize, spec.slice_tokens, contexts=contexts
        )
        loaded.coming, loaded.keep_texts = activations + more, False
        if spec.offload == "on":
            return
        demand = replace(loaded.demand, activations=loaded.coming + loaded.reserve)
        self._make_way(spec, needed_bytes(demand, share, demand.blocks) - loaded.device_bytes)
        loaded.resident = demand.blocks
        if spec.offload == "auto":
            loaded.resident = max(0, fitting_blocks(demand, self._room() + loaded.device_bytes, share))
        if (beyond := residence.bytes_beyond(loaded.resident)) > 0:
            _step_out(residence, beyond)
        residence.step_in(loaded.resident)
        loaded.keep_texts = keep_texts and loaded.resident == demand.blocks

    def learn(self, spec: ModelSpec) -> None:
        """After a forward that ran out of memory: the next one leaves more of it to the activations."""
        self._drop_spared()
        if spec in self.loaded:
            self.loaded[spec].reserve += max(2**28, self.loaded[spec].demand.activations // 2)

    def _make_way(self, spec: ModelSpec | None, nbytes: int) -> None:
        """Let other models step out until the device has `nbytes` more room, the one used longest ago first."""
        if nbytes > self._free():
            self._drop_spared()
        missing = nbytes - self._room()
        for other, loaded in self.loaded.items():
            if other != spec and missing > 0 and loaded.residence.device_bytes:
                missing -= _step_out(loaded.residence, missing)
        if spec in self.loaded:
            self.loaded[spec] = self.loaded.pop(spec)  # now the one used last

    def make_way(self, nbytes: int) -> None:
        """Let models step out until this rank's device has `nbytes` of room. Not collective."""
        self._make_way(None, nbytes)

    def free_room(self) -> int:
        """Bytes that this rank's tensors may still take on its device; no limit on a CPU."""
        return self._room()

    def _note_peak(self) -> None:
        self.peak_private = max(self.peak_private, _private_bytes())

    def _weight(self, source: WeightSource, spec: ModelSpec, name: str) -> Weight:
        """This worker's part of a weight, as the model holds it."""
        return self._finished(spec, name, self.shard.take(name, source.tensor(name)))

    def _finished(self, spec: ModelSpec, name: str, weight: Weight) -> Weight:
        """A part of a weight, changed or not, as the model holds it."""
        weight = cast_and_move(weight, WEIGHT_DTYPES[spec.weight_dtype], self.device, name)
        if isinstance(weight, QuantizedWeight):
            return weight
        if self.device.type == "cuda" and weight.untyped_storage().nbytes() > weight.nbytes:
            return weight.clone()  # rows of a random weight, which would keep the whole in memory
        return weight.contiguous()  # columns of a mapped file, which would be read with every use

    def _unplaced(self, source: WeightSource, spec: ModelSpec, name: str) -> tuple[Weight, torch.dtype | None]:
        """This worker's part of a weight before `cast_and_move`, and the dtype to which that function will cast the
        part, or None where the part is in its final form already."""
        whole, dtype = source.tensor(name), WEIGHT_DTYPES[spec.weight_dtype]
        weight = self.shard.take(name, whole)
        if not isinstance(weight, torch.Tensor):
            return weight, None
        if weight.numel() < whole.numel():
            weight = weight.clone()  # else the whole would stay in memory, or be read with every use
        if is_quantized_at_load(name, weight.ndim, dtype):
            return cast_and_move(weight, dtype, self.device, name), None
        return weight, storage_dtype(name, weight.ndim, dtype)

    def _held_sizes(self, source: WeightSource, spec: ModelSpec, rank: int) -> dict[str, int]:
        """Bytes of a rank's part of each weight that its stage has."""
        plan, shapes = self.settings.plan, source.config.shapes()
        at = plan.place(rank)
        shard, stage = TensorShard(plan.tensor_parallel, at.tensor), Stage.of(at.stage, plan.pipeline_parallel)
        sizes = storage_bytes(source.config, source.header, WEIGHT_DTYPES[spec.weight_dtype])
        return {
            name: sizes[name] * math.prod(shard.held_shape(name, shape)) // math.prod(shape)
            for name, shape in shapes.items()
            if stage.holds(name, source.config)
        }


def _private_bytes() -> int:
    """Host memory of this process that no other shares."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    return 0


def _step_out(residence: Residence, nbytes: float) -> int:
    """As `Residence.step_out`, where host memory has room."""
    needed, room = residence.host_bytes_for(nbytes), host_room()
    if needed > room:
        raise PlacementError(
            f"Weights of {needed / 2**30:.1f} GiB must step out to host memory, which has {max(0, room) / 2**30:.1f} "
            "GiB for them. Close other programs, or unload models."
        )
    return residence.step_out(nbytes)
