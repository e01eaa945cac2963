"""Whether weights and results are numbers: neither NaN nor infinite."""

from __future__ import annotations

import torch

from .quantized import QuantizedWeight, Weight, as_tensor

_FIRST = {
    torch.float64: 0x7FF0 << 48,
    torch.float32: 0x7F80 << 16,
    torch.float16: 0x7C00,
    torch.bfloat16: 0x7F80,
    torch.float8_e5m2: 0x7C,
    torch.float8_e4m3fn: 0x7F,  # has no infinity
}
"""The bits, as an integer, of the smallest positive value of a type that is no number."""
_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def is_finite(weight: Weight) -> bool:
    """Whether no number of a weight or of another tensor is NaN or infinite; on a GPU, waits for the answer."""
    parts = list(weight.components().values()) if isinstance(weight, QuantizedWeight) else [weight]
    if any(part.dtype == torch.uint8 for part in parts):  # bytes with scales among them
        parts = [as_tensor(weight, torch.bfloat16)]
    return all(_is_finite(part) for part in parts if part.dtype.is_floating_point)


def _is_finite(numbers: torch.Tensor) -> bool:
    first = _FIRST.get(numbers.dtype)
    if first is None or numbers.device.type != "cpu" or not numbers.numel():
        return bool(numbers.float().isfinite().all())
    # As integers, values that are no numbers are the largest of either sign; isfinite takes ten times as long.
    bits = numbers.detach().contiguous().view(_INTEGERS[numbers.dtype.itemsize]).numpy()
    sign = 1 << (8 * bits.dtype.itemsize - 1)
    return int(bits.max()) < first and int(bits.view(f"u{bits.dtype.itemsize}").max()) < first + sign
