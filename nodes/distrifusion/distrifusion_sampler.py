"""Official DistriFusion Sampler: ComfyUI's own sampling, with a say in how often the patches are synchronised."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import comfy.samplers
import torch
from comfy_api.latest import io

from nodes import common_ksampler  # ComfyUI's, not this folder

from ...distributed.client.displaced_runs import DisplacedRuns
from ...wanvideo.base.user_error import InputError
from ..common.sockets import DISTRIFUSION_CATEGORY, DISTRIFUSION_MODEL
from ..common.validation import checks_inputs
from ..model.model_patcher import RemoteModelPatcher, displaced_runs
from ..model.sampled_forward import SYNC_FREQUENCY, sampled_forward


class OfficialDistriFusionSampler(io.ComfyNode):
    """KSampler for a MODEL of the DistriFusion loader."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Describe the node to ComfyUI."""
        return io.Schema(
            node_id="OfficialDistriFusionSampler",
            display_name="🎯 Official DistriFusion Sampler",
            category=DISTRIFUSION_CATEGORY,
            description=(
                "KSampler, with sync_frequency. Steps between synchronous ones take the other GPUs' patches as they "
                "were one step before, which saves waiting. Refuses a video whose buffers do not fit, before it starts."
            ),
            inputs=[
                DISTRIFUSION_MODEL.Input(
                    "model", tooltip="From Official DistriFusion Model Loader, or any node behind it."
                ),
                io.Conditioning.Input("positive", tooltip="What the video should show."),
                io.Conditioning.Input("negative", tooltip="What it should not show. Without effect where cfg is 1."),
                io.Latent.Input("latent_image", tooltip="The latent to denoise, such as EmptyHunyuanLatentVideo."),
                *_sampling(),
                io.Int.Input(
                    "sync_frequency",
                    default=10,
                    min=1,
                    max=10,
                    tooltip=(
                        "After the warm-up steps of the loader, every such step is synchronous and exact. 1: all of "
                        "them, which is the result of XDit+USP. 10: the least waiting."
                    ),
                ),
            ],
            outputs=[io.Latent.Output(display_name="LATENT", tooltip="The denoised latent.")],
        )

    @classmethod
    @checks_inputs
    def execute(
        cls,
        model: object,
        positive: list,
        negative: list,
        latent_image: Mapping[str, Any],
        seed: int,
        steps: int,
        cfg: float,
        sampler_name: str,
        scheduler: str,
        denoise: float,
        sync_frequency: int,
    ) -> io.NodeOutput:
        """Sample as KSampler does.

        Raises:
            InputError: `model` is not from the DistriFusion loader.
            PlanError: the video cannot be cut like this, or does not fit into memory.
        """
        patcher, runs = with_sync_frequency(model, sync_frequency)
        if "context_handler" not in patcher.model_options:  # a context handler shows the model only parts of the latent
            branches = 1 if cfg == 1.0 else 2
            _check(runs, latent_image["samples"], branches, sync_frequency, steps)
        sampled = common_ksampler(
            patcher,
            seed,
            steps,
            cfg,
            sampler_name,
            scheduler,
            positive,
            negative,
            latent_image,
            denoise=denoise,
        )
        return io.NodeOutput(sampled[0])


def _sampling() -> list[io.Input]:
    """The inputs of KSampler."""
    return [
        io.Int.Input(
            "seed",
            default=0,
            min=0,
            max=0xFFFFFFFFFFFFFFFF,
            control_after_generate=True,
            tooltip="Of the noise. The same seed and settings give the same video.",
        ),
        io.Int.Input("steps", default=20, min=1, max=10000, tooltip="Denoising steps."),
        io.Float.Input(
            "cfg",
            default=6.0,
            min=0.0,
            max=100.0,
            step=0.1,
            round=0.01,
            tooltip="How closely to follow the prompt. Above 1 two branches are computed, with buffers each.",
        ),
        io.Combo.Input("sampler_name", options=comfy.samplers.KSampler.SAMPLERS, tooltip="ComfyUI's own samplers."),
        io.Combo.Input(
            "scheduler", options=comfy.samplers.KSampler.SCHEDULERS, tooltip="ComfyUI's own noise schedules."
        ),
        io.Float.Input(
            "denoise",
            default=1.0,
            min=0.0,
            max=1.0,
            step=0.01,
            tooltip="How much of the latent is made anew; below 1 it keeps some of what is there.",
        ),
    ]


def with_sync_frequency(model: object, frequency: int) -> tuple[RemoteModelPatcher, DisplacedRuns]:
    """Clone a DistriFusion MODEL so that every `frequency`-th step is synchronous; returns it and its sampling runs.

    Raises:
        InputError: `model` has no patches.
    """
    runs = displaced_runs(model)
    if not isinstance(model, RemoteModelPatcher) or runs is None:
        loader = "XDit+USP WanVideo Model Loader" if isinstance(model, RemoteModelPatcher) else "a stock loader"
        raise InputError(
            f"This MODEL comes from {loader} and has no patches to synchronise. "
            "Connect Official DistriFusion Model Loader, or sample this MODEL with KSampler."
        )
    patcher = model.clone()
    options = patcher.model_options.get("transformer_options", {})
    patcher.model_options["transformer_options"] = {**options, SYNC_FREQUENCY: frequency}
    return patcher, runs


def _check(runs: DisplacedRuns, latent: torch.Tensor, branches: int, sync_frequency: int, steps: int) -> None:
    """Refuse now what the first step would refuse, before anything is loaded.

    Raises:
        PlanError: the video cannot be cut like this, or does not fit into memory.
    """
    if latent.ndim != 5:
        return  # the MODEL itself says what is wrong with it
    size = (latent.shape[0] * branches, *latent.shape[1:])
    options = {SYNC_FREQUENCY: sync_frequency, "sample_sigmas": range(steps + 1)}
    runs.check(size, sampled_forward(options, size[0]))
