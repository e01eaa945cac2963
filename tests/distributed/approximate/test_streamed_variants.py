"""PipeFusion of the variants: VACE's control streams, tokens behind the video, what a part of the tokens hears."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
from testkit import tiny, worker_group
from testkit.shared.divided import KeptInOneProcess
from wan_parallel.distributed.approximate.schedule import FILL, STALE
from wan_parallel.distributed.approximate.strategies.pipefusion import cut
from wan_parallel.distributed.plan.degrees import ParallelPlan, PatchSplit
from wan_parallel.distributed.protocol.requests import Displaced
from wan_parallel.distributed.protocol.specs import ModelSpec
from wan_parallel.wanvideo.base.conditioning import Conditioning, extended
from wan_parallel.wanvideo.base.config import WanConfig
from wan_parallel.wanvideo.base.grid import patchify, sequence_of, unpatchify
from wan_parallel.wanvideo.base.options import Options
from wan_parallel.wanvideo.model.context_tokens import context_tokens_of
from wan_parallel.wanvideo.model.model import model_class

SIZE = (9, 8, 6)
STEPS = (FILL, STALE, STALE)
BERNINI = replace(tiny.TINY, num_layers=4)
RING = ParallelPlan(4, pipeline_parallel=2, ring_degree=2)
ULYSSES = ParallelPlan(4, pipeline_parallel=2, ulysses_degree=2)
STAGES = ParallelPlan(4, pipeline_parallel=4)
TENSOR = ParallelPlan(4, pipeline_parallel=2, tensor_parallel=2)


@dataclass(frozen=True)
class Run:
    """Three steps of a sampling run."""

    config: WanConfig
    plan: ParallelPlan

    def __str__(self) -> str:
        return f"{'Bernini' if self.config == BERNINI else self.config.variant}, {self.plan.describe(2)}"

    def step(self, number: int) -> tuple[tiny.Inputs, Conditioning]:
        """The inputs as the workers get them."""
        given = tiny.inputs(self.config, SIZE, batch=2)
        if self.config == BERNINI:
            videos = [torch.ones(2, 16, 3, 6, 8), torch.ones(2, 16, 1, 5, 4)]
            context_videos, grids = context_tokens_of(videos, own_phases=True)
            conditioning = Conditioning(context_videos=context_videos, options=Options(context_grids=grids))
        else:
            conditioning = tiny.conditioning(self.config, given.x, contexts=2)
        x, conditioning = extended(given.x * (1 + 0.1 * number), conditioning)
        return given._replace(x=x, timestep=given.timestep - 20 * number), conditioning


RUNS = [
    *(Run(tiny.VACE, plan) for plan in (STAGES, ULYSSES, RING)),
    *(Run(tiny.S2V, plan) for plan in (STAGES, TENSOR)),
    Run(BERNINI, ULYSSES),
    Run(replace(tiny.ANIMATE, num_layers=5), ULYSSES),
    Run(tiny.HUMO_17B, TENSOR),
    Run(tiny.SCAIL_2, RING),
    Run(replace(tiny.WANDANCER, num_layers=5), ULYSSES),
    Run(tiny.FUN_CAMERA, TENSOR),
]


@pytest.fixture(scope="module")
def paths(tmp_path_factory) -> dict[WanConfig, str]:
    folder = tmp_path_factory.mktemp("streamed")
    configs = dict.fromkeys(run.config for run in RUNS)
    return {c: tiny.write_checkpoint(folder / f"{i}.safetensors", c) for i, c in enumerate(configs)}


@pytest.fixture(scope="module")
def outcome(tmp_path_factory, paths) -> worker_group.Outcome:
    jobs = []
    for run in RUNS:
        for number, kind in enumerate(STEPS):
            given, conditioning = run.step(number)
            part_in_run = Displaced(
                kind, str(run), ("conditional", "unconditional"), PatchSplit(), strategy="pipefusion"
            )
            spec = ModelSpec(paths[run.config], "fp32", "fp32")
            job = worker_group.Job(run.plan, spec, given, part_in_run, "pipefusion", conditioning=conditioning)
            jobs.append(job)
    return worker_group.run(4, jobs, tmp_path_factory.mktemp("gloo"))


@pytest.mark.parametrize("number", range(len(RUNS)), ids=[str(run) for run in RUNS])
@torch.inference_mode()
def test_patches_see_fresh_keys_behind_them_and_stale_ones_ahead(outcome, paths, number):
    run, kept = RUNS[number], None
    model = model_class(run.config).from_checkpoint(paths[run.config])
    for step, kind in enumerate(STEPS):
        (x, timestep, context), conditioning = run.step(step)
        grid = sequence_of(x, conditioning.options)
        kept = kept or KeptInOneProcess(model.kernel, grid.tokens)
        edges = cut(grid, run.plan.pipeline_parallel) if kind == STALE else [(0, grid.tokens)]
        tokens, out = patchify(x), torch.zeros(2, grid.tokens, 4 * run.config.out_dim)
        for part in (slice(*pair) for pair in edges):
            out[:, part] = model.transform(
                tokens[:, part], grid, part, timestep, context, kept.of(part), conditioning=conditioning
            )
        expected = unpatchify(out[:, : grid.video_tokens], grid, tuple(x.shape[-3:]))
        assert tiny.relative_error(outcome.latents[number * len(STEPS) + step], expected) <= 2e-6
    exact = model(x, timestep, context, conditioning)
    assert 1e-4 < tiny.relative_error(expected, exact) < 0.2
