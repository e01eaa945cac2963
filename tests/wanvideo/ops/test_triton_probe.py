"""Triton's kernels are used only where they have run once; where they fail, a warning says what to install."""

from __future__ import annotations

import logging
import sys
from types import ModuleType

import pytest
import torch
from wan_parallel.wanvideo.ops import triton_probe

CUDA = torch.device("cuda")


def kernels(monkeypatch: pytest.MonkeyPatch, problem: Exception | None = None) -> ModuleType:
    """A module of kernels that work, or fail with `problem`, where Triton is installed."""
    module = ModuleType("stand_in_kernels")

    def try_out(device: torch.device) -> None:
        if problem:
            raise problem

    module.try_out = try_out
    monkeypatch.setitem(sys.modules, "stand_in_kernels", module)
    monkeypatch.setattr(triton_probe, "find_spec", lambda name: object())
    return module


def test_kernels_that_work_are_used(monkeypatch):
    module = kernels(monkeypatch)
    assert triton_probe.tried_out("stand_in_kernels", "", CUDA) is module


def test_a_failure_is_told_in_a_line_with_what_to_install(monkeypatch, caplog):
    kernels(monkeypatch, OSError("gcc: not found\nand a long trace"))
    with caplog.at_level(logging.WARNING):
        assert triton_probe.tried_out("stand_in_kernels", "", CUDA) is None
    assert "['gcc: not found']). Install gcc and Python's headers" in caplog.text


def test_nothing_is_imported_without_a_gpu_or_without_triton(monkeypatch):
    kernels(monkeypatch)
    assert triton_probe.tried_out("no_such_module", "", torch.device("cpu")) is None
    monkeypatch.setattr(triton_probe, "find_spec", lambda name: None)
    assert triton_probe.tried_out("no_such_module", "", CUDA) is None
