"""Files that once blocked the reader, or were read as something else than they were when chosen."""

from __future__ import annotations

import json
import os
import resource
import shutil
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import safetensors
import torch
from safetensors.torch import save_file
from testkit import format_files, tiny
from testkit.hostile import hostile_files
from wan_parallel.wanvideo.base.regular_file import open_regular
from wan_parallel.wanvideo.base.tensor_info import CheckpointError
from wan_parallel.wanvideo.checkpoint.file_header import read_file_header
from wan_parallel.wanvideo.checkpoint.header import read_header
from wan_parallel.wanvideo.checkpoint.mapped_file import MappedFile
from wan_parallel.wanvideo.checkpoint.safetensors_header import read_safetensors
from wan_parallel.wanvideo.checkpoint.weight_source import Checkpoint, file_stamp

WEIGHT = "blocks.0.ffn.0.weight"


def refusal(path: Path) -> str:
    """The message with which the file is refused, soon and without much memory."""
    with hostile_files.harmless(path.parent), pytest.raises(CheckpointError) as error:
        read_header(path)
    assert tiny.sentences(str(error.value)) == 2
    return str(error.value)


# Counts that would be followed for hours.


@pytest.mark.parametrize("item, count", [(4, 2**31), (0, 2**63), (8, 2**60), (9, 2**40), (9, 200_000)])
def test_an_array_longer_than_its_gguf_file_is_refused(tmp_path, item, count):
    path = tmp_path / "bomb.gguf"
    path.write_bytes(hostile_files.gguf_bytes([("x", 9, hostile_files.gguf_array(item, count))], []) + bytes(1_800_000))
    assert "is cut short or its header is corrupt" in refusal(path)


def test_an_array_as_long_as_its_gguf_file_is_passed_over(tmp_path):
    path, count = tmp_path / "vocabulary.gguf", 2**35
    raw = hostile_files.gguf_bytes([("x", 9, hostile_files.gguf_array(0, count))], [])
    with open(path, "wb") as file:
        file.write(raw)
        file.truncate(len(raw) + count)
    assert "is not a Wan video model" in refusal(path)


def test_texts_without_end_in_a_large_gguf_file_are_refused(tmp_path):
    path = tmp_path / "texts.gguf"
    raw = hostile_files.gguf_bytes([("x", 9, hostile_files.gguf_array(8, 2**30))], [])
    with open(path, "wb") as file:
        file.write(raw)
        file.truncate(2**36)
    assert "is cut short or its header is corrupt" in refusal(path)


@pytest.mark.parametrize("counts", [(2**40, 0), (0, 2**40), (60_000, 0), (2**64 - 1, 2**64 - 1)])
def test_more_tensors_or_fields_than_a_gguf_file_has_room_for_are_refused(tmp_path, counts):
    path = tmp_path / "counts.gguf"
    path.write_bytes(hostile_files.gguf_bytes([], [], counts) + bytes(100_000))
    assert "is cut short or its header is corrupt" in refusal(path)


def test_a_gguf_file_for_other_machines_is_refused(tmp_path):
    path = tmp_path / "big.gguf"
    path.write_bytes(b"GGUF" + struct.pack(">IQQ", 3, 0, 0))
    assert "big-endian" in refusal(path)


# What is no file.


@pytest.mark.parametrize("name", ["wan.safetensors", "wan.gguf"])
@pytest.mark.parametrize("make", [os.mkfifo, lambda path: path.symlink_to("/dev/zero"), Path.mkdir])
def test_only_regular_files_are_opened(tmp_path, name, make):
    make(tmp_path / name)
    assert ("holds 0 .safetensors files" if make is Path.mkdir else "is a folder, a pipe or a device") in refusal(
        tmp_path / name
    )


def test_a_file_that_becomes_a_pipe_is_not_waited_for(tmp_path, monkeypatch):
    path, real = tmp_path / "wan.safetensors", tmp_path / "real"
    os.mkfifo(path)
    real.touch()
    before = os.stat(real)
    monkeypatch.setattr(os, "stat", lambda _path: before)
    with hostile_files.harmless(tmp_path), pytest.raises(CheckpointError, match="a pipe or a device"):
        open_regular(str(path))


