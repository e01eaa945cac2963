"""What a MODEL on workers cannot honour is named, with what to do instead. Needs no ComfyUI."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from testkit import tiny
from testkit.tiny import sentences
from wan_parallel.nodes.common.refusals import NotOnWorkers, refuse_inputs, refuse_transformer_options
from wan_parallel.nodes.model.conditioning_inputs import from_comfyui, latent_node
from wan_parallel.wanvideo.base.config import PRESETS
from wan_parallel.wanvideo.base.options import RopeOptions
from wan_parallel.wanvideo.variants.s2v import S2V


@pytest.mark.parametrize(
    "inputs, named",
    [
        ({"control": {"input": []}}, "ControlNet"),
        ({"clip_fea": object()}, "CLIP vision embedding .* this is a text-to-video model"),
        ({"reference_latent": object()}, "Wan22FunControlToVideo"),
        ({"vace_context": object(), "vace_strength": [1.0]}, "VACE"),
        ({"camera_conditions": object()}, "WanCameraImageToVideo"),
        ({"fps": 30.0}, "WanDancerVideo"),
        ({"sam_latents": object()}, "WanSCAILToVideo"),
        ({"pose_latents": object()}, "Animate"),
        ({"face_pixel_values": object()}, "WanAnimateToVideo"),
        ({"reference_motion": object()}, "WanSoundImageToVideo"),
        ({"something_new": 0}, "something_new"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_inputs_of_other_variants_are_refused(inputs, named):
    with pytest.raises(NotOnWorkers, match=named) as refusal:
        refuse_inputs(inputs, "text-to-video")
    assert sentences(str(refusal.value)) >= 2


def left_by(module, method):
    """A function as a node's method makes and leaves it in a MODEL."""

    def patch():
        raise AssertionError("not on workers")

    patch.__module__, patch.__qualname__ = module, f"{method}.<locals>.patch"
    return patch


HYPERTILE = r"patches: attn1_patch by HyperTile.patch in comfy_extras.nodes_hypertile\)"


