"""One DiT forward by the libraries that a user would pick today: diffusers and xDiT, sharing the sequence.

Started by dit_step.py under torchrun, one process a GPU; prints rows. Weights are random: no speed depends
on them. diffusers runs cuDNN attention, its fastest kernel that needs no download; xDiT runs what it picks
itself (cuDNN), or FlashAttention-3 where asked for.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

sys.path.append(str(Path(__file__).resolve().parents[1]))
import torch.distributed as dist
from benchlib.flops import latent_size
from benchlib.rows import Timing, make_row, publish
from wan_parallel.distributed.comm.topology import link_kind
from wan_parallel.wanvideo.base.config import PRESETS, WanConfig

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def set_up_diffusers() -> type:
    """Join the ranks; returns the model class."""
    dist.init_process_group("nccl", device_id=torch.device("cuda", torch.cuda.current_device()))
    from diffusers import WanTransformer3DModel

    return WanTransformer3DModel


def share_diffusers(model: torch.nn.Module, world_size: int) -> None:
    """Ulysses over all ranks."""
    model.set_attention_backend("_native_cudnn")
    if world_size > 1:
        from diffusers import ContextParallelConfig

        model.enable_parallelism(config=ContextParallelConfig(ulysses_degree=world_size))


def set_up_xdit(attention: str) -> type:
    """Join the ranks as xDiT's own programs do, with Ulysses over all of them; returns the model class."""
    if attention == "fa3":  # the name under which xDiT looks for FlashAttention-3
        sys.modules["flash_attn_interface"] = importlib.import_module("fa3_fwd_interface")
    from xfuser import xFuserArgs
    from xfuser.core.distributed import init_distributed_environment, initialize_model_parallel, runtime_state

    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    init_distributed_environment(rank=rank, world_size=world_size)
    initialize_model_parallel(sequence_parallel_degree=world_size, ulysses_degree=world_size, ring_degree=1)
    arguments = xFuserArgs(
        ulysses_degree=world_size, ring_degree=1, attention_backend="flash_3" if attention == "fa3" else None
    )
    # xDiT makes this state for its own pipelines; the one it has for others knows no degree but 1.
    runtime = object.__new__(runtime_state.ExternalRuntimeState)
    runtime_state.RuntimeState.__init__(runtime, arguments.create_config()[0])
    runtime.increment_step_counter = lambda: None
    runtime_state._RUNTIME = runtime
    from xfuser.model_executor.models.transformers.transformer_wan import xFuserWanTransformer3DWrapper

    return xFuserWanTransformer3DWrapper


def build(cls: type, config: WanConfig, dtype: torch.dtype, device: torch.device | None = None) -> torch.nn.Module:
    """The model with random weights, on this rank's GPU if no device is given."""
    device = device or torch.device("cuda", torch.cuda.current_device())
    with torch.device("meta"):
        model = cls(
            patch_size=(1, 2, 2),
            num_attention_heads=config.num_heads,
            attention_head_dim=config.head_dim,
            in_channels=config.in_dim,
            out_channels=config.out_dim,
            text_dim=config.text_dim,
            freq_dim=config.freq_dim,
            ffn_dim=config.ffn_dim,
            num_layers=config.num_layers,
        )
    model = model.to(dtype).to_empty(device=device).eval().requires_grad_(False)
    generator = torch.Generator(device).manual_seed(0)
    for parameter in model.parameters():
        parameter.normal_(0, 0.02, generator=generator)
    # Buffers made on `meta` are empty: the RoPE tables, and the order of heads that xDiT may change.
    for name, buffer in model.named_buffers():
        if "head_perm" in name:
            buffer.copy_(torch.arange(buffer.numel(), device=device))
    rope = type(model.rope)(config.head_dim, (1, 2, 2), 1024)
    model.rope.freqs_cos, model.rope.freqs_sin = rope.freqs_cos.to(device), rope.freqs_sin.to(device)
    return model


def measure(forward: Callable[[], torch.Tensor], iters: int) -> tuple[Timing, bool]:
    """Time `forward` on all ranks together, and say whether its result is finite."""
    times = []
    for _ in range(iters + 1):
        dist.barrier()
        torch.cuda.synchronize()
        start = time.perf_counter()
        out = forward()
        torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return Timing(times[0], tuple(times[1:])), bool(torch.isfinite(out).all())


def peak_bytes() -> int:
    """Device memory in use on the fullest GPU."""
    free, total = torch.cuda.mem_get_info()
    used = torch.tensor([total - free], device="cuda")
    dist.all_reduce(used, dist.ReduceOp.MAX)
    return int(used)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lib", choices=("diffusers", "xdit"), required=True)
    parser.add_argument("--size", choices=sorted(PRESETS), default="14b")
    parser.add_argument("--res", default="480p,720p", help="comma-separated")
    parser.add_argument("--iters", type=int, default=5)
    parser.add_argument("--precision", choices=sorted(DTYPES), default="bf16")
    parser.add_argument("--attention", choices=("cudnn", "fa3"), default="cudnn")
    parser.add_argument("--compile", action="store_true", help="torch.compile each block")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    if options.lib == "diffusers" and options.attention == "fa3":
        parser.error("diffusers cannot share a sequence with FlashAttention-3. Use --attention cudnn.")

    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    config, dtype = PRESETS[options.size], DTYPES[options.precision]
    cls = set_up_diffusers() if options.lib == "diffusers" else set_up_xdit(options.attention)
    with torch.no_grad():
        model = build(cls, config, dtype)
        if options.lib == "diffusers":
            share_diffusers(model, world_size)
        if options.compile:
            for block in model.blocks:
                block.compile(dynamic=False)  # its own kernels for each resolution: the fastest
        for res in options.res.split(","):
            x = torch.randn(1, config.in_dim, *latent_size(res, options.size), device="cuda", dtype=dtype)
            context = torch.randn(1, 512, config.text_dim, device="cuda", dtype=dtype)
            timestep = torch.tensor([500.0], device="cuda")

            def forward(x=x, context=context, timestep=timestep) -> torch.Tensor:
                return model(hidden_states=x, timestep=timestep, encoder_hidden_states=context, return_dict=False)[0]

            timing, finite = measure(forward, options.iters)
            peak = peak_bytes()
            if rank == 0:
                row = make_row(
                    lib=options.lib,
                    size=options.size,
                    res=res,
                    gpus=world_size,
                    timing=timing,
                    config=config,
                    peak_bytes=peak,
                    precision=options.precision,
                    attention=options.attention,
                    finite=finite,
                    compiled=options.compile,
                    ulysses=world_size,
                    ring=1,
                    link=link_kind(torch.device("cuda", 0), range(1, world_size)) if world_size > 1 else None,
                )
                publish(row, options.out)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
