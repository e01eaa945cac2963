"""Files that nobody writes by accident: valid headers with something wrong in them, as strategies of hypothesis.

Each starts from a valid file, as most random bytes are refused by the first check. Some examples change nothing.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import signal
import struct
import sys
import tracemalloc
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, assume, settings
from hypothesis import strategies as st

from testkit import tiny

NUMBERS = (-1, 0, 1, 2, 3, 7, 2**31 - 1, 2**31, 2**32, 2**53, 2**63 - 1, 2**63, 2**64 - 1, 2**64, 10**300)
DEEP: Any = []
for _ in range(150):
    DEEP = [DEEP]
ODD = (*NUMBERS, None, True, False, 1.0, 1.5, float("nan"), float("inf"), "", "3", "F32", "x" * 5_000, [], [[]], [0])
ODD += ([1, 2, 3], {}, {"a": 1}, {"dtype": "F32"}, DEEP)
ODD_NAMES = (
    "",
    "a" * 5_000,
    "\ud800",
    "\0",
    "\x7f",
    "__metadata__",
    "é",
    "\U0001f600",
    "../../etc/passwd",
    "blocks.x.y",
)
ODD_NAMES += ("blocks.99999999999.ffn.0.weight", "blocks.².ffn.0.weight", f"blocks.{'9' * 900}.ffn.0.weight")
ODD_NAMES += (
    "head.modulation",
    "scaled_fp8",
    "blocks.0.ffn.0.comfy_quant",
    "blocks.0.ffn.0.weight_scale",
    "vace_blocks.",
)
ODD_NAMES += ("img_emb.proj.1.weight", "control_adapter.conv.weight", "audio_proj.proj1.weight", "motion_encoder.x")
DTYPES = (
    "F64",
    "F32",
    "F16",
    "BF16",
    "I64",
    "I8",
    "U8",
    "BOOL",
    "F8_E4M3",
    "F8_E5M2",
    "F8_E8M0",
    "F4",
    "F6_E2M3",
    "C64",
)
NOTES = ('{"layers": {}}', '{"layers": {"blocks.0.ffn.0": {"format": "nvfp4"}}}', "[" * 3_000, "{}", "1", "nonsense")
NOTES += ('{"transformer": {"model_type": "i2v"}}', '{"transformer": {"model_type": {}}}', '{"layers": [1]}')
_FORMATS: tuple[Any, ...] = ("nvfp4", "mxfp8", "float8_e4m3fn", "int8_tensorwise", {"format": "int8_tensorwise"}, 3)
_FORMATS += ({"format": "int8_tensorwise", "convrot": True, "convrot_groupsize": []}, {"format": ["nvfp4"]})
_VALID_NAMES = tuple(name for name in ODD_NAMES if name not in ("__metadata__", "\ud800") and len(name) < 1_000)
_BITS = {**dict.fromkeys(("F64", "I64", "C64"), 64), "F32": 32, "F16": 16, "BF16": 16, "F4": 4, "F6_E2M3": 6}
_BITS |= dict.fromkeys(("I8", "U8", "BOOL", "F8_E4M3", "F8_E5M2", "F8_E8M0"), 8)
_LARGEST_FILE = 2**30  # nearly all of it a hole
Header = list[tuple[str, Any]]
Layout = Mapping[str, tuple[str, tuple[int, ...]]]


def seeded(examples: int) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Run a test of hypothesis on this many examples, the same in every run."""
    checks = (
        HealthCheck.too_slow,
        HealthCheck.function_scoped_fixture,
        HealthCheck.data_too_large,
        HealthCheck.filter_too_much,
    )
    return settings(
        max_examples=examples, derandomize=True, database=None, deadline=None, suppress_health_check=[*checks]
    )


# Safetensors.


