#!/usr/bin/env python3
"""Check the pack's types with mypy, whose settings are in pyproject.toml.

    python3 tools/check_types.py                       # the whole pack
    python3 tools/check_types.py wanvideo nodes.usp    # errors in these packages alone

The pack's relative imports climb up to its folder, which may have any name, so that mypy must meet it as a package
under its fixed name `wan_parallel`: a link in mypy's cache folder gives it that name.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = "wan_parallel"
PACKAGES = ("wanvideo", "distributed", "nodes")


def main(*packages: str) -> int:
    """Print mypy's errors with paths from the pack's folder, and return 1 if there are any in `packages`."""
    folder = ROOT / ".mypy_cache" / "pack"
    folder.mkdir(parents=True, exist_ok=True)
    link = folder / PACKAGE
    if not link.is_symlink():
        link.symlink_to(Path("../.."), target_is_directory=True)
    command = [sys.executable, "-m", "mypy", "--config-file", str(ROOT / "pyproject.toml")]
    command += ["--cache-dir", str(folder.parent / "results"), "--no-error-summary"]
    for package in packages or PACKAGES:
        command += ["-p", f"{PACKAGE}.{package}"]
    # not in the pack's folder, where mypy would find `nodes` and `distributed` a second time
    run = subprocess.run(command, cwd=folder, stdout=subprocess.PIPE, text=True, check=False)
    folders = tuple(f"{PACKAGE}/{package.replace('.', '/')}" for package in packages)
    found = [line for line in run.stdout.splitlines() if not packages or line.startswith(folders)]
    if run.returncode not in (0, 1):  # mypy itself could not run
        sys.stderr.write(run.stdout)
        return run.returncode
    for line in found:
        sys.stdout.write(line.removeprefix(f"{PACKAGE}/") + "\n")
    errors = sum(": error: " in line for line in found)
    sys.stdout.write(f"{errors} errors\n")
    return int(errors > 0)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
