"""What test_support.py runs, and the README's support table says: every variant, in every format, under every strategy.

Each pair of the three is run by default, and all combinations of the three with `--full-support-matrix`.

A variant that is added to `tiny.VARIANTS` is run and listed by itself; what a strategy refuses for it goes into
`REFUSED`. Then `python3 tools/support_table.py` writes the table anew.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from wan_parallel.distributed.protocol.specs import ModelSpec
from wan_parallel.wanvideo.base.config import WanConfig

from testkit import format_files, infinitetalk_files, tiny

Tensors = dict[str, torch.Tensor]
Written = tuple[str, Tensors]
"""A file, and the float32 weights that it stands for."""

MODULE, INFINITETALK = "vace module", "infinitetalk"
VARIANTS: dict[str, WanConfig] = {
    "t2v": tiny.TINY,
    "5b": replace(tiny.TINY, in_dim=48, out_dim=48),
    **tiny.VARIANTS,
    MODULE: tiny.VACE,
    INFINITETALK: tiny.INFINITETALK,
}
TITLES = {
    "t2v": "text-to-video 2.1, each expert of 2.2",
    "5b": "5B (2.2)",
    "i2v-2.2": "image-to-video 2.2, Fun-InP 2.2",
    "i2v-2.1": "image-to-video 2.1, Fun-InP 2.1",
    "flf2v": "first-last-frame 2.1",
    "fun-control": "Fun-Control 2.1",
    "fun-control-2.2": "Fun-Control 2.2",
    "fun-camera": "Fun-Camera 2.1",
    "fun-camera-2.2": "Fun-Camera 2.2",
    "vace": "VACE, one file",
    "animate": "Animate 2.2",
    "s2v": "S2V 2.2",
    "humo": "HuMo 1.7B",
    "humo-17b": "HuMo 17B",
    "dancer": "WanDancer",
    "scail": "SCAIL",
    "scail-2": "SCAIL-2",
    MODULE: "VACE, model and module",
    INFINITETALK: "InfiniteTalk, model and layers (bf16)",
}
"""How the table calls a variant; others go by their name."""


@dataclass(frozen=True)
class Strategy:
    """How the work is shared: the plan's degrees, and options of the model."""

    gpus: int
    degrees: Mapping[str, int]
    options: Mapping[str, str]


STRATEGIES = {
    "1 GPU": Strategy(1, {}, {}),
    "Ulysses": Strategy(2, {}, {}),
    "ring": Strategy(2, {"ulysses_degree": 1, "ring_degree": 2}, {}),
    "data": Strategy(2, {"data_parallel": 2}, {}),
    "tensor": Strategy(2, {"tensor_parallel": 2}, {}),
    "pipeline": Strategy(2, {"pipeline_parallel": 2}, {}),
    "shared weights": Strategy(2, {}, {"shard_weights": "on", "offload": "off"}),
    "offload": Strategy(2, {}, {"offload": "on"}),
}
REFUSED: frozenset[tuple[str, str]] = frozenset()
"""Variants and strategies that are refused together."""


def _plain(path: Path, weights: Tensors) -> Written:
    stored = {name: weight.bfloat16() for name, weight in weights.items()}
    meant = {name: weight.float() for name, weight in stored.items()}
    return tiny.write_weights(path.with_suffix(".safetensors"), stored), meant


def _made(make: Callable[[Tensors], tuple[Tensors, Tensors]]) -> Callable[[Path, Tensors], Written]:
    def write(path: Path, weights: Tensors) -> Written:
        stored, meant = make(weights)
        return tiny.write_weights(path.with_suffix(".safetensors"), stored), meant

    return write


def _scaled(weights: Tensors) -> tuple[Tensors, Tensors]:
    matrices = format_files.block_matrices(weights)
    return format_files.scaled(weights, "weight_scale", rows=True, names=matrices)


