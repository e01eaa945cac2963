"""Train the tiny Wan VAE, then the tiny Wan DiT, each within a given number of minutes.

    python3 tools/tiny_wan/train.py vae --minutes 8 --out results
    python3 tools/tiny_wan/train.py t2v --minutes 8 --out results --vae results/tiny_wan_vae.safetensors

Learning rates follow the clock, so a run ends in time on any machine. A run that finds its state file in --state
goes on from there; --total-minutes then says how long all runs together take. At its end a run writes the weights
(float16, safetensors, parts of at most 15 MiB), judges them as evaluate.py does, and writes what it found.
"""

from __future__ import annotations

import argparse
import logging
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from bootstrap import load_pack

load_pack()
from wan_parallel.tools.tiny_wan.judging import DATA_SEED  # noqa: E402
from wan_parallel.tools.tiny_wan.scenes import SIZE  # noqa: E402
from wan_parallel.tools.tiny_wan.t2v_training import train_t2v  # noqa: E402
from wan_parallel.tools.tiny_wan.vae_training import train_vae  # noqa: E402


def parse(argv: list[str] | None) -> argparse.Namespace:
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--minutes", type=float, default=8.0, help="training time of this run")
    common.add_argument("--until", type=float, help="end the training at this Unix time, if that is earlier")
    common.add_argument("--total-minutes", type=float, default=0.0, help="of this run and those before and after")
    common.add_argument("--out", type=Path, default=Path("tiny_wan_results"), help="folder for the results")
    common.add_argument("--state", type=Path, help="folder of the state file (default: --out)")
    common.add_argument("--seed", type=int, default=DATA_SEED, help="of the training data")
    common.add_argument("--commit", default="unknown", help="commit to name in the files")
    common.add_argument("--size", type=int, default=SIZE, help="height = width of a clip in pixels")
    common.add_argument("--clips", type=int, default=64, help="held-out clips for the VAE's PSNR")
    common.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    vae = commands.add_parser("vae", parents=[common], help="train the VAE")
    vae.add_argument("--batch-factor", type=float, default=1.0, help="on the batch sizes of the phases")
    t2v = commands.add_parser("t2v", parents=[common], help="train the DiT on a trained VAE")
    t2v.add_argument("--vae", required=True, help="the VAE's file")
    t2v.add_argument("--batch", type=int, default=512)
    t2v.add_argument("--cached-clips", type=int, default=131072, help="clips whose latents are kept on the device")
    t2v.add_argument("--compile", choices=("auto", "off"), default="auto", help="try torch.compile")
    t2v.add_argument("--steps", type=int, default=20, help="sampling steps of the checks")
    t2v.add_argument("--prompts", type=int, default=40, help="held-out prompts judged at the end")
    t2v.add_argument("--check-prompts", type=int, default=20, help="held-out prompts judged during the training")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    arguments = parse(argv)
    arguments.state = arguments.state or arguments.out
    for folder in (arguments.out, arguments.state):
        folder.mkdir(parents=True, exist_ok=True)
    handlers = [
        logging.StreamHandler(sys.stdout),
        logging.FileHandler(arguments.out / f"{arguments.command}.log"),
    ]
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S", handlers=handlers)
    torch.set_float32_matmul_precision("high")
    torch.backends.cudnn.benchmark = True
    {"vae": train_vae, "t2v": train_t2v}[arguments.command](arguments)
    return 0


if __name__ == "__main__":
    sys.exit(main())
