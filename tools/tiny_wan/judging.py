"""Does a tiny Wan model do what a prompt says? Samples held-out prompts, looks at the clips and writes it down.

Everything is computed as a user's workflow does: the shipped files, this pack's DiT, Euler steps with guidance,
the VAE's decoder.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

import torch

from ...wanvideo.example import tiny_text
from ...wanvideo.example.sampling import euler, flow_sigmas
from ...wanvideo.model.model import WanModel
from .classifier import Scene, classify, prompted
from .scenes import FRAMES, SIZE, draw_scenes, generator, render
from .vae import LATENT_CHANNELS, WanVAE, denormalise, psnr

MODELS = Path(__file__).resolve().parents[2] / "example_workflows" / "models"
T2V_FILE = MODELS / "tiny_wan_t2v.safetensors"
VAE_FILE = MODELS / "tiny_wan_vae.safetensors"
DATA_SEED = 20250221
SHEET_COLUMNS = 6


@dataclass(frozen=True)
class Sampling:
    """How a clip is sampled: Euler steps, the shift of the noise levels, and guidance (CFG)."""

    steps: int = 20
    shift: float = 3.0
    guidance: float = 4.0
    frames: int = FRAMES
    size: int = SIZE


@dataclass(frozen=True)
class Case:
    """One clip to sample."""

    prompt: str
    seed: int


@dataclass(frozen=True)
class Verdict:
    """What was asked for and what the classifier saw."""

    case: Case
    found: Scene

    @property
    def right(self) -> bool:
        """Each prompted colour moves in its prompted direction, and nothing else moves."""
        return self.found.motions == prompted(self.case.prompt).motions

    @property
    def background_right(self) -> bool:
        return self.found.background == prompted(self.case.prompt).background


def held_out_cases(count: int, pairs: bool = False, seed: int = DATA_SEED) -> list[Case]:
    """Prompts whose combinations were not trained on, each once, with consecutive seeds."""
    rng = generator(seed, "held-out prompts of pairs" if pairs else "held-out prompts")
    prompts: dict[str, None] = {}
    while len(prompts) < count:
        scenes = draw_scenes(rng, 64, held_out=True, pairs=float(pairs))
        prompts |= dict.fromkeys(c for c, n in zip(scenes.captions(), scenes.shapes, strict=True) if n == 1 + pairs)
    return [Case(prompt, seed + i) for i, prompt in enumerate(list(prompts)[:count])]


def start_noise(seed: int, how: Sampling) -> torch.Tensor:
    """The noise [1, 16, T, H, W] that ComfyUI draws for this seed, float32 on the CPU."""
    shape = (1, LATENT_CHANNELS, (how.frames - 1) // 4 + 1, how.size // 8, how.size // 8)
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def sample(model: WanModel, cases: Sequence[Case], how: Sampling, batch: int = 8) -> torch.Tensor:
    """Latents [N, 16, T, H, W] as the DiT sees them (normalised), float32 on the model's device."""
    device = model.head.modulation.device
    empty = tiny_text.encode("").to(device)
    latents = []
    for part in _batches(cases, batch):
        prompts = torch.stack([tiny_text.encode(case.prompt) for case in part]).to(device)
        context = torch.cat([prompts, empty.expand_as(prompts)])

        def velocity(x: torch.Tensor, sigma: float, context: torch.Tensor = context) -> torch.Tensor:
            time = torch.full((len(context),), 1000 * sigma, device=device)
            prompt, none = model(torch.cat([x, x]), time, context).chunk(2)
            return none + how.guidance * (prompt - none)

        noise = torch.cat([start_noise(case.seed, how) for case in part]).to(device)
        latents.append(euler(velocity, noise, flow_sigmas(how.steps, how.shift)))
    return torch.cat(latents)


@torch.no_grad()
def decode(vae: WanVAE, latents: torch.Tensor, batch: int = 8) -> torch.Tensor:
    """Normalised latents to videos [N, 3, frames, H, W], float32 from -1 to 1 on the CPU."""
    dtype = next(vae.parameters()).dtype
    parts = [vae.decode(denormalise(part).to(dtype)).float().clamp(-1, 1).cpu() for part in latents.split(batch)]
    return torch.cat(parts)


@torch.no_grad()
def reconstruction(vae: WanVAE, count: int, how: Sampling, seed: int = DATA_SEED) -> torch.Tensor:
    """PSNR in dB of held-out clips after encoding and decoding, [count]."""
    device, dtype = next(vae.parameters()).device, next(vae.parameters()).dtype
    values = []
    for scenes in draw_scenes(generator(seed, "held-out clips"), count, held_out=True).split(8):
        video = render(scenes, how.frames, how.size, device)
        values.append(psnr(vae.decode(vae.encode(video.to(dtype)).to(dtype)).clamp(-1, 1), video).cpu())
    return torch.cat(values)


