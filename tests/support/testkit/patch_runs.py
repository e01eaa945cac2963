"""Short runs on displaced patches, through a pool and on one process as the reference."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from wan_parallel.distributed.approximate.kv_buffers import Codec
from wan_parallel.distributed.approximate.patch_layout import PatchLayout, split_grid
from wan_parallel.distributed.approximate.schedule import EXACT, STALE, PatchSettings, Schedule
from wan_parallel.distributed.client.pool import Pool
from wan_parallel.distributed.protocol.requests import Displaced
from wan_parallel.distributed.protocol.specs import ModelSpec
from wan_parallel.wanvideo.base.config import WanConfig
from wan_parallel.wanvideo.base.grid import grid_of, pad_to_patch, patchify, unpatchify
from wan_parallel.wanvideo.model.model import WanModel

from testkit import tiny

UNEVEN = (5, 14, 6)  # latent frames, rows, columns: 5 x 7 x 3 tokens
STEPS = 8


@dataclass(frozen=True)
class Ran:
    """The latents after each step of a run, and the kinds of its steps."""

    latents: list[torch.Tensor]
    kinds: str

    @property
    def last(self) -> torch.Tensor:
        return self.latents[-1]


Forward = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, Displaced | None], torch.Tensor]


def sample(
    forward: Forward,
    settings: PatchSettings | None,
    batch: int = 1,
    size: tuple[int, int, int] = UNEVEN,
    steps: int = STEPS,
    schedule: Schedule | None = None,
    items: slice = slice(None),
    config: WanConfig = tiny.TINY,
    device: str = "cpu",
) -> Ran:
    """A short run from noise; `items` picks some of the batch, which keep their noise, text and branch ids."""
    x, _, context = (part[items].to(device) for part in tiny.inputs(config, size, batch))
    branch_ids = tuple(f"branch {i}" for i in range(batch))[items]
    schedule, kinds, latents = schedule or Schedule(), [], []
    for step in range(steps):
        timestep = torch.full((len(x),), 1000 * (1 - step / steps), device=device)
        part = schedule.plan(settings, "model", branch_ids, x, timestep) if settings else None
        kinds.append(part.kind[0] if part else "e")
        x = x - 0.05 * forward(x, timestep, context, part)
        latents.append(x)
    return Ran(latents, "".join(kinds))


def through(pool: Pool, spec: ModelSpec) -> Forward:
    return lambda x, timestep, context, part: pool.forward(spec, x, timestep, context, displaced=part)


class Reference:
    """Displaced patches on one process: for each patch, attention of its queries to keys and values of which its own
    and those within the overlap are fresh and all others are those of the last forward."""

    def __init__(self, model: WanModel, ranks: int, overlap: int = 0):
        self.model, self.ranks, self.border = model, ranks, -(-overlap // 16)
        self.kept: dict[tuple, list[torch.Tensor]] = {}

    def __call__(
        self, x: torch.Tensor, timestep: torch.Tensor, context: torch.Tensor, part: Displaced | None
    ) -> torch.Tensor:
        grid, kept, fresh = grid_of(x), self.kept.get(part.branch_ids, []), []
        layout = split_grid(grid, part.split, self.ranks, 16)
        mine = [layout.index(rank).to(x.device) for rank in range(self.ranks)]
        near = [self._near(layout, rank).to(x.device) for rank in range(self.ranks)]

        def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            now = torch.stack([k, v])
            fresh.append(now)
            if part.kind != STALE:
                return self.model.kernel(q, k, v)
            old, out = kept[len(fresh) - 1], torch.empty_like(q)
            for own, fresh_ones in zip(mine, near, strict=True):
                mixed = old.clone()
                mixed[:, :, fresh_ones] = now[:, :, fresh_ones]
                out[:, own] = self.model.kernel(q[:, own], *mixed)
            return out

        tokens = patchify(pad_to_patch(x))
        out = self.model.transform(tokens, grid, slice(None), timestep, context, attend)
        if part.kind != EXACT:
            self.kept[part.branch_ids] = [self._as_sent(kv, mine, part.fp8_buffers) for kv in fresh]
        return unpatchify(out, grid, tuple(x.shape[-3:]))

    def _near(self, layout: PatchLayout, rank: int) -> torch.Tensor:
        """Tokens of a patch and of the strips around it, as places in the grid."""
        patch, inside = layout.patches[rank], torch.zeros(layout.grid.shape, dtype=torch.bool)
        frames = slice(max(0, patch.frames[0] - self.border), patch.frames[1] + self.border)
        rows = slice(max(0, patch.rows[0] - self.border), patch.rows[1] + self.border)
        inside[frames, rows] = True
        return inside.flatten().nonzero().flatten()

    def _as_sent(self, kv: torch.Tensor, patches: list[torch.Tensor], fp8: bool) -> torch.Tensor:
        codec, out = Codec(*kv.shape[1:], kv.dtype, fp8), torch.empty_like(kv)
        for patch in patches:
            sent = torch.empty_like(kv[:, :, patch])
            codec.decode(codec.encode(kv[:, :, patch]), sent)
            out[:, :, patch] = sent
        return out


def assert_like_the_reference(
    pool: Pool, spec: ModelSpec, model: WanModel, settings: PatchSettings, limit: float = 1e-5, **how: object
) -> None:
    """Run both, and compare the latents after every step; the exact path's are farther away."""
    got = sample(through(pool, spec), settings, **how)
    with torch.inference_mode():
        expected = sample(Reference(model, pool.settings.plan.num_gpus, settings.split.overlap), settings, **how)
        exact = sample(lambda x, t, c, _: model(x, t, c), None, **how)
    assert got.kinds == expected.kinds and "s" in got.kinds and "f" in got.kinds
    errors = [tiny.relative_error(a, b) for a, b in zip(got.latents, expected.latents, strict=True)]
    assert max(errors) <= limit, errors
    assert tiny.relative_error(got.last, exact.last) > 5 * limit
