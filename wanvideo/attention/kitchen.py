"""comfy-kitchen, the package of kernels that ComfyUI itself depends on: is it installed, and new enough?

Looking does not import it: its import looks for a GPU.
"""

from __future__ import annotations

import re
from importlib import metadata

_PACKAGE = "comfy-kitchen"
OLDEST = "0.2.33"
"""The first version with sparse attention."""
INSTALL = f"Install it with: pip install --no-deps 'comfy-kitchen>={OLDEST}'"


def version() -> str:
    """The installed version; "" without the package."""
    try:
        return metadata.version(_PACKAGE)
    except metadata.PackageNotFoundError:
        return ""


def refusal(what: str) -> str | None:
    """Why the installed package cannot do `what`, as two sentences; None if it can."""
    installed = version()
    if not installed:
        return f"{what} needs the package {_PACKAGE}, which is not installed. {INSTALL}"
    if _numbers(installed) < _numbers(OLDEST):
        return f"{what} needs {_PACKAGE} {OLDEST} or newer, and {installed} is installed. {INSTALL}"
    return None


def _numbers(text: str) -> tuple[int, ...]:
    """The leading numbers of a version: 0.2.40.dev1 is (0, 2, 40)."""
    found = re.match(r"\d+(\.\d+)*", text)
    return tuple(map(int, found[0].split("."))) if found else ()
