"""Where code of other packs comes from, in the words that a refusal uses."""

from __future__ import annotations

import functools
import os
import re
import sys
from collections.abc import Iterable
from pathlib import Path

import torch

_PACK = Path(__file__).resolve().parents[2]
_PYTHON, _TORCH = (Path(module.__file__ or "").resolve().parent for module in (os, torch))
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
    """Name the function, and its pack, that has called this pack's running code; "" where it is no node's.

    Returns:
        Such as "magcache_forward in ComfyUI-MagCache".
    """
    frame = sys._getframe(1)
    while _only_passes_on(frame.f_code.co_filename) and frame.f_back is not None:
        frame = frame.f_back
    code = frame.f_code
    if "custom_nodes" not in code.co_filename and "comfy_extras" not in code.co_filename:
        return ""
    name = getattr(code, "co_qualname", code.co_name).partition(_LOCALS)[0]  # Python 3.10 has no co_qualname
    return f"{name} in {_pack_of(code.co_filename)}"


def _only_passes_on(path: str) -> bool:
    """Whether the code in a file acts for others: this pack's, Python's, torch's, and what sets attributes for nodes in
    ComfyUI."""
    file = Path(os.path.realpath(path))
    for_nodes = file.parts[-2:] in (("comfy", "utils.py"), ("comfy", "model_patcher.py"))
    return for_nodes or any(folder in file.parents for folder in (_PACK, _PYTHON, _TORCH))


def _pack_of(module: str) -> str:
    """The name of the pack that a module, or the path of a file, belongs to; of ComfyUI's own the module's name."""
    if found := _IN_CUSTOM_NODES.search(module):
        return found[1]
    return f"comfy_extras.{Path(module).stem}" if os.sep in module else module
