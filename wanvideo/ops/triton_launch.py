"""Launching a Triton kernel a second time without Triton looking at every argument again.

`kernel[grid](...)` examines each argument anew and reads Triton's settings from the environment. That takes a slow
host 60 to 100 us, a dozen times in a block that four fast GPUs compute in 3 ms. A kernel compiled for arguments of the
same types, values and alignment can be launched again without all this.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton

_KEPT = 1024
"""The number of kinds of launches that are remembered; a model at one resolution has about twenty."""
_ALIGNED = 16
"""Bytes by which addresses are divisible in kernels that Triton compiles for aligned ones."""
_TAKES_ALL = tuple(int(part) for part in triton.__version__.split(".")[:2]) >= (3, 3)
"""Whether a compiled kernel is launched with all arguments; older Triton launches it without the constants."""


class KernelLauncher:
    """A kernel whose parameters are tensors, then numbers, then constants.

    Args:
        options: of the compiler.
    """

    def __init__(self, kernel: Any, **options: Any):
        self._kernel, self._options = kernel, options
        self._compiled: dict[tuple, Any] = {}

    def __call__(
        self, grid: Sequence[int], tensors: Sequence[torch.Tensor], numbers: tuple, constants: tuple, num_warps: int = 4
    ) -> None:
        """Launch the kernel on the current stream of the tensors' device, which must be the current device."""
        device = tensors[0].device.index
        kinds = tuple([(tensor.dtype, tensor.data_ptr() % _ALIGNED == 0) for tensor in tensors])
        key = (device, kinds, numbers, constants, num_warps)
        compiled = self._compiled.get(key)
        if compiled is not None:
            compiled[(*grid, 1, 1)[:3]](*tensors, *numbers, *constants)
            return
        compiled = self._kernel[tuple(grid)](*tensors, *numbers, *constants, num_warps=num_warps, **self._options)
        if _TAKES_ALL and compiled is not None:  # None where Triton interprets
            if len(self._compiled) >= _KEPT:
                self._compiled.clear()
            self._compiled[key] = compiled
