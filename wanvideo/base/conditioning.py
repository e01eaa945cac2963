"""What a forward is given beside latent, timestep and text: the inputs of the Wan variants and of model patches."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TypeVar

import torch

from .config import WanConfig
from .options import PLAIN, Options
from .variant import Asked, inputs, registered

Computed = TypeVar("Computed")

CONSUMED = ("reference", "extra_frames")
"""Inputs that `extended` puts before and behind the latent; the transformer reads the others, on every rank."""


@dataclass(frozen=True, eq=False, init=False)
class Conditioning:
    """Inputs of one forward, for every batch item.

    An input is an attribute, None where it is not given: Conditioning(image=tokens).image. Which inputs there are, and
    of which shapes, the variants say (see `variant.Input`). Tensors may lie on another device than the model: each rank
    fetches what belongs to its tokens.

    Args:
        options: plain data.
        kept: what `once` has computed, for whoever gives the same conditioning again; without, it computes anew.
        given: the tensors that are given, by the names of the inputs.
        tensors: more of them; None takes one away.

    Raises:
        TypeError: no variant has an input of that name.
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
        """Whether the transformer has nothing to read here."""
        return not self.tensors() and self.options == PLAIN

    def tensors(self) -> dict[str, torch.Tensor]:
        """What is there of the inputs that the transformer reads, by name."""
        return {name: tensor for name, tensor in self.given.items() if name not in CONSUMED}

    def having(self, options: Options | None = None, **tensors: torch.Tensor | None) -> Conditioning:
        """The conditioning with other options, or with other tensors; None takes a tensor away."""
        return Conditioning(options or self.options, self.kept, self.given, **tensors)

    def items(self, s: slice) -> Conditioning:
        """The conditioning of the batch items `s`."""
        kept = None if self.kept is None else self.kept.setdefault((s.start, s.stop), {})
        return Conditioning(self.options, kept, {name: tensor[s] for name, tensor in self.given.items()})

    def once(self, name: str, compute: Callable[[], Computed]) -> Computed:
        """What `compute` gives, which depends on the weights and on the tensors here alone."""
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


def placed(x: torch.Tensor, conditioning: Conditioning) -> Conditioning:
    """The conditioning for a latent x [B, in_dim, T, H, W], with the places of inputs that lie behind its video."""
    for variant in registered():
        conditioning = variant.placed(x, conditioning)
    return conditioning


def extended(x: torch.Tensor, conditioning: Conditioning) -> tuple[torch.Tensor, Conditioning]:
    """Put the reference in front of a latent x [B, in_dim, T, H, W], in the first channels, and extra frames behind.

    They are tokens like all others from then on; `core` takes the frames of x out of the result. Inputs that lie behind
    the video get their places.

    Returns:
        The longer latent, and the conditioning with what is left of it.
    """
    conditioning = placed(x, conditioning)
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
        conditioning.options, reference_frames=0 if reference is None else reference.shape[2]
    )
    return torch.cat(frames, dim=2), conditioning.having(options, reference=None, extra_frames=None)


def core(result: torch.Tensor, frames: int, options: Options) -> torch.Tensor:
    """The `frames` frames of the latent itself in a result for an `extended` one."""
    return result[:, :, options.reference_frames : options.reference_frames + frames]


def check(config: WanConfig, x: torch.Tensor, conditioning: Conditioning) -> None:
    """Check that a conditioning fits the model and the latent x [B, in_dim, T, H, W].

    Raises:
        ValueError: the model has no such input, or it has another shape than the latent asks for.
    """
    batch, _, frames, height, width = x.shape
    asked = Asked(config, batch, frames, height, width, conditioning)
    expected = {given.name: given.shape(variant, asked) for variant, given in config.inputs}
    for name, tensor in conditioning.given.items():
        if name not in expected:
            raise ValueError(
                f"The conditioning has the input {name}, which this {config.variant} model does not take. "
                "Use a model of the variant that the conditioning is made for."
            )
        shape = expected[name]
        fits = tensor.ndim == len(shape) and all(
            want in (None, got) for got, want in zip(tensor.shape, shape, strict=True)
        )
        if not fits:
            wanted = ", ".join("any" if size is None else str(size) for size in shape)
            raise ValueError(
                f"The conditioning's {name} has shape {tuple(tensor.shape)}, but a latent of shape {tuple(x.shape)} "
                f"needs [{wanted}]. Give the conditioning node and the latent the same width, height and length."
            )
    tail = conditioning.tail
    if tail is not None and tail.shape[2] not in {4 * channels for channels in config.tail_channels}:
        raise ValueError(
            f"The conditioning's further videos have {tail.shape[2] // 4} channels, but this "
            f"{config.variant} model takes {' or '.join(map(str, config.tail_channels))}. Encode them with the model's "
            "own VAE."
        )
    for variant in config.variants:
        variant.check(config, x, conditioning)


def check_no_subjects(conditioning: Conditioning) -> None:
    """Check that there are no frames behind the latent, for a variant that has inputs for its frames alone.

    Raises:
        ValueError: there are.
    """
    if conditioning.extra_frames is not None:
        raise ValueError(
            "Subject images (WanPhantomSubjectToVideo) cannot be joined with VACE, a camera path or S2V. "
            "Remove one of them."
        )
