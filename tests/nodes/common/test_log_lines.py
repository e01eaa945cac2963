"""What ComfyUI's console shows of this pack: lines with the pack's name, and errors by a name that reads well."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest
import testkit  # noqa: F401 (registers wan_parallel)
from wan_parallel.nodes.common.log_lines import name_the_pack
from wan_parallel.nodes.common.refusals import WrongVariant
from wan_parallel.nodes.common.settings import SettingsError
from wan_parallel.wanvideo.base.user_error import InputError, UserError

PACKAGE = "/home/me/ComfyUI/custom_nodes/wan-parallel"


@pytest.fixture
def named() -> Iterator[None]:
    """The pack as ComfyUI imports it, twice."""
    name_the_pack(PACKAGE)
    name_the_pack(PACKAGE)
    yield
    logger = logging.getLogger(PACKAGE)
    logger.handlers.clear()
    logger.propagate = True


@pytest.fixture
def shown() -> Iterator[list[logging.LogRecord]]:
    """What the root logger's handlers get, as ComfyUI's do."""
    records: list[logging.LogRecord] = []
    handler = logging.Handler()
    handler.emit = records.append
    logging.getLogger().addHandler(handler)
    yield records
    logging.getLogger().removeHandler(handler)


def test_a_line_of_the_pack_names_the_pack_once(named, shown):
    log = logging.getLogger(f"{PACKAGE}.distributed.client.pool")
    log.warning("%d workers are up at 100 %%.", 2)
    try:
        raise KeyError("blocks")
    except KeyError:
        log.exception("It failed.")
    texts = [record.getMessage() for record in shown]
    assert texts == ["[WanParallel] 2 workers are up at 100 %.", "[WanParallel] It failed."]
    assert [record.levelname for record in shown] == ["WARNING", "ERROR"]
    assert shown[1].exc_info is not None


def test_lines_of_others_are_left_alone(named, shown):
    logging.getLogger("comfy").warning("loaded completely")
    assert [record.getMessage() for record in shown] == ["loaded completely"]


@pytest.mark.parametrize("kind", [WrongVariant, SettingsError, InputError, *UserError.__subclasses__()])
def test_an_error_is_shown_behind_the_name_of_the_pack(kind):
    """ComfyUI shows an error as its class's module, a full stop, and the class's qualified name."""
    assert f"{kind.__module__}.{kind.__qualname__}" == f"WanParallel.{kind.__name__}"
