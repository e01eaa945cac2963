"""Graphs in ComfyUI's API format: the same sampling with the stock loader and with ours."""

from __future__ import annotations

from typing import Any

SEED, STEPS = 7, 3


def link(node: str, slot: int = 0) -> list:
    return [node, slot]


def node(class_type: str, **inputs: Any) -> dict:
    return {"class_type": class_type, "inputs": inputs}


def stock_model(name: str = "model", file: str = "tiny.safetensors") -> dict:
    return {name: node("UNETLoader", unet_name=file, weight_dtype="default")}


def pool_model(name: str = "model", file: str = "tiny.safetensors", loader: dict | None = None, **config: Any) -> dict:
    """Config and loader; `config` overrides the config's widgets, `loader` the loader's inputs."""
    widgets = {**CONFIG, "device": "cpu", "parallel_plan": "as_set", **config}
    inputs = {"model": file, "base_precision": "fp32", "xdit_usp_config": link(f"{name}_config"), **(loader or {})}
    return {
        f"{name}_config": node("XDitUSPConfig", **widgets),
        name: node("XDitUSPWanVideoModelLoader", **inputs),
    }


# fp32 throughout, as the stock loader has it on the CPU
CONFIG = {
    "num_gpus": 2,
    "gpu_memory_fraction": 0.9,
    "pipeline_parallel_size": 1,
    "tensor_parallel_size": 1,
    "data_parallel_size": 1,
    "use_fp16": False,
    "use_bf16": False,
    "enable_activation_checkpointing": True,
    "enable_gradient_checkpointing": False,
    "max_batch_size": 2,
    "max_sequence_length": 8192,
    "overlap_p2p_comm": True,
    "use_flash_attention": True,
    "use_sdpa": True,
}


def conditions(positive_tokens: int = 512, negative_tokens: int = 512) -> dict:
    return {
        "positive": node("RandomConditioning", seed=1, tokens=positive_tokens, width=4096),
        "negative": node("RandomConditioning", seed=2, tokens=negative_tokens, width=4096),
    }


def video(width: int = 64, height: int = 48, frames: int = 9, batch: int = 1) -> dict:
    return {"latent": node("EmptyHunyuanLatentVideo", width=width, height=height, length=frames, batch_size=batch)}


def ksampler(model: str = "model", cfg: float = 4.0, seed: int = SEED, steps: int = STEPS, **more: Any) -> dict:
    inputs = {
        "model": link(model),
        "seed": seed,
        "steps": steps,
        "cfg": cfg,
        "sampler_name": "euler",
        "scheduler": "simple",
        "positive": link("positive"),
        "negative": link("negative"),
        "latent_image": link("latent"),
        "denoise": 1.0,
        **more,
    }
    return {"sampler": node("KSampler", **inputs)}


def stage(name: str, model: str, latent: str, start: int, end: int, first: bool) -> dict:
    """One of two KSamplerAdvanced stages, as Wan 2.2 has a high-noise and a low-noise model."""
    return {
        name: node(
            "KSamplerAdvanced",
            model=link(model),
            add_noise="enable" if first else "disable",
            noise_seed=SEED,
            steps=4,
            cfg=3.0,
            sampler_name="euler",
            scheduler="simple",
            positive=link("positive"),
            negative=link("negative"),
            latent_image=link(latent),
            start_at_step=start,
            end_at_step=end,
            return_with_leftover_noise="enable" if first else "disable",
        )
    }


def lora(model: str, file: str, strength: float, name: str = "lora") -> dict:
    return {name: node("LoraLoaderModelOnly", model=link(model), lora_name=file, strength_model=strength)}


def custom_sampler(model: str = "model") -> dict:
    return {
        "sigmas": node("BasicScheduler", model=link(model), scheduler="simple", steps=STEPS, denoise=1.0),
        "kind": node("KSamplerSelect", sampler_name="uni_pc"),
        "sampler": node(
            "SamplerCustom",
            model=link(model),
            add_noise=True,
            noise_seed=SEED,
            cfg=3.0,
            positive=link("positive"),
            negative=link("negative"),
            sampler=link("kind"),
            sigmas=link("sigmas"),
            latent_image=link("latent"),
        ),
    }
