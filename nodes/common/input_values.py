"""Checks the values of a node's inputs against the inputs in its schema. Imports no ComfyUI.

ComfyUI checks the widgets of a prompt. It does not check values that come over a link, numbers that are NaN, the values
of sockets, or any input that the node's validate_inputs names.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from numbers import Integral, Real
from typing import Any, NoReturn

import torch

from ...wanvideo.base.inputs import OVERFLOW, check_numbers
from ...wanvideo.base.user_error import InputError, shown

Input = Any
"""An input of a ComfyUI schema: `id`, `optional`, `get_io_type()`, and the limits `min`, `max` or `options`."""

FILE_INPUTS = frozenset({"model", "vace_model"})
"""Choices that are names of model files, which are checked with the file (see model_files.py)."""
_MOST = 24  # choices in a sentence


def checked_values(inputs: Iterable[Input], values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values of a node's inputs, where all are what the inputs allow.

    Args:
        values: by the ids of inputs; an optional socket may have None.

    Raises:
        InputError: a value is not allowed. The text names its input, and says what is.
    """
    known = {given.id: given for given in inputs}
    return {name: _checked(known[name], value) for name, value in values.items() if name in known}


def _checked(given: Input, value: Any) -> Any:
    check = _CHECKS.get(str(given.get_io_type()))
    if check is None or (value is None and given.optional and check in _SOCKETS):
        return value
    return check(given, value)


def _whole_number(given: Input, value: Any) -> int:
    whole = isinstance(value, Integral) and not isinstance(value, bool)
    if not whole or not given.min <= int(value) <= given.max:
        _refuse(given, value, f"Set it to a whole number from {given.min} to {given.max}")
    return int(value)


def _number(given: Input, value: object) -> float:
    try:
        number = float(value) if isinstance(value, Real) and not isinstance(value, bool) else math.nan
    except OverflowError:
        number = math.inf
    if not given.min <= number <= given.max:  # false for NaN
        _refuse(given, value, f"Set it to a number from {given.min:g} to {given.max:g}")
    return number


def _switch(given: Input, value: object) -> bool:
    if not isinstance(value, bool):
        _refuse(given, value, "Set it to true or false")
    return value


def _choice(given: Input, value: object) -> str:
    if given.id in FILE_INPUTS:
        if not isinstance(value, str):
            _refuse(given, value, "Choose a file from its list")
        return value
    if not isinstance(value, str) or value not in given.options:
        choices = [str(option) for option in given.options]
        more = ["..."] if len(choices) > _MOST else []
        _refuse(given, value, f"Choose one of: {', '.join(choices[:_MOST] + more)}")
    return value


def _text(given: Input, value: object) -> str:
    if not isinstance(value, str):
        _refuse(given, value, "Write a text there")
    return value


def _latent(given: Input, value: Any) -> object:
    samples = value.get("samples") if isinstance(value, Mapping) else None
    if not isinstance(samples, torch.Tensor):
        _refuse(given, value, "Connect a sampler, VAE Encode, or a node that makes an empty latent")
    check_numbers(f"The latent at {given.id}", samples, OVERFLOW)
    mask = value.get("noise_mask")
    if mask is not None:
        if not isinstance(mask, torch.Tensor):
            _refuse(given, mask, "Connect a latent whose mask is made by Set Latent Noise Mask", "The noise_mask of ")
        check_numbers(f"The noise_mask of {given.id}", mask)
    return value


def _image(given: Input, value: object) -> object:
    if not isinstance(value, torch.Tensor) or value.ndim != 4 or value.shape[-1] < 3:
        _refuse(given, value, "Connect images, which are tensors of [frames, height, width, 3]")
    check_numbers(f"The video at {given.id}", value)
    return value


def _conditioning(given: Input, value: object) -> object:
    entries = value if isinstance(value, Sequence) and not isinstance(value, str) else ()
    if not entries or not all(_is_condition(entry) for entry in entries):
        _refuse(given, value, "Connect a text encoder, such as CLIP Text Encode")
    for tensor, _ in entries:
        check_numbers(f"The text at {given.id}", tensor)
    return value


def _is_condition(entry: object) -> bool:
    if not isinstance(entry, Sequence) or len(entry) != 2:
        return False
    return isinstance(entry[0], torch.Tensor) and isinstance(entry[1], Mapping)


def _refuse(given: Input, value: object, remedy: str, what: str = "") -> NoReturn:
    raise InputError(f"{what}{given.id} cannot be {shown(value)}. {remedy}.")


_SOCKETS = (_latent, _image, _conditioning)
_CHECKS: Mapping[str, Callable[[Input, Any], Any]] = {
    "INT": _whole_number,
    "FLOAT": _number,
    "BOOLEAN": _switch,
    "COMBO": _choice,
    "STRING": _text,
    "LATENT": _latent,
    "IMAGE": _image,
    "CONDITIONING": _conditioning,
}
