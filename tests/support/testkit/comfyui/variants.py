"""Stock conditioning nodes of the Wan variants, and a sampler behind them."""

from __future__ import annotations

from typing import Any

from testkit.comfyui.graphs import conditions, ksampler, link, node

SIZE = {"width": 64, "height": 48, "length": 9, "batch_size": 1}
IMAGES = {
    "vae": node("PoolingVAE", channels=16, scale=8),
    "start": node("RandomImages", count=1, width=64, height=48, seed=4),
    "end": node("RandomImages", count=1, width=64, height=48, seed=5),
    "control": node("RandomImages", count=9, width=64, height=48, seed=6),
    "mask": node("SolidMask", value=0.4, width=64, height=48),
    "clip_start": node("RandomClipVision", seed=7),
    "clip_end": node("RandomClipVision", seed=8),
}


def conditioned(
    kind: str, name: str = "wan", positive: tuple = ("positive", 0), negative: tuple = ("negative", 0), **inputs: Any
) -> dict:
    """A stock node that takes conditioning and a VAE, with the images it needs; texts are links to other nodes."""
    linked = {key: link(value) if value in IMAGES or value == "camera" else value for key, value in inputs.items()}
    wan = node(kind, positive=link(*positive), negative=link(*negative), vae=link("vae"), **{**SIZE, **linked})
    return {**conditions(), **IMAGES, name: wan}


def sampler(name: str = "wan", model: str = "model", negative: int = 1, latent: int = 2, **more: Any) -> dict:
    more = {"positive": link(name), "negative": link(name, negative), "latent_image": link(name, latent), **more}
    return ksampler(model=model, **more)
