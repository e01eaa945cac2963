"""Workers load the file that was queued and no other, and say so when a file that they have mapped is written."""

from __future__ import annotations

import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from testkit import tiny
from wan_parallel.distributed.protocol.specs import ModelSpec
from wan_parallel.wanvideo.base.tensor_info import CheckpointError
from wan_parallel.wanvideo.checkpoint.weight_source import file_stamp
from wan_parallel.wanvideo.model.model import WanModel


def queued(path: Path) -> ModelSpec:
    """The spec of the file as it is now, as the loader makes it."""
    return ModelSpec(str(path), "fp32", "fp32", stamp=file_stamp(str(path)))


def assert_runs(pool, path: Path) -> None:
    given = tiny.inputs()
    assert tiny.relative_error(pool.forward(queued(path), *given), WanModel.from_checkpoint(str(path))(*given)) <= 2e-6


@pytest.mark.parametrize("config", [tiny.TINY, replace(tiny.TINY, ffn_dim=768)], ids=["same", "other"])
def test_a_file_that_is_replaced_between_header_and_load_is_refused(pool_of, tmp_path, checkpoint, config):
    pool, path = pool_of(2), Path(shutil.copy(checkpoint, tmp_path / "wan.safetensors"))
    spec, before = queued(path), path.stat()
    pool.check(spec)
    other = tmp_path / "other.safetensors"
    tiny.write_checkpoint(other, config, seed=3)
    os.utime(other, ns=(before.st_atime_ns, before.st_mtime_ns))
    other.replace(path)
    with pytest.raises(CheckpointError, match=r"wan\.safetensors changed after it was queued\. Queue the prompt again"):
        pool.forward(spec, *tiny.inputs())
    assert_runs(pool, path)
    pool.unload()


def test_a_file_that_is_written_while_loaded_gives_no_result(pool_of, tmp_path, checkpoint):
    pool, path = pool_of(2), Path(shutil.copy(checkpoint, tmp_path / "wan.safetensors"))
    spec = queued(path)
    pool.forward(spec, *tiny.inputs())
    with open(path, "r+b") as file:
        file.seek(-4_000, os.SEEK_END)
        file.write(bytes(4_000))
    for _ in range(2):
        with pytest.raises(CheckpointError, match="changed while it was in use") as error:
            pool.forward(spec, *tiny.inputs())
        assert tiny.sentences(str(error.value)) == 2
    assert_runs(pool, path)
    pool.unload()
