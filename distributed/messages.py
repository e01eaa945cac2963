"""What client, launcher and workers tell each other: small JSON messages; tensors stay in an arena.

JSON rather than pickle, because the client knows these classes under another module name than the workers do
(ComfyUI names a pack after its folder), and because nothing that arrives can then run.
"""

from __future__ import annotations

import functools
import json
import types
import typing
from collections.abc import Iterable
from dataclasses import asdict, dataclass, is_dataclass
from pathlib import Path

from ..wanvideo.options import Options
from .cost import Machine
from .plan import ParallelPlan, PatchSplit

PIPELINE_MODES = ("exact", "pipefusion")


@dataclass(frozen=True)
class PoolSettings:
    """What a pool is made of. Pools with equal settings are one pool.

    Args:
        plan: degrees of parallelism.
        device: "cuda", "cpu", or "auto" (cuda where there is one).
        memory_fraction: share of each GPU's memory that a worker's tensors may take.
        usp_backend: "native" (torch.distributed), "xfuser", or "auto" (the one measured faster: native).
        overlap: exchange what an Ulysses group or a ring shares, and the sums of tensor-parallel ranks, during
            computation.
        pipeline_mode: one of `PIPELINE_MODES`. "pipefusion" makes the forwards that a `Displaced` calls stale stream
            patches through the stages (see pipefusion.py).
        auto: sizes of the plan that are 1, and degrees that are 0, are chosen for the model and its video (see
            choice.py).
    """

    plan: ParallelPlan
    device: str = "auto"
    memory_fraction: float = 1.0
    usp_backend: str = "auto"
    overlap: bool = True
    pipeline_mode: str = "exact"
    auto: bool = False


@dataclass(frozen=True)
class ModelSpec:
    """A checkpoint and how it is run; the workers know the model by it.

    Args:
        path: safetensors file, or `random:14b` (random weights of a released size, for benchmarks).
        weight_dtype: "fp32", "fp16", "bf16", "fp8_e4m3fn" or "fp8_e5m2", in which the matrices are held that the
            file has not quantised (see `wanvideo.checkpoint.place`).
        compute_dtype: "fp32", "fp16" or "bf16", in which products and attention run.
        attention: kernel name, see `wanvideo.attention.get_kernel`.
        allow_flash, allow_sdpa: kinds of kernel that "auto" may choose.
        slice_tokens: tokens that feed-forward and cross-attention take at once; 0 takes all.
        max_batch: batch items that one forward takes at once.
        shard_weights: whether each rank keeps a share of every block, which all gather before its turn: "on", "off",
            or "auto" (where whole weights don't fit).
        offload: whether blocks lie in host memory and are copied to the GPU for their turn: "on" (all of them), "off",
            or "auto" (as many as don't fit otherwise).
        stamp: tells a file from a later one of the same name (see `file_stamp`).
        fp8_mode: "disabled", or what runs in eight bits: "linear", "linear+attention" (see wanvideo/fp8_mode.py).
        module: file beside the model, of a VACE module or of InfiniteTalk's layers (see `wanvideo.vace_module`), or "".
    """

    path: str
    weight_dtype: str = "bf16"
    compute_dtype: str = "bf16"
    attention: str = "auto"
    allow_flash: bool = True
    allow_sdpa: bool = True
    slice_tokens: int = 0
    max_batch: int = 1
    stamp: str = ""
    shard_weights: str = "auto"
    offload: str = "auto"
    fp8_mode: str = "disabled"
    module: str = ""

    @property
    def name(self) -> str:
        """The file, or both, as a user knows them."""
        return " + ".join(Path(path).name for path in (self.path, self.module) if path)


@dataclass(frozen=True)
class ArenaRef:
    """An arena of the client, as the workers open it."""

    path: str
    nbytes: int
    serial: int  # a later arena can have the same path
    pinned: bool = False  # worth pinning: it serves many requests


@dataclass(frozen=True)
class TensorRef:
    """Where a tensor lies in an arena; `dtype` is torch's name for it, such as float32."""

    dtype: str
    shape: tuple[int, ...]
    offset: int


@dataclass(frozen=True)
class PatchRef:
    """A `wanvideo.lora` patch, its tensors in an arena. `kind` is the class name there."""

    kind: str
    tensors: tuple[TensorRef, ...]
    scale: float = 1.0
    base_scale: float = 1.0


@dataclass(frozen=True)
class Start:
    """First message to the launcher."""

    settings: PoolSettings
    client_pid: int


@dataclass(frozen=True)
class Load:
    """Read a model. `tokens` is the length of the first video, beside which its weights must fit; 0 is unknown."""

    id: int
    spec: ModelSpec
    tokens: int = 0


@dataclass(frozen=True)
class Patch:
    """Make the model's weights those of the file plus `weights`; the patches of an earlier uuid are undone."""

    id: int
    spec: ModelSpec
    uuid: str
    arena: ArenaRef
    weights: dict[str, tuple[PatchRef, ...]]