@pytest.mark.parametrize("name", ["a\0b", "\ud800", "x" * 300, "a/" * 3_000])
def test_names_that_no_file_can_have_are_refused(tmp_path, name):
    assert "Choose" in refusal(tmp_path / f"{name}.safetensors")


# Whatever the safetensors library would refuse when it reads the weights.


def entry(**changes: object) -> dict[str, object]:
    """The entry of two float32 numbers."""
    return {"dtype": "F32", "shape": [2], "data_offsets": [0, 8], **changes}


@pytest.mark.parametrize(
    "header, data",
    [
        ({"a": entry(shape=["2"])}, 8),
        ({"a": entry(shape=[2.0])}, 8),
        ({"a": entry(shape=[True, 2])}, 8),
        ({"a": entry(shape=2)}, 8),
        ({"a": entry(shape=[2**63, 2**63, 0], data_offsets=[0, 0])}, 0),
        ({"a": entry(data_offsets=["0", "8"])}, 8),
        ({"a": entry(data_offsets=[0, 8, 16])}, 16),
        ({"a": entry(data_offsets=[8, 16])}, 16),
        ({"a": entry(), "b": entry(data_offsets=[4, 12])}, 12),
        ({"a": entry(), "b": entry(data_offsets=[16, 24])}, 24),
        ({"a": entry()}, 9),
        ({"a": entry(dtype="F128")}, 8),
        ({"a": entry(dtype="F4", shape=[3], data_offsets=[0, 1])}, 1),
        ({"a": entry(more=float("nan"))}, 8),
        ({"a": entry(), "__metadata__": {"a": 1}}, 8),
        ({"a": entry(), "__metadata__": ["a"]}, 8),
    ],
    ids=str,
)
def test_what_the_library_refuses_is_refused_when_the_header_is_read(tmp_path, header, data):
    path = tiny.write_header(tmp_path / "wan.safetensors", json.dumps(header).encode(), data)
    with pytest.raises(safetensors.SafetensorError), safetensors.safe_open(path, "np"):
        pass
    refusal(path)


def test_duplicate_names_and_deep_values_are_refused(tmp_path):
    text = json.dumps(entry())
    deep = f'{text[:-1]}, "more": {"[" * 1_000}{"]" * 1_000}}}'
    for header in (f'{{"a": {text}, "a": {text}}}', f'{{"a": {deep}}}'):
        assert "is corrupt" in refusal(tiny.write_header(tmp_path / "wan.safetensors", header.encode(), 8))


def test_a_header_of_any_size_is_read_in_bounded_time_and_memory(tmp_path):
    for text in (b"[" * 20_000_000, b'"a":[' + b"[]," * 7_000_000, b'"a":{"shape":[' + b"1" * 20_000_000):
        assert "is corrupt" in refusal_of_large(tiny.write_header(tmp_path / "wan.safetensors", b"{" + text))
    many = b",".join(b'"%d":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}' % i for i in range(200_000))
    assert "is corrupt" in refusal_of_large(tiny.write_header(tmp_path / "wan.safetensors", b"{" + many + b"}"))


def refusal_of_large(path: Path) -> str:
    """As `refusal`, of a file whose header has 20 MB."""
    with hostile_files.harmless(path.parent, 20, 120_000_000), pytest.raises(CheckpointError) as error:
        read_header(path)
    return str(error.value)


# Files that change.


