"""Decoding of a video by diffusers' AutoencoderKLWan on one GPU, and by xDiT's DistVAE over it on several.

Started by vae_decode.py under torchrun, one process a GPU; prints rows. Weights are random.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path

import torch

sys.path.append(str(Path(__file__).resolve().parents[1]))
import torch.distributed as dist
from benchlib.flops import MODELS, latent_size, vae_decode_flops
from benchlib.rows import Timing, make_vae_row, publish
from wan_parallel.wanvideo.example.vae_random import RELEASED, vae_shapes
from wan_parallel.wanvideo.vae.vae_layout import KINDS

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--lib", choices=("diffusers", "distvae"), required=True)
    parser.add_argument("--res", default="720p")
    parser.add_argument("--iters", type=int, default=5)
    parser.add_argument("--precision", choices=sorted(DTYPES), default="bf16")
    parser.add_argument("--vae", choices=tuple(KINDS), default="2.1")
    parser.add_argument("--dim", type=int)
    parser.add_argument("--device", choices=("auto", "cuda", "cpu"), default="auto")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    device, on_gpu = _join(options.device)
    with torch.no_grad():
        torch.manual_seed(0)
        vae = _build(options.vae, options.dim).to(device, DTYPES[options.precision]).eval()
        if options.lib == "distvae":
            from distvae.vae import parallelize_decoder

            parallelize_decoder(vae, dist.group.WORLD)
        for res in options.res.split(","):
            _time(vae, res, device, on_gpu, options)
    dist.barrier()
    dist.destroy_process_group()


def _build(vae: str, dim: int | None) -> torch.nn.Module:
    from diffusers import AutoencoderKLWan

    kind, widths = KINDS[vae], RELEASED[vae]
    pixels = 3 * kind.patch**2
    return AutoencoderKLWan(
        base_dim=dim or widths.encoder,
        decoder_base_dim=dim or widths.decoder,
        z_dim=widths.latent,
        is_residual=kind.groups,
        in_channels=pixels,
        out_channels=pixels,
        patch_size=kind.patch if kind.patch > 1 else None,
        scale_factor_spatial=kind.scale,
    )


def _join(wanted: str) -> tuple[torch.device, bool]:
    on_gpu = wanted == "cuda" or (wanted == "auto" and torch.cuda.is_available())
    if not on_gpu:
        dist.init_process_group("gloo")
        return torch.device("cpu"), False
    torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    device = torch.device("cuda", torch.cuda.current_device())
    dist.init_process_group("nccl", device_id=device)
    return device, True


def _time(vae: torch.nn.Module, res: str, device: torch.device, on_gpu: bool, options: argparse.Namespace) -> None:
    size, times = latent_size(res, MODELS[options.vae]), []
    latent = torch.randn(1, RELEASED[options.vae].latent, *size, device=device, dtype=DTYPES[options.precision])
    for _ in range(options.iters + 1):
        dist.barrier()
        start = time.perf_counter()
        frames = vae.decode(latent, return_dict=False)[0]
        if on_gpu:
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    if dist.get_rank() == 0:
        peak = torch.cuda.max_memory_allocated() / 2**30 if on_gpu else 0.0
        row = make_vae_row(
            lib=options.lib if options.lib == "diffusers" else "diffusers+distvae",
            vae=options.vae,
            res=res,
            gpus=dist.get_world_size(),
            timing=Timing(times[0], tuple(times[1:])),
            flops=vae_decode_flops(vae_shapes(options.vae, "decoder", options.dim), size),
            precision=options.precision,
            finite=bool(torch.isfinite(frames).all()),
            allocated_gib=round(peak, 2),
        )
        publish(row, options.out)


if __name__ == "__main__":
    main()
