"""Native against pool for InfiniteTalk: one speaker and two, a video that goes on, and layers that have no file."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
from testkit import infinitetalk_files, tiny
from testkit.comfyui import loras
from testkit.comfyui.comfy_server import ComfyServer
from testkit.comfyui.distrifusion import patch_model
from testkit.comfyui.graphs import conditions, ksampler, link, lora, node, pool_model, stock_model
from testkit.comfyui.results import EXACT, Loader
from wan_parallel.wanvideo.variants.infinitetalk import InfiniteTalk

CONFIG = tiny.INFINITETALK.having(InfiniteTalk(width=16), text_dim=4096, freq_dim=256, image_dim=1280)
SIZE = {"width": 64, "height": 48, "length": 17, "motion_frame_count": 9}
SPEECH = {"layers": infinitetalk_files.LAYERS, "width": infinitetalk_files.FEATURES, "count": 40}
INPUTS = {
    "vae": node("PoolingVAE", channels=16, scale=8),
    "image": node("RandomImages", count=1, width=64, height=48, seed=4),
    "before": node("RandomImages", count=20, width=64, height=48, seed=5),
    "clip": node("RandomClipVision", seed=6),
    "first": node("RandomAudioFeatures", seed=7, **SPEECH),
    "second": node("RandomAudioFeatures", seed=8, **SPEECH),
    "left": node("RandomMask", seed=9, width=64, height=48),
    "right": node("RandomMask", seed=10, width=64, height=48),
}
TWO = {"mode.audio_encoder_output_2": "second", "mode.mask_1": "left", "mode.mask_2": "right", "mode": "two_speakers"}


@pytest.fixture(scope="module")
def infinitetalk(server: ComfyServer) -> Iterator[ComfyServer]:
    """A ComfyUI with a model, its LoRA, and two files of layers that differ in their numbers alone."""
    if not server.get("/object_info/WanInfiniteTalkToVideo"):
        pytest.skip("This ComfyUI has no WanInfiniteTalkToVideo")
    models = server.base / "models"
    base = replace(CONFIG, additions=())
    paths = [models / "diffusion_models" / "speaking.safetensors"]
    tiny.write_checkpoint(paths[0], base)
    loras.write_lora(models / "loras" / "speaking.safetensors", base)
    for seed in (1, 2):
        paths.append(models / "model_patches" / f"talk-{seed}.safetensors")
        infinitetalk_files.write_patch(paths[-1], CONFIG, seed)
    yield server
    for path in paths:
        path.unlink()


def graph(
    model: str = "model", patch: str = "layers", cfg: float = 1.0, steps: int = 2, **inputs: str | float
) -> Callable[[Loader], dict]:
    linked = {name: link(value) if value in INPUTS else value for name, value in inputs.items()}
    wan = node(
        "WanInfiniteTalkToVideo",
        **{"mode": "single_speaker", "audio_scale": 1.0, **SIZE},
        model=link(model),
        model_patch=link(patch),
        positive=link("positive"),
        negative=link("negative"),
        vae=link("vae"),
        start_image=link("image"),
        clip_vision_output=link("clip"),
        audio_encoder_output_1=link("first"),
    )
    wan["inputs"] |= linked
    places = {"positive": link("wan", 1), "negative": link("wan", 2), "latent_image": link("wan", 3)}
    layers = {
        "layers": node("ModelPatchLoader", name="talk-2.safetensors"),
        "changed": node("ChangedPatch", model_patch=link("layers")),
    }
    return lambda loader: {
        **loader(file="speaking.safetensors"),
        **{**conditions(negative_tokens=100), **INPUTS, **layers, "wan": wan},
        **ksampler(model="wan", steps=steps, cfg=cfg, **places),
    }


def error_of(server: ComfyServer, build: Callable[[Loader], dict], *plans: dict) -> float:
    """The largest relative error on the workers of these plans."""
    native = server.sample(build(stock_model), link("sampler"))
    assert native.isfinite().all() and native.std() > 0.1
    pools = [on_workers(plan) for plan in plans or ({},)]
    return max(tiny.relative_error(server.sample(build(pool), link("sampler")), native) for pool in pools)


def on_workers(plan: dict) -> Loader:
    return lambda **file: pool_model(**file, **plan)


def test_one_speaker(infinitetalk):
    plans = {"num_gpus": 1}, {"num_gpus": 3}, {"num_gpus": 4, "tensor_parallel_size": 2, "pipeline_parallel_size": 2}
    assert error_of(infinitetalk, graph(audio_scale=1.3), *plans) <= EXACT


def test_two_speakers(infinitetalk):
    plans = {"num_gpus": 2}, {"num_gpus": 4, "ulysses_degree": 2, "ring_degree": 2}
    assert error_of(infinitetalk, graph(**TWO), *plans) <= EXACT


def test_with_cfg(infinitetalk):
    """Of texts that ComfyUI does not put into one batch: its own layers take one item alone."""
    assert error_of(infinitetalk, graph(cfg=3.0, **TWO)) <= EXACT


def test_a_video_that_goes_on(infinitetalk):
    assert error_of(infinitetalk, graph(previous_frames="before")) <= EXACT


def test_with_a_lora(infinitetalk):
    def with_lora(loader: Loader) -> dict:
        return {**graph(model="lora")(loader), **lora("model", "speaking.safetensors", 0.8)}

    assert error_of(infinitetalk, with_lora) <= EXACT


def test_speech_and_layers_change_the_video(infinitetalk):
    def other(loader: Loader) -> dict:
        return {**graph()(loader), "layers": node("ModelPatchLoader", name="talk-1.safetensors")}

    first = infinitetalk.sample(graph()(pool_model), link("sampler"))
    assert error_of(infinitetalk, other) <= EXACT  # and takes the other file
    for build in (other, graph(audio_encoder_output_1="second"), graph(audio_scale=0.0)):
        assert tiny.relative_error(infinitetalk.sample(build(pool_model), link("sampler")), first) > 1e-3


def test_without_speech_the_model_is_the_one_without_layers(infinitetalk):
    plain = {**graph()(pool_model)}
    expected = {**graph()(stock_model)}
    for nodes in (plain, expected):
        nodes["sampler"]["inputs"]["model"] = link("model")
    infinitetalk.sample(graph()(pool_model), link("sampler"))
    out = infinitetalk.sample(plain, link("sampler"))
    assert tiny.relative_error(out, infinitetalk.sample(expected, link("sampler"))) <= EXACT


def by_patches(file: str) -> dict:
    return patch_model(model=file, base_precision="fp32", warmup_steps=1)


def through_stages(file: str) -> dict:
    return pool_model(file=file, pipeline_parallel_size=2, pipeline_mode="pipefusion")


@pytest.mark.parametrize("loader", [by_patches, through_stages])
def test_with_two_speakers_what_approximates_is_exact(infinitetalk, loader):
    for more, exact in ((TWO, True), ({}, False)):
        build = graph(steps=6, **more)
        error = tiny.relative_error(
            infinitetalk.sample(build(loader), link("sampler")), infinitetalk.sample(build(pool_model), link("sampler"))
        )
        assert (error <= EXACT) == exact and error < 1.0


def refusal(server: ComfyServer, nodes: dict) -> str:
    nodes["save"] = node("SaveLatentTensor", samples=link("sampler"), name="refused")
    outcome = server.run(nodes)
    assert outcome.state == "error", outcome
    assert tiny.sentences(outcome.message.strip()) == 2, outcome.message
    return outcome.message


def test_layers_with_numbers_of_no_file_are_refused(infinitetalk):
    assert "no safetensors file in models/model_patches" in refusal(infinitetalk, graph(patch="changed")(pool_model))


def test_a_model_of_another_size_is_refused(infinitetalk):
    nodes = graph()(pool_model)
    nodes["model"]["inputs"]["model"] = "i2v-2.1.safetensors"
    assert "made for a model of width 1280, but i2v-2.1.safetensors has width 256" in refusal(infinitetalk, nodes)
