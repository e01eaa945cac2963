"""A LoRA changes without the file: the weights behind it stay on the device where there is room."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from testkit import format_files, tiny
from testkit.shared.one_rank import Rank
from wan_parallel.distributed.protocol.requests import Offload
from wan_parallel.distributed.protocol.specs import ModelSpec
from wan_parallel.distributed.weights.base_weights import BaseWeights
from wan_parallel.wanvideo.checkpoint.weight_source import Checkpoint

MATRICES = [name for name in format_files.block_matrices(tiny.random_weights(tiny.TINY))]
BIAS = "blocks.0.ffn.0.bias"
TOUCHED = [*MATRICES, BIAS, "blocks.1.norm3.weight", "head.head.weight"]


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def as_held(rank: Rank) -> torch.Tensor:
    return rank.loaded.model.get_parameter(BIAS)


def in_file(rank: Rank) -> torch.Tensor:
    return Checkpoint(rank.spec.path).tensor(BIAS)


def plain(dtype: torch.dtype):
    return lambda folder: tiny.write_checkpoint(folder / "model.safetensors", dtype=dtype)


def gguf(folder: Path) -> str:
    return format_files.write_gguf(folder / "model.gguf", "Q8_0")[0]


# The file, the precision of the weights, and whether the first LoRA needs the file as the matrices have fewer digits.
KINDS = {
    "bf16 in bf16": (plain(torch.bfloat16), "bf16", False),
    "bf16 in fp32": (plain(torch.bfloat16), "fp32", False),
    "fp16 in bf16": (plain(torch.float16), "bf16", True),
    "bf16 in fp8": (plain(torch.bfloat16), "fp8_e4m3fn", True),
    "scaled fp8": (lambda folder: format_files.written(folder, "ComfyUI's newer scaled")[0], "bf16", False),
    "GGUF": (gguf, "bf16", False),
}


@pytest.fixture(params=KINDS)
def kind(request, tmp_path) -> Iterator[tuple[Rank, bool]]:
    write, weight_dtype, reads = KINDS[request.param]
    yield Rank(ModelSpec(write(tmp_path), weight_dtype, "fp32")), reads


def test_loras_come_change_and_go_without_the_file(kind):
    rank, reads = kind
    plain_weights = rank.weights()
    expected = {}
    for uuid, seed in (("a", 1), ("b", 2), ("a again", 1)):
        read = rank.lora(uuid, seed, TOUCHED)
        rounded = {BIAS} if as_held(rank).dtype != in_file(rank).dtype else set()
        assert read <= ((set(MATRICES) if reads else set()) | rounded if uuid == "a" else set())
        expected.setdefault(seed, rank.weights())
        assert same(rank.weights(), expected[seed]) and not same(rank.weights(), plain_weights)
    fresh = Rank(rank.spec)
    fresh.lora("b", 2, TOUCHED)
    assert same(expected[2], fresh.weights())
    assert rank.lora("fewer", 3, MATRICES[:3]) == set()
    assert rank.lora("", 0, []) == set()
    assert same(rank.weights(), plain_weights)
    assert rank.loaded.base_weights.nbytes == 0


def test_without_room_the_file_is_read_for_what_has_changed_alone(kind, monkeypatch):
    rank, reads = kind
    plain_weights = rank.weights()
    monkeypatch.setattr(rank.models.memory, "spare", lambda spec: 0)
    rank.loaded.base_weights._room = lambda: 0
    assert rank.lora("a", 1, MATRICES[:5]) == (set(MATRICES[:5]) if reads else set())
    assert rank.lora("b", 2, MATRICES[3:9]) >= set(MATRICES[:5])
    assert rank.lora("", 0, []) == set(MATRICES[3:9])
    assert same(rank.weights(), plain_weights)


def test_as_many_are_kept_as_there_is_room_for_and_that_is_asked_once():
    asked, weights = [], [torch.zeros(100) for _ in range(5)]

    def room() -> int:
        asked.append(None)
        return 1000  # bytes: for two of them

    base_weights = BaseWeights(room)
    for turn in (1, 2):
        base_weights.look_for_room()
        for i, weight in enumerate(weights):
            base_weights.keep(f"{turn} {i}", weight, copy=False)
        assert len(asked) == turn and base_weights.nbytes == 800 * turn


def test_weights_that_went_to_host_memory_and_back_change_as_exactly(kind):
    rank, _ = kind
    plain_weights = rank.weights()
    rank.models.offload(Offload(1, rank.spec, (0,), 2.0**60))
    rank.lora("in host memory", 1, TOUCHED)
    rank.models.settle(rank.spec, 64)
    fresh = Rank(rank.spec)
    fresh.lora("a", 1, TOUCHED)
    assert same(rank.weights(), fresh.weights())
    for seed in (2, 3):
        rank.lora(f"back {seed}", seed, TOUCHED)
        fresh.lora(f"back {seed}", seed, TOUCHED)
        assert same(rank.weights(), fresh.weights())
    rank.lora("", 0, [])
    assert same(rank.weights(), plain_weights)


def test_base_weights_leave_first_when_somebody_needs_the_room(kind):
    rank, _ = kind
    rank.lora("a", 1, MATRICES)
    kept = rank.loaded.base_weights.nbytes
    assert kept > 0
    assert sum(held.now for held in rank.models.memory.held()) == rank.loaded.device_bytes + kept
    before = rank.loaded.device_bytes
    rank.models.offload(Offload(1, rank.spec, (0,), kept))
    assert rank.loaded.base_weights.nbytes == 0 and rank.loaded.device_bytes == before
    rank.lora("b", 2, MATRICES)
    rank.models.learn(rank.spec)  # a forward ran out of memory
    assert rank.loaded.base_weights.nbytes == 0
