"""Animate: which tokens a face reaches, and what is computed once for all steps."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file
from testkit import tiny
from wan_parallel.distributed.protocol.specs import ModelSpec
from wan_parallel.wanvideo.base.grid import Grid, grid_of, patchify
from wan_parallel.wanvideo.base.tensor_info import CheckpointError
from wan_parallel.wanvideo.checkpoint.header import read_header
from wan_parallel.wanvideo.model.frames import Run, runs_of
from wan_parallel.wanvideo.variants.animate import AnimateModel

GRID = Grid(3, 2, 2)


@pytest.fixture(scope="module")
def path(tmp_path_factory) -> str:
    return tiny.write_checkpoint(tmp_path_factory.mktemp("animate") / "animate.safetensors", tiny.ANIMATE)


@pytest.fixture(scope="module")
def model(path) -> AnimateModel:
    return AnimateModel.from_checkpoint(path)


def given(batch: int = 1, size: tuple[int, int, int] = (3, 6, 8), **more) -> tuple:
    inputs = tiny.inputs(tiny.ANIMATE, size, batch)
    return (*inputs, tiny.conditioning(tiny.ANIMATE, inputs.x, **more))


@pytest.mark.parametrize(
    "part, runs",
    [
        (slice(0, 12), [Run(slice(0, 12), slice(0, 3))]),
        (slice(3, 10), [Run(slice(0, 1), slice(0, 1)), Run(slice(1, 5), slice(1, 2)), Run(slice(5, 7), slice(2, 3))]),
        (slice(5, 7), [Run(slice(0, 2), slice(1, 2))]),
        (slice(4, 4), []),
        (torch.tensor([0, 1, 4, 5, 8, 9]), [Run(slice(0, 6), slice(0, 3))]),
        (torch.tensor([9, 1, 2]), [Run(slice(0, 1), slice(2, 3)), Run(slice(1, 3), slice(0, 1))]),
    ],
    ids=str,
)
def test_tokens_are_taken_in_runs_of_equally_many_to_a_frame(part, runs):
    assert runs_of(part, GRID.frame_tokens, GRID.frames) == runs


def test_tokens_behind_the_last_frame_are_in_no_run():
    assert runs_of(slice(6, 20), 4, 3) == [Run(slice(0, 2), slice(1, 2)), Run(slice(2, 6), slice(2, 3))]
    assert runs_of(torch.tensor([10, 11, 12, 13]), 4, 3) == [Run(slice(0, 2), slice(2, 3))]
    assert runs_of(slice(13, 20), 4, 3) == []


def test_any_tokens_in_any_order_get_what_is_theirs(model):
    x, _, _, conditioning = given()
    grid, dtype = grid_of(x), torch.float32
    adapter = model.face_adapter["fuser_blocks"][1]

    def changed(part):
        stream = model.embed(patchify(x)[:, part], grid, part, conditioning)
        adapter(stream, *model.side_streams(stream, grid, part, conditioning, [])["face"], dtype)
        return stream

    whole = changed(slice(0, grid.tokens))
    for part in (torch.tensor([14, 3, 35, 20, 21, 8]), slice(5, 31), slice(13, 14)):
        assert tiny.relative_error(changed(part), whole[:, part]) <= 1e-6


def test_the_reference_and_frames_behind_the_face_video_see_no_face(model):
    x, _, _, conditioning = given()
    shorter = replace(conditioning, face=conditioning.face[:, :, :4])
    first = model.side_streams(x, grid_of(x), slice(0, 1), conditioning, [])["face"][0]
    second = model.side_streams(x, grid_of(x), slice(0, 1), shorter, [])["face"][0]
    assert not first[:, 0].any() and first[:, 1:].any(dim=-1).all() and not second[:, 2].any()
    longer = replace(conditioning, face=torch.cat([conditioning.face] * 3, dim=2))
    third = model.side_streams(x, grid_of(x), slice(0, 1), longer, [])["face"][0]
    assert third.shape == first.shape and tiny.relative_error(third[:, :2], first[:, :2]) <= 1e-5


def test_the_pose_is_one_frame_late(model):
    x, _, _, conditioning = given()
    grid = grid_of(x)
    part = slice(0, grid.tokens)
    plain = model.embed(patchify(x), grid, part, replace(conditioning, pose=None))
    short = replace(conditioning, pose=conditioning.pose[:, :, :1])
    posed = model.embed(patchify(x), grid, part, short) - plain
    expected = model.pose_patch_embedding(patchify(short.pose))
    tokens = grid.frame_tokens
    assert tiny.relative_error(posed[:, tokens : 2 * tokens], expected) <= 1e-5
    assert not posed[:, :tokens].any() and not posed[:, 2 * tokens :].any()


def test_a_face_is_encoded_once_for_all_steps(model):
    x, timestep, context, conditioning = given(batch=2)
    calls = []
    hook = model.face_encoder.register_forward_hook(lambda *_: calls.append(1))
    try:
        expected = model(x, timestep, context, conditioning)
        kept = replace(conditioning, kept={})
        for _ in range(3):
            assert torch.equal(model(x, timestep, context, kept), expected)
        assert len(calls) == 2
        for item in range(2):  # of one batch item after the other
            part = slice(item, item + 1)
            out = model(x[part], timestep[part], context[part], kept.items(part))
            assert tiny.relative_error(out, expected[part]) <= 1e-6
    finally:
        hook.remove()


def test_another_face_is_encoded_anew_by_the_workers(pool_of, path, model):
    spec = ModelSpec(path, "fp32", "fp32")
    for seed in (1, 1, 2, 1):
        inputs = given(batch=2, seed=seed)
        out = pool_of(2).forward(spec, *inputs[:3], conditioning=inputs[3])
        assert tiny.relative_error(out, model(*inputs)) <= 2e-6


def test_a_file_may_lack_the_blurs_that_are_known(tmp_path, model):
    save_file(tiny.random_weights(tiny.ANIMATE), tmp_path / "model.safetensors")
    inputs = given()
    assert read_header(tmp_path / "model.safetensors").config == tiny.ANIMATE
    assert torch.equal(AnimateModel.from_checkpoint(str(tmp_path / "model.safetensors"))(*inputs), model(*inputs))


def test_a_file_without_its_face_encoder_is_refused(tmp_path):
    layout = tiny.layout(tiny.ANIMATE)
    del layout["motion_encoder.dec.direction.weight"]
    with pytest.raises(CheckpointError, match="no usable tensor motion_encoder") as refusal:
        read_header(tiny.write_layout(tmp_path / "model.safetensors", layout))
    assert tiny.sentences(str(refusal.value)) == 2