@pytest.mark.parametrize(
    "options, named",
    [
        ({"patches_replace": {"attn1": {("middle", 0): object()}}}, "patches_replace: attn1 by object in builtins"),
        ({"patches_replace": {"dit": {("double_block", 3): object()}}}, "patches_replace: dit"),
        ({"patches_replace": {"dit": {("double_block", 3): lambda args, extra: extra}}}, "patches_replace: dit"),
        ({"patches_replace": {"dit": {("double_block", 3): lambda args: args}}}, "patches_replace: dit"),
        ({"patches": {"attn1_patch": [left_by("comfy_extras.nodes_hypertile", "HyperTile.patch")]}}, HYPERTILE),
        ({"rope_options": {"scale_x": 2.0, "bend": 1.0}}, "rope_options: bend"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_patches_inside_the_blocks_are_refused(options, named):
    with pytest.raises(NotOnWorkers, match=named) as refusal:
        from_comfyui(tiny.TINY, options, {})
    assert sentences(str(refusal.value)) >= 2


def test_what_changes_nothing_passes():
    refuse_inputs({"clip_fea": None, "control": None, "denoise_mask": object()}, "text-to-video")
    refuse_transformer_options(
        {"cond_or_uncond": [1, 0], "sigmas": object(), "patches": {}, "patches_replace": {"dit": {}}}
    )


def test_blocks_that_a_node_leaves_out_are_named_to_the_workers():
    def skip(args, extra_args):
        return args

    options = {
        "patches_replace": {"dit": {("double_block", 9): skip, ("double_block", 3): skip, ("single_block", 1): skip}}
    }
    assert from_comfyui(tiny.TINY, options, {}).options.skip_blocks == (3, 9)


def test_positions_are_passed_on():
    options = {"rope_options": {"scale_x": 2.0, "shift_t": -1}}
    assert from_comfyui(tiny.TINY, options, {}).options.rope == RopeOptions(scale_x=2.0, shift_t=-1.0)


@pytest.mark.parametrize("name, config", tiny.VARIANTS.items(), ids=tiny.VARIANTS)
def test_every_variant_takes_its_own_inputs(name, config):
    x = tiny.inputs(config).x
    own = tiny.conditioning(config, x)
    inputs = {
        "clip_fea": own.image,
        "camera_conditions": own.camera,
        "vace_context": own.vace,
        "vace_strength": list(own.options.vace_strengths) or None,
        "reference_latent": own.subject if config.get(S2V) else own.reference,
        "pose_latents": own.pose,
        "face_pixel_values": own.face,
        "control_video": own.control,
        "reference_motion": own.motion_frames,
        "audio_embed": own.audio,
        "clip_fea_ref": own.image_ref,
        "ref_mask_latents": own.mask,
    }
    taken = from_comfyui(config, {}, inputs)
    assert all(taken.tensors()[key] is tensor for key, tensor in own.tensors().items() if key != "context_videos")
    assert taken.reference is own.reference and taken.options == replace(own.options, context_grids=())


def test_a_pose_video_becomes_the_tail_of_the_sequence():
    """To the right of the video, as SCAIL has it."""
    shapes = ((1, 20, 2, 8, 12), (1, 20, 3, 4, 6), (1, 28, 3, 4, 6))
    reference, pose, masks = (torch.randn(shape) for shape in shapes)
    inputs = {"reference_latent": reference, "pose_latents": pose, "sam_latents": masks, "ref_mask_flag": True}
    animated = from_comfyui(tiny.SCAIL_2, {}, inputs)
    assert animated.context_videos.shape == (1, 18, 4 * 48) and animated.options.context_tokens == 18
    assert animated.options.context_grids[0].rope == RopeOptions(shift_t=2.0, shift_x=120.0)
    replaced = from_comfyui(tiny.SCAIL_2, {}, {**inputs, "ref_mask_flag": False})
    assert replaced.options.context_grids[0].rope == RopeOptions(shift_t=1.0, shift_x=120.0)
    assert replaced.options.reference_rope == RopeOptions(shift_y=120.0)
    assert replaced.options.rope == RopeOptions(shift_t=1.0)


def test_videos_in_the_context_are_turned_by_their_number():
    latents = [torch.randn(1, 16, 3, 6, 8), torch.randn(1, 16, 1, 5, 4)]
    taken = from_comfyui(tiny.TINY, {}, {"context_latents": latents})
    assert [(s.shape, s.rope_phase) for s in taken.options.context_grids] == [((3, 3, 4), 1), ((1, 3, 2), 2)]
    assert taken.context_videos.shape == (1, 36 + 6, 64)


def test_the_subject_of_humo_is_a_silent_frame_behind_the_video():
    audio, subject = torch.randn(1, 3, 8, 5, 12), torch.randn(1, 16, 1, 6, 8)
    taken = from_comfyui(tiny.HUMO, {}, {"audio_embed": audio, "reference_latent": subject})
    assert taken.reference is None and taken.extra_frames is subject
    assert torch.equal(taken.audio[:, :3], audio) and not taken.audio[:, 3:].any() and taken.audio.shape[1] == 4


@pytest.mark.parametrize("fps, coarse", [(None, 0.0), (30.0, 0.0), (29.6, 0.0), (6.0, 6.0)])
def test_the_rate_of_a_dance_tells_whether_it_is_coarse(fps, coarse):
    assert from_comfyui(tiny.WANDANCER, {}, {"fps": fps}).options.fps == coarse


def test_clip_tokens_are_left_out_where_wan_22_has_no_use_for_them():
    assert from_comfyui(tiny.I2V, {}, {"clip_fea": object()}).image is None


@pytest.mark.parametrize(
    "config, node",
    [
        (PRESETS["14b"], "EmptyHunyuanLatentVideo"),
        (PRESETS["5b"], "Wan22ImageToVideoLatent"),
        (tiny.I2V, "WanImageToVideo"),
        (tiny.FUN_CONTROL, "WanFunControlToVideo"),
        (tiny.FUN_CAMERA, "WanCameraImageToVideo"),
        (tiny.VACE, "WanVaceToVideo"),
        (tiny.ANIMATE, "WanAnimateToVideo"),
        (tiny.S2V, "WanSoundImageToVideo"),
        (tiny.SCAIL_2, "WanSCAILToVideo"),
        (tiny.HUMO, "WanHuMoImageToVideo"),
        (tiny.WANDANCER, "WanDancerVideo"),
    ],
)
def test_the_node_of_a_variant_is_named(config, node):
    assert node in latent_node(config)
