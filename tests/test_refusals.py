"""What a MODEL on workers cannot honour is named, with what to do instead. Needs no ComfyUI."""

from __future__ import annotations

import pytest
from tiny import sentences
from wan_parallel.nodes.refusals import NotOnWorkers, refuse_inputs, refuse_transformer_options


@pytest.mark.parametrize(
    "inputs, named",
    [
        ({"control": {"input": []}}, "ControlNet"),
        ({"clip_fea": object()}, "CLIP vision"),
        ({"time_dim_concat": object()}, "WanPhantomSubjectToVideo"),
        ({"reference_latent": object()}, "reference latent"),
        ({"vace_context": object(), "vace_strength": [1.0]}, "VACE"),
        ({"something_new": 0}, "something_new"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_inputs_of_other_variants_are_refused(inputs, named):
    with pytest.raises(NotOnWorkers, match=named) as refusal:
        refuse_inputs(inputs)
    assert sentences(str(refusal.value)) >= 2


@pytest.mark.parametrize(
    "options, named",
    [
        ({"patches_replace": {"dit": {("double_block", 3): object()}}}, "SkipLayerGuidanceDiT"),
        ({"patches": {"attn1_patch": [object()]}}, "attn1_patch"),
        ({"optimized_attention_override": object()}, "attention_mode"),
        ({"rope_options": {"scale_x": 2.0}}, "ScaleROPE"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_patches_inside_the_blocks_are_refused(options, named):
    with pytest.raises(NotOnWorkers, match=named) as refusal:
        refuse_transformer_options(options)
    assert sentences(str(refusal.value)) >= 2


def test_what_changes_nothing_passes():
    refuse_inputs({"clip_fea": None, "control": None, "denoise_mask": object()})
    refuse_transformer_options(
        {"cond_or_uncond": [1, 0], "sigmas": object(), "patches": {}, "patches_replace": {"dit": {}}}
    )
