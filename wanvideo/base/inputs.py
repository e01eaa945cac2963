"""Checks of latent, text and timestep, which every Wan model takes; conditioning.py checks the rest."""

from __future__ import annotations

import math

import torch

from .config import WanConfig
from .user_error import InputError

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
LOOK = "Look at the node that it comes from."
OVERFLOW = (
    "If a sampling step has made it, set use_bf16 in place of use_fp16, whose numbers overflow sooner, or lower cfg or "
    "the strength of a LoRA; else look at the node that it comes from."
)


def check_numbers(name: str, tensor: torch.Tensor, remedy: str = LOOK) -> None:
    """Check that a tensor holds at least one floating-point number, and only finite ones.

    Args:
        name: of the tensor, at the beginning of a sentence.
        remedy: what to do about NaN and infinity.

    Raises:
        InputError: the tensor is empty, holds other numbers, or holds NaN or infinity.
    """
    shape = list(tensor.shape)
    if tensor.dtype not in FLOATS or tensor.layout != torch.strided or tensor.is_meta:
        kind = f"{tensor.dtype}, {'without data' if tensor.is_meta else tensor.layout}"
        kind = kind.removesuffix(", torch.strided").replace("torch.", "")
        raise InputError(f"{name} is a tensor of {kind}, and floating-point numbers are needed. {LOOK}")
    if not tensor.numel():
        raise InputError(f"{name} is empty: its shape is {shape}. {LOOK}")
    low, high = (float(end) for end in torch.aminmax(tensor.detach()))
    if not math.isfinite(low) or not math.isfinite(high):
        raise InputError(f"{name} holds numbers that are NaN or infinite. {remedy}")


def check_video(config: WanConfig, x: torch.Tensor) -> None:
    """Check that a latent has the shape [B, in_dim, T, H, W].

    Raises:
        InputError: it has another one.
    """
    if x.ndim != 5 or x.shape[1] != config.in_dim:
        raise InputError(
            f"The latent has shape {tuple(x.shape)}, but this {config.variant} Wan model takes [batch, "
            f"{config.in_dim}, frames, height, width]. Use the latent and conditioning nodes of this variant."
        )


def check_inputs(config: WanConfig, x: torch.Tensor, context: torch.Tensor) -> None:
    """Check a latent [B, in_dim, T, H, W] and the text [B, L, text_dim].

    Raises:
        InputError: the latent or the text has another shape, is empty, or holds numbers that are none.
    """
    check_video(config, x)
    if context.ndim != 3 or context.shape[-1] != config.text_dim or len(context) != len(x):
        raise InputError(
            f"The text conditioning has shape {tuple(context.shape)}, but this model takes [{len(x)}, tokens, "
            f"{config.text_dim}]. Use CLIPLoader with type wan and the umt5-xxl text encoder."
        )
    check_numbers("The latent", x, OVERFLOW)
    check_numbers("The text conditioning", context)


def check_timestep(x: torch.Tensor, timestep: torch.Tensor) -> None:
    """Check timesteps [B] or [B, T] of a latent [B, in_dim, T, H, W].

    Raises:
        InputError: the timesteps have another shape, or are NaN or infinite.
    """
    if timestep.shape not in ((len(x),), (len(x), x.shape[2])):
        raise InputError(
            f"The timesteps have shape {tuple(timestep.shape)}, but one for each of {len(x)} batch items or for "
            f"each of their {x.shape[2]} latent frames is needed. Use a stock sampler."
        )
    check_numbers("The timestep", timestep if timestep.is_floating_point() else timestep.float())
