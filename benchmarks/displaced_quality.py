"""How far displaced patches move the video from that of the exact path: PSNR and SSIM over prompts with fixed seeds.

    python3 benchmarks/displaced_quality.py --device cuda --gpus 4 --out benchmarks/results

samples the prompts of quality.py with the tiny Wan, all in one batch, on the exact path and then with every
combination of --modes, --overlaps and --syncs; then, in the first mode without overlap and with the rarest
synchronous steps, with each of --warmups and with fp8 buffers. Writes quality-displaced.jsonl, .md and, where
matplotlib is installed, .png. The first two rows compare the exact path with itself.

A token is 16 x 16 pixels and one latent frame, so overlaps of 1 to 16 pixels are one row of tokens, or one latent
frame: settings that come to the same run are run once, and their rows say so (`same_run_as`).
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import date
from importlib.util import find_spec
from pathlib import Path

import torch
from quality import LARGEST_PSNR, ssim
from wan_parallel.distributed.approximate.kv_buffers import MANAGERS, manager_name
from wan_parallel.distributed.approximate.patch_layout import PatchLayout, split_grid, token_pixels
from wan_parallel.distributed.approximate.schedule import EXACT, FILL, STALE, PatchSettings, Schedule
from wan_parallel.distributed.client.pool import Pool, acquire
from wan_parallel.distributed.plan.degrees import SPLIT_MODES, ParallelPlan, PatchSplit, PlanError
from wan_parallel.distributed.protocol.specs import ModelSpec, PoolSettings
from wan_parallel.tools.tiny_wan.judging import (
    T2V_FILE,
    VAE_FILE,
    Case,
    Sampling,
    decode,
    held_out_cases,
    judge,
    start_noise,
)
from wan_parallel.tools.tiny_wan.vae import WanVAE, load_vae, psnr
from wan_parallel.wanvideo.base.grid import grid_of
from wan_parallel.wanvideo.checkpoint.weight_source import model_config
from wan_parallel.wanvideo.example import tiny_text
from wan_parallel.wanvideo.example.sampling import euler, flow_sigmas

log = logging.getLogger("displaced_quality")

LETTERS = {EXACT: "e", FILL: "f", STALE: "s"}
NAME = "quality-displaced"


@dataclass(frozen=True)
class Sampled:
    """The latents [N, 16, T, H, W] of one run, the kind of each step, and its seconds."""

    latents: torch.Tensor
    kinds: str
    seconds: float


@dataclass(frozen=True)
class QualityRow:
    """One setting against the exact path, over all prompts.

    border: latent frames and rows of tokens that are exchanged fresh on either side of a border. right: clips in
    which the classifier sees the prompted motion (exact_right: of the exact path's). psnr_db: mean over the prompts,
    each capped at 120 dB, which equal videos have. kinds: one letter a step (exact, fill, stale).
    """

    name: str
    mode: str
    overlap: int
    sync: int
    warmup: int
    fp8: bool
    patch_size: int
    border: tuple[int, int]
    ranks: int
    manager: str
    prompts: int
    steps: int
    stale_steps: int
    kinds: str
    equal: bool
    psnr_db: float
    psnr_db_worst: float
    ssim: float
    ssim_worst: float
    right: int
    exact_right: int
    run_s: float
    compute: str
    device: str
    torch: str
    date: str
    same_run_as: str | None = None

    def json(self) -> str:
        return json.dumps({name: value for name, value in asdict(self).items() if value is not None})


@dataclass(frozen=True)
class Setting:
    """A row to be: `settings` is None for the exact path."""

    name: str
    settings: PatchSettings | None = None

    def describe(self) -> PatchSettings:
        return self.settings or PatchSettings(PatchSplit(EXACT, 0, 0), 0, 1)


@dataclass
class Study:
    """A pool, a VAE, the prompts, and what has been run with them."""

    pool: Pool
    spec: ModelSpec
    vae: WanVAE
    cases: Sequence[Case]
    how: Sampling
    batch: int
    device: torch.device
    exact: Sampled | None = None
    exact_videos: torch.Tensor | None = None
    done: dict[object, tuple[str, QualityRow]] = field(default_factory=dict)

    def row(self, setting: Setting) -> QualityRow:
        """Sample and compare, unless an equal run has been made.

        Raises:
            PlanError: the setting cannot work for clips of this size.
        """
        key = self._key(setting)
        name, row = self.done.get(key, ("", None))
        if row is None:
            row = self._compared(setting, self.sample(setting.settings))
            self.done[key] = setting.name, row
            return row
        split, border = setting.describe().split, self.layout(setting.describe()).border
        return replace(row, name=setting.name, overlap=split.overlap, border=border, same_run_as=name)

    def begin(self) -> None:
        """Sample the reference, which all rows are compared with."""
        self.exact = self.sample(None)
        self.exact_videos = self._decoded(self.exact)

    def sample(self, settings: PatchSettings | None) -> Sampled:
        """All prompts with guidance, some at a time; every prompt has two branches, which share nothing."""
        started, parts = time.perf_counter(), []
        for first in range(0, len(self.cases), self.batch):
            parts.append(self._sample(settings, self.cases[first : first + self.batch]))
        self.pool.trim()
        latents = torch.cat([latents for latents, _ in parts])
        return Sampled(latents, parts[0][1], time.perf_counter() - started)

    def _sample(self, settings: PatchSettings | None, cases: Sequence[Case]) -> tuple[torch.Tensor, str]:
        prompts = torch.stack([tiny_text.encode(case.prompt) for case in cases])
        # Its numbers are exact in half precision, and 64 texts travel with each step.
        context = torch.cat([prompts, tiny_text.encode("").expand_as(prompts)]).half()
        branch_ids = tuple(f"{branch} {i}" for branch in ("prompt", "none") for i in range(len(cases)))
        schedule, kinds = Schedule(), []

        def velocity(x: torch.Tensor, sigma: float) -> torch.Tensor:
            both, moment = torch.cat([x, x]), torch.full((len(context),), 1000 * sigma)
            part = schedule.plan(settings, self.spec, branch_ids, both, moment) if settings else None
            kinds.append(LETTERS[part.kind if part else EXACT])
            prompt, none = self.pool.forward(self.spec, both, moment, context, displaced=part).chunk(2)
            return none + self.how.guidance * (prompt - none)

        noise = torch.cat([start_noise(case.seed, self.how) for case in cases])
        latents = euler(velocity, noise, flow_sigmas(self.how.steps, self.how.shift))
        return latents, "".join(kinds)

    def layout(self, settings: PatchSettings) -> PatchLayout:
        config, grid = model_config(self.spec.path), grid_of(start_noise(0, self.how))
        return split_grid(grid, settings.split, self.pool.settings.plan.num_gpus, token_pixels(config))

    def _key(self, setting: Setting) -> object:
        if setting.settings is None:
            return setting.name
        settings, layout = setting.settings, self.layout(setting.settings)
        settings = replace(settings, split=replace(settings.split, overlap=0))
        return settings if settings.sync_frequency == 1 else (layout, settings)  # without stale steps no borders

    def _decoded(self, sampled: Sampled) -> torch.Tensor:
        return decode(self.vae, sampled.latents.to(self.device))

    def _compared(self, setting: Setting, sampled: Sampled) -> QualityRow:
        videos, settings = self._decoded(sampled), setting.describe()
        signal = psnr(videos, self.exact_videos).clamp_max(LARGEST_PSNR)
        similar = torch.cat(
            [
                ssim(a.to(self.device), b.to(self.device)).cpu()
                for a, b in zip(videos.split(4), self.exact_videos.split(4), strict=True)
            ]
        )
        return QualityRow(
            name=setting.name,
            mode=settings.split.mode,
            overlap=settings.split.overlap,
            sync=settings.sync_frequency,
            warmup=settings.warmup_steps,
            fp8=settings.fp8_buffers,
            patch_size=settings.split.size,
            border=self.layout(settings).border if setting.settings else (0, 0),
            ranks=self.pool.settings.plan.num_gpus,
            manager=manager_name(settings.manager, torch.device(self.pool.settings.device)),
            prompts=len(self.cases),
            steps=self.how.steps,
            stale_steps=sampled.kinds.count(LETTERS[STALE]),
            kinds=sampled.kinds,
            equal=torch.equal(sampled.latents, self.exact.latents),
            psnr_db=round(signal.mean().item(), 2),
            psnr_db_worst=round(signal.min().item(), 2),
            ssim=round(similar.mean().item(), 5),
            ssim_worst=round(similar.min().item(), 5),
            right=self._right(videos),
            exact_right=self._right(self.exact_videos),
            run_s=round(sampled.seconds, 1),
            compute=self.spec.compute_dtype,
            device=torch.cuda.get_device_name() if self.pool.settings.device == "cuda" else "CPU",
            torch=torch.__version__,
            date=date.today().isoformat(),
        )

    def _right(self, videos: torch.Tensor) -> int:
        return sum(verdict.right for verdict in judge(self.cases, videos))


def settings_of(options: argparse.Namespace) -> Iterator[Setting]:
    """The rows of the tables, in their order."""
    yield Setting("exact again")
    base = PatchSettings(
        PatchSplit(options.modes[0], options.patch_size, 0),
        options.warmup,
        max(options.syncs),
        manager=options.manager,
    )
    for mode in options.modes:
        for overlap in options.overlaps:
            for sync in options.syncs:
                split = replace(base.split, mode=mode, overlap=overlap)
                settings = replace(base, split=split, sync_frequency=sync)
                yield Setting(f"{mode}, overlap {overlap}, sync {sync}", settings)
    for warmup in options.warmups:
        yield Setting(f"warm-up {warmup}", replace(base, warmup_steps=warmup))
    if options.fp8:
        yield Setting("fp8 buffers", replace(base, fp8_buffers=True))


def markdown(rows: Sequence[QualityRow]) -> str:
    """One table by split mode, overlap and sync_frequency, and one of what else was varied."""
    first = rows[0]
    grid = [row for row in rows if ", sync " in row.name]
    others = [row for row in rows if ", sync " not in row.name]
    syncs = sorted({row.sync for row in grid})
    lines = [
        f"PSNR in dB / SSIM to the exact path: mean over {first.prompts} prompts of the tiny Wan, {first.steps} steps, "
        f"{first.ranks} ranks, warm-up {grid[0].warmup if grid else first.warmup}, patch_size {rows[-1].patch_size}. "
        f"Clips that show what was prompted: {first.exact_right} of {first.prompts} on the exact path, and as in "
        "brackets.",
        "",
        "| split mode | overlap, pixels | fresh latent frames, rows | "
        + " | ".join(f"sync_frequency {sync}" for sync in syncs)
        + " |",
        "|---|---|---|" + "---|" * len(syncs),
    ]
    ways = dict.fromkeys((row.mode, row.overlap) for row in grid)
    for mode, overlap in ways:
        cells = {row.sync: row for row in grid if (row.mode, row.overlap) == (mode, overlap)}
        border = next(iter(cells.values())).border
        texts = " | ".join(_cell(cells[sync]) if sync in cells else "" for sync in syncs)
        lines.append(f"| {mode} | {overlap} | {border[0]}, {border[1]} | {texts} |")
    lines += ["", "| else | steps (e exact, f fill, s stale) | to the exact path | worst prompt |", "|---|---|---|---|"]
    lines += [f"| {row.name} | {row.kinds} | {_cell(row)} | {_decibels(row.psnr_db_worst)} |" for row in others]
    return "\n".join(lines) + "\n"


def _cell(row: QualityRow) -> str:
    if row.equal:
        return "equal"
    return f"{_decibels(row.psnr_db)} / {row.ssim:.4f} ({row.right})"


def _decibels(value: float) -> str:
    return "inf" if math.isclose(value, LARGEST_PSNR) else f"{value:.2f}"


def plot(path: Path, rows: Sequence[QualityRow]) -> None:
    """PSNR and SSIM over sync_frequency, a line for each split mode and overlap that is a run of its own."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    grid = [row for row in rows if ", sync " in row.name and row.stale_steps]
    figure, axes = pyplot.subplots(1, 2, figsize=(11, 4))
    for axis, name, values in (
        (axes[0], "PSNR, dB", lambda row: row.psnr_db),
        (axes[1], "SSIM", lambda row: row.ssim),
    ):
        for mode, border in dict.fromkeys((row.mode, row.border) for row in grid):
            line = [row for row in grid if (row.mode, row.border) == (mode, border) and row.same_run_as is None]
            label = f"{mode}, {'fresh border' if any(border) else 'no overlap'}"
            axis.plot([str(row.sync) for row in line], [values(row) for row in line], "o-", label=label)
        axis.set_xlabel("sync_frequency (1: equal)")
        axis.set_ylabel(name)
        axis.grid(alpha=0.3)
    axes[0].legend(fontsize="small")
    figure.suptitle(f"Displaced patches against the exact path, {rows[0].prompts} prompts, {rows[0].ranks} ranks")
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def main(argv: list[str] | None = None) -> int:
    """0: all settings ran; 1: some could not."""
    options = _options(argv)
    logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="%(name)s: %(message)s")
    pool = acquire(PoolSettings(ParallelPlan(options.gpus), options.device))
    device = torch.device(pool.settings.device)
    study = Study(
        pool,
        ModelSpec(options.t2v, "fp32", options.compute, max_batch=2 * options.batch),
        load_vae(options.vae, device),
        held_out_cases(options.prompts),
        Sampling(options.steps, options.shift, options.guidance),
        options.batch,
        device,
    )
    rows, refused = [], False
    try:
        study.begin()
        for setting in settings_of(options):
            try:
                rows.append(study.row(setting))
            except PlanError as error:
                refused = True
                log.error("%s: %s", setting.name, error)
            else:
                print(rows[-1].json(), flush=True)
    finally:
        pool.close()
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / f"{NAME}.jsonl").write_text("".join(row.json() + "\n" for row in rows), encoding="utf-8")
    (options.out / f"{NAME}.md").write_text(markdown(rows), encoding="utf-8")
    print(markdown(rows))
    if find_spec("matplotlib") is None:
        log.warning("The plot is left out: matplotlib is not installed. Install it with: pip install matplotlib")
    else:
        plot(options.out / f"{NAME}.png", rows)
    return int(refused)


