"""Finds out whether Triton works on a device, by running kernels once on small inputs."""

from __future__ import annotations

import logging
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType

import torch

log = logging.getLogger(__name__)


def tried_out(name: str, package: str, device: torch.device) -> ModuleType | None:
    """A module of Triton kernels, imported and run on `device` by its own `try_out(device)`.

    Triton comes with torch's CUDA builds and compiles at the first call, for which it needs a C compiler.

    Args:
        name: of the module, relative to `package`, such as `.pointwise_triton`.

    Returns:
        The module; None without a CUDA device, without Triton, or with a Triton that fails, which is logged.
    """
    if device.type != "cuda" or find_spec("triton") is None:
        return None
    module = import_module(name, package)
    try:
        module.try_out(device)
    except Exception as error:  # a missing compiler, header or driver: Triton has no class of its own for it
        reason = str(error).strip().splitlines()
        log.warning("Triton does not work here (%s). Install gcc and Python's headers for more speed.", reason[:1])
        return None
    return module
