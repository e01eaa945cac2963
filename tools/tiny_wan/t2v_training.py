"""The DiT's training: flow matching on the latents of clips, under their captions."""

from __future__ import annotations

import argparse
import json
import logging
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict

import torch
from torch import nn

from ...wanvideo.attention.kernels import get_kernel
from ...wanvideo.example import tiny_text
from ...wanvideo.model.model import WanModel
from .dit import CONFIG, TrainableWan
from .files import join, save_shipped
from .judging import DATA_SEED, Sampling, decode, evaluate, held_out_cases, judge, report, sample
from .scenes import FRAMES, Scenes, draw_scenes, generator, render
from .training import LOG_SECONDS, STATE_SECONDS, Clock, Every, Recipe, Trainer, facts_of
from .vae import LATENT_CHANNELS, WanVAE, load_vae, normalise

log = logging.getLogger(__name__)

RECIPE = Recipe(learning_rate=6e-4, betas=(0.9, 0.95), weight_decay=0.01, warmup_steps=300, average=0.9995)

LONGEST_CAPTION = 23  # words; two diagonal motions take 19, and with the empty slot this makes 24 keys
TRAIN_SHIFT = 3.0
DROPPED_CAPTIONS = 0.1
REFRESH_EVERY, REFRESH_CLIPS = 16, 256


class WordVectors:
    """`tiny_text.encode_words` for many captions at once, on the device."""

    def __init__(self, device: torch.device, dtype: torch.dtype):
        def signs(kind: str, names: Iterable[object]) -> torch.Tensor:
            return torch.stack([tiny_text.signs(f"{kind} {name}") for name in names]).to(device, dtype)

        words = ("", *tiny_text.VOCABULARY)
        self._index = {word: i for i, word in enumerate(words)}
        self.word, self.before, self.after = (signs(kind, words) for kind in ("word", "before", "after"))
        self.place = signs("place", range(LONGEST_CAPTION))

    def indices(self, captions: Iterable[str]) -> torch.Tensor:
        """Words of each caption as numbers, 0 behind its end; int64 [B, LONGEST_CAPTION] on the CPU."""
        captions = list(captions)
        out = torch.zeros(len(captions), LONGEST_CAPTION, dtype=torch.int64)
        for row, caption in zip(out, captions, strict=True):
            words = [self._index[word] for word in caption.split()]
            row[: len(words)] = torch.tensor(words)
        return out

    def __call__(self, indices: torch.Tensor) -> torch.Tensor:
        """Vectors [B, LONGEST_CAPTION, 4096] of `indices`; what lies behind a caption's end means nothing."""
        before, after = indices.roll(1, 1), indices.roll(-1, 1)
        before[:, 0] = after[:, -1] = 0
        neighbours = tiny_text.NEIGHBOUR_WEIGHT * (self.before[before] + self.after[after])
        return self.word[indices] + neighbours + tiny_text.PLACE_WEIGHT * self.place


