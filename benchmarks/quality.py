"""How far one way to run the sampler moves the video from another: PSNR and SSIM over prompts with fixed seeds.

    python3 benchmarks/quality.py --a gpus=1 --b gpus=2,compute=bf16 --prompts 10 --out results/quality

samples the same prompts from the same noise with the settings A and B, decodes both, and compares the frames.
Settings are words such as gpus=4,data=2,ulysses=2,ring=1,weights=fp16,compute=bf16,attention=sageattn,backend=xfuser;
weights=fp8_e4m3fn,fp8=linear+attention (fp8_mode of the loader, which needs such weights);
or gpus=2,pipeline=2,mode=pipefusion,warmup=4,sync=10 (exact steps at the start, and every so many after them); what is
left out has its default. Prints a table; --out gets quality.jsonl (one line a prompt and one for all) and
quality.png. LPIPS is left out: its weights need a download.

The model is the tiny Wan unless --t2v and --vae name others. It reads prompts of its own few words only, and a
larger model's videos differ more between settings: compare settings with it, not models.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from importlib.util import find_spec
from pathlib import Path
from statistics import fmean

import torch
from torch.nn import functional as F
from wan_parallel.distributed.approximate.schedule import PatchSettings, Schedule
from wan_parallel.distributed.client.pool import acquire
from wan_parallel.distributed.plan.degrees import ParallelPlan, PlanError
from wan_parallel.distributed.protocol.specs import ModelSpec, PoolSettings
from wan_parallel.tools.tiny_wan.judging import (
    T2V_FILE,
    VAE_FILE,
    Case,
    Sampling,
    decode,
    held_out_cases,
    start_noise,
)
from wan_parallel.tools.tiny_wan.vae import load_vae, psnr
from wan_parallel.wanvideo.example import tiny_text
from wan_parallel.wanvideo.example.sampling import euler, flow_sigmas

log = logging.getLogger("quality")

LARGEST_PSNR = 120.0
"""dB; what `psnr` gives for equal videos is a rounding limit, shown as this."""

_PLAN = {
    "gpus": "num_gpus",
    "data": "data_parallel",
    "tensor": "tensor_parallel",
    "pipeline": "pipeline_parallel",
    "ulysses": "ulysses_degree",
    "ring": "ring_degree",
}
_POOL = {"backend": "usp_backend", "mode": "pipeline_mode"}
_STEPS = {"warmup": "warmup_steps", "sync": "sync_frequency"}
_SPEC = {"weights": "weight_dtype", "compute": "compute_dtype", "attention": "attention", "fp8": "fp8_mode"}


@dataclass(frozen=True)
class Setting:
    """One way to run the sampler."""

    name: str
    pool: PoolSettings
    spec: ModelSpec
    steps: PatchSettings = field(default_factory=PatchSettings)  # of pipefusion


@dataclass(frozen=True)
class Difference:
    """B's video against A's. PSNR in dB of the whole video, SSIM averaged over its frames."""

    prompt: str
    seed: int
    psnr_db: float
    ssim: float
    largest_latent_difference: float


def parse_setting(text: str, t2v: str, device: str) -> Setting:
    """A setting from words such as `gpus=2,compute=bf16`.

    Raises:
        ValueError: a word is not known, or its value is of the wrong kind.
        PlanError: the degrees do not fit together.
    """
    plan: dict[str, int] = {"num_gpus": 1}
    spec: dict[str, str] = {"weight_dtype": "fp32", "compute_dtype": "fp32"}
    pool: dict[str, str] = {}
    steps: dict[str, int] = {}
    for word in filter(None, text.split(",")):
        key, _, value = word.partition("=")
        if key in _PLAN and value.isdecimal():
            plan[_PLAN[key]] = int(value)
        elif key in _SPEC and value:
            spec[_SPEC[key]] = value
        elif key in _POOL and value:
            pool[_POOL[key]] = value
        elif key in _STEPS and value.isdecimal():
            steps[_STEPS[key]] = int(value)
        else:
            known = ", ".join([*_PLAN, *_SPEC, *_POOL, *_STEPS])
            raise ValueError(f"'{word}' is no setting. Write settings such as gpus=2, with these names: {known}.")
    parallel = ParallelPlan(**plan)
    parallel.validate()
    settings = PatchSettings(strategy="pipefusion", **steps)
    return Setting(text, PoolSettings(parallel, device, **pool), ModelSpec(t2v, **spec), settings)


def sample_through_pool(setting: Setting, cases: Sequence[Case], how: Sampling) -> torch.Tensor:
    """Latents [N, 16, T, H, W] as the DiT sees them, one prompt at a time; the pool is closed again."""
    pool = acquire(setting.pool)
    empty = tiny_text.encode("")
    schedule, streamed = Schedule(), setting.pool.pipeline_mode == "pipefusion"
    latents = []
    try:
        for case in cases:
            context = torch.stack([tiny_text.encode(case.prompt), empty])

            def velocity(x: torch.Tensor, sigma: float, context: torch.Tensor = context) -> torch.Tensor:
                both, time = torch.cat([x, x]), torch.full((2,), 1000 * sigma)
                part = schedule.plan(setting.steps, None, ("prompt", "none"), both, time) if streamed else None
                prompt, none = pool.forward(setting.spec, both, time, context, displaced=part).chunk(2)
                return none + how.guidance * (prompt - none)

            latents.append(euler(velocity, start_noise(case.seed, how), flow_sigmas(how.steps, how.shift)))
    finally:
        pool.close()
    return torch.cat(latents)


def compare(cases: Sequence[Case], a: torch.Tensor, b: torch.Tensor, vae_path: str) -> list[Difference]:
    """Decode both sets of latents and compare them, prompt by prompt."""
    vae = load_vae(vae_path)
    differences = []
    for i, case in enumerate(cases):
        first, second = decode(vae, a[i : i + 1]), decode(vae, b[i : i + 1])
        differences.append(
            Difference(
                case.prompt,
                case.seed,
                round(min(psnr(second, first).item(), LARGEST_PSNR), 2),
                round(ssim(first, second).item(), 5),
                (a[i] - b[i]).abs().max().item(),
            )
        )
    return differences


def ssim(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Structural similarity of each of B videos [B, 3, T, H, W] from -1 to 1, averaged over its frames; [B].

    Wang et al., IEEE TIP 13(4), 2004, with uniform windows of 7 x 7 and sample covariances: what scikit-image's
    `structural_similarity` gives by default for a data range of 1.
    """
    window, luminance, contrast = 7, 0.01**2, 0.03**2
    x, y = (((video.double() + 1) / 2).transpose(1, 2).flatten(0, 1) for video in (a, b))
    mean_x, mean_y, xx, yy, xy = (F.avg_pool2d(v, window, 1) for v in (x, y, x * x, y * y, x * y))
    sample = window**2 / (window**2 - 1)
    covariance, spread = sample * (xy - mean_x * mean_y), sample * (xx - mean_x**2 + yy - mean_y**2)
    similar = (2 * mean_x * mean_y + luminance) * (2 * covariance + contrast)
    similar /= (mean_x**2 + mean_y**2 + luminance) * (spread + contrast)
    return similar.reshape(len(a), -1).mean(1).float()


