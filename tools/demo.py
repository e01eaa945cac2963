"""The main job without ComfyUI: sample a short video on several workers and compare it with one worker.

`./install_xdit_usp.sh --demo` runs this, with the small Wan model in example_workflows/models. The video shows what
the prompt says; the comparison shows that sharing the work changes only rounding. Prompt and seed mean the same as in
ComfyUI (euler, simple, as in example_workflows/tiny_wan_demo.json) and give the same video there, where the
number of steps divides 1000, as the default does.
"""

from __future__ import annotations

import argparse
import json
import logging
import platform
import signal
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module, metadata, util
from pathlib import Path
from types import FrameType

ROOT = Path(__file__).resolve().parents[1]

try:
    import torch
    from PIL import Image

    _spec = util.spec_from_file_location("wan_parallel_bootstrap", ROOT / "bootstrap.py")
    _bootstrap = util.module_from_spec(_spec)
    _spec.loader.exec_module(_bootstrap)
    _bootstrap.load_pack()
    headers = import_module("wan_parallel.wanvideo.checkpoint.header")
    sampling = import_module("wan_parallel.wanvideo.example.sampling")
    tiny_text = import_module("wan_parallel.wanvideo.example.tiny_text")
    plans = import_module("wan_parallel.distributed.plan.degrees")
    executors = import_module("wan_parallel.distributed.executors.local")
    pools = import_module("wan_parallel.distributed.client.pool")
    errors = import_module("wan_parallel.wanvideo.base.user_error")
    specs = import_module("wan_parallel.distributed.protocol.specs")
    tiny_vae = import_module("wan_parallel.tools.tiny_wan.vae")
    tiny_wan = import_module("wan_parallel.tools.tiny_wan.judging")
    classifier = import_module("wan_parallel.tools.tiny_wan.classifier")
except ModuleNotFoundError as missing:
    sys.exit(f"{sys.executable} lacks {missing.name}. Run ./install_xdit_usp.sh --demo, which installs it.")

FPS = 8
SHEET_COLUMNS, SHEET_ROWS, SHEET_GAP = 4, 2, 4
CPU_WORKERS = 2
SEED = 5
TOLERANCE = 1e-5
"""Largest difference to one worker, relative to the largest value: float32 sums in another order."""


class DemoError(Exception):
    """What the user can put right: what is wrong, and what to do."""


@dataclass(frozen=True)
class Result:
    """What one run of the sampler gave."""

    latent: torch.Tensor
    seconds_per_step: float
    status: object  # distributed.client.pool.PoolStatus


def sample(settings: object, prompt: str, seed: int, how: object, label: str) -> Result:
    """Sample with guidance on a pool of its own, which is closed again however this ends."""
    spec = specs.ModelSpec(path=str(tiny_wan.T2V_FILE), weight_dtype="fp32", compute_dtype="fp32")
    context = torch.stack([tiny_text.encode(prompt), tiny_text.encode("")])
    pool = pools.acquire(settings)
    seconds: list[float] = []

    def velocity(x: torch.Tensor, sigma: float) -> torch.Tensor:
        started = time.perf_counter()
        both = pool.forward(spec, torch.cat([x, x]), torch.full((2,), 1000 * sigma), context)
        seconds.append(time.perf_counter() - started)
        conditional, unconditional = both.chunk(2)
        return unconditional + how.guidance * (conditional - unconditional)

    try:
        say(f"{label}: starting")
        pool.ensure_ready(spec)
        latent = sampling.euler(
            velocity,
            tiny_wan.start_noise(seed, how),
            sampling.flow_sigmas(how.steps, how.shift),
            on_step=lambda i, _: progress(label, i + 1, how.steps, statistics.median(seconds)),
        )
        return Result(latent, statistics.median(seconds), pool.status())
    finally:
        pool.close()


def decode(latent: torch.Tensor) -> torch.Tensor:
    """Latent [1, 16, T, H, W] to a video [3, frames, 8H, 8W], float32 from -1 to 1, on the CPU."""
    return tiny_wan.decode(tiny_vae.load_vae(str(tiny_wan.VAE_FILE)), latent)[0]


def pictures(video: torch.Tensor) -> torch.Tensor:
    """Video [3, frames, H, W] to frames [frames, H, W, 3], uint8."""
    return ((video + 1) * 127.5).round().to(torch.uint8).permute(1, 2, 3, 0).contiguous()


