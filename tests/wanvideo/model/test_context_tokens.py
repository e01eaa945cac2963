"""Tokens of further videos behind the video, and audio: what they mean, whoever holds which of them."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from testkit import tiny
from wan_parallel.distributed.protocol.specs import ModelSpec
from wan_parallel.wanvideo.base.conditioning import Conditioning, check
from wan_parallel.wanvideo.base.grid import Grid
from wan_parallel.wanvideo.base.options import ContextGrid, Options, RopeOptions
from wan_parallel.wanvideo.model.context_tokens import context_tokens_of
from wan_parallel.wanvideo.model.model import WanModel
from wan_parallel.wanvideo.ops.rope import rope_table, sequence_table
from wan_parallel.wanvideo.variants.humo import moments

SIZE = (3, 6, 8)


@pytest.fixture(scope="module")
def variant(tmp_path_factory):
    """Gives the model of a configuration in this process, with its path."""
    folder = tmp_path_factory.mktemp("tails")

    def get(config) -> WanModel:
        return WanModel.from_checkpoint(tiny.write_checkpoint(folder / "model.safetensors", config))

    return get


def in_context(videos, **options) -> Conditioning:
    context_videos, grids = context_tokens_of(videos, **options)
    return Conditioning(context_videos=context_videos, options=Options(context_grids=grids))


def test_a_tail_in_the_place_of_further_frames_is_those_frames(variant):
    model = variant(tiny.TINY)
    x, timestep, context = tiny.inputs(size=SIZE)
    frames = torch.randn(1, 16, 2, *SIZE[1:])
    expected = model(x, timestep, context, Conditioning(extra_frames=frames))
    context_videos = in_context([frames], rope=RopeOptions(shift_t=float(SIZE[0])))
    assert tiny.relative_error(model(x, timestep, context, context_videos), expected) <= 1e-6


def test_the_streams_of_a_context_are_told_apart_by_their_number(variant):
    model = variant(tiny.TINY)
    x, timestep, context = tiny.inputs(size=SIZE)
    streams = [torch.randn(1, 16, 1, 6, 8), torch.randn(1, 16, 1, 6, 8)]
    first, second = (model(x, timestep, context, in_context(s, own_phases=True)) for s in (streams, streams[::-1]))
    assert tiny.relative_error(second, first) > 1e-3


@pytest.mark.parametrize("workers", [2, 3])
def test_streams_of_any_sizes_are_shared_by_workers(pool_of, tmp_path, workers):
    path = tiny.write_checkpoint(tmp_path / "model.safetensors")
    inputs = tiny.inputs(batch=2, size=SIZE)
    context_videos = in_context([torch.randn(2, 16, 3, 6, 8), torch.randn(2, 16, 1, 5, 4)], own_phases=True)
    out = pool_of(workers).forward(ModelSpec(path, "fp32", "fp32"), *inputs, conditioning=context_videos)
    assert tiny.relative_error(out, WanModel.from_checkpoint(path)(*inputs, context_videos)) <= 2e-6


def test_a_turn_is_a_rotation_of_every_pair_by_its_frequency():
    plain, turned = (
        sequence_table((1, 2, 2), 128, options=Options(context_grids=(ContextGrid(1, 2, 2, rope_phase=phase),)))[4:]
        for phase in (0, 3)
    )
    angles = (turned / plain).angle()
    frequencies = 10000.0 ** -(torch.arange(64, dtype=torch.float64) / 64)
    assert torch.allclose(torch.sin(angles), torch.sin(3 * frequencies).float().expand(4, -1), atol=1e-5)


def test_a_pose_of_half_the_size_stands_between_the_tokens_that_it_covers():
    context_grid = ContextGrid(1, 2, 3, RopeOptions(shift_x=120.0), stretched=True)
    table = sequence_table((1, 4, 6), 128, options=Options(context_grids=(context_grid,)))[24:]
    expected = rope_table((1, 2, 3), 128, options=RopeOptions(scale_y=2, scale_x=2, shift_y=0.5, shift_x=120.5))
    assert torch.equal(table, expected)


def test_references_below_the_video_begin_with_it():
    options = Options(reference_frames=2, reference_rope=RopeOptions(shift_y=120.0), rope=RopeOptions(shift_t=1.0))
    table = sequence_table((5, 2, 2), 128, options=options)
    assert torch.equal(table[:8], rope_table((2, 2, 2), 128, options=RopeOptions(shift_y=120.0)))
    assert torch.equal(table[8:], rope_table((3, 2, 2), 128, options=RopeOptions(shift_t=1.0)))


def test_a_coarse_video_lies_in_the_time_of_the_full_one():
    table = sequence_table((5, 1, 1), 128, options=Options(fps=7.0))
    angles = table[:, 0].angle() % (2 * torch.pi)  # the first pair turns by 1 a frame
    times = torch.tensor([0.0, 30 / 7, 60 / 7, 90 / 7, int(30 / 7 * 5 + 0.5) - 1])
    assert torch.allclose(angles, times % (2 * torch.pi), atol=1e-5)


def test_every_token_hears_the_moment_of_its_frame():
    grid = Grid(3, 2, 2)
    assert moments(grid, slice(0, 12), 3) == ((0, 4, 0), (4, 8, 1), (8, 12, 2))
    assert moments(grid, slice(3, 7), 3) == ((0, 1, 0), (1, 4, 1))
    assert moments(grid, torch.tensor([0, 1, 4, 5, 8, 9]), 3) == ((0, 2, 0), (2, 4, 1), (4, 6, 2))
    assert moments(grid, slice(12, 12), 3) == ()


@pytest.mark.parametrize("config, name", [(tiny.HUMO, "audio"), (tiny.WANDANCER, "audio"), (tiny.SCAIL_2, "mask")])
def test_what_is_heard_or_masked_shows_in_the_result(variant, config, name):
    model = variant(config)
    x, timestep, context = tiny.inputs(config, SIZE)
    conditioning = tiny.conditioning(config, x)
    out = model(x, timestep, context, conditioning)
    assert tiny.relative_error(model(x, timestep, context, replace(conditioning, **{name: None})), out) > 1e-3


def test_music_of_no_strength_is_silence(variant):
    model = variant(tiny.WANDANCER)
    x, timestep, context = tiny.inputs(tiny.WANDANCER, SIZE)
    conditioning = tiny.conditioning(tiny.WANDANCER, x)
    quiet = replace(conditioning, options=replace(conditioning.options, audio_scale=0.0))
    silent = replace(conditioning, audio=None)
    assert torch.equal(model(x, timestep, context, quiet), model(x, timestep, context, silent))


@pytest.mark.parametrize(
    "config, change, text",
    [
        (tiny.SCAIL_2, {"mask": torch.zeros(1, 28, 4, 6, 8)}, "has 4 latent frames"),
        (tiny.SCAIL_2, {"reference": torch.zeros(1, 16, 1, 6, 8)}, "needs [1, 20, any, 6, 8]"),
        (tiny.HUMO, {"audio": torch.zeros(1, 3, 8, 5, 11)}, "has 440 numbers"),
        (tiny.WANDANCER, {"audio": torch.zeros(1, 20, 34)}, "needs [1, any, 35]"),
        (tiny.TINY, {"mask": torch.zeros(1, 28, 3, 6, 8)}, "does not take"),
        (tiny.TINY, {"audio": torch.zeros(1, 3, 8)}, "does not take"),
        (tiny.VACE, in_context([torch.zeros(1, 16, 1, 6, 8)]), "does not take"),
        (tiny.TINY, in_context([torch.zeros(1, 20, 1, 6, 8)]), "have 20 channels"),
    ],
)
def test_a_conditioning_that_does_not_fit_is_refused(config, change, text):
    x = tiny.inputs(config, SIZE).x
    given = change if isinstance(change, Conditioning) else replace(tiny.conditioning(config, x), **change)
    with pytest.raises(ValueError) as error:
        check(config, x, given)
    assert text in str(error.value) and tiny.sentences(str(error.value)) == 2