@dataclass(frozen=True)
class ConditioningRef:
    """A `wanvideo.conditioning.Conditioning`: its tensors by name, in an arena of their own that outlives a step.

    A tensor with one item where the latent has more is the same for all of them.
    """

    arena: ArenaRef | None
    tensors: dict[str, TensorRef]
    options: Options


@dataclass(frozen=True)
class Displaced:
    """How one forward takes part in displaced patch parallelism; see schedule.py for its fields.

    Args:
        kind: "exact", "fill" or "stale".
        run: buffers of another run are dropped.
        lanes: a name for each batch item; items of one name follow each other over the steps.
    """

    kind: str
    run: str
    lanes: tuple[str, ...]
    split: PatchSplit
    fp8_buffers: bool = False
    manager: str = "auto"


@dataclass(frozen=True)
class Forward:
    """Run one DiT forward; the workers write their tokens of the result into `out` [B, tokens, 4*out_dim]."""

    id: int
    spec: ModelSpec
    arena: ArenaRef
    x: TensorRef
    timestep: TensorRef
    context: TensorRef
    out: TensorRef
    displaced: Displaced | None = None
    conditioning: ConditioningRef | None = None


@dataclass(frozen=True)
class LoadVAE:
    """Take the weights of a VAE's decoder or encoder, in `dtype`; the workers know them by `key` from then on.

    Those of another `vae` are dropped.
    """

    id: int
    vae: str
    key: str
    dtype: str
    arena: ArenaRef
    weights: dict[str, TensorRef]


@dataclass(frozen=True)
class VAEOptions:
    """How a video is decoded; the result is the same within rounding.

    Args:
        convolution: see `wanvideo.vae_ops.CONVOLUTIONS`.
        piece_mib: MiB of the largest tensor of a piece; less where memory is short.
        axis: what is shared among the ranks: "rows", "columns", or "auto" (the longer side).
    """

    convolution: str = "auto"
    piece_mib: int = 512
    axis: str = "auto"


@dataclass(frozen=True)
class DecodeVAE:
    """Decode latents [B, C, T, h, w] in `arena` into `out` [B, frames, H, W, 3], float32 from 0 to 1, in `out_arena`.

    `done` there has a word for each rank: how many frames it has written.
    """

    id: int
    key: str
    arena: ArenaRef
    latent: TensorRef
    out_arena: ArenaRef
    out: TensorRef
    done: TensorRef
    options: VAEOptions = VAEOptions()


@dataclass(frozen=True)
class EncodeVAE:
    """Encode frames [T, H, W, 3] from 0 to 1 in `arena` into the mean of the latent, `out` [C, t, h, w], float32.

    `done` counts latent frames, as `DecodeVAE.done` does frames.
    """

    id: int
    key: str
    arena: ArenaRef
    frames: TensorRef
    out_arena: ArenaRef
    out: TensorRef
    done: TensorRef
    options: VAEOptions = VAEOptions()


@dataclass(frozen=True)
class Trim:
    """Give back memory that only a sampling run needs: displaced patches' buffers and torch's cache."""

    id: int


@dataclass(frozen=True)
class Unload:
    """Drop the weights of `specs`."""

    id: int
    specs: tuple[ModelSpec, ...]


@dataclass(frozen=True)
class StepOut:
    """Move weights of `spec` to host memory on `ranks` until each has `nbytes` more on its device, or all of them.

    They come back with the next forward, as far as they then fit.
    """

    id: int
    spec: ModelSpec
    ranks: tuple[int, ...]
    nbytes: float


@dataclass(frozen=True)
class Report:
    """Ask for every worker's `WorkerStatus`."""

    id: int


@dataclass(frozen=True)
class Survey:
    """Ask for every worker's `Surveyed`, which it measures the first time."""

    id: int


@dataclass(frozen=True)
class Divide:
    """Share the GPUs out as `plan` says. Loaded models stay: they must be divided alike under both plans."""

    id: int
    plan: ParallelPlan


@dataclass(frozen=True)
class Cancel:
    """To the launcher: the client no longer waits for request `id`."""

    id: int


Request = Load | Patch | Forward | Unload | StepOut | Trim | Report | Survey | Divide | LoadVAE | DecodeVAE | EncodeVAE


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
    patches: str
    tensor: int = 1
    pipeline: int = 1
    placement: str = ""  # where the weights live, and why
    device_bytes: int = 0  # weights on this worker's device
    host_bytes: int = 0  # weights in its host memory, copies of what is on the device included
    fp8: str = ""  # what runs in fp8, and how; empty: nothing
    overlapped: bool = False  # Ulysses' exchanges run beside the computation (see overlapped.py)
    moved_in: int = 0  # bytes of weights copied from host memory to the device since the model was loaded
    moved_out: int = 0  # and to host memory


@dataclass(frozen=True)
class HeldWeights:
    """Bytes of a model's weights on one worker's device: as it is, and once all that belongs there is back."""

    spec: ModelSpec
    now: int
    whole: int


