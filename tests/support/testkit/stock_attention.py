"""Attention overrides as ComfyUI's own nodes make them, for tests on ComfyUIs that have no such nodes, and on none."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


class SparseAttnPatch:
    """The settings that ComfyUI's Model Sparse Attention keeps, under its names."""

    def __init__(self, **changes: Any):
        self.tau, self.topk_ratio, self.extra_tokens, self.vsa = 1.3, 0.0, 256, False
        self.sigma_start, self.sigma_end, self.min_tokens, self.dense_blocks = 0.9, 0.0, 12288, set()
        self.sink_conditioning, self.verbose = "exact_kv_and_rows", False
        vars(self).update(changes)


def sparse_override(patch: SparseAttnPatch, previous: Callable | None = None) -> Callable:
    """What Model Sparse Attention sets, over what was set before."""

    def override(func: Callable, *args: Any, **kwargs: Any) -> Any:
        assert patch.tau is not None
        return func(*args, **kwargs) if previous is None else previous(func, *args, **kwargs)

    return override


def kernel_override(optimized_attention: Callable) -> Callable:
    """What Model Attention Backend sets."""

    def optimized_attention_override(_: Callable, *args: Any, **kwargs: Any) -> Any:
        return optimized_attention(*args, **kwargs)

    return optimized_attention_override


def attention_pytorch(*_args: Any, **_kwargs: Any) -> None:
    """Named as ComfyUI's function."""


def attention_comfy_kitchen_int8(*_args: Any, **_kwargs: Any) -> None:
    """Named as ComfyUI's function."""
