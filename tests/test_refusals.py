"""What a MODEL on workers cannot honour is named, with what to do instead. Needs no ComfyUI."""

from __future__ import annotations

import pytest
import tiny
from tiny import sentences
from wan_parallel.nodes.conditioning import from_comfyui, latent_node
from wan_parallel.nodes.refusals import NotOnWorkers, refuse_inputs, refuse_transformer_options
from wan_parallel.wanvideo.config import PRESETS
from wan_parallel.wanvideo.options import RopeOptions


@pytest.mark.parametrize(
    "inputs, named",
    [
        ({"control": {"input": []}}, "ControlNet"),
        ({"clip_fea": object()}, "CLIP vision embedding .* this is a text-to-video model"),
        ({"reference_latent": object()}, "Wan22FunControlToVideo"),
        ({"vace_context": object(), "vace_strength": [1.0]}, "VACE"),
        ({"camera_conditions": object()}, "WanCameraImageToVideo"),
        ({"context_latents": [object()]}, "Bernini"),
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


@pytest.mark.parametrize(
    "options, named",
    [
        ({"patches_replace": {"attn1": {("middle", 0): object()}}}, "PerturbedAttentionGuidance"),
        ({"patches_replace": {"dit": {("double_block", 3): object()}}}, "patches_replace: dit"),
        ({"patches_replace": {"dit": {("double_block", 3): lambda args, extra: extra}}}, "patches_replace: dit"),
        ({"patches_replace": {"dit": {("double_block", 3): lambda args: args}}}, "patches_replace: dit"),
        ({"patches": {"attn1_patch": [object()]}}, "attn1_patch"),
        ({"optimized_attention_override": object()}, "attention_mode"),
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
        "reference_latent": own.subject if config.sound else own.reference,
        "pose_latents": own.pose,
        "face_pixel_values": own.face,
        "audio_embed": own.sound,
        "control_video": own.control,
        "reference_motion": own.so_far,
    }
    taken = from_comfyui(config, {}, inputs)
    assert all(taken.tensors()[key] is tensor for key, tensor in own.tensors().items())
    assert taken.reference is own.reference and taken.options == own.options


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
    ],
)
def test_the_node_of_a_variant_is_named(config, node):
    assert node in latent_node(config)