@dataclass(frozen=True)
class MemoryUse:
    """What the memory of one worker's device is used for, in bytes: at the fullest moment of the last forward, or as it
    is where none has been finished since the worker started, or since one failed.

    Args:
        weights: of all models and VAEs, and the blocks that pass through (see residence.py).
        activations: what the forward works with. 0 before one, and on a CPU, where nobody counts them.
        cache: keys and values kept between the steps of a run.
        mailboxes: memory that other ranks write into (see mailbox.py).
        unused: memory that torch's allocator keeps for later.
        others: what is not torch's in this worker: CUDA itself, NCCL, and other processes such as ComfyUI.
        total: all that the device has; on a CPU, that the host has.
        measured: whether it is of a forward.
    """

    weights: int
    activations: int
    cache: int
    mailboxes: int
    unused: int
    others: int
    total: int
    measured: bool = False

    @property
    def free(self) -> int:
        used = self.weights + self.activations + self.cache + self.mailboxes + self.unused + self.others
        return max(0, self.total - used)


@dataclass(frozen=True)
class WorkerStatus:
    """One worker's memory, in bytes. `peak_private` is host memory of its own while it loaded weights;
    pages of the checkpoint are the system's page cache, shared by all workers. `fused` says whether Triton's
    kernels are used (see wanvideo/pointwise.py); `link` how it reaches the other GPUs (see links.py);
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
class Surveyed:
    """What a worker's device does (see survey.py), and what there is room for.

    Args:
        room: bytes that a model's weights and activations may take on its device, those of loaded models included.
        host_room: bytes of host memory that is free for weights, of all workers together.
        hosted: bytes that the loaded models of this worker take there.
        link: how it reaches the others (see links.py).
    """

    machine: Machine
    room: int
    host_room: int
    hosted: int
    link: str


@dataclass(frozen=True)
class Ready:
    """A worker has joined the group."""

    rank: int
    pid: int
    device: str
    torch: str
    xfuser: str


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
class Stall:
    """How long a rank's device stood still for one kind of exchange in a forward (see stopwatch.py).

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
    def of(kind: str, ranks: tuple[int, ...], seconds: Iterable[float]) -> Stall:
        return Stall(kind, ranks, ",".join(str(round(s * 1e6)) for s in seconds))

    @property
    def seconds(self) -> list[float]:
        return [int(us) / 1e6 for us in self.microseconds.split(",") if us]


@dataclass(frozen=True)
class Reply:
    """A worker's answer. `error` is empty where all went well; `kind` is the error's class name; `patches` is
    the uuid of those merged into the model that was to be loaded; `weights` tells of every loaded model; `stalls`
    where the device stood still in a forward."""

    id: int
    rank: int
    error: str = ""
    kind: str = ""
    cancelled: bool = False
    seconds: float = 0.0
    patches: str = ""
    status: WorkerStatus | None = None
    exchange: Exchange | None = None
    weights: tuple[HeldWeights, ...] = ()
    stalls: tuple[Stall, ...] = ()
    surveyed: Surveyed | None = None
    vaes: tuple[str, ...] = ()  # keys of the VAEs it has


@dataclass(frozen=True)
class PoolReady:
    workers: tuple[Ready, ...]


@dataclass(frozen=True)
class Replies:
    """Every worker's answer to one request."""

    id: int
    replies: tuple[Reply, ...]


@dataclass(frozen=True)
class PoolFailed:
    """The pool has ended."""

    reason: str
    kind: str = ""


_TYPES = {
    cls.__name__: cls
    for cls in (
        *(Start, Load, Patch, Forward, Unload, StepOut, Trim, Report, Survey, Divide, Cancel),
        *(LoadVAE, DecodeVAE, EncodeVAE),
        *(Ready, Reply, PoolReady, Replies, PoolFailed),
    )
}


def encode(message: object) -> bytes:
    """A message as JSON."""
    return json.dumps({"type": type(message).__name__, **asdict(message)}).encode()


def decode(data: bytes) -> object:
    """The message that `encode` was given.

    Raises:
        ValueError: the data is no message of ours.
    """
    fields = json.loads(data)
    cls = _TYPES.get(fields.pop("type", "")) if isinstance(fields, dict) else None
    if cls is None:
        raise ValueError("A pool message has an unknown type. Restart ComfyUI after updating WanParallel.")
    return _revive(cls, fields)


@functools.cache
def _hints(kind: type) -> dict[str, object]:
    """The types of a dataclass's fields. Python evaluates their text anew each time, which took 7 ms of a forward."""
    return typing.get_type_hints(kind)


def _revive(kind: object, value: object) -> object:
    """Build `value`, as JSON holds it, into the annotated type `kind`."""
    if value is None:
        return None
    if is_dataclass(kind):
        hints = _hints(kind)
        return kind(**{name: _revive(hints[name], item) for name, item in value.items()})
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is tuple:
        return tuple(_revive(arguments[0], item) for item in value)
    if origin is dict:
        return {name: _revive(arguments[1], item) for name, item in value.items()}
    if origin in (types.UnionType, typing.Union):
        return _revive(arguments[0], value)
    return value