@st.composite
def other_layouts(draw: st.DrawFn, *files: str | Layout) -> tuple[bytes, int]:
    """A file whose header breaks no rule, with other names, shapes and types than a model of `tiny` or a layout has."""
    chosen = draw(st.sampled_from(files))
    layout = tiny.layout(getattr(tiny, chosen), "F32") if isinstance(chosen, str) else dict(chosen)
    for _ in range(draw(st.integers(1, 3))):
        name = draw(st.sampled_from(sorted(layout)))
        dtype, shape = layout[name]
        shapes = st.lists(st.sampled_from((0, 1, 2, 3, 5, 16, 36, 48, 64, 127, 128, 129, 256, 1280)), max_size=6)
        axis = draw(st.integers(0, max(0, len(shape) - 1)))
        near = (*shape[:axis], draw(st.sampled_from((0, 1, 2, 128, 256, 384))), *shape[axis + 1 :])
        layer = name.rpartition(".")[0]
        match draw(st.sampled_from(("shape", "near", "dtype", "lost", "name", "more", "scale", "note", "layer"))):
            case "shape":
                layout[name] = dtype, tuple(draw(shapes))
            case "near":
                layout[name] = dtype, near
            case "dtype":
                layout[name] = draw(st.sampled_from(DTYPES)), shape
            case "lost":
                del layout[name]
            case "name":
                layout[draw(st.sampled_from((*_VALID_NAMES, f"model.{name}", name + "_")))] = layout.pop(name)
            case "more":
                layout[draw(st.sampled_from(_VALID_NAMES))] = draw(st.sampled_from(DTYPES)), tuple(draw(shapes))
            case "scale":
                end = draw(st.sampled_from(("weight_scale", "scale_weight", "weight_scale_2", "input_scale")))
                layout[f"{layer}.{end}"] = draw(st.sampled_from(DTYPES)), draw(st.sampled_from(((), (1,), shape, near)))
                layout[name] = draw(st.sampled_from(("F8_E4M3", "I8", "U8", dtype))), shape
            case "note":
                layout[f"{layer}.comfy_quant"] = "U8", (draw(st.sampled_from((0, 2, 9, 5_000))),)
            case "layer":
                layout |= {key.replace(".0.", ".7.", 1): value for key, value in layout.items() if layer in key}
    header, end = valid_header(layout)
    assume(end < _LARGEST_FILE)
    if draw(st.booleans()):
        notes = {"blocks.0.ffn.0": draw(st.sampled_from(_FORMATS)), "blocks.0.self_attn.q": draw(st.sampled_from(ODD))}
        noted = {"_quantization_metadata": json.dumps({"layers": notes}), "config": draw(st.sampled_from(NOTES))}
        header[0] = ("__metadata__", noted)
    raw = _dumped(header)
    return struct.pack("<Q", len(raw)) + raw, 8 + len(raw) + end


