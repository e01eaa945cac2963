"""The inputs of a forward beside latent, timestep and text, which Wan variants and model patches define."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TypeVar

import torch

from .config import WanConfig
from .inputs import check_video
from .options import PLAIN, Options
from .user_error import InputError
from .variant import Asked, inputs, registered

Computed = TypeVar("Computed")

CONSUMED = ("reference", "extra_frames")
"""The inputs that `extended` joins to the latent as frames. The transformer reads all other inputs, on every rank."""


@dataclass(frozen=True, eq=False, init=False)
class Conditioning:
    """Inputs of one forward, for every batch item.

    An input is an attribute, None where the caller gives no such input: Conditioning(image=tokens).image. The variants
    define the names and shapes of the inputs (see `variant.Input`). Tensors may lie on another device than the model:
    each rank fetches the parts that belong to its tokens.

    Args:
        options: the inputs that are plain data.
        kept: a dict in which `once` keeps its results for later forwards with the same conditioning; None keeps none.
        given: the input tensors, by the names of the inputs.
        tensors: further input tensors by name; None removes an input from `given`.

    Raises:
        TypeError: no variant has an input with one of these names.
    """

    options: Options
    kept: dict | None
    given: Mapping[str, torch.Tensor] = field(repr=False)

    def __init__(
        self,
        options: Options = PLAIN,
        kept: dict | None = None,
        given: Mapping[str, torch.Tensor] | None = None,
        **tensors: torch.Tensor | None,
    ):
        unknown = sorted(name for name in tensors if not _is_input(name))
        if unknown:
            raise TypeError(f"no Wan variant has an input {', '.join(unknown)}")
        merged = {**(given or {}), **tensors}
        object.__setattr__(self, "options", options)
        object.__setattr__(self, "kept", kept)
        object.__setattr__(self, "given", {name: tensor for name, tensor in merged.items() if tensor is not None})

    def __getattr__(self, name: str) -> torch.Tensor | None:
        if name.startswith("_") or name in ("options", "kept", "given") or not _is_input(name):
            raise AttributeError(name)
        return self.given.get(name)

    @property
    def empty(self) -> bool:
        """Whether this conditioning has no tensor and no option for the transformer to read."""
        return not self.tensors() and self.options == PLAIN

    def tensors(self) -> dict[str, torch.Tensor]:
        """The given tensors that the transformer itself reads, by the names of the inputs (all but `CONSUMED`)."""
        return {name: tensor for name, tensor in self.given.items() if name not in CONSUMED}

    def having(self, options: Options | None = None, **tensors: torch.Tensor | None) -> Conditioning:
        """This conditioning with other `options`, and with `tensors` added or replaced; None removes a tensor."""
        return Conditioning(options or self.options, self.kept, self.given, **tensors)

    def items(self, s: slice) -> Conditioning:
        """The conditioning of the batch items `s`."""
        kept = None if self.kept is None else self.kept.setdefault((s.start, s.stop), {})
        return Conditioning(self.options, kept, {name: tensor[s] for name, tensor in self.given.items()})

    def once(self, name: str, compute: Callable[[], Computed]) -> Computed:
        """The result of `compute()`, which may depend on weights and these tensors alone; `kept` keeps it as `name`."""
        if self.kept is None:
            return compute()
        if name not in self.kept:
            self.kept[name] = compute()
        return self.kept[name]


@functools.cache
def _names(_variants: tuple[type, ...]) -> frozenset[str]:
    return frozenset(given.name for given in inputs())


def _is_input(name: str) -> bool:
    return name in _names(registered())


NOTHING = Conditioning()


def with_context_grids(x: torch.Tensor, conditioning: Conditioning) -> Conditioning:
    """The conditioning with the grids of all context tokens that its inputs add to a latent x [B, in_dim, T, H, W]."""
    for variant in registered():
        conditioning = variant.with_context_grids(x, conditioning)
    return conditioning


def extended(x: torch.Tensor, conditioning: Conditioning) -> tuple[torch.Tensor, Conditioning]:
    """Join reference frames and extra frames to a latent x [B, in_dim, T, H, W].

    The reference frames come first and fill the first channels; the extra frames come last. The transformer treats both
    as frames of the video, and `core` takes the frames of x out of its result.

    Returns:
        The longer latent, and the conditioning without the joined inputs but with the grids of its context tokens.
    """
    conditioning = with_context_grids(x, conditioning)
    frames, reference = [x], conditioning.reference
    if reference is not None:
        reference = reference if reference.ndim == 5 else reference.unsqueeze(2)
        front = x.new_zeros(x.shape[0], x.shape[1], reference.shape[2], *x.shape[-2:])
        front[:, : reference.shape[1]] = reference
        frames.insert(0, front)
    if conditioning.extra_frames is not None:
        frames.append(conditioning.extra_frames.to(x))
    if len(frames) == 1:
        return x, conditioning
    options = dataclasses.replace(
        conditioning.options,
        reference_frames=0 if reference is None else reference.shape[2],
        extra_frames=0 if conditioning.extra_frames is None else conditioning.extra_frames.shape[2],
    )
    return torch.cat(frames, dim=2), conditioning.having(options, reference=None, extra_frames=None)


def core(result: torch.Tensor, frames: int, options: Options) -> torch.Tensor:
    """The `frames` frames of the original latent, out of a result for the latent that `extended` has made longer."""
    return result[:, :, options.reference_frames : options.reference_frames + frames]


def check(config: WanConfig, x: torch.Tensor, conditioning: Conditioning) -> None:
    """Check that a conditioning fits the model and the latent x [B, in_dim, T, H, W].

    Raises:
        InputError: the model does not take one of the inputs, or an input has another shape than the latent asks for.
    """
    check_video(config, x)
    batch, _, frames, height, width = x.shape
    asked = Asked(config, batch, frames, height, width, conditioning)
    expected = {given.name: given.shape(variant, asked) for variant, given in config.inputs}
    for name, tensor in conditioning.given.items():
        if name not in expected:
            raise InputError(
                f"The conditioning has the input {name}, which this {config.variant} model does not take. "
                "Use a model of the variant that the conditioning is made for."
            )
        if tensor.is_complex():
            raise InputError(f"The conditioning's {name} holds complex numbers. Look at the node that it comes from.")
        shape = expected[name]
        fits = tensor.ndim == len(shape) and all(
            want in (None, got) for got, want in zip(tensor.shape, shape, strict=True)
        )
        if not fits:
            wanted = ", ".join("any" if size is None else str(size) for size in shape)
            raise InputError(
                f"The conditioning's {name} has shape {tuple(tensor.shape)}, but a latent of shape {tuple(x.shape)} "
                f"needs [{wanted}]. Give the conditioning node and the latent the same width, height and length."
            )
    context_videos, channels = conditioning.context_videos, config.context_channels
    if context_videos is not None and context_videos.shape[2] not in {4 * count for count in channels}:
        raise InputError(
            f"The conditioning's further videos have {context_videos.shape[2] // 4} channels, but this "
            f"{config.variant} model takes {' or '.join(map(str, channels))}. Encode them with the model's "
            "own VAE."
        )
    for variant in config.variants:
        variant.check(config, x, conditioning)


def check_no_subjects(conditioning: Conditioning) -> None:
    """Check that the conditioning has no extra frames, which have no part in the other inputs of some variants.

    Raises:
        InputError: the conditioning has extra frames.
    """
    if conditioning.extra_frames is not None:
        raise InputError(
            "Subject images (WanPhantomSubjectToVideo) cannot be joined with VACE, a camera path or S2V. "
            "Remove one of them."
        )
