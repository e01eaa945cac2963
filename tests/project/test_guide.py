"""The tables of XDIT_USP_README.md and OFFICIAL_DISTRIFUSION_README.md say what the code does."""

from __future__ import annotations

import re
from dataclasses import fields

import pytest
import torch
from testkit.shared.guides import GUIDE, PATCHES, ROOT, rows, section
from wan_parallel.distributed.approximate.displaced_memory_estimate import gib, patch_memory
from wan_parallel.distributed.approximate.patch_layout import split_grid, token_pixels
from wan_parallel.distributed.parallel.model_division import held_parameters
from wan_parallel.distributed.plan.degrees import ParallelPlan, PatchSplit
from wan_parallel.distributed.protocol.silence import STILL, STOPPED, VARIABLE, WORKING, SilenceLimits
from wan_parallel.nodes.common.settings import ATTENTION_MODES, WEIGHT_PRECISIONS, USPConfig
from wan_parallel.nodes.distrifusion.distrifusion_settings import DistriFusionConfig
from wan_parallel.wanvideo.base.config import PRESETS
from wan_parallel.wanvideo.base.grid import Grid
from wan_parallel.wanvideo.checkpoint.weight_source import total_storage_bytes
from wan_parallel.wanvideo.quant.formats.gguf_blocks import BLOCKS

SPELLED = {True: "on", False: "off"}


def test_the_files_and_folders_that_the_architecture_names_are_there() -> None:
    page = (ROOT / "docs" / "ARCHITECTURE.md").read_text(encoding="utf-8")
    table = section("The packages", page).split("| **")[1:]
    named = [
        (folder, name)
        for folder, rows_below in (part.split("/** |", 1) for part in table)
        for name in re.findall(r"`([\w/]+(?:\.py|/))`", rows_below)
    ]
    assert len(named) > 20
    assert [
        name for folder, name in named if not ((ROOT / name).exists() or list((ROOT / folder).rglob(name.rstrip("/"))))
    ] == []


def test_each_package_has_a_line_in_the_architecture() -> None:
    page = section("The packages", (ROOT / "docs" / "ARCHITECTURE.md").read_text(encoding="utf-8"))
    packages = [path.parent.name for top in ("distributed", "wanvideo") for path in (ROOT / top).glob("*/__init__.py")]
    unexplained = [name for name in packages if f"`{name}/`" not in page]
    assert set(unexplained) <= {"base", "ops", "example"} and len(packages) == 20


def test_the_config_table_has_every_input_with_its_default() -> None:
    shown = [(name.strip("`"), default) for name, default, _ in rows("XDit+USP Config")[1:]]
    assert shown == defaults(USPConfig)


def defaults(kind: type) -> list[tuple[str, str]]:
    return [
        (field.name, SPELLED[field.default] if isinstance(field.default, bool) else str(field.default))
        for field in fields(kind)
    ]


def test_the_distrifusion_loaders_table_has_every_input_with_its_default() -> None:
    title = "🎯 Official DistriFusion Model Loader"
    shown = [(name.strip("`"), default) for name, default, _ in rows(title, PATCHES)[1:]]
    assert shown == [("model", ""), *defaults(DistriFusionConfig)]


def test_the_memory_of_the_buffers_is_what_the_loader_computes() -> None:
    for model, size, shown, weights in rows("Memory", PATCHES)[1:]:
        config = PRESETS[model.lower()]
        width, height = (int(pixels) // token_pixels(config) for pixels in size.split("x"))
        layout = split_grid(Grid(31 if model == "5B" else 21, height, width), PatchSplit(), 1, token_pixels(config))
        need = patch_memory(config, layout, "bf16", "bf16")
        assert (shown, weights) == (gib(need.buffers), gib(need.weights))


def test_the_degrees_are_those_that_are_chosen() -> None:
    head, *body = rows("How the GPUs share the work")
    heads = [int(re.search(r"\((\d+) heads\)", cell)[1]) for cell in head[1:]]
    assert heads == [preset.num_heads for preset in PRESETS.values()]
    assert [int(row[0]) for row in body] == list(range(2, 9))
    for gpus, *shown in body:
        plan = ParallelPlan(num_gpus=int(gpus))
        assert shown == [str(plan.sequence_degrees(number)) for number in heads]


def test_the_memory_of_the_weights_is_that_of_their_parameters() -> None:
    body = [row for row in rows("Memory") if row[0].split(",")[0] in ("1.3B", "5B", "14B")]
    for preset, (_, *shown) in zip(PRESETS.values(), body, strict=True):
        assert shown == [f"{preset.parameters * nbytes / 2**30:.1f} GiB" for nbytes in (4, 2)]


def test_the_memory_of_divided_weights_is_that_of_the_largest_part() -> None:
    body = [row for row in rows("Memory") if row[0].startswith(("pipeline", "tensor"))]
    assert len(body) == 5
    for sizes, *shown in body:
        given = {f"{kind}_parallel": int(size) for kind, size in re.findall(r"(pipeline|tensor) (\d)", sizes)}
        plan = ParallelPlan(8, **given)
        assert shown == [f"{held_parameters(preset, plan) * 2 / 2**30:.1f} GiB" for preset in PRESETS.values()]


def test_the_table_of_model_files_names_what_is_read() -> None:
    table = rows("Model files")
    assert [name for name in BLOCKS if name not in " ".join(file for file, _ in table)] == []
    at_load = next(held for file, held in table if "fp8_e4m3fn" in file)
    assert f"{total_storage_bytes('random:14b', torch.float8_e4m3fn) / 2**30:.1f} GiB for the 14B" in at_load
    assert all(name in section("Model files", GUIDE) for name in WEIGHT_PRECISIONS)


def test_every_attention_kernel_is_explained() -> None:
    shown = [name for cell, *_ in rows("Attention kernels")[1:] for name in re.findall(r"`(\w+)`", cell)]
    assert shown == list(ATTENTION_MODES)


def test_the_table_of_silent_workers_has_the_limits() -> None:
    _, *body = [row for row in rows("Troubleshooting") if len(row) == 3]
    limits, seconds = SilenceLimits(), [tuple(float(cell.removesuffix(" s")) for cell in row[1:]) for row in body]
    assert seconds == [
        (limits.warn, limits.end(STOPPED)),
        (limits.warn, limits.end(STILL)),
        (limits.told, limits.end(STILL, announced=True)),
        (limits.told, limits.end(WORKING)),
    ]
    assert VARIABLE in section("Troubleshooting", GUIDE)


@pytest.mark.parametrize("weights", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("switch", ["use_fp16", "use_bf16", "both off"])
def test_the_precision_pairs_are_those_that_run(weights: str, switch: str) -> None:
    switches = {"use_fp16": switch == "use_fp16", "use_bf16": switch == "use_bf16"}
    activations = USPConfig(**switches).compute_dtype(weights)
    for base, named, held, runs in rows("Precision")[1:]:
        if (base, named.strip("`")) == (weights, switch):
            assert (held, runs.split(":")[0]) == (weights, activations)