def table(differences: Sequence[Difference]) -> str:
    """The differences as text, the mean and the worst last."""
    width = max(len(d.prompt) for d in differences)
    lines = [f"{'prompt':{width}}  {'PSNR dB':>8}  {'SSIM':>8}"]
    lines += [f"{d.prompt:{width}}  {d.psnr_db:8.2f}  {d.ssim:8.5f}" for d in differences]
    for name, pick in (("mean", fmean), ("worst", min)):
        values = pick(d.psnr_db for d in differences), pick(d.ssim for d in differences)
        lines.append(f"{name:{width}}  {values[0]:8.2f}  {values[1]:8.5f}")
    return "\n".join(lines)


def write_results(out: Path, a: Setting, b: Setting, differences: Sequence[Difference]) -> None:
    """quality.jsonl: one line a prompt, then one for all; quality.png beside it where matplotlib is installed."""
    out.mkdir(parents=True, exist_ok=True)
    summary = {
        "a": a.name,
        "b": b.name,
        "prompts": len(differences),
        "psnr_db_mean": round(fmean(d.psnr_db for d in differences), 2),
        "psnr_db_worst": min(d.psnr_db for d in differences),
        "ssim_mean": round(fmean(d.ssim for d in differences), 5),
        "ssim_worst": min(d.ssim for d in differences),
        "torch": torch.__version__,
    }
    rows = [{"a": a.name, "b": b.name, **asdict(d)} for d in differences]
    text = "".join(json.dumps(row) + "\n" for row in [*rows, summary])
    (out / "quality.jsonl").write_text(text, encoding="utf-8")
    if find_spec("matplotlib") is None:
        log.warning("The plot is left out: matplotlib is not installed. Install it with: pip install matplotlib")
    else:
        plot(out / "quality.png", f"{b.name} against {a.name}", differences)


def plot(path: Path, title: str, differences: Sequence[Difference]) -> None:
    """Two bar charts, PSNR and SSIM, over the prompts."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(11, 1.5 + 0.35 * len(differences)), sharey=True)
    prompts = [f"{d.prompt} ({d.seed})" for d in differences]
    for axis, name, values in (
        (axes[0], "PSNR, dB", [d.psnr_db for d in differences]),
        (axes[1], "1 - SSIM", [1 - d.ssim for d in differences]),
    ):
        axis.barh(prompts, values)
        axis.set_xlabel(name)
    axes[0].invert_yaxis()
    figure.suptitle(title)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def main(argv: list[str] | None = None) -> int:
    """0: compared; 2: the user can put it right."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--a", default="gpus=1", help="the reference (default: gpus=1, in fp32)")
    parser.add_argument("--b", default="gpus=2", help="what is compared with it (default: gpus=2)")
    parser.add_argument("--prompts", type=int, default=10, help="held-out prompts, with consecutive seeds")
    parser.add_argument("--steps", type=int, default=Sampling.steps)
    parser.add_argument("--shift", type=float, default=Sampling.shift)
    parser.add_argument("--guidance", type=float, default=Sampling.guidance)
    parser.add_argument("--device", choices=("auto", "cuda", "cpu"), default="auto")
    parser.add_argument("--t2v", default=str(T2V_FILE))
    parser.add_argument("--vae", default=str(VAE_FILE))
    parser.add_argument("--out", type=Path, default=Path("quality"), help="folder for the results")
    arguments = parser.parse_args(argv)
    for path in (arguments.t2v, arguments.vae):
        if not Path(path).is_file():
            parser.error(f"{path} does not exist. Train it with tools/tiny_wan/train.py, or name another file.")
    try:
        a, b = (parse_setting(text, arguments.t2v, arguments.device) for text in (arguments.a, arguments.b))
    except (ValueError, PlanError) as error:
        parser.error(str(error))
    cases = held_out_cases(arguments.prompts)
    how = Sampling(arguments.steps, arguments.shift, arguments.guidance)
    latents = [sample_through_pool(setting, cases, how) for setting in (a, b)]
    differences = compare(cases, *latents, arguments.vae)
    write_results(arguments.out, a, b, differences)
    print(table(differences))
    return 0


if __name__ == "__main__":
    sys.exit(main())
