"""The VAE's training: reconstruct clips, through latents that suit Wan's statistics."""

from __future__ import annotations

import argparse
import json
import logging
import time
from dataclasses import dataclass

import numpy as np
import torch

from .files import save_shipped
from .judging import DATA_SEED, Sampling, reconstruction, write_contact_sheet
from .scenes import FRAMES, draw_scenes, generator, render
from .training import LOG_SECONDS, STATE_SECONDS, Clock, Every, Recipe, Trainer, facts_of
from .vae import WanVAE, load_vae, psnr

log = logging.getLogger(__name__)

VAE_WIDTH = 16
RECIPE = Recipe(learning_rate=1.5e-3, betas=(0.9, 0.99), weight_decay=0.0, warmup_steps=200, average=0.998)

KL_WEIGHT = 2e-4
SQUARE_WEIGHT = 3.0  # of the squared error beside the absolute one


@dataclass(frozen=True)
class Phase:
    """Part of the VAE's training: clips cut out of the full ones, until a share of the time is over."""

    until: float
    frames: int
    crop: int
    batch: int


PHASES = (Phase(0.35, 9, 64, 32), Phase(0.65, 17, 96, 16), Phase(1.0, 17, 128, 8))


def train_vae(arguments: argparse.Namespace) -> None:
    """The VAE: reconstruct clips through 16 noisy latent channels."""
    device, clock = torch.device(arguments.device), Clock(arguments)
    vae = WanVAE(VAE_WIDTH)
    vae.initialise()
    vae.to(device)
    trainer = Trainer(vae, RECIPE, clock, arguments.state / "vae_state.safetensors", device)
    rng = generator(arguments.seed, f"VAE clips after {trainer.steps} steps")
    dtype, layout = fastest_format(trainer, rng, arguments) if device.type == "cuda" else FORMATS["plain"]
    log.info("VAE of %.2f million parameters, %s", sum(p.numel() for p in vae.parameters()) / 1e6, dtype)
    report_now, save_now, seen, counted = Every(LOG_SECONDS), Every(STATE_SECONDS), 0, time.monotonic()
    while not clock.over:
        phase = next(p for p in PHASES if clock.progress <= p.until)
        video = crop(draw_clips(rng, batch_of(phase, arguments), arguments.size, device), phase, rng)
        loss = vae_loss(vae, video, dtype, layout)
        trainer.step(loss)
        seen += 1
        if report_now():
            rate, seen, counted = seen / (time.monotonic() - counted), 0, time.monotonic()
            quality = validation_psnr(trainer.average, arguments.size, device)
            log.info(
                "vae %3.0f %%, step %d, %.1f steps/s, %d px, loss %.4f, held-out PSNR %.2f dB",
                100 * clock.progress, trainer.steps, rate, phase.crop, loss.item(), quality,
            )  # fmt: skip
        if save_now():
            trainer.save()
    trainer.save()
    finish_vae(trainer, arguments, device)


FORMATS = {
    "plain": (torch.float32, torch.contiguous_format),
    "16 bit, channels last": (torch.bfloat16, torch.channels_last_3d),
    "16 bit, channels first": (torch.bfloat16, torch.contiguous_format),
    "32 bit, channels last": (torch.float32, torch.channels_last_3d),
}
Format = tuple[torch.dtype, torch.memory_format]


def fastest_format(trainer: Trainer, rng: np.random.Generator, arguments: argparse.Namespace) -> Format:
    """Try the ways to hold a clip in memory, with real steps: cuDNN's 3D convolutions differ widely in speed."""
    phase, device = PHASES[-1], torch.device(arguments.device)
    seconds = {}
    for name, (dtype, layout) in FORMATS.items():
        if name == "plain":
            continue
        for step in range(2 + 6):  # two to warm up
            if step == 2:
                torch.cuda.synchronize()
                start = time.monotonic()
            video = crop(draw_clips(rng, batch_of(phase, arguments), arguments.size, device), phase, rng)
            trainer.step(vae_loss(trainer.model, video, dtype, layout))
        torch.cuda.synchronize()
        seconds[name] = (time.monotonic() - start) / 6
    log.info("seconds a step: %s", ", ".join(f"{name} {value:.3f}" for name, value in seconds.items()))
    return FORMATS[min(seconds, key=seconds.get)]


