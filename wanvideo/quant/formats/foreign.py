"""Quantised formats of other programs, recognised by the names of their tensors so that a refusal can name them."""

from __future__ import annotations

from collections.abc import Iterable

_FORMATS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("svdq (nunchaku's SVDQuant)", (".wscales", ".wtscale", ".smooth_factor", ".smooth_factor_orig", ".wzeros")),
    ("bitsandbytes' nf4 or fp4", (".absmax", ".quant_map", "bitsandbytes__nf4", "bitsandbytes__fp4")),
    ("bitsandbytes' int8", (".SCB",)),
    ("quanto (as Wan2GP writes it)", (".weight._data", ".weight._scale", ".weight.qdata")),
    ("torchao's", ("._weight_qdata", ":_data", ":tensor_impl", ":qdata")),
    ("compressed-tensors", (".weight_packed",)),
    ("HQQ", (".W_q",)),
    ("GPTQ", (".g_idx",)),
    ("AWQ", (".qzeros", ".qweight")),
    ("SDNQ", (".svd_up", ".zero_point")),
    ("block-scaled fp8 (weight_scale_inv)", (".weight_scale_inv",)),
)
"""The user's name of each format, and ends of names that only its files have; the first format that fits counts."""


def foreign_format(names: Iterable[str]) -> str | None:
    """The name of the format of another program in which a file with tensors of these `names` is; None for others."""
    names = list(names)
    for format, ends in _FORMATS:
        if any(name.endswith(ends) for name in names):
            return format
    return None
