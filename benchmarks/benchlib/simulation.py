"""The memory of one worker of a pool, counted without any GPU: the worker's own code on tensors that have no bytes.

A real `Worker` loads a model and runs a forward on torch's meta device, in a process group that sends nothing. Counted
are the storages that are alive: weights, buffers of gathers and exchanges, activations. Stand-ins take the place of
what is CUDA's alone: Triton's kernels and the attention kernel allocate their outputs. Not counted are the CUDA
context and NCCL, which lie outside of torch's allocator, and what its segments waste.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from wan_parallel.distributed.comm.peer_memory import PeerMemory, Transfer
from wan_parallel.distributed.parallel import groups
from wan_parallel.distributed.plan.degrees import ParallelPlan
from wan_parallel.distributed.plan.placement import PlacementError
from wan_parallel.distributed.planner.planner import Planner, Workload
from wan_parallel.distributed.protocol.machine import Machine
from wan_parallel.distributed.protocol.refs import ArenaRef, TensorRef
from wan_parallel.distributed.protocol.replies import Reply
from wan_parallel.distributed.protocol.reports import DeviceProfile
from wan_parallel.distributed.protocol.requests import Forward, Load
from wan_parallel.distributed.protocol.specs import ModelSpec, PoolSettings, on_one_host
from wan_parallel.distributed.weights import block_states, block_store, loaded, models
from wan_parallel.distributed.worker.worker import Worker
from wan_parallel.wanvideo.attention.kernels import AttentionKernel
from wan_parallel.wanvideo.base.config import PRESETS
from wan_parallel.wanvideo.model.model import model_class
from wan_parallel.wanvideo.ops import pointwise

from benchlib.flops import tokens_of

META = torch.device("meta")
ROUNDING = 512  # torch's allocator gives out multiples of it
CUBLAS_BYTES = 2**25  # cuBLAS's workspace on Hopper, which lies in torch's allocator
TEXT_TOKENS = 512


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of the meta tensors that are alive while it is entered."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = CUBLAS_BYTES
        self.paused = False
        self._seen: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and tensor.device.type == "meta":
                self._note(tensor.untyped_storage())
        return result

    def _note(self, storage: torch.UntypedStorage) -> None:
        key, nbytes = storage._cdata, 0 if self.paused else -(-storage.nbytes() // ROUNDING) * ROUNDING
        if key in self._seen:
            return
        self._seen.add(key)
        self.now += nbytes
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._forget, key, nbytes).atexit = False

    def _forget(self, key: int, nbytes: int) -> None:
        self._seen.discard(key)
        self.now -= nbytes


@dataclass(frozen=True)
class Simulated:
    """What one worker would hold at most, in bytes of torch's allocator; `refusal` where it would not even start."""

    peak: int = 0
    peak_of_load: int = 0
    exchange: int = 0  # beside torch's allocator: what the other ranks write into
    weights: int = 0
    host: int = 0  # this worker's
    placement: str = ""
    degrees: str = ""
    refusal: str = ""


def choose_plan(
    settings: PoolSettings,
    spec: ModelSpec,
    latent: tuple[int, int, int],
    cap: int,
    batch: int = 1,
    host_room: int = 2**38,
) -> tuple[ParallelPlan, str]:
    """The plan that a pool with `settings.auto` chooses on H200s with NVLink of which it may take `cap` bytes, and why.

    Arguments as of `simulate`.

    Raises:
        PlacementError: none fits.
    """
    planner, config = Planner(settings), PRESETS[spec.path.partition(":")[2]]
    there = DeviceProfile(Machine(), cap - CUBLAS_BYTES - loaded.GPU_MARGIN, host_room, 0, "NVLink")
    workload = Workload(spec, tokens_of(latent), batch)
    plan = planner.choose(config, workload, [there] * settings.plan.num_gpus, planner.first_plan, loaded=False)
    return plan, planner.reason


def simulate(
    settings: PoolSettings,
    spec: ModelSpec,
    latent: tuple[int, int, int],
    cap: int,
    batch: int = 1,
    host_room: int = 2**38,
) -> Simulated:
    """Rank 0 of a pool whose GPUs may each take `cap` bytes, with a file of a released size as `spec.path` names it.

    Rank 0 has the largest shares of everything.

    Args:
        latent: frames, rows and columns.
        host_room: of host memory that weights may take.
    """
    live = LiveBytes()
    size = spec.path.partition(":")[2]
    with _process_group(settings.plan.num_gpus), _stand_ins(live, size, settings.plan.num_gpus, host_room):
        nobody = SimpleNamespace(begin=lambda _request: None, check=lambda _rank, _leader: None)  # who would cancel
        rank = Worker(0, settings, nobody, on_one_host(settings.plan.num_gpus), META)
        rank.models.memory.room = lambda: cap - live.now - loaded.GPU_MARGIN + rank.models.memory.buffers.nbytes
        config = PRESETS[size]
        tokens = tokens_of(latent)
        arena = ArenaRef("", 0, 0)
        inputs = [
            TensorRef("float32", shape, 0)
            for shape in ((batch, config.in_dim, *latent), (batch,), (batch, TEXT_TOKENS, config.text_dim))
        ]
        out = TensorRef("float32", (batch, tokens, config.out_dim * 4), 0)
        rank.runner.arena = _Arena(out)
        with live:
            try:
                _check(rank.handle(Load(1, spec, tokens)))
            except PlacementError as refusal:
                return Simulated(refusal=str(refusal))
            peak_of_load = live.peak
            _check(rank.handle(Forward(2, spec, arena, *inputs, out)))
        model = rank.models.loaded[spec]
        return Simulated(
            peak=live.peak,
            peak_of_load=peak_of_load,
            exchange=sum(memory.nbytes for memory in rank.parallel.peer_memories.values()),
            weights=model.device_bytes,
            host=model.blocks.host_bytes,
            placement=model.placement.reason,
            degrees=settings.plan.describe(config.num_heads),
        )


