"""The tables of XDIT_USP_README.md say what the code does."""

from __future__ import annotations

import re
from dataclasses import fields
from pathlib import Path

import pytest
from wan_parallel.distributed.plan import ParallelPlan
from wan_parallel.distributed.pool import held_parameters
from wan_parallel.nodes.settings import ATTENTION_MODES, USPConfig
from wan_parallel.wanvideo.config import PRESETS

GUIDE = (Path(__file__).parents[1] / "XDIT_USP_README.md").read_text(encoding="utf-8")


def section(title: str) -> str:
    return GUIDE.split(f"\n## {title}\n")[1].split("\n## ")[0]


def rows(title: str) -> list[list[str]]:
    """The cells of the tables of a section, without the line under the heads."""
    lines = [line for line in section(title).splitlines() if line.startswith("|") and not line.startswith("|---")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def test_the_config_table_has_every_input_with_its_default() -> None:
    shown = [(name.strip("`"), default) for name, default, _ in rows("XDit+USP Config")[1:]]
    spelled = {True: "on", False: "off"}
    assert shown == [
        (field.name, spelled[field.default] if isinstance(field.default, bool) else str(field.default))
        for field in fields(USPConfig)
    ]


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


def test_every_attention_kernel_is_explained() -> None:
    shown = [name for cell, *_ in rows("Attention kernels")[1:] for name in re.findall(r"`(\w+)`", cell)]
    assert shown == list(ATTENTION_MODES)


@pytest.mark.parametrize("weights", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("switch", ["use_fp16", "use_bf16", "both off"])
def test_the_precision_pairs_are_those_that_run(weights: str, switch: str) -> None:
    switches = {"use_fp16": switch == "use_fp16", "use_bf16": switch == "use_bf16"}
    activations = USPConfig(**switches).compute_dtype(weights)
    for base, named, held, runs in rows("Precision")[1:]:
        if (base, named.strip("`")) == (weights, switch):
            assert (held, runs.split(":")[0]) == (weights, activations)
