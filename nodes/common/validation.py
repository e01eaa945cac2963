"""The answers that several nodes give to ComfyUI's validate_inputs and fingerprint_inputs.

ComfyUI gives None for an input that is linked to another node: its value is known in `execute` only, which checks it.
"""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Protocol

from ...wanvideo.base.tensor_info import CheckpointError
from ...wanvideo.base.user_error import InputError
from ...wanvideo.checkpoint.weight_source import file_stamp
from .input_values import Input, checked_values
from .model_files import model_path
from .settings import SettingsError


class Settings(Protocol):
    """Widgets of a node that can check themselves."""

    def validate(self) -> None:
        """Raise SettingsError where the widgets contradict each other or this machine."""


def checks_inputs(execute: Callable[..., Any]) -> Callable[..., Any]:
    """Decorate the `execute` of a node, which then gets only values that the node's schema allows.

    Raises:
        InputError: a value is not allowed (see `checked_values`).
    """

    @functools.wraps(execute)
    def checked(cls: Any, **values: Any) -> Any:
        return execute(cls, **checked_values(cls.define_schema().inputs, values))

    return checked


def check_widgets(inputs: Iterable[Input], settings: Callable[..., Settings], widgets: Mapping[str, Any]) -> bool | str:
    """Check the widgets that make up a node's settings; returns True, or a sentence on what is wrong.

    Args:
        inputs: of the node's schema.
        widgets: of those inputs; where one is linked, the others are checked alone, not together.
    """
    known = {name: value for name, value in widgets.items() if value is not None}
    try:
        known = checked_values(inputs, known)
        if len(known) == len(widgets):
            settings(**known).validate()
    except (InputError, SettingsError) as error:
        return str(error)
    return True


async def check_file(read: Callable[[str], object], name: str | None) -> bool | str:
    """Check a model file by reading its header in a thread, as ComfyUI's server answers nobody meanwhile; returns True,
    or a sentence on what is wrong."""
    return True if name is None else await asyncio.to_thread(_checked, read, name)


def _checked(read: Callable[[str], object], name: str) -> bool | str:
    try:
        read(model_path(name))
    except CheckpointError as error:
        return str(error)
    return True


def file_fingerprint(name: str | None) -> str:
    """Return the stamp of a model file, which changes when the file is replaced; "" for a file that `execute` will
    refuse."""
    try:
        return file_stamp(model_path(name))
    except CheckpointError:
        return ""


def new_fingerprint() -> float:
    """Return the fingerprint of a node that runs with every prompt: NaN, which equals nothing that ComfyUI has stored.

    Each call makes a NaN of its own, as tuples take one and the same object for equal even where it is NaN.
    """
    return float("nan")
