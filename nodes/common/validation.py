"""The answers that several nodes give to ComfyUI's validate_inputs and fingerprint_inputs.

ComfyUI gives None for an input that is linked to another node: its value is known in `execute` only, which checks it.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import Any, Protocol

from ...wanvideo.base.tensor_info import CheckpointError
from ...wanvideo.checkpoint.weight_source import file_stamp
from .model_files import model_path
from .settings import SettingsError


class Settings(Protocol):
    """Widgets of a node that can check themselves."""

    def validate(self) -> None:
        """Raise SettingsError where the widgets contradict each other or this machine."""


def check_widgets(settings: Callable[..., Settings], widgets: Mapping[str, Any]) -> bool | str:
    """Check the widgets that a node's settings are made of; True, or what is wrong with them."""
    if None in widgets.values():
        return True
    try:
        settings(**widgets).validate()
    except SettingsError as error:
        return str(error)
    return True


def check_file(read: Callable[[str], object], name: str | None) -> bool | str:
    """Check a model file by reading it; True, or what is wrong with it."""
    if name is None:
        return True
    try:
        read(model_path(name))
    except CheckpointError as error:
        return str(error)
    return True


def file_fingerprint(name: str | None) -> str:
    """The stamp of a model file, as a file that was replaced is another model; "" for one that is not there."""
    path = model_path(name) if name else ""
    return file_stamp(path) if os.path.exists(path) else ""


def new_fingerprint() -> float:
    """The fingerprint of a node that runs with every prompt: it is equal to no other, so ComfyUI takes no old results.

    Each call makes a number of its own, as a tuple takes one and the same object for equal, even where it is NaN.
    """
    return float("nan")
