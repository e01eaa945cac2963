"""Where code of other packs comes from, in the words that a refusal uses."""

from __future__ import annotations

import functools
import os
import re
import sys
from collections.abc import Iterable
from pathlib import Path

_PACK = Path(__file__).resolve().parents[2]
_IN_CUSTOM_NODES = re.compile(r"custom_nodes[/\\.]([^/\\.]+)")
_LOCALS = ".<locals>"


def origin_of(code: object) -> str:
    """Name the code that a node has left in a MODEL: the method that made it, and its pack or module.

    Args:
        code: a function, a bound method, a partial function or an object.

    Returns:
        Such as "NAGuidance.execute in comfy_extras.nodes_nag".
    """
    while isinstance(code, functools.partial):
        code = code.func
    code = getattr(code, "__func__", code)
    named = code if isinstance(getattr(code, "__qualname__", None), str) else type(code)
    name = named.__qualname__.partition(_LOCALS)[0]  # type: ignore[attr-defined]
    return f"{name} in {_pack_of(str(named.__module__))}"


def origins_of(codes: Iterable[object]) -> str:
    """Name each origin once, in the order of `codes`."""
    return ", ".join(dict.fromkeys(map(origin_of, codes)))


def asking_code() -> str:
    """Name the function, and its pack, that has led to the running code; "" where it is neither a node pack's nor one
    of ComfyUI's own nodes.

    Returns:
        Such as "magcache_forward in ComfyUI-MagCache".
    """
    frame = sys._getframe(1)
    while frame is not None:
        code = frame.f_code
        path = code.co_filename
        if "comfy_extras" in path or ("custom_nodes" in path and not _is_ours(path)):
            name = getattr(code, "co_qualname", code.co_name).partition(_LOCALS)[0]  # no co_qualname in Python 3.10
            return f"{name} in {_pack_of(path)}"
        frame = frame.f_back  # type: ignore[assignment]
    return ""


def _is_ours(path: str) -> bool:
    return _PACK in Path(os.path.realpath(path)).parents


def _pack_of(module: str) -> str:
    """The name of the pack that a module, or the path of a file, belongs to; of ComfyUI's own the module's name."""
    if found := _IN_CUSTOM_NODES.search(module):
        return found[1]
    return f"comfy_extras.{Path(module).stem}" if os.sep in module else module
