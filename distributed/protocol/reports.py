"""What workers tell of themselves: their models, their memory, what their devices do and when they stand still."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from .machine import Machine
from .specs import ModelSpec


@dataclass(frozen=True)
class ModelStatus:
    """How one loaded model runs."""

    name: str
    weight_dtype: str
    compute_dtype: str
    kernel: str
    backend: str
    ulysses: int
    ring: int
    lora_uuid: str
    tensor: int = 1
    pipeline: int = 1
    placement: str = ""  # where the weights live, and why
    device_bytes: int = 0  # weights on this worker's device
    host_bytes: int = 0  # weights in its host memory, copies of what is on the device included
    fp8: str = ""  # what runs in fp8, and how; empty: nothing
    overlapped: bool = False  # Ulysses' exchanges run beside the computation (see ulysses_overlap.py)
    moved_in: int = 0  # bytes of weights copied from host memory to the device since the model was loaded
    moved_out: int = 0  # and to host memory


@dataclass(frozen=True)
class HeldWeights:
    """Bytes of a model's weights on one worker's device: as it is, and once all that belongs there is back.

    `lora_uuid` is the uuid of the LoRAs merged into them, or "".
    """

    spec: ModelSpec
    now: int
    whole: int
    lora_uuid: str = ""


@dataclass(frozen=True)
class MemoryUse:
    """What the memory of one worker's device is used for, in bytes: at the fullest moment of the last forward, or as it
    is where none has been finished since the worker started, or since one failed.

    Args:
        weights: of all models and VAEs, and the blocks that pass through (see prefetch.py).
        activations: what the forward works with. 0 before one, and on a CPU, where nobody counts them.
        cache: keys and values kept between the steps of a run.
        peer_memory: memory that other ranks write into (see peer_memory.py).
        unused: memory that torch's allocator keeps for later.
        others: what is not torch's in this worker: CUDA itself, NCCL, and other processes such as ComfyUI.
        total: all that the device has; on a CPU, that the host has.
        measured: whether it is of a forward.
    """

    weights: int
    activations: int
    cache: int
    peer_memory: int
    unused: int
    others: int
    total: int
    measured: bool = False

    @property
    def free(self) -> int:
        """Bytes that nothing has taken."""
        used = self.weights + self.activations + self.cache + self.peer_memory + self.unused + self.others
        return max(0, self.total - used)


@dataclass(frozen=True)
class WorkerStatus:
    """One worker's memory, in bytes. `peak_private` is host memory of its own while it loaded weights;
    pages of the checkpoint are the system's page cache, shared by all workers. `fused` says whether Triton's
    kernels are used (see wanvideo/ops/pointwise.py); `link` how it reaches the other GPUs (see topology.py);
    `peak_allocated` the most that torch's allocator gave out on its GPU, `peak_reserved` the most it took for that;
    `memory` what it is used for."""

    rank: int
    pid: int
    device: str
    used: int
    total: int
    peak_private: int
    fused: bool
    models: tuple[ModelStatus, ...]
    link: str = ""
    peak_allocated: int = 0
    memory: MemoryUse | None = None
    peak_reserved: int = 0
    vae_bytes: int = 0  # weights of VAEs


@dataclass(frozen=True)
class DeviceProfile:
    """What a worker's device does (see probe.py), and what there is room for.

    Args:
        room: bytes that a model's weights and activations may take on its device, those of loaded models included.
        host_room: bytes of host memory that is free for weights, of all workers together.
        hosted: bytes that the loaded models of this worker take there.
        link: how it reaches the others (see topology.py).
        device: what it is called, as all of its kind are.
    """

    machine: Machine
    room: int
    host_room: int
    hosted: int
    link: str
    device: str = ""


@dataclass(frozen=True)
class AttentionUse:
    """The self-attention of one forward whose attention was asked for beyond what its model has.

    Args:
        dense: the kernel of dense attention.
        sparse_blocks: how many blocks of the model were sparse, of `blocks`.
        chosen: what sparse attention computes exactly, in words; "" where none was asked for.
        why_dense: why all blocks were dense although sparse attention was asked for, in words.
    """

    dense: str
    sparse_blocks: int
    blocks: int
    chosen: str = ""
    why_dense: str = ""


@dataclass(frozen=True)
class Exchange:
    """What a forward on stale keys and values exchanged with the other patches.

    Args:
        manager: who did it, with its version.
        received: bytes that arrived on this rank.
        seconds: what the exchange takes when nothing else runs, from one layer measured alone.
        waited: seconds for which this rank's device stood still for it.
        buffers: bytes of the buffers of all branches on this rank.
    """

    manager: str
    received: int
    seconds: float
    waited: float
    buffers: int


@dataclass(frozen=True)
class WaitTimes:
    """How long a rank's device stood still for one kind of exchange in a forward (see timing.py).

    Args:
        kind: of the exchange.
        ranks: that take part in it; none where a rank needs no other.
        microseconds: of each time, in their order, with commas between: as numbers, hundreds of them would take
            milliseconds to read.
    """

    kind: str
    ranks: tuple[int, ...]
    microseconds: str

    @staticmethod
    def of(kind: str, ranks: tuple[int, ...], seconds: Iterable[float]) -> WaitTimes:
        """The waits of one kind of exchange, whose lengths are given in seconds."""
        return WaitTimes(kind, ranks, ",".join(str(round(s * 1e6)) for s in seconds))

    @property
    def seconds(self) -> list[float]:
        """The length of each wait in seconds, in their order."""
        return [int(us) / 1e6 for us in self.microseconds.split(",") if us]