def batch_of(phase: Phase, arguments: argparse.Namespace) -> int:
    return max(1, round(phase.batch * arguments.batch_factor))


def draw_clips(rng: np.random.Generator, count: int, size: int, device: torch.device) -> torch.Tensor:
    return render(draw_scenes(rng, count), FRAMES, size, device)


def crop(video: torch.Tensor, phase: Phase, rng: np.random.Generator) -> torch.Tensor:
    """A random window of the phase's size in time and space, the same for the whole batch."""
    frames, size = min(phase.frames, video.shape[2]), min(phase.crop, video.shape[3])
    first, top, left = (
        int(rng.integers(whole - part + 1)) for whole, part in zip(video.shape[2:], (frames, size, size), strict=True)
    )
    return video[:, :, first : first + frames, top : top + size, left : left + size]


def vae_loss(vae: WanVAE, video: torch.Tensor, dtype: torch.dtype, layout: torch.memory_format) -> torch.Tensor:
    posterior = vae.posterior(video.to(dtype).contiguous(memory_format=layout))
    latent = posterior.sample().to(dtype).contiguous(memory_format=layout)
    error = vae.decode(latent).float() - video
    return error.abs().mean() + SQUARE_WEIGHT * error.square().mean() + KL_WEIGHT * posterior.divergence()


@torch.no_grad()
def validation_psnr(vae: WanVAE, size: int, device: torch.device, count: int = 8) -> float:
    scenes = draw_scenes(generator(DATA_SEED, "validation clips"), count, held_out=True)
    video = render(scenes, FRAMES, size, device)
    return psnr(vae.decode(vae.encode(video)).clamp(-1, 1), video).mean().item()


@torch.no_grad()
def latent_statistics(
    vae: WanVAE, arguments: argparse.Namespace, device: torch.device, batches: int = 16
) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and deviation of each latent channel over training clips, [16] each."""
    rng = generator(arguments.seed, "latent statistics")
    count = max(1, round(16 * arguments.batch_factor))
    latents = torch.cat([vae.encode(draw_clips(rng, count, arguments.size, device)) for _ in range(batches)])
    return latents.mean((0, 2, 3, 4)), latents.std((0, 2, 3, 4))


def finish_vae(trainer: Trainer, arguments: argparse.Namespace, device: torch.device) -> None:
    """Give the latents Wan's statistics, write the file, and judge what was written."""
    vae = trainer.average
    mean, std = latent_statistics(vae, arguments, device)
    log.info("latent deviations before folding: %s", " ".join(f"{value:.2f}" for value in std.tolist()))
    vae.fold_statistics(mean, std)
    facts = facts_of(trainer, arguments, device) | {"width": VAE_WIDTH}
    (path,) = save_shipped(arguments.out, "tiny_wan_vae", vae.state_dict(), facts)
    shipped = load_vae(str(path), device)
    quality = reconstruction(shipped, arguments.clips, Sampling(size=arguments.size))
    facts |= {"psnr_db": quality.mean().item(), "psnr_db_lowest": quality.min().item()}
    log.info("wrote %s: PSNR %.2f dB, the worst clip %.2f dB", path.name, quality.mean(), quality.min())
    (arguments.out / "vae.json").write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
    scenes = draw_scenes(generator(DATA_SEED, "held-out clips"), 4, held_out=True)
    video = render(scenes, FRAMES, arguments.size, device)
    with torch.no_grad():
        both = torch.stack([video, shipped.decode(shipped.encode(video))], dim=1).flatten(0, 1).cpu()
    captions = [caption for c in scenes.captions() for caption in (f"original: {c}", "after encoding and decoding")]
    write_contact_sheet(arguments.out / "vae_sheet.png", captions, both)
