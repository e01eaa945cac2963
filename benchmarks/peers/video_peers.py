"""A video of a few steps by diffusers' pieces: its transformer and AutoencoderKLWan, from noise to frames.

Started by video.py under torchrun, one process a GPU; prints rows. On several GPUs the forwards run under diffusers'
context parallelism, and the first GPU decodes. Weights are random.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch

sys.path.append(str(Path(__file__).resolve().parents[1]))
import torch.distributed as dist
from benchlib.flops import latent_size
from benchlib.rows import FirstRow, VideoRow, machine_fields, publish
from peers import build, share_diffusers  # loads the pack
from wan_parallel.wanvideo.base.config import PRESETS
from wan_parallel.wanvideo.checkpoint.header import read_header
from wan_parallel.wanvideo.example.sampling import euler, flow_sigmas

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
Times = dict[str, list[float]]


def main() -> None:
    options = _options()
    device = _join(options.device)
    from diffusers import AutoencoderKLWan, WanTransformer3DModel

    config = read_header(options.model).config if options.model else PRESETS[options.size]
    with torch.no_grad():
        torch.manual_seed(0)
        model = build(WanTransformer3DModel, config, DTYPES[options.precision], device)
        if device.type == "cuda":
            share_diffusers(model, dist.get_world_size())
        if options.compile:
            for block in model.blocks:
                block.compile(dynamic=False)  # its own kernels for each resolution: the fastest
        vae = AutoencoderKLWan(base_dim=options.vae_dim).to(device, DTYPES[options.vae_precision]).eval()
        for number, res in enumerate(options.res.split(",")):
            _measure(Case(model, vae, config, res, device, options), cold=number == 0)
    dist.barrier()
    dist.destroy_process_group()


class Case:
    """What is sampled at one resolution."""

    def __init__(
        self,
        model: torch.nn.Module,
        vae: torch.nn.Module,
        config: object,
        res: str,
        device: torch.device,
        options: argparse.Namespace,
    ):
        self.model, self.vae, self.res, self.device, self.options = model, vae, res, device, options
        self.dtype = DTYPES[options.precision]
        generator = torch.Generator().manual_seed(0)
        size = latent_size(res, options.size)
        self.noise = torch.randn(1, config.in_dim, *size, generator=generator).to(device)
        self.context = torch.randn(1, 512, config.text_dim, generator=generator).to(device, self.dtype)

    def forward(self, x: torch.Tensor, sigma: float) -> torch.Tensor:
        timestep = torch.full((1,), 1000 * sigma, device=self.device)
        given = {"hidden_states": x.to(self.dtype), "timestep": timestep, "encoder_hidden_states": self.context}
        return self.model(**given, return_dict=False)[0].float()

    def frames(self, latent: torch.Tensor) -> torch.Tensor:
        """In host memory, as ComfyUI has them: [frames, height, width, 3] from 0 to 1."""
        decoded = self.vae.decode(latent.to(DTYPES[self.options.vae_precision]), return_dict=False)[0]
        return decoded[0].float().add_(1).div_(2).clamp_(0, 1).permute(1, 2, 3, 0).cpu().contiguous()

    def timed(self, function: Callable[[], torch.Tensor | None]) -> tuple[float, torch.Tensor | None]:
        """Seconds of `function`, which begins on all ranks together, and its result."""
        dist.barrier()
        self.synchronize()
        begin = time.perf_counter()
        result = function()
        self.synchronize()
        return time.perf_counter() - begin, result

    def video(self, times: Times) -> torch.Tensor | None:
        """Make a video, and note the seconds of its parts."""
        sigmas, moment = flow_sigmas(self.options.steps, self.options.shift), time.perf_counter()

        def note(_step: int, _x: torch.Tensor) -> None:
            nonlocal moment
            self.synchronize()
            now = time.perf_counter()
            times["step"].append(now - moment)
            moment = now

        latent = euler(self.forward, self.noise, sigmas, note)
        times["sampling"].append(sum(times["step"][-self.options.steps :]))
        if dist.get_rank() != 0:
            return None
        frames = self.frames(latent)
        times["decode"].append(time.perf_counter() - moment)
        return frames

    def synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()


def _measure(case: Case, cold: bool) -> None:
    options = case.options
    first, second = (case.timed(lambda: case.forward(case.noise, 1.0))[0] for _ in range(2))
    times: Times = {"step": [], "sampling": [], "decode": []}
    first_video, _ = case.timed(lambda: case.video(times))
    for seconds in times.values():
        seconds.clear()
    done = [case.timed(lambda: case.video(times)) for _ in range(options.videos)]
    if dist.get_rank() != 0:
        return
    common = {
        "lib": "diffusers",
        "size": options.size,
        "res": case.res,
        "gpus": dist.get_world_size(),
        "precision": options.precision,
        "attention": "cudnn" if case.device.type == "cuda" else "torch",
        "compiled": options.compile,
        **machine_fields(),
    }
    caches = "empty" if options.empty_caches else "kept"
    publish(FirstRow(cold=cold, caches=caches, s=round(first, 3), second_s=round(second, 4), **common), options.out)
    middle = {name: round(median(seconds), 4) for name, seconds in times.items()}
    row = VideoRow(
        steps=options.steps,
        shift=options.shift,
        videos=len(done),
        s=round(median(seconds for seconds, _ in done), 4),
        sampling_s=middle["sampling"],
        step_s=middle["step"],
        decode_s=middle["decode"],
        first_s=round(first_video, 2),
        lossy=False,
        vae_precision=options.vae_precision,
        finite=bool(torch.isfinite(done[-1][1]).all()),
        frames=tuple(done[-1][1].shape),
        allocated_gib=_allocated(case.device),
        **common,
    )
    publish(row, options.out)


def _allocated(device: torch.device) -> float | None:
    return round(torch.cuda.max_memory_allocated() / 2**30, 2) if device.type == "cuda" else None


def _join(wanted: str) -> torch.device:
    if wanted == "cpu" or not torch.cuda.is_available():
        dist.init_process_group("gloo")
        return torch.device("cpu")
    torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    device = torch.device("cuda", torch.cuda.current_device())
    dist.init_process_group("nccl", device_id=device)
    return device


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=sorted(PRESETS), default="14b")
    parser.add_argument("--res", default="480p,720p")
    parser.add_argument("--videos", type=int, default=5)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--shift", type=float, default=5.0)
    parser.add_argument("--precision", choices=sorted(DTYPES), default="bf16")
    parser.add_argument("--vae-precision", choices=sorted(DTYPES), default="bf16")
    parser.add_argument("--vae-dim", type=int, default=96)
    parser.add_argument("--device", choices=("auto", "cuda", "cpu"), default="auto")
    parser.add_argument("--model", help="a checkpoint, of which only the dimensions are taken")
    parser.add_argument("--compile", action="store_true", help="torch.compile each block")
    parser.add_argument("--empty-caches", action="store_true", help="said by video.py, which has emptied them")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    if options.device == "cpu" and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        parser.error("On a CPU diffusers' forwards are not shared. Use one process: --peer-gpus 1.")
    return options


if __name__ == "__main__":
    sys.exit(main())
