"""The main job without ComfyUI: sample a short video on several workers and compare it with one worker.

`./install_xdit_usp.sh --demo` runs this. The checkpoint is written here and has random weights in Wan's own
layout, so the picture is structured noise: coloured clouds that grow out of the smooth start noise. What the
demo shows is that the whole engine runs on this machine, and that sharing the work changes only rounding.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import platform
import signal
import statistics
import sys
import time
from dataclasses import dataclass
from importlib import import_module, metadata, util
from pathlib import Path
from types import FrameType

ROOT = Path(__file__).resolve().parents[1]

try:
    import torch
    from PIL import Image
    from safetensors.torch import save_file

    _spec = util.spec_from_file_location("wan_parallel_bootstrap", ROOT / "bootstrap.py")
    _bootstrap = util.module_from_spec(_spec)
    _spec.loader.exec_module(_bootstrap)
    _bootstrap.load_pack()
    config = import_module("wan_parallel.wanvideo.config")
    sampling = import_module("wan_parallel.wanvideo.sampling")
    plans = import_module("wan_parallel.distributed.plan")
    pools = import_module("wan_parallel.distributed.pool")
except ModuleNotFoundError as missing:
    sys.exit(f"{sys.executable} lacks {missing.name}. Run ./install_xdit_usp.sh --demo, which installs it.")

MODEL = config.WanConfig(dim=512, ffn_dim=1024, num_heads=4, num_layers=3)
LATENT = (1, 16, 9, 18, 30)  # 1,215 tokens, which no even number of workers shares evenly
FRAMES, HEIGHT, WIDTH = 33, 144, 240  # of the video: 4 x 8 x 8 as in Wan's VAE
FPS = 16
SHEET_COLUMNS, SHEET_ROWS, SHEET_GAP = 4, 2, 4
CPU_WORKERS = 2
SHIFT, GUIDANCE = 5.0, 3.0
SEED = 20250221
TOLERANCE = 1e-5
"""Largest difference to one worker, relative to the largest value: float32 sums in another order."""


class DemoError(Exception):
    """What the user can put right: what is wrong, and what to do."""


@dataclass(frozen=True)
class Result:
    """What one run of the sampler gave."""

    latent: torch.Tensor
    seconds_per_step: float
    status: object  # distributed.pool.PoolStatus


def write_checkpoint(path: Path) -> None:
    """Random weights under Wan's original key names, drawn so that activations neither vanish nor blow up."""
    generator = torch.Generator().manual_seed(SEED)
    tensors = {}
    for name, shape in MODEL.shapes().items():
        if name.endswith(".bias"):
            tensors[name] = torch.zeros(shape)
        elif "norm" in name:
            tensors[name] = torch.ones(shape)
        else:
            scale = 0.3 if name.endswith("modulation") else math.prod(shape[1:]) ** -0.5
            tensors[name] = torch.randn(shape, generator=generator) * scale
    # The four latent pixels of a token get one velocity; with four random ones the picture is a dot pattern.
    tensors["head.head.weight"] = tensors["head.head.weight"][: MODEL.out_dim].repeat(4, 1)
    save_file(tensors, path)


def start_noise() -> torch.Tensor:
    """Noise [1, 16, T, H, W], smooth over a few latent pixels so that there is something to look at."""
    generator = torch.Generator().manual_seed(SEED + 1)
    batch, channels, *size = LATENT
    coarse = torch.randn(batch, channels, *(math.ceil(n / 6) + 1 for n in size), generator=generator)
    smooth = torch.nn.functional.interpolate(coarse, size=size, mode="trilinear", align_corners=True)
    noise = smooth / smooth.std() + 0.05 * torch.randn(LATENT, generator=generator)
    return noise / noise.std()


def text_embeddings() -> torch.Tensor:
    """Stand-ins for the text encoder's output, [2, 512, 4096]: the prompt, then the empty prompt."""
    generator = torch.Generator().manual_seed(SEED + 2)
    context = torch.zeros(2, 512, MODEL.text_dim)
    context[0, :24] = torch.randn(24, MODEL.text_dim, generator=generator)
    context[1, :2] = torch.randn(2, MODEL.text_dim, generator=generator)
    return context


def sample(settings: object, checkpoint: Path, steps: int, label: str) -> Result:
    """Sample with guidance on a pool of its own, which is closed again however this ends."""
    spec = pools.ModelSpec(path=str(checkpoint), weight_dtype="fp32", compute_dtype="fp32")
    context = text_embeddings()
    pool = pools.acquire(settings)
    seconds: list[float] = []

    def velocity(x: torch.Tensor, sigma: float) -> torch.Tensor:
        started = time.perf_counter()
        both = pool.forward(spec, torch.cat([x, x]), torch.full((2,), 1000 * sigma), context)
        seconds.append(time.perf_counter() - started)
        prompt, empty = both.chunk(2)
        return empty + GUIDANCE * (prompt - empty)

    try:
        say(f"{label}: starting")
        pool.ensure_ready(spec)
        latent = sampling.euler(
            velocity,
            start_noise(),
            sampling.flow_sigmas(steps, SHIFT),
            on_step=lambda i, _: progress(label, i + 1, steps, statistics.median(seconds)),
        )
        return Result(latent, statistics.median(seconds), pool.status())
    finally:
        pool.close()


