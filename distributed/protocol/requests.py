"""What a client can ask of its workers. All of them get the same request, and each answers with a `replies.Reply`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Generic, TypeVar

from ...wanvideo.base.attention_choice import PLAIN_ATTENTION, AttentionChoice
from ..plan.degrees import ParallelPlan, PatchSplit
from .refs import ArenaRef, ConditioningRef, LoraRef, TensorRef
from .replies import Done, ForwardDone
from .reports import DeviceProfile, WorkerStatus
from .specs import ModelSpec

OutcomeT = TypeVar("OutcomeT", covariant=True)


@dataclass(frozen=True)
class Request(Generic[OutcomeT]):
    """What all requests have in common; `Request[X]` is answered with an X.

    Attributes:
        id: grows by time.
        outcome: the class of the answer of a worker that did what was asked.
        collective: whether ranks wait for each other in it. Where one of them then fails alone, the others never
            answer; in any other request each rank answers for itself, however long that takes.
    """

    id: int

    outcome: ClassVar[type[Any]] = Done
    collective: ClassVar[bool]


@dataclass(frozen=True)
class Load(Request[Done]):
    """Read a model. `tokens` is the length of the first video, beside which its weights must fit; 0 is unknown.
    `sparse` says that its self-attention is sparse, which takes more memory."""

    collective = True

    spec: ModelSpec
    tokens: int = 0
    sparse: bool = False


@dataclass(frozen=True)
class ApplyLora(Request[Done]):
    """Make the model's weights those of the file plus `weights`; the LoRAs of an earlier uuid are undone."""

    collective = False

    spec: ModelSpec
    uuid: str
    arena: ArenaRef
    weights: dict[str, tuple[LoraRef, ...]]


@dataclass(frozen=True)
class Unload(Request[Done]):
    """Drop the weights of `specs`."""

    collective = False

    specs: tuple[ModelSpec, ...]


@dataclass(frozen=True)
class Offload(Request[Done]):
    """Move weights of `spec` to host memory on `ranks` until each has `nbytes` more on its device, or all of them.

    They come back with the next forward, as far as they then fit.
    """

    collective = False

    spec: ModelSpec
    ranks: tuple[int, ...]
    nbytes: float


EXACT = "exact"
"""Name of the strategy that approximates nothing."""


@dataclass(frozen=True)
class Displaced:
    """The part that one forward takes in an approximate sampling run; see schedule.py for its fields.

    Args:
        kind: "exact", "fill" or "stale".
        run: buffers of another run are dropped.
        branch_ids: a name for each batch item; items of one name follow each other over the steps.
        split, fp8_buffers, manager: of displaced patches alone.
        strategy: the name under which the workers know the strategy (see strategy.py).
    """

    kind: str
    run: str
    branch_ids: tuple[str, ...]
    split: PatchSplit
    fp8_buffers: bool = False
    manager: str = "auto"
    strategy: str = "displaced"


@dataclass(frozen=True)
class Forward(Request[ForwardDone]):
    """Run one DiT forward; the workers write their tokens of the result into `out` [B, tokens, 4*out_dim]."""

    outcome = ForwardDone
    collective = True

    spec: ModelSpec
    arena: ArenaRef
    x: TensorRef
    timestep: TensorRef
    context: TensorRef
    out: TensorRef
    displaced: Displaced | None = None
    conditioning: ConditioningRef | None = None
    attention: AttentionChoice = PLAIN_ATTENTION

    @property
    def strategy(self) -> str:
        """The name of the strategy by which the workers share this forward."""
        return EXACT if self.displaced is None else self.displaced.strategy


@dataclass(frozen=True)
class LoadVAE(Request[Done]):
    """Take the weights of a VAE's decoder or encoder, in `dtype`; the workers know them by `key` from then on.

    Those of another `vae` are dropped.
    """

    collective = False

    vae: str
    key: str
    dtype: str
    arena: ArenaRef
    weights: dict[str, TensorRef]


@dataclass(frozen=True)
class VAEOptions:
    """How a video is decoded; the result is the same within rounding.

    Args:
        convolution: see `wanvideo.vae.vae_ops.CONVOLUTIONS`.
        piece_mib: MiB of the largest tensor of a piece; less where memory is short.
        axis: what is shared among the ranks: "rows", "columns", or "auto" (the longer side).
        speeds: of the GPUs by rank, after which they share it; empty where all are alike.
    """

    convolution: str = "auto"
    piece_mib: int = 512
    axis: str = "auto"
    speeds: tuple[int, ...] = ()


@dataclass(frozen=True)
class DecodeVAE(Request[Done]):
    """Decode latents [B, C, T, h, w] in `arena` into `out` [B, frames, H, W, 3], float32 from 0 to 1, in `out_arena`.

    `done` there has a word for each rank: how many frames it has written.
    """

    collective = True

    key: str
    arena: ArenaRef
    latent: TensorRef
    out_arena: ArenaRef
    out: TensorRef
    done: TensorRef
    options: VAEOptions = VAEOptions()


@dataclass(frozen=True)
class EncodeVAE(Request[Done]):
    """Encode frames [T, H, W, 3] from 0 to 1 in `arena` into the mean of the latent, `out` [C, t, h, w], float32.

    `done` counts latent frames, as `DecodeVAE.done` does frames.
    """

    collective = True

    key: str
    arena: ArenaRef
    frames: TensorRef
    out_arena: ArenaRef
    out: TensorRef
    done: TensorRef
    options: VAEOptions = VAEOptions()


@dataclass(frozen=True)
class Trim(Request[Done]):
    """Give back memory that only a sampling run needs: displaced patches' buffers and torch's cache."""

    collective = False


@dataclass(frozen=True)
class Report(Request[WorkerStatus]):
    """Ask for every worker's `WorkerStatus`."""

    outcome = WorkerStatus
    collective = False


@dataclass(frozen=True)
class Probe(Request[DeviceProfile]):
    """Ask for every worker's `DeviceProfile`, which it measures the first time."""

    outcome = DeviceProfile
    collective = True


@dataclass(frozen=True)
class Reconfigure(Request[Done]):
    """Share the GPUs out as `plan` says. Loaded models stay: they must be divided alike under both plans."""

    collective = True

    plan: ParallelPlan


AnyRequest = (
    Load
    | ApplyLora
    | Forward
    | Unload
    | Offload
    | Trim
    | Report
    | Probe
    | Reconfigure
    | LoadVAE
    | DecodeVAE
    | EncodeVAE
)
