"""Checks of the shapes of latent, text and timestep, which every Wan model takes; conditioning.py checks the rest."""

from __future__ import annotations

import torch

from .config import WanConfig
from .user_error import InputError


def check_inputs(config: WanConfig, x: torch.Tensor, context: torch.Tensor) -> None:
    """Check a latent [B, in_dim, T, H, W] and the text [B, L, text_dim].

    Raises:
        InputError: the latent or the text has another shape.
    """
    if x.ndim != 5 or x.shape[1] != config.in_dim:
        raise InputError(
            f"The latent has shape {tuple(x.shape)}, but this {config.variant} Wan model takes [batch, "
            f"{config.in_dim}, frames, height, width]. Use the latent and conditioning nodes of this variant."
        )
    if context.ndim != 3 or context.shape[-1] != config.text_dim or len(context) != len(x):
        raise InputError(
            f"The text conditioning has shape {tuple(context.shape)}, but this model takes [{len(x)}, tokens, "
            f"{config.text_dim}]. Use CLIPLoader with type wan and the umt5-xxl text encoder."
        )


def check_timestep(x: torch.Tensor, timestep: torch.Tensor) -> None:
    """Check timesteps [B] or [B, T] of a latent [B, in_dim, T, H, W].

    Raises:
        InputError: the timesteps have another shape.
    """
    if timestep.shape not in ((len(x),), (len(x), x.shape[2])):
        raise InputError(
            f"The timesteps have shape {tuple(timestep.shape)}, but one for each of {len(x)} batch items or for "
            f"each of their {x.shape[2]} latent frames is needed. Use a stock sampler."
        )
