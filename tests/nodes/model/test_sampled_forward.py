"""What ComfyUI's transformer options say of a forward's place in its sampling run."""

from __future__ import annotations

import torch
from wan_parallel.distributed.client.sampling_runs import SampledForward
from wan_parallel.nodes.model.sampled_forward import SYNC_FREQUENCY, branch_ids, sampled_forward

BOTH = {"uuids": ["p", "n"], "cond_or_uncond": [0, 1]}


def test_every_branch_and_video_has_an_id_of_its_own():
    assert branch_ids(BOTH, 4) == ("p:0:0", "p:0:1", "n:1:0", "n:1:1")
    assert branch_ids({}, 2) == ("0", "1")


def test_a_batch_that_was_split_has_no_ids():
    assert branch_ids(BOTH, 3) == ()
    assert branch_ids(BOTH, 1) == ()


def test_options_that_say_nothing_leave_everything_open():
    assert sampled_forward({}, 1) == SampledForward(("0",))
    assert sampled_forward({"patches_replace": {"dit": {}}, "context_window": None}, 1) == SampledForward(("0",))


def test_every_option_is_read():
    class MultiTalkGetAttnMapPatch:
        """As ComfyUI's WanInfiniteTalkToVideo puts it there for two speakers."""

    options = {
        **BOTH,
        "sample_sigmas": torch.ones(9),
        "context_window": object(),
        "patches_replace": {"dit": {("double_block", 1): print}},
        "patches": {"attn1_patch": [MultiTalkGetAttnMapPatch()]},
        SYNC_FREQUENCY: 3,
    }
    assert sampled_forward(options, 2, vace_contexts=1, context_tokens=7) == SampledForward(
        ("p:0:0", "n:1:0"),
        steps=8,
        in_context_window=True,
        skips_blocks=True,
        two_speakers=True,
        sync_frequency=3,
        vace_contexts=1,
        context_tokens=7,
    )
