"""XDit+USP WanVideo Model Loader: a MODEL for every stock node, whose transformer runs in a pool of workers."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from typing import Any

import comfy.sd
from comfy_api.latest import io

from ...distributed.client.pool import acquire
from ...wanvideo.checkpoint.header import read_header
from ...wanvideo.checkpoint.vace_module import read_model
from ...wanvideo.checkpoint.weight_source import storage_format
from ...wanvideo.model import fp8_mode as fp8_modes
from ..common import shared_inputs
from ..common.model_files import listed_lora, model_path
from ..common.settings import WEIGHT_PRECISIONS, USPConfig
from ..common.sockets import CATEGORY, XDITUSPCONFIG
from ..common.validation import check_file, file_fingerprint
from ..model.lora_file import read_lora
from ..model.lora_names import with_native_names
from ..model.model_patcher import RemoteModelPatcher
from ..model.remote_model import build_model
from .vace_select import VACEPATH, module_path

log = logging.getLogger(__name__)

# A type of our own that also plugs into every MODEL input.
WAN_MODEL = io.Custom("XDITUSPWANVIDEOMODEL,MODEL")


class XDitUSPWanVideoModelLoader(io.ComfyNode):
    """Reads the header of a checkpoint; weights and workers come with the first sampling step."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Describe the node to ComfyUI."""
        return io.Schema(
            node_id="XDitUSPWanVideoModelLoader",
            display_name="XDit+USP WanVideo Model Loader",
            category=CATEGORY,
            description=(
                "A Wan 2.1/2.2 model (text- or image-to-video, first-last-frame, Fun, VACE) that runs on all GPUs of "
                "XDit+USP Config; which of the high- and low-noise files is which cannot be told from them. Its output "
                "goes where any MODEL goes: LoRA loaders, ModelSamplingSD3, KSampler, EasyCache and so on. "
                "The workers start and load the weights with the first sampling step, and stay for the next "
                "prompt."
            ),
            inputs=[
                *_model(),
                XDITUSPCONFIG.Input("xdit_usp_config", tooltip="From XDit+USP Config."),
                shared_inputs.attention_mode(
                    "auto: the fastest exact kernel that is installed. sageattn quantises its inputs: "
                    "faster, and not exact. XDit+USP Status says which one runs."
                ),
                *_additions(),
                _fp8_mode(),
            ],
            outputs=[WAN_MODEL.Output(display_name="model", tooltip="Plugs into every MODEL input.")],
        )

    @classmethod
    async def validate_inputs(cls, model: str | None = None) -> bool | str:
        """Check that the file can be read, before anything runs."""
        return await check_file(read_header, model)

    @classmethod
    def fingerprint_inputs(cls, model: str | None = None, **_inputs: object) -> str:
        """Return another value for another file, even under the same name."""
        return file_fingerprint(model)

    @classmethod
    def execute(
        cls,
        model: str,
        base_precision: str,
        xdit_usp_config: USPConfig,
        attention_mode: str = "auto",
        lora: Sequence[Mapping[str, Any]] | None = None,
        vace_model: object = None,
        fp8_mode: str = fp8_modes.DISABLED,
    ) -> io.NodeOutput:
        """Return a MODEL whose weights are read with its first sampling step."""
        _check_config(xdit_usp_config)
        header = read_model(model_path(model), module := module_path(vace_model))
        weights = fp8_modes.weights_for(header, fp8_mode, base_precision)
        spec = xdit_usp_config.model_spec(header.path, weights, attention_mode, fp8_mode, module, header.stamp)
        pool = acquire(xdit_usp_config.pool_settings())
        pool.check(spec)
        log.info(
            "XDit+USP: %s on %s; weights %s, activations %s. The workers start with the first sampling step.",
            spec.name,
            _workers(xdit_usp_config, header.config.num_heads),
            storage_format(header, spec.weight_dtype),
            spec.compute_dtype,
        )
        patcher = build_model(header, spec, pool)
        for entry in _lora_entries(lora):
            patcher = _with_lora(patcher, entry)
        return io.NodeOutput(patcher)


