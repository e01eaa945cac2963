"""The lines of this pack in ComfyUI's console, which name the pack. Imports no ComfyUI."""

from __future__ import annotations

import copy
import logging

PREFIX = "[WanParallel] "


class _PrefixedLines(logging.Handler):
    """Passes records on to ComfyUI's own handlers, with `PREFIX` before the text."""

    def emit(self, record: logging.LogRecord) -> None:
        told = copy.copy(record)
        told.msg, told.args = PREFIX + record.getMessage(), ()
        logging.getLogger().handle(told)


def name_the_pack(package: str) -> None:
    """Let all lines that modules of `package` log begin with `PREFIX`; safe to call twice."""
    logger = logging.getLogger(package)
    if not any(isinstance(handler, _PrefixedLines) for handler in logger.handlers):
        logger.addHandler(_PrefixedLines())
        logger.propagate = False
