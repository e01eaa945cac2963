"""What the log says once about a model's file: the tensors in the file that no model reads."""

from __future__ import annotations

import functools
import logging
from pathlib import Path

from ...wanvideo.base.tensor_info import listed
from ...wanvideo.checkpoint.header import Header

log = logging.getLogger(__name__)


def tell_ignored(header: Header) -> None:
    """Log the tensors that were ignored in a model's file, once for each file."""
    if header.ignored:
        _tell(header.path, header.ignored)


@functools.cache
def _tell(path: str, names: tuple[str, ...]) -> None:
    log.warning(
        "%s has %d tensors that no Wan model reads. Ignored, as ComfyUI does: %s.",
        Path(path).name,
        len(names),
        listed(list(names)),
    )