def _model() -> list[io.Input]:
    return [
        shared_inputs.model_file(
            "model",
            "A Wan model from models/diffusion_models or models/unet: .safetensors in fp32, "
            "bf16, fp16, fp8 or fp8_scaled, .gguf, or the transformer folder of a diffusers model.",
        ),
        io.Combo.Input(
            "base_precision",
            options=list(WEIGHT_PRECISIONS),
            default="bf16",
            tooltip=(
                "Precision of the weights in the workers. What an fp8 or GGUF file has quantised stays in its "
                "format and size whatever you choose; this is for the rest of it. fp8_e4m3fn and fp8_e5m2 "
                "quantise the blocks of any other file while loading, with a scale for each output channel: "
                "half the memory of bf16. The activations have the precision of use_fp16 or use_bf16 in "
                "XDit+USP Config, or this one where both are off (bf16 for fp8)."
            ),
        ),
    ]


def _additions() -> list[io.Input]:
    """Inputs that change the model: LoRAs, and a VACE module."""
    return [
        io.Custom("WANVIDLORA").Input(
            "lora",
            optional=True,
            tooltip=(
                "LoRAs from WanVideo Lora Select, applied as LoraLoaderModelOnly does. You can as "
                "well put LoraLoaderModelOnly behind this node."
            ),
        ),
        VACEPATH.Input(
            "vace_model",
            optional=True,
            tooltip=(
                "A VACE module for a text-to-video model of the same size, from XDit+USP VACE Module Select. "
                "Both files together are a VACE model. Leave it open with a whole VACE file."
            ),
        ),
    ]


def _fp8_mode() -> io.Input:
    return io.Combo.Input(
        "fp8_mode",
        options=list(fp8_modes.MODES),
        default=fp8_modes.DISABLED,
        optional=True,
        tooltip=(
            "Lossy, and faster on Ada, Hopper and newer GPUs. linear: the matrix products of the blocks in "
            "fp8 (e4m3, a scale for each token and each output channel); weights of bf16 and fp16 files "
            "are rounded to fp8 while loading. linear+attention: self-attention in fp8 too, with "
            "FlashAttention-3 on Hopper. On random numbers a product is off by 3 % and attention by 5 %; "
            "videos of the tiny Wan have a PSNR of 29 and 27 dB against exact ones. Use it with use_bf16."
        ),
    )


def _workers(config: USPConfig, num_heads: int) -> str:
    if config.chooses_sizes and config.num_gpus > 1:
        return f"{config.num_gpus} workers, whose sizes are chosen with the first sampling step"
    return config.plan.describe(num_heads)


def _check_config(config: object) -> None:
    if not isinstance(config, USPConfig):
        raise ValueError(
            "xdit_usp_config does not hold the settings of an XDit+USP Config node. Connect that node to it."
        )
    config.validate()


def _lora_entries(lora: object) -> Sequence[Mapping[str, Any]]:
    if lora is None or (isinstance(lora, (list, tuple)) and all(isinstance(entry, Mapping) for entry in lora)):
        return lora or ()
    raise ValueError("lora does not hold a list of LoRAs. Connect WanVideo Lora Select to it, or a node like it.")


def _with_lora(patcher: RemoteModelPatcher, entry: Mapping[str, Any]) -> RemoteModelPatcher:
    """Apply one entry of a WANVIDLORA list as LoraLoaderModelOnly does, with the names of more training scripts known.

    Raises:
        ValueError: the entry asks for something that LoraLoaderModelOnly cannot do, or its file is for another model.
        CheckpointError: its file is not one of ComfyUI's LoRAs, or is damaged.
    """
    path, strength = listed_lora(entry.get("path")), entry.get("strength", 1.0)
    name = entry.get("name") or os.path.basename(path)
    if not isinstance(strength, (int, float)):
        raise ValueError(
            f"LoRA {name} has a strength for each step, which this loader cannot apply. Give it one strength."
        )
    if entry.get("blocks") or entry.get("layer_filter"):
        raise ValueError(
            f"LoRA {name} is limited to some blocks or layers, which this loader cannot do. "
            "Disconnect the block selection, or use a LoRA made for these layers."
        )
    if strength == 0:
        return patcher
    weights = with_native_names(name, read_lora(path), patcher.remote.header.tensors)
    return comfy.sd.load_lora_for_models(patcher, None, weights, float(strength), 0.0)[0]
