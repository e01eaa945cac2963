"""What a client can ask of its workers. All of them get the same request, and each answers with a `messages.Reply`."""

from __future__ import annotations

from dataclasses import dataclass

from ..plan.degrees import ParallelPlan, PatchSplit
from .refs import ArenaRef, ConditioningRef, PatchRef, TensorRef
from .specs import ModelSpec


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


EXACT = "exact"
"""Name of the strategy that approximates nothing."""


@dataclass(frozen=True)
class Displaced:
    """The part that one forward takes in an approximate sampling run; see schedule.py for its fields.

    Args:
        kind: "exact", "fill" or "stale".
        run: buffers of another run are dropped.
        lanes: a name for each batch item; items of one name follow each other over the steps.
        split, fp8_buffers, manager: of displaced patches alone.
        strategy: the name under which the workers know the strategy (see strategy.py).
    """

    kind: str
    run: str
    lanes: tuple[str, ...]
    split: PatchSplit
    fp8_buffers: bool = False
    manager: str = "auto"
    strategy: str = "displaced"


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

    @property
    def strategy(self) -> str:
        """The name of the strategy by which the workers share this forward."""
        return EXACT if self.displaced is None else self.displaced.strategy


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


Request = Load | Patch | Forward | Unload | StepOut | Trim | Report | Survey | Divide | LoadVAE | DecodeVAE | EncodeVAE