def judge(cases: Sequence[Case], videos: torch.Tensor) -> list[Verdict]:
    """One verdict a clip [3, T, H, W]."""
    return [Verdict(case, classify(video)) for case, video in zip(cases, videos, strict=True)]


def table(verdicts: Sequence[Verdict]) -> str:
    """The verdicts as text, one a line, and the share that is right."""
    width = max(len(v.case.prompt) for v in verdicts)
    lines = [
        f"{'ok' if v.right else 'WRONG':5}  {v.case.prompt:{width}}  seed {v.case.seed}  found: {v.found}"
        for v in verdicts
    ]
    right, background = sum(v.right for v in verdicts), sum(v.background_right for v in verdicts)
    lines.append(f"colour and direction: {right} of {len(verdicts)}; background: {background} of {len(verdicts)}")
    return "\n".join(lines)


def write_contact_sheet(path: Path, captions: Sequence[str], videos: torch.Tensor) -> None:
    """One row a clip: its caption, and SHEET_COLUMNS frames from the first to the last."""
    image_module, draw_module = import_module("PIL.Image"), import_module("PIL.ImageDraw")
    _, _, frames, height, width = videos.shape
    chosen = torch.linspace(0, frames - 1, SHEET_COLUMNS).round().long()
    pixels = ((videos[:, :, chosen].clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 4, 1)
    gap, strip = 4, 16
    sheet = image_module.new("RGB", (SHEET_COLUMNS * (width + gap) - gap, len(captions) * (height + strip)), "white")
    pen = draw_module.Draw(sheet)
    for row, caption in enumerate(captions):
        top = row * (height + strip)
        pen.text((2, top + 2), caption, fill="black")
        for column in range(SHEET_COLUMNS):
            frame = image_module.fromarray(pixels[row, column].contiguous().numpy())
            sheet.paste(frame, (column * (width + gap), top + strip))
    sheet.save(path)


@dataclass(frozen=True)
class Evaluation:
    """Verdicts on prompts with one and with two shapes, their clips, and the VAE's PSNR."""

    single: list[Verdict]
    pairs: list[Verdict]
    videos: torch.Tensor
    psnr: torch.Tensor
    how: Sampling

    def summary(self) -> dict[str, object]:
        def share(verdicts: list[Verdict]) -> str:
            return f"{sum(v.right for v in verdicts)}/{len(verdicts)}"

        return {
            "right": share(self.single),
            "right_two_shapes": share(self.pairs),
            "background_right": f"{sum(v.background_right for v in self.single)}/{len(self.single)}",
            "vae_psnr_db": round(self.psnr.mean().item(), 2),
            "vae_psnr_db_lowest": round(self.psnr.min().item(), 2),
            "steps": self.how.steps,
            "shift": self.how.shift,
            "guidance": self.how.guidance,
            "frames": self.how.frames,
            "size": self.how.size,
        }


def evaluate(
    model: WanModel, vae: WanVAE, count: int, pairs: int, how: Sampling, clips: int = 32, batch: int = 8
) -> Evaluation:
    """Sample `count` prompts with one shape and `pairs` with two, and reconstruct `clips` clips."""
    cases = held_out_cases(count) + (held_out_cases(pairs, pairs=True) if pairs else [])
    videos = decode(vae, sample(model, cases, how, batch), batch)
    verdicts = judge(cases, videos)
    return Evaluation(verdicts[:count], verdicts[count:], videos, reconstruction(vae, clips, how), how)


def report(result: Evaluation, out: Path) -> str:
    """Write evaluation.json and contact_sheet.png; returns the text of the tables."""
    out.mkdir(parents=True, exist_ok=True)
    (out / "evaluation.json").write_text(json.dumps(result.summary(), indent=2) + "\n", encoding="utf-8")
    verdicts = result.single[:10] + result.pairs[:4]
    chosen = list(range(min(10, len(result.single))))
    chosen += [len(result.single) + i for i in range(min(4, len(result.pairs)))]
    write_contact_sheet(out / "contact_sheet.png", [v.case.prompt for v in verdicts], result.videos[chosen])
    tables = [table(v) for v in (result.single, result.pairs) if v]
    lowest, mean = result.psnr.min().item(), result.psnr.mean().item()
    tables.append(f"VAE: {mean:.2f} dB PSNR on {len(result.psnr)} held-out clips, the worst {lowest:.2f} dB")
    return "\n\n".join(tables)


def _batches(cases: Sequence[Case], size: int) -> Iterator[Sequence[Case]]:
    return (cases[start : start + size] for start in range(0, len(cases), size))
