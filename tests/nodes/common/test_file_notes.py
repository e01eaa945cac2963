"""What the log says about a model's file is said once."""

from __future__ import annotations

import logging

from testkit import tiny
from wan_parallel.nodes.common.file_notes import tell_ignored
from wan_parallel.wanvideo.checkpoint.header import read_header


def test_ignored_tensors_are_named_once_for_each_file(tmp_path, caplog):
    strays = {"freqs": ("F32", (4,)), **{f"vae.{i}.weight": ("F32", (2,)) for i in range(9)}}
    paths = [tiny.write_layout(tmp_path / name, tiny.layout() | strays) for name in ("a.safetensors", "b.safetensors")]
    with caplog.at_level(logging.WARNING):
        for path in paths * 2:
            tell_ignored(read_header(path))
    assert [record.args[:2] for record in caplog.records] == [("a.safetensors", 10), ("b.safetensors", 10)]
    assert "freqs, vae.0.weight" in caplog.text and "and 5 more" in caplog.text


def test_a_plain_file_needs_no_word(tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        tell_ignored(read_header(tiny.write_layout(tmp_path / "wan.safetensors", tiny.layout())))
    assert not caplog.records
