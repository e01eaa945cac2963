"""For tests of kernels that dequantise: on a GPU, and in Triton's interpreter, which needs none."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType

import pytest
import torch
from wan_parallel.wanvideo.ops import pointwise

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = torch.device("cpu" if INTERPRETED else "cuda")

on_triton = [] if INTERPRETED else [pytest.mark.gpu]
on_triton.append(
    pytest.mark.skipif(not (INTERPRETED or torch.cuda.is_available()), reason="Triton's kernels run on a CUDA GPU")
)


def kernels_of(module: str) -> ModuleType:
    """A module of wanvideo/quant/ that has kernels."""
    if not (INTERPRETED or pointwise.use_triton(DEVICE)):
        pytest.skip("Triton does not work on this machine")
    return import_module(f"wan_parallel.wanvideo.quant.{module}")


def assert_same_bits(kernels: ModuleType, weight: object, dtype: torch.dtype) -> None:
    """A weight comes out of the kernels as out of plain torch."""
    got, expected = kernels.dequantize(weight, dtype), weight.dequantize_by_torch(dtype).contiguous()
    assert got.dtype == dtype and got.shape == expected.shape and got.is_contiguous()
    bits = torch.int32 if dtype == torch.float32 else torch.int16
    expected_bits = expected.view(bits)
    if INTERPRETED and dtype == torch.bfloat16:  # which cuts off what it should round
        expected = weight.dequantize_by_torch(torch.float32).contiguous()
        expected_bits = (expected.view(torch.int32) >> 16).to(bits)
    assert ((got.view(bits) == expected_bits) | (got.isnan() & expected.isnan())).all()


def run_interpreted(file: str) -> None:
    """Run a file of tests in the interpreter, where Triton is installed."""
    if INTERPRETED or find_spec("triton") is None:
        pytest.skip("in it already" if INTERPRETED else "triton is not installed")
    command = [sys.executable, "-W", "ignore", "-m", "pytest", "-q", "-p", "no:cacheprovider", file]
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=170)
    assert done.returncode == 0 and "passed" in done.stdout, done.stdout
