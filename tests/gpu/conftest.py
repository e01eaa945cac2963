"""Tests on real GPUs: `python3 test_xdit_usp.py -m gpu` on a machine that has some."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

HERE = Path(__file__).resolve().parent


def pytest_collection_modifyitems(items):
    """Mark what lies in this folder, and skip it where there are too few GPUs."""
    found = torch.cuda.device_count()
    for item in items:
        if HERE not in Path(item.fspath).parents:
            continue
        item.add_marker(pytest.mark.gpu)
        given = item.callspec.params if hasattr(item, "callspec") else {}
        needed = given["shared"].gpus if "shared" in given else getattr(given.get("plan"), "num_gpus", 1)
        if found < needed:
            item.add_marker(pytest.mark.skip(reason=f"needs {needed} CUDA GPUs, this machine has {found}"))
