"""Another program on some GPUs, which makes them slower for others: multiplies matrices on each until stdin ends.

    python3 benchmarks/benchlib/busy.py --gpus 1

A GPU works for its processes in turn, so one beside it has about half of the GPU. Prints a line once all are at work.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

_AHEAD = 4  # products that wait on a GPU for their turn


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpus", required=True, help="comma-separated numbers, as torch counts them")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    options = parser.parse_args()
    on_cpu, ended, threads = options.device == "cpu", threading.Event(), []
    for number in options.gpus.split(","):
        device = torch.device("cpu") if on_cpu else torch.device("cuda", int(number))
        a = torch.ones(64, 64) if on_cpu else torch.ones(8192, 8192, dtype=torch.bfloat16, device=device)
        threads.append(threading.Thread(target=_multiply, args=(a, ended)))
    for thread in threads:
        thread.start()
    sys.stdout.write("at work\n")
    sys.stdout.flush()
    sys.stdin.read()
    ended.set()
    for thread in threads:
        thread.join()
    return 0


@contextmanager
def busy(gpus: str, device: torch.device) -> Iterator[None]:
    """Have that program on these GPUs meanwhile; on none where `gpus` is empty."""
    if not gpus:
        yield
        return
    command = [sys.executable, str(Path(__file__).resolve()), "--gpus", gpus, "--device", device.type]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        try:
            if not process.stdout.readline():
                raise SystemExit(f"{Path(__file__).name} ended with status {process.wait()}; its words are above.")
            yield
        finally:
            process.stdin.close()


def _multiply(a: torch.Tensor, ended: threading.Event) -> None:
    """Let the device of `a` have something to do until then."""
    out = torch.empty_like(a)
    while not ended.wait(1e-3 if a.device.type == "cpu" else 0):
        for _ in range(_AHEAD):
            torch.mm(a, a, out=out)
        if a.device.type == "cuda":
            torch.cuda.synchronize(a.device)


if __name__ == "__main__":
    sys.exit(main())
