"""Native against pool for S2V: sound, subject and control video, and a video that goes on with another one."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
from testkit import tiny
from testkit.comfyui import loras
from testkit.comfyui.comfy_server import ComfyServer
from testkit.comfyui.graphs import conditions, ksampler, link, lora, node, pool_model, stock_model
from testkit.comfyui.results import EXACT, Loader
from wan_parallel.wanvideo.variants.s2v import S2V

CONFIG = tiny.S2V.having(S2V(), text_dim=4096)
SIZE = {"width": 96, "height": 64, "length": 13, "batch_size": 1}
INPUTS = {
    "vae": node("PoolingVAE", channels=16, scale=8),
    "image": node("RandomImages", count=1, width=96, height=64, seed=4),
    "video": node("RandomImages", count=13, width=96, height=64, seed=5),
    "sound": node("RandomAudioFeatures", seed=6, layers=25, width=1024, count=60),
}


@pytest.fixture(scope="module")
def s2v(server: ComfyServer) -> Iterator[ComfyServer]:
    """A ComfyUI with an S2V model and a LoRA for it."""
    path = server.base / "models" / "diffusion_models" / "sounding.safetensors"
    tiny.write_checkpoint(path, CONFIG)
    loras.write_lora(server.base / "models" / "loras" / "s2v.safetensors", CONFIG)
    yield server
    path.unlink()


def linked(**inputs: str | int) -> dict:
    return {name: link(value) if value in INPUTS else value for name, value in inputs.items()}


def graph(steps: int = 3, cfg: float = 4.0, **inputs: str | int) -> Callable[[Loader], dict]:
    texts = {"positive": link("positive"), "negative": link("negative"), "vae": link("vae")}
    wan = node("WanSoundImageToVideo", **texts, **SIZE, **linked(**inputs))
    places = {"positive": link("wan"), "negative": link("wan", 1), "latent_image": link("wan", 2)}
    return lambda loader: {
        **loader(file="sounding.safetensors"),
        **{**conditions(), **INPUTS, "wan": wan},
        **ksampler(steps=steps, cfg=cfg, **places),
    }


def on_workers(num_gpus: int) -> Loader:
    return lambda **more: pool_model(num_gpus=num_gpus, **more)


def error_of(
    server: ComfyServer, build: Callable[[Loader], dict], loader: Loader = pool_model, output: str = "sampler"
) -> float:
    native = server.sample(build(stock_model), link(output))
    assert native.isfinite().all() and native.std() > 0.1
    return tiny.relative_error(server.sample(build(loader), link(output)), native)


WHOLE = {"audio_encoder_output": "sound", "ref_image": "image", "control_video": "video", "ref_motion": "video"}
GRAPHS = {
    "sound and subject": {"audio_encoder_output": "sound", "ref_image": "image"},
    "sound alone": {"audio_encoder_output": "sound"},
    "no sound": {"ref_image": "image", "control_video": "video"},
    "all": WHOLE,
    "nothing": {},
}


@pytest.mark.parametrize("inputs", GRAPHS.values(), ids=GRAPHS)
def test_s2v(s2v, inputs):
    assert error_of(s2v, graph(**inputs)) <= EXACT


@pytest.mark.parametrize("num_gpus", [1, 4])
def test_on_other_numbers_of_workers(s2v, num_gpus):
    assert error_of(s2v, graph(**WHOLE), on_workers(num_gpus)) <= EXACT


def test_a_video_that_goes_on(s2v):
    def longer(loader: Loader) -> dict:
        nodes = graph(**{"audio_encoder_output": "sound", "ref_image": "image"})(loader)
        texts = {"positive": link("positive"), "negative": link("negative"), "vae": link("vae")}
        more = linked(audio_encoder_output="sound", ref_image="image", length=13)
        nodes["more"] = node("WanSoundImageToVideoExtend", **texts, video_latent=link("sampler"), **more)
        places = {"positive": link("more"), "negative": link("more", 1), "latent_image": link("more", 2)}
        nodes["second"] = ksampler(cfg=4.0, **places)["sampler"]
        return nodes

    assert error_of(s2v, longer, output="second") <= EXACT


def test_a_lora_reaches_the_injectors_of_the_sound(s2v):
    def with_lora(loader: Loader) -> dict:
        nodes = {**graph(**WHOLE)(loader), **lora("model", "s2v.safetensors", 0.8)}
        nodes["sampler"]["inputs"]["model"] = link("lora")
        return nodes

    assert error_of(s2v, with_lora) <= EXACT
    without = s2v.sample(graph(**WHOLE)(pool_model), link("sampler"))
    assert tiny.relative_error(s2v.sample(with_lora(pool_model), link("sampler")), without) > 0.01