def _check(reply: Reply) -> None:
    if reply.failure is not None:
        raise reply.failure.for_the_user() or RuntimeError(f"{reply.failure.kinds[0]}: {reply.failure.text}")


@contextmanager
def _process_group(world_size: int) -> Iterator[None]:
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=world_size)
    try:
        yield
    finally:
        dist.destroy_process_group()


@contextmanager
def _stand_ins(live: LiveBytes, size: str, world_size: int, host_room: int) -> Iterator[None]:
    """What takes the place of CUDA, of the file, and of what the ranks tell each other."""

    def uncounted(make: Callable[..., Any]) -> Callable[..., Any]:
        """For what is on the meta device in a real worker, too, and for host memory."""

        def made(*arguments: Any, **options: Any) -> Any:
            live.paused = True
            try:
                return make(*arguments, **options)
            finally:
                live.paused = False

        return made

    def host_bytes(nbytes: int, pin: bool) -> SimpleNamespace:
        return SimpleNamespace(bytes=torch.empty(nbytes, dtype=torch.uint8, device=META))

    replaced = [
        mock.patch.object(models, "model_class", lambda config: uncounted(model_class(config))),
        mock.patch.object(block_store, "on_meta", uncounted(block_store.on_meta)),
        mock.patch.object(block_states, "HostBuffer", uncounted(host_bytes)),
        mock.patch.object(pointwise, "norm", lambda x, scale, shift, eps, dtype: torch.empty_like(x, dtype=dtype)),
        mock.patch.object(pointwise, "add_norm", lambda x, _y, _gate, *rest: torch.empty_like(x, dtype=rest[-1])),
        mock.patch.object(pointwise, "rms_norm", lambda x, *_rest: torch.empty_like(x)),
        mock.patch.object(pointwise, "add_", lambda x, *_rest: x),
        mock.patch.object(models, "get_kernel", lambda *_asked: AttentionKernel("simulated", _attention)),
        mock.patch.object(models, "open_weights", lambda *_asked, **_options: _File(size)),
        mock.patch.object(models, "gather_rows", lambda row, *_rest: [list(row)] * world_size),
        mock.patch.object(models, "host_room", lambda: host_room),
        mock.patch.object(
            groups, "open_peer_memory", lambda group, device: SimulatedPeerMemory(group, device, uncounted)
        ),
        mock.patch.object(dist, "barrier", lambda *_group: None),
        mock.patch.object(dist, "batch_isend_irecv", lambda _operations: []),
    ]
    for patch in replaced:
        patch.start()
    try:
        yield
    finally:
        for patch in replaced:
            patch.stop()


def _attention(q: torch.Tensor, _k: torch.Tensor, _v: torch.Tensor, _want_lse: bool) -> tuple:
    """Flash attention allocates its output and the log-sum-exp."""
    batch, tokens, heads, head_dim = q.shape
    out = torch.empty(batch, tokens, heads, head_dim, dtype=q.dtype, device=META)
    return out, torch.empty(batch, heads, tokens, dtype=torch.float32, device=META)


class SimulatedPeerMemory(PeerMemory):
    """Memory that others write into, which is not torch's allocator's."""

    def __init__(self, group: dist.ProcessGroup, device: torch.device, uncounted: Callable):
        super().__init__(group, device)
        self._empty = uncounted(torch.empty)

    def _make(self, nbytes: int) -> None:
        self._memory = self._empty(nbytes, dtype=torch.uint8, device=META)

    def _drop(self) -> None:
        del self._memory

    def _part(self, rank: int, offset: int, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        return self._memory[offset : offset + math.prod(shape) * dtype.itemsize].view(dtype).view(*shape)

    def _put(self, transfers: Sequence[Transfer], values: Sequence[int], tensor: torch.Tensor) -> None: ...

    def _wait_signals(self, transfers: Sequence[Transfer], words: Sequence[tuple[int, int]]) -> None: ...

    def hold(self, tensor: torch.Tensor) -> None: ...


class _File:
    """A bf16 file of a released size; its tensors take no memory."""

    header = None

    def __init__(self, size: str):
        self.config = PRESETS[size]
        self._shapes = self.config.shapes()

    def tensor(self, name: str) -> torch.Tensor:
        return torch.zeros(1, dtype=torch.bfloat16).expand(self._shapes[name])

    def check_unchanged(self) -> None:
        """Do nothing: there is no file."""


class _Arena:
    """In place of an arena: what lies there is on the CPU, and the output is dropped.

    Made before bytes are counted.
    """

    def __init__(self, out: TensorRef):
        self.out = out
        self._nowhere = torch.empty(out.shape, dtype=getattr(torch, out.dtype), device=META)

    def view(self, _arena: ArenaRef, ref: TensorRef) -> torch.Tensor:
        dtype = getattr(torch, ref.dtype)
        if ref is self.out:  # which the result is copied into
            return self._nowhere
        return torch.zeros(1, dtype=dtype).expand(ref.shape)
