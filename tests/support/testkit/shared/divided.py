"""Forwards of a model that four ranks divide, and what one process gives for them."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from wan_parallel.distributed.approximate.schedule import FILL, STALE
from wan_parallel.distributed.approximate.strategies.pipefusion import cut
from wan_parallel.distributed.plan.degrees import ParallelPlan
from wan_parallel.distributed.protocol.specs import ModelSpec
from wan_parallel.wanvideo.attention.kernels import AttentionKernel
from wan_parallel.wanvideo.base.config import WanConfig
from wan_parallel.wanvideo.base.grid import grid_of, pad_to_patch, patchify, unpatchify
from wan_parallel.wanvideo.checkpoint.weight_source import DTYPES
from wan_parallel.wanvideo.model.model import WanModel

from testkit import tiny, worker_group

# 4 heads for 4 ranks, hidden columns and blocks that do not divide
UNEVEN = WanConfig(dim=512, ffn_dim=515, num_heads=4, num_layers=5, text_dim=32)


@dataclass(frozen=True)
class Case:
    """One forward."""

    plan: ParallelPlan
    size: tuple[int, int, int] = (3, 6, 10)
    batch: int = 1
    by_frame: bool = False
    slice_tokens: int = 0
    max_batch: int = 1
    compute: str = "fp32"
    overlap: bool = True

    def __str__(self) -> str:
        overlap = "" if self.overlap else ", one after the other"
        return f"{self.plan.describe(4)}, size {self.size}, batch {self.batch}, {self.compute}{overlap}"

    def inputs(self) -> tiny.Inputs:
        given = tiny.inputs(UNEVEN, self.size, self.batch)
        frames = torch.linspace(0, 900, self.batch * self.size[0]).view(self.batch, -1)
        return given._replace(timestep=frames) if self.by_frame else given

    def job(self, path: str) -> worker_group.Job:
        spec = ModelSpec(path, "fp32", self.compute, slice_tokens=self.slice_tokens, max_batch=self.max_batch)
        return worker_group.Job(self.plan, spec, self.inputs(), overlap=self.overlap)

    def alone(self, path: str, compute: str) -> torch.Tensor:
        return WanModel.from_checkpoint(path, compute_dtype=DTYPES[compute])(*self.inputs())


STREAMED_SIZES = [(9, 8, 6), (2, 14, 6)]  # patches of whole frames for two stages, and of rows of tokens
STEPS = (FILL, STALE, STALE)


def step_inputs(size: tuple[int, int, int], step: int) -> tiny.Inputs:
    given = tiny.inputs(UNEVEN, size, batch=2)
    return given._replace(x=given.x * (1 + 0.1 * step), timestep=given.timestep - 20 * step)


class KeptInOneProcess:
    """Attention to the keys and values that each block saw last of every token."""

    def __init__(self, kernel: AttentionKernel, tokens: int):
        self.kernel, self.tokens, self.kept = kernel, tokens, {}

    def of(self, part: slice) -> Callable[..., torch.Tensor]:
        blocks = itertools.count()

        def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            block = next(blocks)
            for name, new in (("keys", k), ("values", v)):
                whole = self.kept.get((name, block), new.new_empty(len(new), self.tokens, *new.shape[2:])).clone()
                whole[:, part] = new
                self.kept[name, block] = whole
            return self.kernel(q, self.kept["keys", block], self.kept["values", block])

        return attend


def streamed_in_one_process(path: str, plan: ParallelPlan, size: tuple[int, int, int]) -> list[torch.Tensor]:
    """The steps of a run as they should be: patch after patch through all blocks."""
    model, latents = WanModel.from_checkpoint(path), []
    grid = grid_of(step_inputs(size, 0).x)
    kept = KeptInOneProcess(model.kernel, grid.tokens)
    for step, kind in enumerate(STEPS):
        x, timestep, context = step_inputs(size, step)
        parts = cut(grid, plan.pipeline_parallel) if kind == STALE else [(0, grid.tokens)]
        tokens = patchify(pad_to_patch(x))
        done = []
        for part in (slice(*edges) for edges in parts):
            done.append(model.transform(tokens[:, part], grid, part, timestep, context, kept.of(part)))
        latents.append(unpatchify(torch.cat(done, dim=1), grid, size))
    return latents