class LatentCache:
    """Encoded training clips on the device; the oldest give way to new ones during the training."""

    def __init__(self, vae: WanVAE, vectors: WordVectors, arguments: argparse.Namespace, device: torch.device):
        self.vae, self.vectors, self.size, self.device = vae, vectors, arguments.size, device
        self.rng = generator(arguments.seed, "DiT clips")
        shape = (LATENT_CHANNELS, (FRAMES - 1) // 4 + 1, arguments.size // 8, arguments.size // 8)
        self.latents = torch.empty(arguments.cached_clips, *shape, dtype=torch.float16, device=device)
        self.words = torch.zeros(arguments.cached_clips, LONGEST_CAPTION, dtype=torch.int64, device=device)
        self.filled = self.next = 0

    def fill(self, seconds: float, batch: int) -> None:
        """Encode clips until the cache is full or the time is over."""
        end = time.monotonic() + seconds
        while self.filled < len(self.latents) and (time.monotonic() < end or not self.filled):
            self.add(min(batch, len(self.latents) - self.filled))

    def add(self, count: int) -> None:
        """Encode new clips in the place of the oldest."""
        scenes = draw_scenes(self.rng, count)
        place = torch.arange(self.next, self.next + count, device=self.device) % len(self.latents)
        self.latents[place] = encode_clips(self.vae, scenes, self.size, self.device).half()
        self.words[place] = self.vectors.indices(scenes.captions()).to(self.device)
        self.filled = min(len(self.latents), max(self.filled, self.next + count))
        self.next = (self.next + count) % len(self.latents)

    def batch(self, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Latents and word indices of random clips."""
        chosen = torch.randint(self.filled, (count,), device=self.device)
        return self.latents[chosen].float(), self.words[chosen]


@torch.no_grad()
def encode_clips(vae: WanVAE, scenes: Scenes, size: int, device: torch.device) -> torch.Tensor:
    """Normalised latents; computed in the dtype of the VAE's weights; float32."""
    dtype = next(vae.parameters()).dtype
    parts = []
    for part in scenes.split(64):
        video = render(part, FRAMES, size, device).to(dtype)
        if device.type == "cuda":
            video = video.contiguous(memory_format=torch.channels_last_3d)
        parts.append(normalise(vae.encode(video)))
    return torch.cat(parts)


def train_t2v(arguments: argparse.Namespace) -> None:
    """The DiT: flow matching on the VAE's normalised latents."""
    device, clock = torch.device(arguments.device), Clock(arguments)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    torch.manual_seed(arguments.seed)
    vectors = WordVectors(device, dtype)
    cache = LatentCache(load_vae(arguments.vae, device, dtype), vectors, arguments, device)
    cache.fill(0.12 * clock.seconds, REFRESH_CLIPS)
    log.info("encoded %d clips in %.0f s", cache.filled, clock.elapsed)
    model = TrainableWan(CONFIG, dtype).to(device)
    trainer = Trainer(model, RECIPE, clock, arguments.state / "t2v_state.safetensors", device)
    log.info("DiT of %.2f million parameters, %s", CONFIG.parameters / 1e6, dtype)
    validation = validation_set(cache, device)
    choose_compilation(trainer, cache, arguments)

    report_now, save_now, seen, counted = Every(LOG_SECONDS), Every(STATE_SECONDS), 0, time.monotonic()
    checks = [0.6, 0.3]  # shares of the time at which to sample some prompts; the last first
    while not clock.over:
        loss = flow_loss(model, cache, arguments.batch)
        trainer.step(loss)
        seen += 1
        if trainer.steps % REFRESH_EVERY == 0:
            cache.add(min(REFRESH_CLIPS, len(cache.latents)))
        if report_now():
            rate, seen, counted = seen / (time.monotonic() - counted), 0, time.monotonic()
            log.info(
                "t2v %3.0f %%, step %d, %.1f steps/s, loss %.4f, held-out loss %.4f",
                100 * clock.progress, trainer.steps, rate, loss.item(), validation(trainer.average),
            )  # fmt: skip
        if save_now():
            trainer.save()
        if checks and clock.progress > checks[-1]:
            checks.pop()
            quick_check(trainer.average, arguments, device)
    trainer.save()
    finish_t2v(trainer, arguments, device)


Velocity = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def flow_loss(velocity: Velocity, cache: LatentCache, count: int) -> torch.Tensor:
    """Mean squared error of the velocity noise - latent at noise levels spread over 0 to 1."""
    latent, words = cache.batch(count)
    kept = torch.rand(count, device=latent.device) >= DROPPED_CAPTIONS
    return velocity_error(velocity, latent, words, kept, cache.vectors)


def velocity_error(
    velocity: Velocity, latent: torch.Tensor, words: torch.Tensor, kept: torch.Tensor, vectors: WordVectors
) -> torch.Tensor:
    count = len(latent)
    even = (torch.arange(count, device=latent.device) + torch.rand(count, device=latent.device)) / count
    sigma = (TRAIN_SHIFT * even / (1 + (TRAIN_SHIFT - 1) * even)).view(-1, 1, 1, 1, 1)
    noise = torch.randn_like(latent)
    noisy = torch.lerp(latent, noise, sigma)
    counts = (words > 0).sum(1) * kept
    predicted = velocity(noisy, 1000 * sigma.flatten(), vectors(words), counts)
    return (predicted - (noise - latent)).square().mean()


def validation_set(cache: LatentCache, device: torch.device, count: int = 128) -> Callable[[nn.Module], float]:
    """The loss on held-out clips, with the same noise each time."""
    scenes = draw_scenes(generator(DATA_SEED, "validation clips"), min(count, len(cache.latents)), held_out=True)
    latent = encode_clips(cache.vae, scenes, cache.size, device)
    words = cache.vectors.indices(scenes.captions()).to(device)

    @torch.no_grad()
    def loss(model: nn.Module) -> float:
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            torch.manual_seed(DATA_SEED)
            kept = torch.ones(len(words), dtype=torch.bool, device=device)
            return velocity_error(model, latent, words, kept, cache.vectors).item()

    return loss


def choose_compilation(trainer: Trainer, cache: LatentCache, arguments: argparse.Namespace) -> None:
    """Compile the model's blocks if that is asked for and pays; tried out with real steps."""
    model = trainer.model
    if arguments.compile == "off":
        return
    try:
        seconds = {}
        for on in (False, True):
            model.compile_blocks(on)
            seconds[on] = _seconds_a_step(model, trainer, cache, arguments.batch)
    except (RuntimeError, AssertionError, ImportError) as error:  # what torch's compilers raise, or subclasses
        log.warning("torch.compile failed, training goes on without it: %s", str(error)[:500])
        model.compile_blocks(False)
        return
    log.info("seconds a step: plain %.4f, compiled %.4f", seconds[False], seconds[True])
    model.compile_blocks(seconds[True] < seconds[False])


def _seconds_a_step(velocity: Velocity, trainer: Trainer, cache: LatentCache, count: int, steps: int = 10) -> float:
    start = 0.0
    for step in range(3 + steps):
        if step == 3:
            _synchronize(cache.device)
            start = time.monotonic()
        trainer.step(flow_loss(velocity, cache, count))
    _synchronize(cache.device)
    return (time.monotonic() - start) / steps


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def inference_model(average: nn.Module, device: torch.device) -> WanModel:
    """The pack's own model with these weights, in float32."""
    model = WanModel(CONFIG, get_kernel("sdpa", device, torch.float32)).to(device)
    model.load_state_dict(average.state_dict())
    return model.eval().requires_grad_(False)


def quick_check(average: nn.Module, arguments: argparse.Namespace, device: torch.device) -> None:
    """Log how many of some held-out prompts come out right so far."""
    cases, how = held_out_cases(arguments.check_prompts), Sampling(size=arguments.size, steps=arguments.steps)
    if not cases:
        return
    videos = decode(load_vae(arguments.vae, device), sample(inference_model(average, device), cases, how))
    right = sum(verdict.right for verdict in judge(cases, videos))
    log.info("prompts followed so far: %d of %d", right, len(cases))


def finish_t2v(trainer: Trainer, arguments: argparse.Namespace, device: torch.device) -> None:
    """Write the weights, then judge the written file."""
    facts = facts_of(trainer, arguments, device) | asdict(CONFIG)
    paths = save_shipped(arguments.out, "tiny_wan_t2v", trainer.average.state_dict(), facts)
    log.info("wrote %s", ", ".join(path.name for path in paths))
    whole = arguments.state / "tiny_wan_t2v.safetensors"
    join(arguments.out / "tiny_wan_t2v", whole)
    model = WanModel.from_checkpoint(str(whole), device=device)
    how = Sampling(size=arguments.size, steps=arguments.steps)
    vae = load_vae(arguments.vae, device)
    result = evaluate(model, vae, arguments.prompts, arguments.prompts // 2, how, arguments.clips)
    log.info("judged after %d training steps:\n%s", trainer.steps, report(result, arguments.out))
    facts |= {"evaluation": result.summary()}
    (arguments.out / "t2v.json").write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
