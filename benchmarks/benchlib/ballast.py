"""Makes a card smaller: holds memory of each GPU until no more than this many GiB are free, and until stdin ends.

    python3 benchmarks/benchlib/ballast.py --gib 24 --gpus 1

Every process on the card then finds what a card of that size has, CUDA's own memory for each of them included. Once it
holds all, it prints the bytes that the first GPU has in all.
"""

from __future__ import annotations

import argparse
import os
import sys

import torch

GIB = 2**30
_STEP = 2**28  # bytes


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gib", type=float, required=True)
    parser.add_argument("--gpus", type=int, default=1)
    options = parser.parse_args()
    os.environ["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"  # torch would take more than it is asked for
    held = [hold(torch.device("cuda", index), int(options.gib * GIB)) for index in range(options.gpus)]
    sys.stdout.write(f"{torch.cuda.mem_get_info(0)[1]}\n")  # the whole of the first
    sys.stdout.flush()
    sys.stdin.read()
    return 0 if held else 1


def hold(device: torch.device, left: int) -> list[torch.Tensor]:
    """Allocate until `left` bytes are free on the device."""
    free, _ = torch.cuda.mem_get_info(device)
    if free < left:
        raise SystemExit(
            f"{device} has {free / GIB:.1f} GiB free, less than the {left / GIB:.1f} GiB of the smaller card. "
            "Ask for less with --gib, or end what else uses the GPU."
        )
    tensors = []
    while free - left >= 2**21:  # what the driver hands out at a time
        tensors.append(torch.empty(min(_STEP, free - left) // 2**21 * 2**21, dtype=torch.uint8, device=device))
        free, _ = torch.cuda.mem_get_info(device)
    return tensors


if __name__ == "__main__":
    sys.exit(main())
