"""A flow-matching Euler sampler, for the demo and the tests, which run without ComfyUI.

x_t = (1 - sigma) x_0 + sigma * noise, and the model predicts the velocity noise - x_0
(Wan 2.1 `wan/utils/fm_solvers.py`; shift as in Stable Diffusion 3).
"""

from __future__ import annotations

from collections.abc import Callable

import torch


def flow_sigmas(steps: int, shift: float) -> torch.Tensor:
    """Noise levels from 1 to 0, float64 [steps + 1]; a shift above 1 spends more steps at high noise."""
    sigmas = torch.linspace(1.0, 0.0, steps + 1, dtype=torch.float64)
    return shift * sigmas / (1 + (shift - 1) * sigmas)


def euler(
    velocity: Callable[[torch.Tensor, float], torch.Tensor],
    x: torch.Tensor,
    sigmas: torch.Tensor,
    on_step: Callable[[int, torch.Tensor], None] | None = None,
) -> torch.Tensor:
    """Integrate `velocity(x, sigma)` from sigmas[0] down to sigmas[-1]; `on_step(i, x)` follows each step."""
    for i, (sigma, following) in enumerate(zip(sigmas.tolist(), sigmas[1:].tolist(), strict=False)):
        x = x + (following - sigma) * velocity(x, sigma)
        if on_step is not None:
            on_step(i, x)
    return x
