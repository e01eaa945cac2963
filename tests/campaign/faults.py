#!/usr/bin/env python3
"""Random faults, one after the other, on pools or on a real ComfyUI; prints what came of them as a table of counts.

    python3 tests/campaign/faults.py --faults 100                          # pools of two to four CPU workers
    COMFYUI_DIR=~/ComfyUI COMFYUI_PYTHON=~/ComfyUI/venv/bin/python \\
        python3 tests/campaign/faults.py --place ComfyUI --faults 50       # prompts over its API
    python3 tests/campaign/faults.py --seed 3 --only 17                    # one fault once more

A fault is a kill, a signal, a process that stands still, Cancel, another file, other settings, a full disk, few file
descriptors, another user, a read-only home; in the start, the load, a forward, the VAE, or at rest. After each of them
the call must have ended in time, its message must name the rank and the cause, no process and no file may be left, the
next result must be bit-equal, and the client must not have grown. The exit status is 1 where one of these did not hold.
Full disks, other users and read-only homes need root.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import uuid
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "support"))

import torch
from testkit.campaign import faults
from testkit.campaign.campaign import Campaign
from testkit.campaign.clients import Client
from testkit.campaign.drills import Verdict
from testkit.campaign.drive_comfyui import ComfyUIClient
from testkit.campaign.drive_pool import PoolClient
from testkit.campaign.table import as_line, from_line, markdown
from testkit.campaign.worlds import possible


def main() -> int:
    """Returns the exit status."""
    options = _options()
    if options.count:
        lines = [line for path in options.count for line in path.read_text(encoding="utf-8").splitlines()]
        print(markdown([from_line(line) for line in lines]))
        return 0
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="faults-", ignore_cleanup_errors=True) as folder:
        os.chmod(folder, 0o755)
        mark = uuid.uuid4().hex
        client = _client(options, Path(folder), mark)
        asked = options.kinds or faults.KINDS
        kinds = [kind for kind in asked if kind not in faults.IN_A_WORLD or possible(kind, options.python)]
        of_files = [job for job in client.jobs if client.file_of(job) is not None]
        drawn = faults.draw(options.seed, options.faults, client.jobs, of_files, kinds)
        chosen = [fault for fault in drawn if fault.number >= options.first and options.only in (None, fault.number)]
        campaign = Campaign(client, mark)
        verdicts = campaign.run(chosen, lambda verdict: _tell(verdict, options))
    left_out = [kind for kind in asked if kind not in kinds]
    print(f"\nSeed {options.seed}, {options.place}:\n\n{markdown(verdicts)}")
    nbytes, descriptors = campaign.growth
    print(f"\nNo client grew by more than {max(nbytes, 0) / 2**20:.0f} MiB and {max(descriptors, 0)} descriptors.")
    if left_out:
        print(f"\nLeft out, as they take the rights of root: {', '.join(left_out)}.")
    return int(any(verdict.short for verdict in verdicts))


def _client(options: argparse.Namespace, folder: Path, mark: str) -> Client:
    if options.place == "pool":
        return PoolClient(folder, mark)
    return ComfyUIClient(Path(os.environ["COMFYUI_DIR"]), options.python, folder, mark)


def _tell(verdict: Verdict, options: argparse.Namespace) -> None:
    fault = verdict.fault
    print(
        f"{fault.number:4} {'fell short' if verdict.short else 'ok        '} {verdict.seconds:5.1f} s  {fault}",
        flush=True,
    )
    if options.verbose and verdict.told:
        print(f"       told: {verdict.told}", flush=True)
    for text in verdict.short:
        print(f"       {text}", flush=True)
    if verdict.short:
        print(f"       again: --place {options.place} --seed {options.seed} --only {fault.number}", flush=True)
    if options.out is not None:
        with options.out.open("a", encoding="utf-8") as file:
            file.write(as_line(verdict) + "\n")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--place", choices=("pool", "ComfyUI"), default="pool")
    parser.add_argument("--faults", type=int, default=100, help="how many")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int, help="the number of one fault, in place of all")
    parser.add_argument("--first", type=int, default=0, help="the number of the first fault, to go on with a campaign")
    parser.add_argument("--kinds", nargs="+", choices=faults.KINDS, metavar="KIND", help="some kinds alone")
    parser.add_argument("--out", type=Path, help="append a line of JSON for each fault to this file")
    parser.add_argument("--count", type=Path, nargs="+", help="print the table of such files, and do nothing else")
    parser.add_argument("--verbose", action="store_true", help="show what was told")
    options = parser.parse_args()
    options.python = os.environ.get("COMFYUI_PYTHON", sys.executable) if options.place == "ComfyUI" else sys.executable
    if options.place == "ComfyUI" and not Path(os.environ.get("COMFYUI_DIR", ""), "main.py").is_file():
        parser.error("COMFYUI_DIR does not name a ComfyUI folder. Set it.")
    if options.only is not None:
        options.faults = max(options.faults, options.only + 1)
    return options


if __name__ == "__main__":
    sys.exit(main())
