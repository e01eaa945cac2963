"""The place of a forward in its sampling run, read from ComfyUI's transformer options."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ...distributed.client.sampling_runs import SampledForward
from .infinitetalk_patch import has_two_speakers

SYNC_FREQUENCY = "wan_parallel_sync_frequency"
"""The transformer option in which OfficialDistriFusionSampler leaves its `sync_frequency`."""


def sampled_forward(
    options: Mapping[str, Any], batch: int, vace_contexts: int = 0, context_tokens: int = 0
) -> SampledForward:
    """Translate ComfyUI's transformer options of a forward of `batch` items to a `SampledForward`, which also takes the
    other arguments as they are."""
    sigmas = options.get("sample_sigmas")
    return SampledForward(
        branch_ids(options, batch),
        steps=None if sigmas is None else len(sigmas) - 1,
        in_context_window=options.get("context_window") is not None,
        skips_blocks=bool(options.get("patches_replace", {}).get("dit")),
        two_speakers=has_two_speakers(options),
        sync_frequency=options.get(SYNC_FREQUENCY),
        vace_contexts=vace_contexts,
        context_tokens=context_tokens,
    )


def branch_ids(options: Mapping[str, Any], batch: int) -> tuple[str, ...]:
    """Return a name for each batch item, which stays the same in every step of a run; no names where the options do not
    fit the batch.

    A batch of ComfyUI's holds, for one conditioning in `uuids` after the other, all videos that are sampled together.
    """
    branches = [
        f"{name}:{label}"
        for name, label in zip(options.get("uuids") or (), options.get("cond_or_uncond") or (), strict=False)
    ]
    if not branches:
        return tuple(str(item) for item in range(batch))
    if batch % len(branches):
        return ()
    return tuple(f"{branch}:{item}" for branch in branches for item in range(batch // len(branches)))
