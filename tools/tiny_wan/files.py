"""The files of the training: what it ships (in parts, if a part must stay small) and what it resumes from.

    python3 tools/tiny_wan/files.py join results/tiny_wan_t2v example_workflows/models/tiny_wan_t2v.safetensors

joins results/tiny_wan_t2v.part1.safetensors and so on into one file.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

LICENCE = "Apache-2.0"
PART_BYTES = 15 * 2**20


def save_shipped(
    folder: Path, name: str, weights: Mapping[str, torch.Tensor], facts: Mapping[str, object]
) -> list[Path]:
    """Write weights in float16 as folder/name.safetensors, or in parts of at most PART_BYTES; returns the paths."""
    tensors = {key: value.detach().to("cpu", torch.float16).contiguous() for key, value in weights.items()}
    metadata = {"format": "pt", "licence": LICENCE, **{key: str(value) for key, value in facts.items()}}
    parts: list[dict[str, torch.Tensor]] = [{}]
    room = PART_BYTES
    for key, tensor in tensors.items():
        if tensor.nbytes > room and parts[-1]:
            parts.append({})
            room = PART_BYTES
        parts[-1][key] = tensor
        room -= tensor.nbytes
    if len(parts) == 1:
        return [_write(folder / f"{name}.safetensors", tensors, metadata)]
    return [_write(folder / f"{name}.part{i}.safetensors", part, metadata) for i, part in enumerate(parts, 1)]


def join(stem: Path, target: Path) -> None:
    """Join stem.part1.safetensors, stem.part2.safetensors, ... into target.

    Raises:
        FileNotFoundError: there are no parts.
    """
    tensors: dict[str, torch.Tensor] = {}
    metadata: dict[str, str] = {}
    paths = sorted(stem.parent.glob(f"{stem.name}.part*.safetensors"))
    if not paths:
        raise FileNotFoundError(f"There is no {stem.name}.part1.safetensors in {stem.parent}. Train first.")
    for path in paths:
        part, metadata = read(path)
        tensors |= part
    _write(target, tensors, metadata)


def read(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """The tensors (on the CPU) and the metadata of a safetensors file."""
    with safe_open(path, framework="pt", device="cpu") as file:
        return {key: file.get_tensor(key) for key in file.keys()}, file.metadata() or {}  # noqa: SIM118


def save_state(path: Path, groups: Mapping[str, Mapping[str, torch.Tensor]], facts: Mapping[str, object]) -> None:
    """What a later run resumes from, in full precision; an interrupted write leaves the older file."""
    tensors = {f"{group}/{key}": value for group, members in groups.items() for key, value in members.items()}
    temporary = path.with_suffix(".tmp")
    _write(temporary, tensors, {key: str(value) for key, value in facts.items()})
    os.replace(temporary, path)


def load_state(path: Path) -> tuple[dict[str, dict[str, torch.Tensor]], dict[str, str]]:
    """The groups and facts of `save_state`."""
    tensors, facts = read(path)
    groups: dict[str, dict[str, torch.Tensor]] = {}
    for name, value in tensors.items():
        group, key = name.split("/", 1)
        groups.setdefault(group, {})[key] = value
    return groups, facts


def _write(path: Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({key: value.detach().cpu().contiguous() for key, value in tensors.items()}, path, dict(metadata))
    path.chmod(0o644)  # safetensors makes files that only their owner can read
    return path


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    joining = commands.add_parser("join", help="join the parts of a shipped file")
    joining.add_argument("stem", type=Path)
    joining.add_argument("target", type=Path)
    arguments = parser.parse_args(argv)
    try:
        join(arguments.stem, arguments.target)
    except FileNotFoundError as error:
        sys.exit(str(error))
    return 0


if __name__ == "__main__":
    sys.exit(main())
