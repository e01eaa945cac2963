"""The DistriFusion loader of a graph."""

from __future__ import annotations

from testkit.comfyui.graphs import node

LOADER = {
    "model": "tiny.safetensors",
    "precision": "fp32",
    "quantization": "disabled",
    "num_gpus": 2,
    "patch_size": 32,
    "patch_overlap": 0,
    "split_mode": "spatial",
    "world_size": 2,
    "rank": 0,
}


def patch_model(name: str = "model", **widgets: object) -> dict:
    inputs = {**LOADER, "device": "cpu", "warmup_steps": 2, **widgets}
    return {name: node("OfficialDistriFusionModelLoader", **inputs)}