def _diffusers(path: Path, weights: Tensors) -> Written:
    return tiny.write_weights(path.with_suffix(".safetensors"), tiny.diffusers_weights(weights)), weights


def _gguf(path: Path, weights: Tensors) -> Written:
    return format_files.write_gguf(path.with_suffix(".gguf"), "Q8_0", weights=weights)


FORMATS: dict[str, Callable[[Path, Tensors], Written]] = {
    "bf16": _plain,
    "fp8 e4m3": _made(lambda weights: format_files.plain_fp8(weights, torch.float8_e4m3fn)),
    "scaled fp8": _made(_scaled),
    "int8 convrot": _made(format_files.convrot),
    "GGUF Q8_0": _gguf,
    "diffusers": _diffusers,
}
DIFFUSERS = ("t2v", "5b", "i2v-2.2", "i2v-2.1", "flf2v", "vace", "animate")
"""Variants that diffusers has a class for."""


def formats_of(variant: str) -> list[str]:
    """The formats in which a variant is published, or could be."""
    if variant == INFINITETALK:  # wide, so that it takes long
        return ["bf16", "scaled fp8", "GGUF Q8_0"]
    return [name for name in FORMATS if name != "diffusers" or variant in DIFFUSERS]


def runs(variant: str) -> list[str]:
    """The strategies under which a variant runs, in every format of `formats_of`."""
    return [name for name in STRATEGIES if (variant, name) not in REFUSED]


def formats_by_pairs(variant: str, strategy: str) -> list[str]:
    """The formats for one cell of a run by pairs: over all cells, each variant meets each of its formats, and each
    strategy meets each format."""
    formats = formats_of(variant)
    alike = [name for name in VARIANTS if formats_of(name) == formats]
    return [formats[(alike.index(variant) + list(STRATEGIES).index(strategy)) % len(formats)]]


def cells() -> Iterator[tuple[str, str]]:
    """Every variant and strategy, run or refused; a strategy at a time, as each has workers of its own."""
    return ((variant, strategy) for strategy in STRATEGIES for variant in VARIANTS)


def write(folder: Path, variant: str, kind: str) -> tuple[ModelSpec, ModelSpec]:
    """The model of a variant in the format `kind`, and what it stands for in float32."""
    weights, make = tiny.random_weights(VARIANTS[variant]), FORMATS[kind]
    folder.mkdir(parents=True)
    module = module_meant = ""
    if variant == INFINITETALK:
        layers = {name: weights.pop(name) for name in list(weights) if infinitetalk_files.is_infinitetalk(name)}
        module, meant_layers = _plain(folder / "layers", layers | infinitetalk_files.MARKER)
        module_meant = tiny.write_weights(folder / "meant-layers.safetensors", meant_layers)
    if variant == MODULE:
        vace = {name: weights.pop(name) for name in list(weights) if name.startswith("vace_")}
        module, meant_module = make(folder / "module", vace)
        path, meant = make(folder / "model", weights)
        meant = {**meant, **meant_module}
    else:
        path, meant = make(folder / "model", weights)
    meant_path = tiny.write_weights(folder / "meant.safetensors", meant)
    return ModelSpec(path, "fp32", "fp32", module=module), ModelSpec(meant_path, "fp32", "fp32", module=module_meant)


def table() -> str:
    """The table in Markdown: a row for each variant, a column for each format, in the cells the strategies."""
    lines = [f"All strategies: {', '.join(STRATEGIES)}.", ""]
    lines += [f"| | {' | '.join(FORMATS)} |", f"|---|{'---|' * len(FORMATS)}"]
    for variant in VARIANTS:
        refused = [name for name in STRATEGIES if name not in runs(variant)]
        told = f"all but {', '.join(refused)}" if refused else "all"
        row = [told if kind in formats_of(variant) else "" for kind in FORMATS]
        lines.append(f"| {TITLES.get(variant, variant)} | {' | '.join(row)} |")
    return "\n".join(lines)
