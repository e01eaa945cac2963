"""FlashAttention-3, out of either of two packages: a build of FlashAttention's hopper folder, or the fa3-fwd wheel.

Both packages register an operator with torch. Their public function also saves the inputs of a backward pass, makes two
empty tensors on the device and looks whether outputs share memory, which takes the host 0.13 ms, three times in a block
that a fast GPU computes in 3 ms. So this module calls the operator itself wherever its arguments are the known ones.
"""

from __future__ import annotations

import importlib
import inspect
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..base.packages import has_module

Forward = Callable[..., "tuple[Tensor, Tensor]"]
"""(q, k, v) [B, S, H, D], and by name `q_descale`, `k_descale` and `v_descale` [B, H] where they are fp8, to the output
and its log-sum-exp [B, H, S_q]."""

_ARGUMENTS = {"q_descale", "k_descale", "v_descale", "softmax_scale", "num_splits"}


def installed() -> bool:
    """Whether a package that has FlashAttention-3 is installed."""
    return _has_build() or has_module("fa3_fwd_interface")


def dtypes() -> frozenset[torch.dtype]:
    """The types in which the package computes plain attention. The fa3-fwd wheel was built without float16."""
    return frozenset({torch.float16, torch.bfloat16} if _has_build() else {torch.bfloat16})


def load() -> Forward:
    """The forward of the installed package; a build of the hopper folder comes before the wheel.

    Raises:
        ImportError: neither package is installed, or its import fails.
    """
    build = _has_build()
    module = importlib.import_module("flash_attn_interface" if build else "fa3_fwd_interface")
    operator = _operator("flash_attn_3" if build else "fa3_fwd")
    return _of_function(module.flash_attn_func) if operator is None else _of_operator(operator)


def _has_build() -> bool:
    """Whether a build of the hopper folder is installed; PyPI's `flash-attn-interface` is only an empty placeholder."""
    return has_module("flash_attn_interface") and has_module("flash_attn_3")


def _operator(library: str) -> Any:
    """The package's operator; None if it has none, or another one than we know."""
    packet = getattr(getattr(torch.ops, library), "fwd", None)
    if packet is None or "default" not in packet.overloads():
        return None
    schema = packet.default._schema
    names = [argument.name for argument in schema.arguments]
    known = names[:3] == ["q", "k", "v"] and set(names) >= _ARGUMENTS and len(schema.returns) >= 2
    return packet.default if known else None


def _of_operator(operator: Any) -> Forward:
    def forward(q: Tensor, k: Tensor, v: Tensor, **scales: Tensor) -> tuple[Tensor, Tensor]:
        # its own default lets a heuristic split the keys, the public function's does not
        out, lse, *_ = operator(q, k, v, softmax_scale=1 / math.sqrt(q.shape[-1]), num_splits=1, **scales)
        return out, lse

    return forward


def _of_function(function: Callable[..., Any]) -> Forward:
    # early builds have no such argument and always give the pair
    asks = {"return_attn_probs": True} if "return_attn_probs" in inspect.signature(function).parameters else {}

    def forward(q: Tensor, k: Tensor, v: Tensor, **scales: Tensor) -> tuple[Tensor, Tensor]:
        out, lse, *_ = function(q, k, v, **asks, **scales)
        return out, lse

    return forward
