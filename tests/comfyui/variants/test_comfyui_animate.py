"""Native against pool for Animate. Its face encoder has one size in ComfyUI, which takes seconds an image on a CPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
from testkit import tiny
from testkit.comfyui import loras
from testkit.comfyui.comfy_server import ComfyServer
from testkit.comfyui.graphs import conditions, ksampler, link, lora, node, pool_model, stock_model
from testkit.comfyui.results import EXACT, Loader
from wan_parallel.wanvideo.variants.animate import Animate

CONFIG = tiny.ANIMATE.having(Animate(), num_layers=5, text_dim=4096, image_dim=1280)
SIZE = {"width": 64, "height": 48, "length": 1, "batch_size": 1}
VIDEOS = {
    "vae": node("PoolingVAE", channels=16, scale=8),
    "image": node("RandomImages", count=1, width=64, height=48, seed=4),
    "face": node("RandomImages", count=9, width=64, height=64, seed=5),
    "pose": node("RandomImages", count=9, width=64, height=48, seed=6),
    "background": node("RandomImages", count=9, width=64, height=48, seed=7),
    "mask": node("SolidMask", value=1.0, width=64, height=48),
    "clip": node("RandomClipVision", seed=7),
}
LED = {"reference_image": "image", "clip_vision_output": "clip", "face_video": "face", "pose_video": "pose"}


@pytest.fixture(scope="module")
def animate(server: ComfyServer) -> Iterator[ComfyServer]:
    """A ComfyUI with an Animate model and a LoRA for it."""
    path = server.base / "models" / "diffusion_models" / "animate.safetensors"
    tiny.write_checkpoint(path, CONFIG)
    loras.write_lora(server.base / "models" / "loras" / "animate.safetensors", CONFIG)
    yield server
    path.unlink()


def graph(steps: int = 1, cfg: float = 1.0, **inputs: str | int) -> Callable[[Loader], dict]:
    linked = {name: link(value) if value in VIDEOS else value for name, value in inputs.items()}
    wan = node(
        "WanAnimateToVideo",
        positive=link("positive"),
        negative=link("negative"),
        vae=link("vae"),
        **{**SIZE, "continue_motion_max_frames": 5, "video_frame_offset": 0, **linked},
    )
    places = {"positive": link("wan"), "negative": link("wan", 1), "latent_image": link("wan", 2)}
    return lambda loader: {
        **loader(file="animate.safetensors"),
        **{**conditions(), **VIDEOS, "wan": wan},
        **ksampler(steps=steps, cfg=cfg, **places),
    }


def on_workers(num_gpus: int) -> Loader:
    return lambda **more: pool_model(num_gpus=num_gpus, **more)


def error_of(server: ComfyServer, build: Callable[[Loader], dict], loader: Loader = pool_model) -> float:
    native = server.sample(build(stock_model), link("sampler"))
    assert native.isfinite().all() and native.std() > 0.1
    return tiny.relative_error(server.sample(build(loader), link("sampler")), native)


GRAPHS = {
    "face and pose": {**LED, "length": 5},
    "pose alone": {**{name: value for name, value in LED.items() if name != "face_video"}, "length": 9},
    "nothing": {},
    "a replaced character": {**LED, "background_video": "background", "character_mask": "mask"},
    "going on": {**LED, "continue_motion": "background", "length": 5, "video_frame_offset": 12},
}


@pytest.mark.parametrize("inputs", GRAPHS.values(), ids=GRAPHS)
def test_animate(animate, inputs):
    assert error_of(animate, graph(**inputs)) <= EXACT


@pytest.mark.parametrize("num_gpus", [1, 4])
def test_on_other_numbers_of_workers(animate, num_gpus):
    assert error_of(animate, graph(**LED), on_workers(num_gpus)) <= EXACT


def test_with_cfg_the_face_of_the_negative_is_another(animate):
    assert error_of(animate, graph(cfg=4.0, **LED)) <= EXACT


def test_a_lora_reaches_the_adapters_of_the_face(animate):
    def with_lora(loader: Loader) -> dict:
        nodes = {**graph(**LED)(loader), **lora("model", "animate.safetensors", 0.8)}
        nodes["sampler"]["inputs"]["model"] = link("lora")
        return nodes

    assert error_of(animate, with_lora) <= EXACT
    plain, changed = graph(**LED)(pool_model), with_lora(pool_model)
    without = animate.sample(plain, link("sampler"))
    assert tiny.relative_error(animate.sample(changed, link("sampler")), without) > 0.01
