"""One DiT forward by ComfyUI's own model on one GPU, dense and with sparse attention as its node has it; prints rows.

    python3 benchmarks/peers/comfyui_step.py COMFYUI_DIR --res 720p --sparse dense keep=0.1

Needs what ComfyUI needs. Weights are random: no speed depends on them. The override is written here, since ComfyUIs
before 0.33.2 have no such node: it calls the same kernel with the same arguments.
"""

from __future__ import annotations

import argparse
import importlib
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

sys.path.append(str(Path(__file__).resolve().parents[1]))
from benchlib.flops import latent_size
from benchlib.rows import Timing, make_row, publish
from benchlib.sparse_names import DENSE, settings_of
from wan_parallel.wanvideo.base.config import PRESETS, WanConfig


def override_of(sparse: str) -> Callable[..., torch.Tensor]:
    """Attention by comfy-kitchen's kernel for calls whose queries and keys are alike, by ComfyUI's own for others."""
    kitchen, settings = importlib.import_module("comfy_kitchen"), settings_of(sparse)

    def override(func: Callable[..., torch.Tensor], q: Any, k: Any, v: Any, heads: int, **more: Any) -> torch.Tensor:
        if q.shape != k.shape:
            return func(q, k, v, heads, **more)
        apart = (x.unflatten(-1, (heads, -1)) for x in (q, k, v))
        chosen = {"tau": settings.tau, "topk_ratio": settings.keep, "token_aug": settings.extra_tokens}
        return kitchen.sol_attn(*apart, **chosen).flatten(2)

    return override


def build(config: WanConfig, dtype: torch.dtype, device: torch.device) -> torch.nn.Module:
    """ComfyUI's model with random weights."""
    ops, wan = importlib.import_module("comfy.ops"), importlib.import_module("comfy.ldm.wan.model")
    sizes = {name: getattr(config, name) for name in ("dim", "ffn_dim", "num_heads", "num_layers", "in_dim", "out_dim")}
    with torch.device("meta"):
        model = wan.WanModel(
            model_type="t2v", text_dim=config.text_dim, dtype=dtype, operations=ops.disable_weight_init, **sizes
        )
    model = model.to_empty(device=device).eval().requires_grad_(False)
    generator = torch.Generator(device).manual_seed(0)
    for parameter in model.parameters():
        parameter.normal_(0, 0.02, generator=generator)
    return model


def main() -> int:
    options = _options()
    sys.path.insert(0, str(options.comfyui))
    sys.argv = ["main.py", *(["--cpu"] if options.device == "cpu" else [])]
    importlib.import_module("comfy.options").enable_args_parsing()
    device, config = torch.device(options.device), PRESETS[options.size]
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    if options.layers:
        config = config.having(num_layers=options.layers)
    attention = importlib.import_module("comfy.ldm.modules.attention").optimized_attention
    version = importlib.import_module("comfyui_version").__version__
    with torch.inference_mode():
        model = build(config, dtype, device)
        for res in options.res.split(","):
            x = torch.randn(1, config.in_dim, *latent_size(res, options.size), device=device, dtype=dtype)
            context = torch.randn(1, 512, config.text_dim, device=device, dtype=dtype)
            timestep = torch.tensor([500.0], device=device)
            for sparse in options.sparse:
                given = {} if sparse == DENSE else {"optimized_attention_override": override_of(sparse)}
                times = []
                for _ in range(options.iters + 1):
                    start = time.perf_counter()
                    out = model(x, timestep, context, transformer_options=dict(given))
                    finite = bool(torch.isfinite(out).all())  # waits for the device
                    times.append(time.perf_counter() - start)
                row = make_row(
                    lib=f"comfyui {version}",
                    size=options.size,
                    res=res,
                    gpus=1,
                    timing=Timing(times[0], tuple(times[1:])),
                    config=config,
                    peak_bytes=torch.cuda.max_memory_reserved() if device.type == "cuda" else None,
                    precision=str(dtype).removeprefix("torch."),
                    attention=attention.__name__,
                    lossy=sparse != DENSE,
                    sparse=None if sparse == DENSE else sparse,
                    finite=finite,
                )
                publish(row, options.out)
    return 0


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("comfyui", type=Path, help="its folder")
    parser.add_argument("--size", choices=sorted(PRESETS), default="14b")
    parser.add_argument("--layers", type=int, default=0, help="fewer blocks, for a trial")
    parser.add_argument("--res", default="480p,720p", help="comma-separated: 480p, 720p or FRAMESxROWSxCOLUMNS")
    parser.add_argument("--sparse", nargs="+", default=[DENSE], help="such as dense keep=0.1 tau=1.3,extra=256")
    parser.add_argument("--iters", type=int, default=5, help="timed forwards, after one that is not")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--out", type=Path, help="append the rows to this file too")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
