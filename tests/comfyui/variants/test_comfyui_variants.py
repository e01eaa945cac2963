"""Native against pool for the Wan variants: stock conditioning nodes, and the model patches that Wan users apply."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from testkit.comfyui.comfy_server import ComfyServer
from testkit.comfyui.graphs import conditions, ksampler, link, lora, node, pool_model, stage, stock_model, video
from testkit.comfyui.results import EXACT, Loader, assert_same, plain, sampled
from testkit.comfyui.variants import IMAGES, SIZE, conditioned, sampler
from testkit.tiny import relative_error


def graph(file: str, kind: str, **inputs: Any) -> Callable[[Loader], dict]:
    return lambda loader: {**loader(file=f"{file}.safetensors"), **conditioned(kind, **inputs), **sampler()}


IMAGE_TO_VIDEO = {
    "A14B": ("i2v-2.2", "WanImageToVideo", {"start_image": "start"}),
    "A14B with clip": ("i2v-2.2", "WanImageToVideo", {"start_image": "start", "clip_vision_output": "clip_start"}),
    "A14B without image": ("i2v-2.2", "WanImageToVideo", {}),
    "A14B first last": ("i2v-2.2", "WanFirstLastFrameToVideo", {"start_image": "start", "end_image": "end"}),
    "2.1": ("i2v-2.1", "WanImageToVideo", {"start_image": "start", "clip_vision_output": "clip_start"}),
    "2.1 without clip": ("i2v-2.1", "WanImageToVideo", {"start_image": "start"}),
    "2.1 inpaint": (
        "i2v-2.1",
        "WanFunInpaintToVideo",
        {"start_image": "start", "end_image": "end", "clip_vision_output": "clip_start"},
    ),
    "FLF2V": (
        "flf2v",
        "WanFirstLastFrameToVideo",
        {
            "start_image": "start",
            "end_image": "end",
            "clip_vision_start_image": "clip_start",
            "clip_vision_end_image": "clip_end",
        },
    ),
    "FLF2V with one clip": (
        "flf2v",
        "WanFirstLastFrameToVideo",
        {"start_image": "start", "clip_vision_start_image": "clip_start"},
    ),
}


@pytest.mark.parametrize("file, kind, inputs", IMAGE_TO_VIDEO.values(), ids=IMAGE_TO_VIDEO)
def test_image_to_video(server, file, kind, inputs):
    assert_same(server, graph(file, kind, **inputs))


FUN = {
    "control": (
        "fun-control",
        "WanFunControlToVideo",
        {"start_image": "start", "control_video": "control", "clip_vision_output": "clip_start"},
    ),
    "control 2.2": ("fun-control-2.2", "Wan22FunControlToVideo", {"ref_image": "start", "control_video": "control"}),
    "control 2.2 without reference": ("fun-control-2.2", "Wan22FunControlToVideo", {"control_video": "control"}),
    "camera": (
        "fun-camera",
        "WanCameraImageToVideo",
        {"start_image": "start", "camera_conditions": "camera", "clip_vision_output": "clip_start"},
    ),
    "camera 2.2": (
        "fun-camera-2.2",
        "WanCameraImageToVideo",
        {"start_image": "start", "camera_conditions": "camera"},
    ),
    "camera without path": ("fun-camera-2.2", "WanCameraImageToVideo", {"start_image": "start"}),
}


@pytest.mark.parametrize("file, kind, inputs", FUN.values(), ids=FUN)
def test_fun_control_and_camera(server, file, kind, inputs):
    path = node("WanCameraEmbedding", camera_pose="Zoom In", width=64, height=48, length=9, speed=1.0)
    assert_same(server, lambda loader: {"camera": path, **graph(file, kind, **inputs)(loader)})


VACE = {
    "text": {"strength": 1.0},
    "control": {"strength": 0.7, "control_video": "control", "control_masks": "mask"},
    "reference": {"strength": 1.0, "control_video": "control", "reference_image": "start"},
}


@pytest.mark.parametrize("inputs", VACE.values(), ids=VACE)
def test_vace(server, inputs):
    assert_same(server, graph("vace", "WanVaceToVideo", **inputs))


def with_module(base: str, module: str) -> dict:
    select = {"module": node("XDitUSPVACEModuleSelect", vace_model=f"{module}.safetensors")}
    return {**pool_model(file=f"{base}.safetensors", loader={"vace_model": link("module")}), **select}


@pytest.mark.parametrize("inputs", VACE.values(), ids=VACE)
def test_a_vace_module_beside_its_model_is_the_vace_model(server, inputs):
    native = sampled(server, graph("vace", "WanVaceToVideo", **inputs)(stock_model))
    pool = sampled(
        server, graph("vace", "WanVaceToVideo", **inputs)(lambda file: with_module("vace-base", "vace-module"))
    )
    assert relative_error(pool, native) <= EXACT


def test_a_lora_reaches_the_weights_of_the_module(server):
    def changed(loader):
        nodes = graph("vace", "WanVaceToVideo", **VACE["control"])(loader)
        return {**nodes, **lora("model", "vace.safetensors", 0.8), **sampler(model="lora")}

    native = sampled(server, changed(stock_model))
    pool = sampled(server, changed(lambda file: with_module("vace-base", "vace-module")))
    assert relative_error(pool, native) <= EXACT


def two_contexts(loader: Loader, **more: Any) -> dict:
    first = conditioned("WanVaceToVideo", "first", strength=0.6, control_video="control")
    again = {"positive": ("first", 0), "negative": ("first", 1), "strength": 0.9, "control_video": "end"}
    return {
        **loader(file="vace.safetensors"),
        **first,
        **conditioned("WanVaceToVideo", "second", **again),
        **sampler("second", **more),
    }


@pytest.mark.parametrize("plan", [{}, {"pipeline_parallel_size": 2}], ids=str)
def test_two_vace_contexts_on_four_workers(server, plan):
    native = sampled(server, two_contexts(stock_model))
    pool = sampled(server, two_contexts(lambda file: pool_model(file=file, num_gpus=4, **plan)))
    assert relative_error(pool, native) <= EXACT


def test_two_vace_contexts_by_pipefusion(server):
    def streamed(file: str) -> dict:
        return pool_model(file=file, pipeline_parallel_size=2, pipeline_mode="pipefusion")

    native = sampled(server, two_contexts(stock_model, steps=6))
    assert 1e-6 < relative_error(sampled(server, two_contexts(streamed, steps=6)), native) < 0.2


def test_vace_without_a_vace_node(server):
    assert_same(server, lambda loader: {**plain(loader), **loader(file="vace.safetensors")})


def test_subject_images_behind_the_video(server):
    def phantom(loader):
        nodes = conditioned("WanPhantomSubjectToVideo", images="end")
        return {**loader(), **nodes, **sampler(negative=2, latent=3)}

    assert_same(server, phantom)


def segmented(loader: Loader, file: str = "flow-rvs.safetensors", **sampler: Any) -> dict:
    """FlowRVS starts from the video itself, and takes one step."""
    encoded = node("VAEEncode", pixels=link("control"), vae=link("vae"))
    return {**loader(file=file), **conditions(), **IMAGES, "latent": encoded, **ksampler(**sampler)}


@pytest.mark.parametrize("steps, cfg", [(1, 1.0), (3, 4.0)])
def test_flow_rvs_is_sampled_in_its_own_way(server, steps, cfg):
    if not knows_flow_rvs(server):
        pytest.skip("This ComfyUI has no FlowRVS")
    native = assert_same(server, lambda loader: segmented(loader, steps=steps, cfg=cfg))
    plain = sampled(server, segmented(stock_model, "tiny.safetensors", steps=steps, cfg=cfg))
    assert relative_error(native, plain) > 0.1


def test_flow_rvs_is_refused_where_comfyui_would_sample_it_as_text_to_video(server):
    if knows_flow_rvs(server):
        pytest.skip("This ComfyUI has FlowRVS")
    nodes = {**segmented(pool_model), "out": node("SaveLatentTensor", samples=link("sampler"), name="refused")}
    outcome = server.run(nodes)
    assert outcome.state == "error" and "FlowRVS model, which this ComfyUI cannot sample" in outcome.message


def knows_flow_rvs(server: ComfyServer) -> bool:
    kind = "ModelSamplingDiscrete"
    return "img_to_img_flow" in server.get(f"/object_info/{kind}")[kind]["input"]["required"]["sampling"][0]


def test_5b_image_to_video(server):
    def five(loader):
        latent = node("Wan22ImageToVideoLatent", vae=link("vae48"), start_image=link("start"), **SIZE)
        vae = node("PoolingVAE", channels=48, scale=16)
        nodes = {**loader(file="wan22-5b.safetensors"), **conditions(), **IMAGES, "vae48": vae, "latent": latent}
        return {**nodes, **ksampler()}

    assert_same(server, five)


@pytest.mark.parametrize(
    "file, kind, inputs",
    [
        ("fun-control-5b", "Wan22FunControlToVideo", {"ref_image": "start", "control_video": "control", "height": 64}),
        ("fun-inp-5b", "WanFunInpaintToVideo", {"start_image": "start"}),
    ],
    ids=["control", "inpaint"],
)
def test_fun_models_of_5b(server, file, kind, inputs):
    vae = {"vae": node("PoolingVAE", channels=48, scale=16)}
    assert_same(server, lambda loader: {**graph(file, kind, **inputs)(loader), **vae})


def test_a_batch_of_videos_on_data_parallel_groups(server):
    def batch(loader):
        inputs = {"start_image": "start", "clip_vision_output": "clip_start", "batch_size": 2}
        return graph("i2v-2.1", "WanImageToVideo", **inputs)(loader)

    native = sampled(server, batch(stock_model))
    pool = sampled(server, batch(lambda file: pool_model(file=file, num_gpus=2, data_parallel_size=2)))
    assert relative_error(pool, native) <= EXACT


def test_both_experts_of_image_to_video(server):
    def experts(loader):
        nodes = {**loader("high", file="i2v-2.2.safetensors"), **loader("low", file="fun-camera-2.2.safetensors")}
        nodes |= conditioned("WanImageToVideo", start_image="start")
        first = stage("first", "high", "latent", 0, 2, first=True)
        second = stage("second", "low", "first", 2, 4, first=False)
        for each in (first["first"], second["second"]):
            each["inputs"] |= {"positive": link("wan"), "negative": link("wan", 1)}
        first["first"]["inputs"]["latent_image"] = link("wan", 2)
        return {**nodes, **first, **second}

    assert_same(server, experts, output="second")


@pytest.mark.parametrize("name, kind", [("i2v", "WanImageToVideo"), ("vace", "WanVaceToVideo")])
def test_a_lora_reaches_the_weights_of_the_variant(server, name, kind):
    file = {"i2v": "i2v-2.1", "vace": "vace"}[name]
    inputs = {"strength": 1.0, "control_video": "control"} if name == "vace" else {"start_image": "start"}
    if name == "i2v":
        inputs["clip_vision_output"] = "clip_start"

    def with_lora(loader):
        return {
            **graph(file, kind, **inputs)(loader),
            **lora("model", f"{name}.safetensors", 0.8),
            **sampler(model="lora"),
        }

    changed = assert_same(server, with_lora)
    assert relative_error(sampled(server, graph(file, kind, **inputs)(stock_model)), changed) > 0.01


# Patches of the model.

SKIP = {"double_layers": "1, 9", "single_layers": "0", "start_percent": 0.0, "end_percent": 1.0}
PATCHES = {
    "SkipLayerGuidanceDiT": {**SKIP, "scale": 3.0, "rescaling_scale": 0.2},
    "SkipLayerGuidanceDiTSimple": SKIP,
    "CFGZeroStar": {},
    "ScaleROPE": {"scale_x": 0.5, "shift_x": 3.0, "scale_y": 2.0, "shift_y": 0.0, "scale_t": 1.5, "shift_t": -1.0},
    "UNetTemporalAttentionMultiply": {
        "self_structural": 1.0,
        "self_temporal": 1.3,
        "cross_structural": 1.0,
        "cross_temporal": 1.2,
    },
    "WanContextWindowsManual": {
        "context_length": 9,
        "context_overlap": 5,
        "context_schedule": "standard_static",
        "context_stride": 1,
        "closed_loop": False,
        "fuse_method": "pyramid",
    },
}


@pytest.mark.parametrize("kind, inputs", PATCHES.items(), ids=PATCHES)
@pytest.mark.parametrize("file", ["tiny", "vace"])
def test_patches_of_the_model(server, file, kind, inputs):
    if not server.get(f"/object_info/{kind}"):
        pytest.skip(f"This ComfyUI has no {kind}")
    if kind == "WanContextWindowsManual" and file == "vace":
        pytest.skip("ComfyUI's windows do not cut the VACE video in every version")
    widgets = server.get(f"/object_info/{kind}")[kind]["input"]["required"]  # some ComfyUIs have more than others
    defaults = {name: entry[1]["default"] for name, entry in widgets.items() if "default" in (entry[1:] or [{}])[0]}

    def patched(loader):
        nodes = {**plain(loader), **loader(file=f"{file}.safetensors"), **video(frames=21)}
        return {**nodes, "patch": node(kind, model=link("model"), **{**defaults, **inputs}), **ksampler(model="patch")}

    changed = assert_same(server, patched)
    if kind != "UNetTemporalAttentionMultiply":  # which finds no weights of its kind in a Wan model
        bare = {**plain(stock_model), **stock_model(file=f"{file}.safetensors"), **video(frames=21)}
        assert relative_error(sampled(server, bare), changed) > 1e-3
