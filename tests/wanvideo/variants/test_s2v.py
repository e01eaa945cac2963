"""S2V: tokens behind the video, and the sound of each frame."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from testkit import tiny
from wan_parallel.distributed.protocol.specs import ModelSpec
from wan_parallel.wanvideo.base.conditioning import check, with_context_grids
from wan_parallel.wanvideo.base.grid import Grid, patchify, sequence_of
from wan_parallel.wanvideo.variants.s2v import S2VModel

SIZE = (3, 16, 24)
BEHIND = 96 + 96 + 24 + 24  # the subject, and of the video so far the last frame, two more and 16 more
WHOLE = ("audio", "control", "subject", "motion_frames")


@pytest.fixture(scope="module")
def path(tmp_path_factory) -> str:
    return tiny.write_checkpoint(tmp_path_factory.mktemp("s2v") / "s2v.safetensors", tiny.S2V)


@pytest.fixture(scope="module")
def model(path) -> S2VModel:
    return S2VModel.from_checkpoint(path)


def given(batch: int = 1, size: tuple[int, int, int] = SIZE, without: tuple[str, ...] = (), **more) -> tuple:
    inputs = tiny.inputs(tiny.S2V, size, batch)
    conditioning = tiny.conditioning(tiny.S2V, inputs.x, **more)
    return (*inputs, with_context_grids(inputs.x, replace(conditioning, **dict.fromkeys(without))))


# Numbers of ComfyUI 0.3.64's class for the same weights and inputs: every 3027th of the result.
COMFYUI = {
    (): [
        8.5e-05,
        -1.610314,
        0.218448,
        2.461389,
        -0.109878,
        0.933268,
        2.340384,
        0.40486,
        1.301272,
        1.298643,
        -1.872861,
        2.442551,
    ],
    ("motion_frames",): [
        -0.042695,
        -1.662168,
        0.306762,
        2.477092,
        -0.185221,
        0.867919,
        2.348396,
        0.351774,
        1.316203,
        1.286905,
        -1.851016,
        2.441945,
    ],
    ("audio", "subject"): [
        0.600991,
        -1.590642,
        0.469154,
        2.223,
        -0.57152,
        1.21962,
        2.324813,
        0.057815,
        1.320408,
        1.44655,
        -1.932614,
        1.853333,
    ],
}


@pytest.mark.parametrize("without", COMFYUI, ids=str)
def test_it_is_that_of_comfyui(model, without):
    out = model(*given(batch=2, without=without)).flatten()[: 12 * 3027 : 3027]
    assert tiny.relative_error(out, torch.tensor(COMFYUI[without])) <= 1e-5


@pytest.mark.parametrize("name", WHOLE)
def test_every_input_shows(model, name):
    assert tiny.relative_error(model(*given(without=(name,))), model(*given())) > 1e-3


def test_the_tokens_behind_the_video_are_counted_from_shapes():
    x, _, _, conditioning = given()
    grid = sequence_of(x, conditioning.options)
    assert grid == Grid(3, 8, 12, BEHIND) and grid.tokens == 3 * 96 + BEHIND


def test_tokens_behind_the_video_have_time_0(model):
    x, timestep, _, conditioning = given()
    grid = sequence_of(x, conditioning.options)
    for times in (timestep[:, None], timestep[:, None].expand(1, 3)):
        rows, row_of_token = model.times(times, grid, slice(200, grid.tokens), conditioning)
        told = rows[0, row_of_token]
        assert (told[:88] == 700).all() and not told[88:].any() and len(told) == grid.tokens - 200


def test_any_tokens_get_what_is_theirs(model):
    x, _, _, conditioning = given()
    grid = sequence_of(x, conditioning.options)
    tokens = patchify(x)
    whole = model.embed(tokens, grid, slice(0, grid.tokens), conditioning)
    for part in (slice(0, 100), slice(250, 300), slice(300, 310), slice(380, grid.tokens)):
        assert tiny.relative_error(model.embed(tokens[:, part], grid, part, conditioning), whole[:, part]) <= 1e-6


def test_a_sound_that_lasts_for_some_frames_is_spread_over_all(model):
    x, timestep, context, conditioning = given(size=(4, 8, 8))
    short = replace(conditioning, audio=conditioning.audio[..., :8])
    check(tiny.S2V, x, short)
    runs = model.side_streams(x, sequence_of(x, short.options), slice(0, 64), short, [])["audio"][-1]
    assert [(run.tokens, run.frames) for run in runs] == [(slice(0, 64), slice(0, 2))]
    assert model(x, timestep, context, short).shape == x.shape


DIVIDED = {"tensor_parallel": 2, "pipeline_parallel": 2}


@pytest.mark.parametrize("workers, plan", [(1, {}), (2, {}), (4, {}), (4, DIVIDED)])
def test_every_split_gives_the_result_of_one_model(pool_of, path, model, workers, plan):
    inputs = given(batch=2, size=(3, 10, 14))
    pool, spec = pool_of(workers, **plan), ModelSpec(path, "fp32", "fp32", slice_tokens=50)
    out = pool.forward(spec, *inputs[:3], conditioning=inputs[3])
    assert tiny.relative_error(out, model(*inputs)) <= 2e-6
    pool.unload()


def test_a_sound_is_encoded_once_for_all_steps(model):
    inputs = given(batch=2)
    calls, kept = [], replace(inputs[3], kept={})
    hook = model.casual_audio_encoder.register_forward_hook(lambda *_: calls.append(1))
    try:
        for _ in range(3):
            assert torch.equal(model(*inputs[:3], kept), model(*inputs))
        assert len(calls) == 4
    finally:
        hook.remove()


@pytest.mark.parametrize(
    "size, change, text",
    [
        ((3, 6, 8), {"motion_frames": torch.zeros(1, 16, 5, 6, 8)}, "at least 64 pixels"),
        ((3, 9, 8), {"subject": torch.zeros(1, 16, 1, 9, 8)}, "multiples of 16 pixels"),
        ((3, 6, 8), {"subject": torch.zeros(1, 16, 1, 6, 6)}, "needs [1, 16, any, 6, 8]"),
        ((3, 6, 6), {"audio": torch.zeros(1, 3, 24, 8)}, "longer sound"),
        ((3, 6, 8), {"extra_frames": torch.zeros(1, 16, 2, 6, 8)}, "cannot be joined"),
    ],
)
def test_inputs_that_do_not_fit_are_refused(size, change, text):
    x, _, _, conditioning = given(size=size)
    with pytest.raises(ValueError) as error:
        check(tiny.S2V, x, replace(conditioning, **change))
    assert text in str(error.value) and tiny.sentences(str(error.value)) == 2
