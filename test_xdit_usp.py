"""Run the whole test suite: `python3 test_xdit_usp.py [pytest arguments]`.

Where the running interpreter lacks what the tests need, install_xdit_usp.sh first makes this folder's own
virtual environment (.venv), and the tests run there; the second time that takes no time.
"""

from __future__ import annotations

import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).resolve().parent
REQUIREMENTS = ("requirements_compatible.txt", "tests/requirements.txt", "tools/requirements.txt")
ENVIRONMENT = ROOT / ".venv"


def main() -> None:
    """Replace this process by pytest in an interpreter that has what the tests need."""
    os.chdir(ROOT)
    python = sys.executable
    if missing := lacking():
        print(f"{python} lacks {', '.join(missing)}: the tests run in {ENVIRONMENT}.", flush=True)
        made = subprocess.run(["bash", "install_xdit_usp.sh", "--make-venv", *REQUIREMENTS[1:]], check=False)
        if made.returncode:
            sys.exit(made.returncode)
        python = str(ENVIRONMENT / "bin" / "python")
    os.execv(python, [python, "-m", "pytest", *sys.argv[1:]])


def lacking() -> list[str]:
    """The requirements of the tests that the running interpreter does not meet."""
    try:
        from packaging.requirements import Requirement
    except ModuleNotFoundError:
        return ["packaging"]
    lines = ["torch", *(line for name in REQUIREMENTS for line in (ROOT / name).read_text().splitlines())]
    missing = []
    for text in (line.split("#")[0].strip() for line in lines):
        if not text:
            continue
        requirement = Requirement(text)
        try:
            met = requirement.specifier.contains(metadata.version(requirement.name), prereleases=True)
        except metadata.PackageNotFoundError:
            met = False
        if not met:
            missing.append(text)
    return missing


if __name__ == "__main__":
    main()
