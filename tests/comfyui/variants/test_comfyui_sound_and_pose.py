"""Native against pool for the variants that follow music, speech, a pose or other videos, with their stock nodes."""

from __future__ import annotations

import pytest
from testkit import tiny
from testkit.comfyui.graphs import conditions, ksampler, link, node, pool_model, stock_model
from testkit.comfyui.results import EXACT, assert_same, sampled
from testkit.comfyui.variants import IMAGES, SIZE, conditioned, sampler
from testkit.tiny import relative_error
from wan_parallel.wanvideo.variants.humo import Humo

AUDIO = Humo(features=8 * 5 * 1280, hidden=512, width=1536, tokens=16)  # which ComfyUI takes for granted
DIVIDED = {"num_gpus": 4, "tensor_parallel_size": 2, "pipeline_parallel_size": 2}


def need(server, *kinds: str) -> None:
    for kind in kinds:
        if not server.get(f"/object_info/{kind}"):
            pytest.skip(f"This ComfyUI has no {kind}")


def same_on_four(server, graph) -> None:
    native = sampled(server, graph(stock_model))
    for plan in ({"num_gpus": 3}, DIVIDED):
        pool = sampled(server, graph(lambda plan=plan, **file: pool_model(**file, **plan)))
        assert relative_error(pool, native) <= EXACT


POSE = {
    "pose": node("RandomImages", count=9, width=64, height=64, seed=21),
    "people": node("RandomImages", count=2, width=64, height=64, seed=22),
    "tracks": node("RandomTracks", count=9, width=64, height=64, seed=23),
    "one": node("RandomTracks", count=2, width=64, height=64, seed=24),
    "before": node("RandomImages", count=9, width=64, height=64, seed=25),
}
WIDGETS = {"pose_strength": 0.9, "pose_start": 0.0, "pose_end": 1.0, "video_frame_offset": 0, "previous_frame_count": 5}
FOLLOWED = {
    "animate": ("scail-2", {"replacement_mode": False}),
    "replace": ("scail-2", {"replacement_mode": True}),
    "go on": ("scail-2", {"replacement_mode": True, "previous_frames": link("before")}),
    "first SCAIL": ("scail", {}),
}


def scail(name: str, more: dict):
    replaces = more.get("replacement_mode", False)
    masks = node(
        "SCAIL2ColoredMask",
        driving_track_data=link("tracks"),
        ref_track_data=link("one"),
        object_indices="",
        sort_by="left_to_right",
        replacement_mode=replaces,
    )
    masked = {"pose_video_mask": link("masks"), "reference_image_mask": link("masks", 1)} if name == "scail-2" else {}
    inputs = {**WIDGETS, "pose_video": link("pose"), "reference_image": link("people"), **masked, **more}

    def graph(loader):
        wan = conditioned("WanSCAILToVideo", clip_vision_output="clip_start", height=64)
        wan["wan"]["inputs"] |= inputs
        return {**loader(file=f"{name}.safetensors"), **POSE, "masks": masks, **wan, **sampler()}

    return graph


@pytest.mark.parametrize("name, more", FOLLOWED.values(), ids=FOLLOWED)
def test_scail(server, name, more):
    need(server, "WanSCAILToVideo")
    assert_same(server, scail(name, more))


def test_scail_on_uneven_and_on_divided_workers(server):
    need(server, "WanSCAILToVideo")
    same_on_four(server, scail(*FOLLOWED["replace"]))


def bernini(loader):
    inputs = {"source_video": "control", "reference_images.reference_image_0": "end", "ref_max_size": 48}
    return {**loader(), **conditioned("BerniniConditioning", **inputs), **sampler()}


def test_bernini(server):
    need(server, "BerniniConditioning")
    without = {**stock_model(), **conditioned("BerniniConditioning", ref_max_size=48), **sampler()}
    assert relative_error(sampled(server, without), assert_same(server, bernini)) > 0.01


def test_bernini_on_uneven_and_on_divided_workers(server):
    need(server, "BerniniConditioning")
    same_on_four(server, bernini)


def dancer(fps: float):
    def graph(loader):
        wan = conditioned(
            "WanDancerVideo",
            start_image="start",
            clip_vision_output="clip_start",
            clip_vision_output_ref="clip_end",
            height=64,  # ComfyUI divides each frame's tokens by 8
        )
        wan["wan"]["inputs"]["audio_encoder_output"] = link("music")
        music = {"music": node("RandomMusic", seed=31, fps=fps)}
        return {**loader(file="dancer.safetensors"), **music, **wan, **sampler()}

    return graph


@pytest.mark.parametrize("fps", [30.0, 7.5])
def test_dancer(server, fps):
    need(server, "WanDancerVideo")
    assert_same(server, dancer(fps))


def test_dancer_on_uneven_and_on_divided_workers(server):
    need(server, "WanDancerVideo")
    same_on_four(server, dancer(7.5))


@pytest.fixture(scope="module")
def humo_files(server):
    for name, config in (("humo", tiny.HUMO), ("humo-17b", tiny.HUMO_17B)):
        path = server.base / "models" / "diffusion_models" / f"{name}.safetensors"
        tiny.write_checkpoint(path, config.having(AUDIO, text_dim=4096))


def humo(name: str, *given: str):
    inputs = {"audio_encoder_output": link("speech"), "ref_image": link("start")}

    def graph(loader):
        speech = {"speech": node("RandomAudioFeatures", seed=41, layers=33, width=1280, count=50)}
        wan = conditioned("WanHuMoImageToVideo")
        wan["wan"]["inputs"] |= {key: inputs[key] for key in given}
        return {**loader(file=f"{name}.safetensors"), **speech, **wan, **sampler()}

    return graph


@pytest.mark.parametrize("name", ["humo", "humo-17b"])
@pytest.mark.parametrize("given", [("audio_encoder_output", "ref_image"), ("audio_encoder_output",)], ids=len)
def test_humo(server, humo_files, name, given):
    assert_same(server, humo(name, *given))


def test_humo_on_uneven_and_on_divided_workers(server, humo_files):
    same_on_four(server, humo("humo-17b", "audio_encoder_output", "ref_image"))


def test_a_model_without_its_node(server):
    """As text-to-video: nothing to follow."""
    need(server, "WanSCAILToVideo")
    latent = {"latent": node("EmptyHunyuanLatentVideo", **SIZE)}
    for name in ("scail-2", "dancer"):
        assert_same(
            server,
            lambda loader, name=name: {
                **loader(file=f"{name}.safetensors"),
                **conditions(),
                **IMAGES,
                **latent,
                **ksampler(),
            },
        )
