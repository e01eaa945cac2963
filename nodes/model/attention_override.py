"""The attention that nodes ask of a MODEL, translated for the workers: sparse attention, and the dense kernel below it.

ComfyUI has one hook for both, the transformer option `optimized_attention_override`: a function that ComfyUI's own
models call in place of attention. Such a function cannot run in the workers. The functions of ComfyUI's own nodes are
recognised by the variables that they enclose, and their settings are read; any other is refused.

Our own node leaves its settings under an option of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from types import FunctionType
from typing import Any

from ...distributed.protocol.specs import ModelSpec
from ...wanvideo.base.attention_choice import AttentionChoice, SparseSettings
from ...wanvideo.model.fp8_mode import ATTENTION
from ..common import refusals
from ..common.origin import origin_of

SPARSE = "wan_parallel_sparse_attention"
"""The transformer option in which XDit+USP Sparse Attention leaves a `SparseWindow`."""
_HOOK = "optimized_attention_override"
_STOCK_SETTINGS = ("tau", "topk_ratio", "extra_tokens", "sigma_start", "sigma_end", "dense_blocks", "min_tokens", "vsa")
_STOCK_KERNELS = {
    "attention_pytorch": "sdpa",
    "attention_comfy_kitchen_int8": "comfy_kitchen_int8",
}
"""Our kernels by the names of ComfyUI's functions (comfy/ldm/modules/attention.py)."""


@dataclass(frozen=True)
class SparseWindow:
    """Settings of our node: those of sparse attention, and the part of the sampling run in which they hold.

    Args:
        start, end: from 0 to 1.
    """

    settings: SparseSettings
    start: float
    end: float

    def settled(self, percent_to_sigma: Callable[[float], float]) -> SparseSettings:
        """The settings with the sigmas of a model's sampling."""
        first, last = (float(percent_to_sigma(percent)) for percent in (self.start, self.end))
        return replace(self.settings, sigma_start=first, sigma_end=last)


def attention_choice(options: Mapping[str, Any], percent_to_sigma: Callable[[float], float]) -> AttentionChoice:
    """The attention that ComfyUI's transformer options ask for.

    Raises:
        NotOnWorkers: an option asks for attention that the workers do not have.
    """
    window, choice = options.get(SPARSE), _of_hook(options.get(_HOOK))
    if window is not None:
        if choice.sparse is not None:
            refusals.refuse(
                "Both Model Sparse Attention and XDit+USP Sparse Attention set sparse attention", "Remove one of them."
            )
        choice = replace(choice, sparse=window.settled(percent_to_sigma))
    sigmas = options.get("sigmas")
    return replace(choice, sigma=None if sigmas is None or choice.sparse is None else float(sigmas[0]))


def refuse_attention(choice: AttentionChoice, spec: ModelSpec, exact: bool) -> None:
    """Refuse attention that the model cannot have beside its settings.

    Args:
        exact: whether all forwards of the MODEL are exact.

    Raises:
        NotOnWorkers: forwards use keys of the step before, or fp8_mode has a kernel of its own.
    """
    if choice.sparse is not None and not exact:
        refusals.refuse(
            "Sparse attention needs the keys of all tokens, and DistriFusion and PipeFusion keep stale ones",
            "Use XDit+USP WanVideo Model Loader with pipeline_mode exact, or remove the sparse attention node.",
        )
    if choice.kernel and spec.fp8_mode == ATTENTION:
        refusals.refuse(
            f"Model Attention Backend asks for {choice.kernel}, and fp8_mode is {ATTENTION}, which has a kernel of its "
            "own",
            "Remove that node, or set fp8_mode to linear.",
        )


def _of_hook(override: object) -> AttentionChoice:
    """What an attention override does, and the overrides below it to which it leaves the rest."""
    choice, below = AttentionChoice(), override
    while below is not None:
        enclosed = _enclosed(below)
        patch: Any = enclosed.get("patch")
        function: Any = enclosed.get("optimized_attention")
        if type(patch).__name__ == "SparseAttnPatch" and "previous" in enclosed:
            if choice.sparse is not None:
                refusals.refuse("Two Model Sparse Attention nodes follow each other", "Remove one of them.")
            choice, below = replace(choice, sparse=_stock_settings(patch)), enclosed["previous"]
        elif getattr(function, "__name__", "") in _STOCK_KERNELS:
            choice, below = replace(choice, kernel=_STOCK_KERNELS[function.__name__]), None
        else:
            _refuse_unknown(function or below)
    return choice


def _enclosed(function: object) -> dict[str, Any]:
    """The variables that a function encloses, by name; nothing for any other object."""
    if not isinstance(function, FunctionType) or function.__closure__ is None:
        return {}
    cells = zip(function.__code__.co_freevars, function.__closure__, strict=True)
    return {name: cell.cell_contents for name, cell in cells}


def _stock_settings(patch: Any) -> SparseSettings:
    """The settings of ComfyUI's Model Sparse Attention."""
    missing = [name for name in _STOCK_SETTINGS if not hasattr(patch, name)]
    if missing:
        refusals.refuse(
            f"Model Sparse Attention of this ComfyUI lacks the settings {', '.join(missing)}, so it is not understood",
            "Use XDit+USP Sparse Attention in its place, or update WanParallel.",
        )
    if patch.vsa:
        refusals.refuse(
            "Model Sparse Attention is set to vsa, which is for models trained with it, and no Wan model is",
            "Set its method to sol-attn or sla.",
        )
    return SparseSettings(
        tau=float(patch.tau),
        keep=float(patch.topk_ratio),
        extra_tokens=int(patch.extra_tokens),
        sigma_start=float(patch.sigma_start),
        sigma_end=float(patch.sigma_end),
        dense_blocks=tuple(sorted(int(block) for block in patch.dense_blocks)),
        min_tokens=int(patch.min_tokens),
    )


def _refuse_unknown(function: object) -> None:
    """Refuse attention of other nodes, which name themselves only by the function."""
    refusals.refuse(
        f"A node replaces attention by a function of its own ({_HOOK} by {origin_of(function)})",
        "Remove that node, and choose attention_mode in XDit+USP WanVideo Model Loader, or use "
        "XDit+USP Sparse Attention.",
    )