def decode(latent: torch.Tensor) -> torch.Tensor:
    """Latent [1, 16, T, H, W] to frames [FRAMES, HEIGHT, WIDTH, 3], uint8; no VAE.

    The 16 channels stand for 16 hues round the colour wheel: red, green and blue are each a cosine of the
    channel's place on it. The result is stretched to the video's size.
    """
    hue = torch.arange(16) / 16
    wheel = torch.stack([torch.cos(2 * math.pi * (hue - primary / 3)) for primary in range(3)])
    rgb = torch.einsum("pc,cthw->pthw", wheel, latent[0])
    rgb = torch.nn.functional.interpolate(
        rgb.unsqueeze(0), size=(FRAMES, HEIGHT, WIDTH), mode="trilinear", align_corners=True
    )[0]
    rgb = torch.sigmoid(1.2 * (rgb - rgb.mean()) / rgb.std())
    return (255 * rgb).round().to(torch.uint8).permute(1, 2, 3, 0).contiguous()


def write_video(frames: torch.Tensor, out: Path) -> Path:
    """video.mp4 where imageio-ffmpeg is installed, else video.gif; returns its path."""
    if util.find_spec("imageio_ffmpeg") is not None:
        path = out / "video.mp4"
        writer = import_module("imageio_ffmpeg").write_frames(
            str(path), size=(WIDTH, HEIGHT), fps=FPS, quality=8, ffmpeg_log_level="error"
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
    across, down = WIDTH + SHEET_GAP, HEIGHT + SHEET_GAP
    sheet = Image.new("RGB", (SHEET_COLUMNS * across - SHEET_GAP, SHEET_ROWS * down - SHEET_GAP))
    for i in range(count):
        frame = frames[round(i * (len(frames) - 1) / (count - 1))]
        sheet.paste(as_image(frame), (i % SHEET_COLUMNS * across, i // SHEET_COLUMNS * down))
    sheet.save(path)


def as_image(frame: torch.Tensor) -> Image.Image:
    return Image.frombytes("RGB", (WIDTH, HEIGHT), as_bytes(frame))


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
    return device, gpus or min(available, plans.MAX_GPUS)


def run(arguments: argparse.Namespace) -> bool:
    """Run the demo and return whether the workers agree with one worker."""
    device, workers = choose_workers(arguments.device, arguments.gpus)
    plan = plans.ParallelPlan(num_gpus=workers)
    plan.validate()
    out = Path(arguments.out).expanduser().resolve()
    out.mkdir(parents=True, exist_ok=True)

    kind = "GPU" if device == "cuda" else "CPU worker"
    say(f"Sampling a video of {FRAMES} frames, {WIDTH} x {HEIGHT}, on {workers} {kind}{'s' * (workers > 1)},")
    say(f"then the same on one, into {out}")
    checkpoint = out / "random_wan_t2v.safetensors"
    write_checkpoint(checkpoint)
    say(f"Wrote {checkpoint.name}: {MODEL.parameters / 1e6:.0f} million random weights in Wan's layout.")
    say("Random weights draw no scene: the video is structured noise that looks like coloured clouds.")

    settings = pools.PoolSettings(plan=plan, device=device)
    shared = sample(settings, checkpoint, arguments.steps, f"{workers} x {kind}")
    settings = pools.PoolSettings(plan=plans.ParallelPlan(num_gpus=1), device=device)
    one = sample(settings, checkpoint, arguments.steps, f"1 x {kind}")

    frames = decode(shared.latent)
    video = write_video(frames, out)
    write_contact_sheet(frames, out / "frames.png")
    difference = (shared.latent - one.latent).abs().max().item()
    relative = difference / one.latent.abs().max().item()
    agree = relative <= TOLERANCE  # False for NaN too
    write_report(out / "report.json", plan, arguments.steps, shared, one, difference, relative)

    say(f"Largest difference to one worker: {relative:.1e} of the largest value (allowed: {TOLERANCE:.0e}).")
    say(f"Wrote {video.name}, frames.png and report.json to {out}")
    if not agree:
        say("The workers do not agree with one worker. Please report this with report.json.")
    return agree


def write_report(
    path: Path, plan: object, steps: int, shared: Result, one: Result, difference: float, relative: float
) -> None:
    worker = shared.status.workers[0]
    model = worker.models[0]
    report = {
        "workers": plan.num_gpus,
        "plan": plan.describe(MODEL.num_heads),
        "device": worker.device,
        "seconds_per_step": round(shared.seconds_per_step, 4),
        "seconds_per_step_one_worker": round(one.seconds_per_step, 4),
        "max_abs_diff_vs_one_worker": difference,
        "relative_diff_vs_one_worker": relative,
        "relative_tolerance": TOLERANCE,
        "backend": model.backend,
        "attention": model.kernel,
        "precision": "fp32",
        "steps": steps,
        "guidance": GUIDANCE,
        "latent": list(LATENT),
        "weights": "random: the picture is structured noise",
        "torch": torch.__version__,
        "versions": versions(),
    }
    path.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


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
    def positive(text: str) -> int:
        if not text.isdecimal() or int(text) < 1:
            raise argparse.ArgumentTypeError(f"{text} is not a whole number above 0")
        return int(text)

    parser = argparse.ArgumentParser(prog="install_xdit_usp.sh --demo", description=__doc__.split("\n\n")[0])
    parser.add_argument("--out", default=str(ROOT / "demo_output"), help="folder for the results")
    parser.add_argument("--gpus", type=positive, help="workers (default: all GPUs, or 2 on the CPU)")
    parser.add_argument("--device", choices=("auto", "cuda", "cpu"), default="auto")
    parser.add_argument("--steps", type=positive, default=12, help="sampling steps (default: 12)")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """0: the workers agree with one; 1: they don't, or one failed; 2: the user can put it right."""
    arguments = parse(argv)
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    signal.signal(signal.SIGTERM, _interrupt)  # so that the pool is closed as after Ctrl-C
    try:
        return 0 if run(arguments) else 1
    except (DemoError, plans.PlanError) as error:
        return complain(error, 2)
    except KeyboardInterrupt:
        return complain("Stopped. Run it again to start from the beginning.", 130)
    except pools.PoolError as error:
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