def _options(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=32, help="held-out prompts, with consecutive seeds")
    parser.add_argument("--batch", type=int, default=32, help="prompts that a forward takes at once")
    parser.add_argument("--steps", type=int, default=Sampling.steps)
    parser.add_argument("--shift", type=float, default=Sampling.shift)
    parser.add_argument("--guidance", type=float, default=Sampling.guidance)
    parser.add_argument("--gpus", type=int, default=4)
    parser.add_argument("--device", choices=("auto", "cuda", "cpu"), default="auto")
    parser.add_argument("--compute", choices=("fp32", "bf16", "fp16"), default="fp32")
    parser.add_argument("--manager", choices=MANAGERS, default="auto")
    parser.add_argument("--patch-size", type=int, default=32, help="larger ones do not cut the small frame in four")
    parser.add_argument("--warmup", type=int, default=PatchSettings.warmup_steps)
    parser.add_argument("--modes", nargs="+", choices=SPLIT_MODES, default=list(SPLIT_MODES))
    parser.add_argument("--overlaps", nargs="+", type=int, default=[0, 8, 16])
    parser.add_argument("--syncs", nargs="+", type=int, default=[1, 2, 4, 10])
    parser.add_argument("--warmups", nargs="*", type=int, default=[1, 2, 4, 8])
    parser.add_argument("--fp8", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--t2v", default=str(T2V_FILE))
    parser.add_argument("--vae", default=str(VAE_FILE))
    parser.add_argument("--out", type=Path, default=Path(__file__).resolve().parent / "results", help="a folder")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