def write_video(frames: torch.Tensor, out: Path) -> Path:
    """video.mp4 where imageio-ffmpeg is installed, else video.gif; returns its path."""
    height, width = frames.shape[1:3]
    if util.find_spec("imageio_ffmpeg") is not None:
        path = out / "video.mp4"
        writer = import_module("imageio_ffmpeg").write_frames(
            str(path), size=(width, height), fps=FPS, quality=8, ffmpeg_log_level="error"
        )
        writer.send(None)
        for frame in frames:
            writer.send(as_bytes(frame))
        writer.close()
        return path
    path = out / "video.gif"
    first, *rest = (as_image(frame) for frame in frames)
    first.save(path, save_all=True, append_images=rest, duration=1000 // FPS, loop=0)
    return path


def write_contact_sheet(frames: torch.Tensor, path: Path) -> None:
    """Frames spread over the whole video, left to right, top to bottom."""
    count = SHEET_COLUMNS * SHEET_ROWS
    down, across = (side + SHEET_GAP for side in frames.shape[1:3])
    sheet = Image.new("RGB", (SHEET_COLUMNS * across - SHEET_GAP, SHEET_ROWS * down - SHEET_GAP))
    for i in range(count):
        frame = frames[round(i * (len(frames) - 1) / (count - 1))]
        sheet.paste(as_image(frame), (i % SHEET_COLUMNS * across, i // SHEET_COLUMNS * down))
    sheet.save(path)


def as_image(frame: torch.Tensor) -> Image.Image:
    height, width = frame.shape[:2]
    return Image.frombytes("RGB", (width, height), as_bytes(frame))


def as_bytes(frame: torch.Tensor) -> bytes:
    return bytes(frame.flatten().tolist())  # without NumPy, which torch may lack


def choose_workers(device: str, gpus: int | None) -> tuple[str, int]:
    """The device ("cuda" or "cpu") and the number of workers.

    Raises:
        DemoError: more GPUs than there are.
    """
    available = torch.cuda.device_count()
    if device == "auto":
        device = "cuda" if available or gpus is not None else "cpu"
    if device == "cpu":
        return device, gpus or CPU_WORKERS
    if not available:
        raise DemoError(
            "This machine has no CUDA GPU that torch can use. Leave out --gpus to use "
            f"{CPU_WORKERS} CPU workers, or add --device cpu to choose their number."
        )
    if gpus is not None and gpus > available:
        raise DemoError(f"--gpus {gpus} is more than the {available} GPUs of this machine. Use fewer.")
    return device, gpus or min(available, executors.MAX_GPUS)


def run(arguments: argparse.Namespace) -> bool:
    """Run the demo and return whether the workers agree with one worker."""
    device, workers = choose_workers(arguments.device, arguments.gpus)
    executors.check_num_gpus(workers)
    plan = plans.ParallelPlan(num_gpus=workers)
    plan.validate()
    check_prompt(arguments.prompt)
    model = read_model()
    how = tiny_wan.Sampling(steps=arguments.steps)
    out = Path(arguments.out).expanduser().resolve()
    out.mkdir(parents=True, exist_ok=True)

    kind = "GPU" if device == "cuda" else "CPU worker"
    say(f"'{arguments.prompt}'")
    say(f"Sampling {how.frames} frames, {how.size} x {how.size}, on {workers} {kind}{'s' * (workers > 1)},")
    say(f"then the same on one, into {out}")
    say(f"The model, {tiny_wan.T2V_FILE.name}, has {model.parameters / 1e6:.0f} million parameters.")

    settings = specs.PoolSettings(plan=plan, device=device)
    shared = sample(settings, arguments.prompt, arguments.seed, how, f"{workers} x {kind}")
    settings = specs.PoolSettings(plan=plans.ParallelPlan(num_gpus=1), device=device)
    one = sample(settings, arguments.prompt, arguments.seed, how, f"1 x {kind}")

    say("Decoding the video")
    video = decode(shared.latent)
    seen = str(classifier.classify(video))
    frames = pictures(video)
    path = write_video(frames, out)
    write_contact_sheet(frames, out / "frames.png")
    difference = (shared.latent - one.latent).abs().max().item()
    relative = difference / one.latent.abs().max().item()
    agree = relative <= TOLERANCE  # False for NaN too
    report = describe(plan, model, how, shared, one) | {
        "max_abs_diff_vs_one_worker": difference,
        "relative_diff_vs_one_worker": relative,
        "relative_tolerance": TOLERANCE,
        "prompt": arguments.prompt,
        "seen_in_the_video": seen,
        "seed": arguments.seed,
    }
    (out / "report.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")

    say(f"A program that sees only the video says: {seen}.")
    say(f"Largest difference to one worker: {relative:.1e} of the largest value (allowed: {TOLERANCE:.0e}).")
    say(f"Wrote {path.name}, frames.png and report.json to {out}")
    if not agree:
        say("The workers do not agree with one worker. Please report this with report.json.")
    return agree


def check_prompt(prompt: str) -> None:
    try:
        tiny_text.tokenize(prompt)
    except ValueError as error:
        raise DemoError(str(error)) from None


def read_model() -> object:
    """The configuration of the shipped DiT (wanvideo.base.config.WanConfig); both files are there then."""
    for path in (tiny_wan.T2V_FILE, tiny_wan.VAE_FILE):
        if not path.is_file():
            raise DemoError(f"{path} is missing. Restore it with 'git checkout', or get the whole pack again.")
    return headers.read_header(tiny_wan.T2V_FILE).config


def describe(plan: object, model: object, how: object, shared: Result, one: Result) -> dict[str, object]:
    """What the report says about the run, but for the comparison."""
    worker = shared.status.workers[0]
    loaded = worker.models[0]
    return {
        "workers": plan.num_gpus,
        "plan": plan.describe(model.num_heads),
        "device": worker.device,
        "seconds_per_step": round(shared.seconds_per_step, 4),
        "seconds_per_step_one_worker": round(one.seconds_per_step, 4),
        "backend": loaded.backend,
        "attention": loaded.kernel,
        "precision": "fp32",
        "steps": how.steps,
        "shift": how.shift,
        "guidance": how.guidance,
        "latent": list(shared.latent.shape),
        "weights": [tiny_wan.T2V_FILE.name, tiny_wan.VAE_FILE.name],
        "torch": torch.__version__,
        "versions": versions(),
    }


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in ("safetensors", "yunchang", "xfuser", "numpy", "pillow", "imageio-ffmpeg"):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def progress(label: str, done: int, total: int, seconds: float) -> None:
    """A bar on a terminal; one line at the end elsewhere."""
    if not sys.stdout.isatty() and done < total:
        return
    width = 30
    bar = "#" * (width * done // total)
    start, end = ("\r", "\n" if done == total else "") if sys.stdout.isatty() else ("", "\n")
    print(f"{start}{label}: [{bar:{width}}] {done}/{total}, {seconds:.2f} s a step", end=end, flush=True)


def say(text: str) -> None:
    print(text, flush=True)


def parse(argv: list[str] | None) -> argparse.Namespace:
    def number(lowest: int, highest: int = 2**64 - 1) -> Callable[[str], int]:
        def parse_number(text: str) -> int:
            if not text.isdecimal() or not lowest <= int(text) <= highest:
                raise argparse.ArgumentTypeError(f"{text} is not a whole number from {lowest} to {highest}")
            return int(text)

        return parse_number

    parser = argparse.ArgumentParser(prog="install_xdit_usp.sh --demo", description=__doc__.split("\n\n")[0])
    parser.add_argument("--out", default=str(ROOT / "demo_output"), help="folder for the results")
    parser.add_argument("--prompt", default=tiny_text.EXAMPLE, help="what moves where (default: '%(default)s')")
    parser.add_argument("--seed", type=number(0), default=SEED, help="of the start noise (default: %(default)s)")
    parser.add_argument("--gpus", type=number(1), help="workers (default: all GPUs, or 2 on the CPU)")
    parser.add_argument("--device", choices=("auto", "cuda", "cpu"), default="auto")
    parser.add_argument("--steps", type=number(1, 1000), default=tiny_wan.Sampling.steps, help="(default: %(default)s)")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """0: the workers agree with one; 1: they don't, or one failed; 2: the user can put it right."""
    arguments = parse(argv)
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    signal.signal(signal.SIGTERM, _interrupt)  # so that the pool is closed as after Ctrl-C
    try:
        return 0 if run(arguments) else 1
    except (DemoError, plans.PlanError, headers.CheckpointError) as error:
        return complain(error, 2)
    except KeyboardInterrupt:
        return complain("Stopped. Run it again to start from the beginning.", 130)
    except errors.UserError as error:
        return complain(error, 1)
    except OSError as error:
        where = error.filename or arguments.out
        return complain(f"{where} cannot be written: {error.strerror}. Choose another folder with --out.", 2)


def _interrupt(signum: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def complain(error: object, code: int) -> int:
    if sys.stdout.isatty():
        print()  # a progress bar may stand there
    print(error, file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
