"""What the xfuser path refuses, and how it keeps xfuser in its place. That it is exact, gpu/test_gpu_pool.py says."""

from __future__ import annotations

import logging
import os
import sys

import pytest
import torch
from testkit.tiny import sentences
from wan_parallel.distributed.parallel import xfuser_backend
from wan_parallel.distributed.parallel.xfuser_backend import BackendError, refusal
from wan_parallel.distributed.plan.degrees import SequenceDegrees
from wan_parallel.wanvideo.attention.kernels import AttentionKernel, get_kernel

KERNEL = get_kernel("sdpa", torch.device("cpu"), torch.float32)
WITHOUT_LSE = AttentionKernel("sageattn", KERNEL.forward, has_lse=False, lossy=True)


@pytest.mark.parametrize(
    "kernel, degrees, tokens, heads, reason",
    [
        (KERNEL, SequenceDegrees(8, 1), 75600, 12, "12 heads do not divide by Ulysses 8"),
        (KERNEL, SequenceDegrees(2, 2), 4095, 12, "4095 tokens do not divide by 4 GPUs"),
        (WITHOUT_LSE, SequenceDegrees(2, 2), 4096, 12, "gives no log-sum-exp, which a ring needs"),
    ],
)
def test_what_xfuser_cannot_share_is_refused(kernel, degrees, tokens, heads, reason):
    text = refusal(kernel, degrees, tokens, heads)
    assert reason in text and sentences(text) == 2


@pytest.mark.parametrize(
    "kernel, degrees, tokens, heads",
    [
        (KERNEL, SequenceDegrees(4, 2), 75600, 12),
        (KERNEL, SequenceDegrees(1, 8), 75600, 13),
        (WITHOUT_LSE, SequenceDegrees(4, 1), 4096, 12),
    ],
)
def test_what_xfuser_can_share_is_let_through(kernel, degrees, tokens, heads):
    assert refusal(kernel, degrees, tokens, heads) is None


def test_the_cpu_is_refused():
    with pytest.raises(BackendError, match="Set usp_backend to native for the CPU"):
        xfuser_backend.join_group(SequenceDegrees(2, 1), torch.device("cpu"))


@pytest.fixture
def fake_xfuser(tmp_path, monkeypatch):
    """Writes a package `xfuser` whose import runs `source`."""
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(xfuser_backend, "_imported", [])

    def write(source: str) -> None:
        (tmp_path / "xfuser").mkdir()
        (tmp_path / "xfuser" / "__init__.py").write_text(source)

    yield write
    for name in [name for name in sys.modules if name.split(".")[0] == "xfuser"]:
        del sys.modules[name]


def test_a_missing_package_is_named_with_its_install_line(monkeypatch):
    monkeypatch.setattr(xfuser_backend, "_imported", [])
    monkeypatch.setattr(xfuser_backend, "installed", lambda: False)
    with pytest.raises(BackendError, match=r"xfuser is not installed\. Run .*--with-xfuser"):
        xfuser_backend.join_group(SequenceDegrees(2, 1), torch.device("cuda", 0))


@pytest.mark.parametrize(
    "source", ["import a_module_that_is_not_there", "raise NotImplementedError('No Accelerators')"]
)
def test_an_xfuser_that_does_not_import_says_why(fake_xfuser, source):
    fake_xfuser(source)
    with pytest.raises(BackendError, match="is installed but can't be imported"):
        xfuser_backend.join_group(SequenceDegrees(2, 1), torch.device("cuda", 0))


TALKATIVE = """
import logging, os, sys
logger = logging.getLogger("xfuser.talk")
logger.propagate = False
logger.addHandler(logging.StreamHandler(sys.stdout))
logger.setLevel(getattr(logging, os.environ.get("LOG_LEVEL", "debug").upper()))
logger.debug("chatter")
"""


def test_xfuser_keeps_off_stdout(fake_xfuser, monkeypatch, capsys):
    monkeypatch.delenv("LOG_LEVEL", raising=False)
    fake_xfuser(TALKATIVE)
    with pytest.raises(BackendError):
        xfuser_backend._modules()  # the stand-in has none of the real one's parts
    logging.getLogger("xfuser.talk").warning("more chatter")
    assert capsys.readouterr().out == ""
    assert logging.getLogger("xfuser.talk").propagate
    assert "LOG_LEVEL" not in os.environ
