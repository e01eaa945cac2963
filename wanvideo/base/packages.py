"""Finds out which packages are installed without importing any: importing some packages starts CUDA."""

from __future__ import annotations

import importlib.util
import sys


def has_module(name: str) -> bool:
    """Whether `import name` would find a module."""
    module = sys.modules.get(name)
    if module is not None and module.__spec__ is None:  # made by hand, as xfuser does with flash_attn_3
        return False
    return importlib.util.find_spec(name) is not None