def rewrite(path: Path) -> None:
    """Write other numbers into a file, whose header, size and time of change stay as they are."""
    before = path.stat()
    with open(path, "r+b") as file:
        file.seek(-4_000, os.SEEK_END)
        file.write(bytes(4_000))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def replace_by_another(path: Path) -> None:
    """Put another model under the name of a file, with its size and time of change."""
    before = path.stat()
    other = path.with_name("other")
    tiny.write_checkpoint(other, seed=7)
    os.utime(other, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert other.stat().st_size == before.st_size
    other.replace(path)


@pytest.mark.parametrize("change", [rewrite, replace_by_another])
def test_a_file_with_the_same_size_and_time_is_another_file(tmp_path, checkpoint, change):
    path = Path(shutil.copy(checkpoint, tmp_path / "wan.safetensors"))
    stamp = file_stamp(str(path))
    assert Checkpoint(str(path), stamp=stamp).header.stamp == stamp
    opened = Checkpoint(str(path))
    change(path)
    assert file_stamp(str(path)) != stamp
    with pytest.raises(CheckpointError, match="changed after it was queued") as error:
        Checkpoint(str(path), stamp=stamp)
    assert tiny.sentences(str(error.value)) == 2
    with pytest.raises(CheckpointError, match="changed after its header was read"):
        opened.tensor(WEIGHT)


def test_a_file_that_was_replaced_is_read_on_as_it_was(tmp_path, checkpoint):
    path = Path(shutil.copy(checkpoint, tmp_path / "wan.safetensors"))
    opened = Checkpoint(str(path))
    before = opened.tensor(WEIGHT).clone()
    replace_by_another(path)
    assert torch.equal(opened.tensor(WEIGHT), before)
    opened.check_unchanged()


@pytest.mark.parametrize("name", ["wan.safetensors", "wan.gguf"])
def test_a_file_that_is_written_while_it_is_mapped_is_noticed(tmp_path, checkpoint, name):
    path = tmp_path / name
    if path.suffix == ".gguf":
        format_files.write_gguf(path, "Q8_0")
    else:
        shutil.copy(checkpoint, path)
    opened = Checkpoint(str(path))
    opened.tensor(WEIGHT)
    with open(path, "r+b") as file:
        file.seek(-100, os.SEEK_END)
        file.write(bytes(100))
    for look in (opened.check_unchanged, lambda: opened.tensor("head.modulation")):
        with pytest.raises(CheckpointError, match="changed while it was in use") as error:
            look()
        assert tiny.sentences(str(error.value)) == 2


# Folders.


def sharded(folder: Path, places: dict[str, str]) -> Path:
    """A folder with an index of these places."""
    folder.mkdir()
    save_file({"a": torch.zeros(2)}, folder / "one.safetensors")
    (folder / hostile_files.INDEX).write_text(json.dumps({"weight_map": places}))
    return folder


@pytest.mark.parametrize(
    "shard", ["../outside.safetensors", "{outside}", "..", ".", "", "/dev/zero", "one.safetensors\0"]
)
def test_an_index_names_files_beside_it_alone(tmp_path, shard):
    outside = tmp_path / "outside.safetensors"
    save_file({"a": torch.zeros(2)}, outside)
    folder = sharded(tmp_path / "model", {"a": shard.format(outside=outside)})
    assert "is corrupt" in refusal_in(folder)


def test_an_index_of_tensors_that_its_files_lack_is_refused(tmp_path):
    places = {"a": "one.safetensors", "b": "one.safetensors"}
    assert "lacks 1 of the tensors" in refusal_in(sharded(tmp_path / "model", places))


def test_a_shard_may_be_a_link_as_in_the_caches_of_huggingface_hub(tmp_path):
    folder = sharded(tmp_path / "model", {"a": "one.safetensors"})
    (folder / "one.safetensors").rename(tmp_path / "blob")
    (folder / "one.safetensors").symlink_to(tmp_path / "blob")
    assert read_file_header(str(folder)).tensors["a"].shape == (2,)


def refusal_in(folder: Path) -> str:
    """The message with which a folder is refused; nothing outside of it is opened."""
    with hostile_files.harmless(folder), pytest.raises(CheckpointError) as error:
        read_file_header(str(folder))
    assert tiny.sentences(str(error.value)) == 2
    return str(error.value)


# Limits of the process.


def test_the_lack_of_a_second_descriptor_is_not_blamed_on_the_file(tmp_path):
    path = tmp_path / "model.safetensors"
    save_file({"a": torch.zeros(4)}, path)
    info = read_safetensors(str(path)).tensors["a"]
    identity = read_safetensors(str(path)).identities[str(path)]
    for read in (lambda: read_safetensors(str(path)), lambda: MappedFile(str(path), False, identity).tensor(info)):
        with one_descriptor_left(), pytest.raises(CheckpointError, match="ulimit -n") as error:
            read()
        assert tiny.sentences(str(error.value)) == 2
        read()


@contextmanager
def one_descriptor_left() -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    highest = max(int(descriptor) for descriptor in os.listdir("/proc/self/fd"))
    taken = []
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (highest + 8, hard))
        with pytest.raises(OSError, match="Too many open files"):
            while True:
                taken.append(os.open("/dev/null", os.O_RDONLY))
        os.close(taken.pop())
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        for descriptor in taken:
            os.close(descriptor)
