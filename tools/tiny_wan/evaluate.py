"""Does the tiny Wan model do what a prompt says? Samples held-out prompts and looks at the clips.

    python3 tools/tiny_wan/evaluate.py --count 10 --out results

prints a table, and writes evaluation.json and a contact sheet into the folder --out.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from bootstrap import load_pack

load_pack()
from wan_parallel.tools.tiny_wan.judging import T2V_FILE, VAE_FILE, Sampling, evaluate, report  # noqa: E402
from wan_parallel.tools.tiny_wan.scenes import SIZE  # noqa: E402
from wan_parallel.tools.tiny_wan.vae import load_vae  # noqa: E402
from wan_parallel.wanvideo.model.model import WanModel  # noqa: E402


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--t2v", default=str(T2V_FILE), help="the DiT's file")
    parser.add_argument("--vae", default=str(VAE_FILE), help="the VAE's file")
    parser.add_argument("--count", type=int, default=10, help="prompts with one shape")
    parser.add_argument("--pairs", type=int, default=0, help="prompts with two shapes")
    parser.add_argument("--clips", type=int, default=16, help="clips for the VAE's PSNR")
    parser.add_argument("--steps", type=int, default=Sampling.steps)
    parser.add_argument("--shift", type=float, default=Sampling.shift)
    parser.add_argument("--guidance", type=float, default=Sampling.guidance)
    parser.add_argument("--size", type=int, default=SIZE, help="height = width in pixels")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, default=Path("tiny_wan_evaluation"))
    arguments = parser.parse_args(argv)
    for path in (arguments.t2v, arguments.vae):
        if not Path(path).is_file():
            parser.error(f"{path} does not exist. Train it with tools/tiny_wan/train.py, or name another file.")
    model = WanModel.from_checkpoint(arguments.t2v, device=arguments.device)
    vae = load_vae(arguments.vae, arguments.device)
    how = Sampling(arguments.steps, arguments.shift, arguments.guidance, size=arguments.size)
    result = evaluate(model, vae, arguments.count, arguments.pairs, how, arguments.clips)
    print(report(result, arguments.out))
    return 0


if __name__ == "__main__":
    sys.exit(main())