@st.composite
def safetensors_bytes(draw: st.DrawFn, layout: Layout) -> tuple[bytes, int]:
    """The first bytes of a file with the tensors of `layout` (see `tiny.layout`), changed, and the size of the file."""
    header, end = valid_header(layout)
    for change in draw(st.lists(st.sampled_from(_CHANGES), max_size=3)):
        change(draw, header)
    text = draw(st.sampled_from(_TEXTS))(_dumped(header))
    length = draw(st.sampled_from(NUMBERS)) % 2**64 if draw(_rarely) else len(text)
    raw = (
        _with_wrong_bytes(draw, struct.pack("<Q", length) + text) if draw(_rarely) else struct.pack("<Q", length) + text
    )
    data = draw(st.sampled_from((0, 1, end - 1, end + 1, end // 2, 2 * end))) if draw(_rarely) else end
    return raw, len(raw) + data


def valid_header(layout: Layout) -> tuple[Header, int]:
    """The entries of a header, and the bytes of its tensors."""
    header: Header = [("__metadata__", {"format": "pt"})]
    end = 0
    for name, (dtype, shape) in layout.items():
        nbytes = math.prod(shape) * _BITS[dtype] // 8
        header.append((name, {"dtype": dtype, "shape": list(shape), "data_offsets": [end, end + nbytes]}))
        end += nbytes
    return header, end


_rarely = st.sampled_from((False, False, False, True))


def _dumped(header: Header) -> bytes:
    """JSON that may have a name twice."""
    return "{{{}}}".format(",".join(f"{json.dumps(name)}:{json.dumps(value)}" for name, value in header)).encode()


def _entry(draw: st.DrawFn, header: Header) -> int:
    return draw(st.integers(0, len(header) - 1)) if header else 0


def _odd_field(draw: st.DrawFn, header: Header) -> None:
    value = header[_entry(draw, header)][1]
    if isinstance(value, dict):
        value[draw(st.sampled_from(("dtype", "shape", "data_offsets", "more")))] = draw(st.sampled_from(ODD))


def _odd_number(draw: st.DrawFn, header: Header) -> None:
    value = header[_entry(draw, header)][1]
    numbers = value.get(draw(st.sampled_from(("shape", "data_offsets")))) if isinstance(value, dict) else None
    if isinstance(numbers, list) and numbers:
        place = draw(st.integers(0, len(numbers) - 1))
        near = numbers[place] + draw(st.sampled_from((-1, 1))) if isinstance(numbers[place], int) else 0
        numbers[place] = draw(st.sampled_from((near, *ODD)))


def _other_dtype(draw: st.DrawFn, header: Header) -> None:
    value = header[_entry(draw, header)][1]
    if isinstance(value, dict):
        value["dtype"] = draw(st.sampled_from((*DTYPES, "f32", "F128", "")))


def _same_size(draw: st.DrawFn, header: Header) -> None:
    """Another shape or type with as many bytes, which no reader of safetensors minds."""
    value = header[_entry(draw, header)][1]
    if isinstance(value, dict) and isinstance(value.get("shape"), list):
        shape = value["shape"]
        changed = draw(st.sampled_from((shape[::-1], [1, *shape], [*shape, 1], [1] * 60 + shape)))
        value["shape"] = changed
        value["dtype"] = draw(st.sampled_from((value.get("dtype"), "F16", "BF16", "I16", "U16")))


def _odd_entry(draw: st.DrawFn, header: Header) -> None:
    place = _entry(draw, header)
    header[place] = (header[place][0], draw(st.sampled_from(ODD)))


def _other_name(draw: st.DrawFn, header: Header) -> None:
    place = _entry(draw, header)
    other = header[_entry(draw, header)][0]
    header[place] = (draw(st.sampled_from((other, other + "_", f"model.{other}", *ODD_NAMES))), header[place][1])


def _lost(draw: st.DrawFn, header: Header) -> None:
    if len(header) > 1:
        del header[_entry(draw, header)]


def _swapped(draw: st.DrawFn, header: Header) -> None:
    one, two = header[_entry(draw, header)][1], header[_entry(draw, header)][1]
    if isinstance(one, dict) and isinstance(two, dict):
        one["data_offsets"], two["data_offsets"] = two.get("data_offsets"), one.get("data_offsets")


def _more(draw: st.DrawFn, header: Header) -> None:
    empty = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
    header.append((draw(st.sampled_from((*ODD_NAMES, "extra", header[-1][0]))), draw(st.sampled_from((empty, *ODD)))))


def _noted(draw: st.DrawFn, header: Header) -> None:
    key = draw(st.sampled_from(("config", "_quantization_metadata", "format")))
    header[0] = ("__metadata__", {key: draw(st.sampled_from((*NOTES, *ODD)))})


_CHANGES = (_odd_field, _odd_number, _other_dtype, _same_size, _odd_entry, _other_name, _lost, _swapped, _more, _noted)
_TEXTS: tuple[Callable[[bytes], bytes], ...] = (
    *(lambda text: text,) * 12,
    lambda text: b" \n" + text,
    lambda text: text + b" " * 9,
    lambda text: text + b"\0",
    lambda text: text + text,
    lambda text: b"\xef\xbb\xbf" + text,
    lambda text: text.decode().encode("utf-16"),
    lambda text: text[:-1] + b",}",
    lambda text: text.replace(b"[", b"[" * 40_000, 1),
    lambda text: text.replace(b":", b":NaN,", 1),
    lambda text: text.replace(b'"', b"'"),
    lambda text: text.replace(b"e", b"\\u0065", 5),
    lambda text: text.replace(b"o", b"\\ud800", 1),
)


def _with_wrong_bytes(draw: st.DrawFn, raw: bytes) -> bytes:
    changed = bytearray(raw)
    for _ in range(draw(st.integers(1, 4))):
        place = draw(st.integers(0, max(0, len(changed) - 1)))
        piece = draw(st.binary(max_size=4))
        changed[place : place + draw(st.integers(0, 4))] = piece
    return bytes(changed)


# GGUF.

_GGUF_NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}


def gguf_bytes(
    fields: list[tuple[str, int, bytes]],
    tensors: list[tuple[str, tuple[int, ...], int, int]],
    counts: tuple[int, int] | None = None,
    version: int = 3,
) -> bytes:
    """The header of a GGUF file: `fields` (key, type, encoded value), `tensors` (name, dims, type, offset)."""
    written, there = counts or (len(tensors), len(fields)), b""
    for key, kind, value in fields:
        there += gguf_text(key) + struct.pack("<I", kind & 0xFFFFFFFF) + value
    for name, dims, kind, offset in tensors:
        there += gguf_text(name) + struct.pack("<I", len(dims)) + struct.pack(f"<{len(dims)}Q", *dims)
        there += struct.pack("<IQ", kind, offset)
    return b"GGUF" + struct.pack("<IQQ", version, *written) + there


def gguf_text(text: str, length: int | None = None) -> bytes:
    """A text of GGUF, which may lie about its length."""
    raw = text.encode(errors="surrogatepass")
    return struct.pack("<Q", len(raw) if length is None else length) + raw


def gguf_array(item: int, count: int, content: bytes = b"") -> bytes:
    """An array of GGUF, which may lie about its count."""
    return struct.pack("<IQ", item, count) + content


@st.composite
def gguf_files(draw: st.DrawFn, layout: Layout) -> tuple[bytes, int]:
    """The first bytes of a GGUF file with the tensors of `layout` (all F32), changed, and the size of the file."""
    fields = [("general.architecture", 8, gguf_text("wan")), ("general.quantization_version", 4, struct.pack("<I", 2))]
    tensors, end = [], 0
    for name, (_, shape) in layout.items():
        tensors.append((name, shape[::-1], 0, end))
        end += -(-4 * math.prod(shape) // 32) * 32
    changes = draw(st.lists(st.sampled_from(("tensor", "field", "counts", "version")), max_size=3))
    counts, version = None, 3
    for change in changes:
        if change == "tensor":
            _odd_tensor(draw, tensors)
        elif change == "field":
            fields.insert(draw(st.integers(0, len(fields))), draw(_odd_gguf_field()))
        elif change == "counts":
            odd = st.sampled_from([n for n in NUMBERS if 0 <= n < 2**64] + [len(tensors), len(fields)])
            counts = draw(odd), draw(odd)
        else:
            version = draw(st.sampled_from((0, 1, 2, 3, 4, 0x03000000, 2**32 - 1)))
    raw = gguf_bytes(fields, tensors, counts, version)
    raw = _with_wrong_bytes(draw, raw) if draw(_rarely) else raw
    padded = -(-len(raw) // 32) * 32
    size = (
        padded + end if draw(_rarely) is False else draw(st.sampled_from((padded + end // 2, padded, len(raw) // 2, 3)))
    )
    return raw[:size], size


def _odd_tensor(draw: st.DrawFn, tensors: list[tuple[str, tuple[int, ...], int, int]]) -> None:
    place = draw(st.integers(0, len(tensors) - 1))
    name, dims, kind, offset = tensors[place]
    match draw(st.sampled_from(("name", "dims", "type", "offset"))):
        case "name":
            name = draw(st.sampled_from((*ODD_NAMES, tensors[0][0])))
        case "dims":
            sizes = st.sampled_from([n for n in NUMBERS if 0 <= n < 2**64] + list(dims))
            dims = tuple(draw(st.lists(sizes, max_size=9))) if draw(st.booleans()) else dims[::-1]
        case "type":
            kind = draw(st.sampled_from((*range(42), 2**31, 2**32 - 1)))
        case "offset":
            offset = draw(st.sampled_from((*(n for n in NUMBERS if 0 <= n < 2**64), offset + 32, max(0, offset - 32))))
    tensors[place] = name, dims, kind, offset


@st.composite
def _odd_gguf_field(draw: st.DrawFn) -> tuple[str, int, bytes]:
    count = draw(st.sampled_from([n for n in NUMBERS if 0 <= n < 2**64]))
    item = draw(st.sampled_from((*range(14), 2**31)))
    values = (
        (9, gguf_array(item, count)),
        (9, gguf_array(item, 2, bytes(64))),
        (9, gguf_array(9, 1, gguf_array(9, 1, gguf_array(9, 1, gguf_array(9, 1, gguf_array(9, 1)))))),
        (9, gguf_array(9, 3, gguf_array(4, 0) * 3)),
        (9, gguf_array(5, 2, struct.pack("<2i", 256, 256))),
        (9, gguf_array(8, 2, gguf_text("a") * 2)),
        (8, gguf_text("a", count)),
        (item, bytes(8)),
        (4, struct.pack("<I", draw(st.sampled_from((0, 1, 3, 32, 64, 2**31))))),
    )
    keys = ("x", "general.alignment", "general.architecture", "GGUF.version", "comfy.gguf.orig_shape.head.modulation")
    key = draw(st.sampled_from((*keys, "comfy.gguf.orig_shape.blocks.0.ffn.0.weight", "\ud800")))
    return (key, *draw(st.sampled_from(values)))


# Folders of shards.

INDEX = "diffusion_pytorch_model.safetensors.index.json"


@st.composite
def folder_changes(draw: st.DrawFn, outside: Path) -> Callable[[Path], None]:
    """A function that changes a folder of shards with an `INDEX`. The file `outside` is not in the folder."""
    changes = [draw(st.one_of(_index_change(outside), _file_change())) for _ in range(draw(st.integers(0, 2)))]

    def change(folder: Path) -> None:
        for one in changes:
            one(folder)

    return change


@st.composite
def _index_change(draw: st.DrawFn, outside: Path) -> Callable[[Path], None]:
    names = (
        str(outside),
        f"../{outside.name}",
        f"../../{outside.name}",
        "..",
        ".",
        "",
        "a.bin",
        "/dev/zero",
        "/etc/passwd",
    )
    names += (
        f"./{outside.name}",
        "\0.safetensors",
        "\ud800.safetensors",
        "gone.safetensors",
        "x" * 300 + ".safetensors",
    )
    odd, place = draw(st.sampled_from((*names, *ODD))), draw(st.integers(0, 30))
    kind = draw(st.sampled_from(("value", "value", "all", "map", "more", "other", "bytes", "text", "note")))
    text, piece = (
        draw(st.sampled_from((b"", b"[]", b"{}", b"[" * 50_000, b"\xff\xfe", b'{"weight_map": null}'))),
        draw(st.binary()),
    )

    def change(folder: Path) -> None:
        index = folder / INDEX
        if not index.is_file():
            return
        raw = index.read_bytes()
        try:
            content = json.loads(raw)
            entries = content["weight_map"]
            name = sorted(entries)[place % len(entries)]
        except (ValueError, KeyError, TypeError, ZeroDivisionError, RecursionError):
            return
        if not isinstance(entries, dict):
            return
        match kind:
            case "value":
                entries[name] = odd
            case "all":
                entries |= dict.fromkeys(entries, odd)
            case "map":
                content["weight_map"] = odd
            case "more":
                entries["more.weight"] = entries[name]
            case "note":
                content["metadata"] = odd
            case "other":
                entries[name] = next((shard for shard in entries.values() if shard != entries[name]), odd)
        raw = json.dumps(content).encode()
        if kind == "bytes":
            raw = raw[: 20 * place] + piece + raw[20 * place + 2 :]
        index.write_bytes(text if kind == "text" else raw)

    return change


@st.composite
def _file_change(draw: st.DrawFn) -> Callable[[Path], None]:
    place = draw(st.integers(0, 2))
    kind = draw(
        st.sampled_from(("lost", "pipe", "zero", "folder", "loop", "short", "same", "swapped", "empty", "renamed"))
    )

    def change(folder: Path) -> None:
        files = sorted(path for path in folder.iterdir() if path.is_file() and not path.is_symlink())
        if not files:
            return
        path, other = files[place % len(files)], files[(place + 1) % len(files)]
        raw = path.read_bytes()
        if kind == "short":
            path.write_bytes(raw[: len(raw) // 2])
        elif kind == "same":
            path.write_bytes(other.read_bytes())
        elif kind == "swapped":
            path.write_bytes(other.read_bytes())
            other.write_bytes(raw)
        elif kind == "renamed":
            path.rename(folder / "other.safetensors")
        elif kind == "linked":  # as in the caches of huggingface_hub
            path.symlink_to(path.rename(folder.parent / path.name))
        elif kind == "more":
            (folder / "config.json").write_bytes(raw[:100])
        else:
            path.unlink()
            {
                "lost": lambda: None,
                "pipe": lambda: os.mkfifo(path),
                "zero": lambda: path.symlink_to("/dev/zero"),
                "folder": lambda: path.mkdir(),
                "loop": lambda: path.symlink_to(path),
                "empty": lambda: path.touch(),
            }[kind]()

    return change


# What every example is held to.


@contextlib.contextmanager
def harmless(folder: Path, seconds: float = 5, more_bytes: int = 30_000_000) -> Iterator[None]:
    """Let what runs within the `with` block take `seconds` and `more_bytes` of memory at most, and open no file outside
    of `folder`, but for modules of Python."""
    before = signal.signal(signal.SIGALRM, _too_slow)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    tracemalloc.start()
    _opened.clear()
    _watching.append(True)
    try:
        yield
    finally:
        _watching.clear()
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert peak < more_bytes, f"took {peak:,} bytes"
    outside = [path for path in _opened if not path.startswith((f"{folder}{os.sep}", "/proc/self/fd/"))]
    assert not [path for path in outside if not path.endswith((".py", ".pyc", ".so"))], outside


_opened: list[str] = []
_watching: list[bool] = []


def _watch(event: str, args: tuple[Any, ...]) -> None:
    if _watching and event == "open" and isinstance(args[0], (str, bytes)):
        _opened.append(os.fsdecode(args[0]))


def _too_slow(*_signal: object) -> None:
    raise TimeoutError("An example took too long.")


sys.addaudithook(_watch)
