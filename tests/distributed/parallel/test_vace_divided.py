"""VACE in pipeline stages, alone and with every other kind of parallelism: the control streams travel along."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import pytest
import torch
from testkit import tiny, worker_group
from wan_parallel.distributed.parallel.model_division import held_parameters, parts_of
from wan_parallel.distributed.parallel.pipeline import Stage
from wan_parallel.distributed.plan.degrees import ParallelPlan
from wan_parallel.distributed.protocol.specs import ModelSpec
from wan_parallel.wanvideo.base.conditioning import NOTHING, Conditioning
from wan_parallel.wanvideo.base.config import PRESETS, WanConfig
from wan_parallel.wanvideo.model.model import WanModel, model_class
from wan_parallel.wanvideo.variants.vace import Vace

# Of four stages the second has no VACE block and passes the streams on, and the last has none and gets none.
VACE = WanConfig(dim=256, ffn_dim=515, num_heads=2, num_layers=8, text_dim=32).having(Vace(2, 12))
VACE_14B = PRESETS["14b"].having(Vace(8, 96))

PLANS = [
    ParallelPlan(4, pipeline_parallel=4),
    ParallelPlan(4, pipeline_parallel=2, tensor_parallel=2),
    ParallelPlan(4, pipeline_parallel=2, data_parallel=2),
    ParallelPlan(4, pipeline_parallel=2, ulysses_degree=2),
    ParallelPlan(4, pipeline_parallel=2, ring_degree=2),
]


@dataclass(frozen=True)
class Case:
    """One forward."""

    plan: ParallelPlan
    size: tuple[int, int, int] = (3, 6, 10)
    batch: int = 1
    strengths: tuple[float, ...] = (0.8, 1.3)
    skip_blocks: tuple[int, ...] = ()
    max_batch: int = 1
    slice_tokens: int = 0
    way: str = "module"
    shard: str = "off"
    offload: str = "off"

    def __str__(self) -> str:
        what = f"size {self.size}, batch {self.batch}, {len(self.strengths)} contexts, {self.way}"
        return f"{self.plan.describe(2)}, {what}, shard {self.shard}, offload {self.offload}"

    @property
    def given(self) -> tiny.Inputs:
        return tiny.inputs(VACE, self.size, self.batch)

    @property
    def conditioning(self) -> Conditioning:
        if not self.strengths:
            return NOTHING
        made = tiny.conditioning(VACE, self.given.x, contexts=len(self.strengths))
        options = replace(made.options, vace_strengths=self.strengths, skip_blocks=self.skip_blocks)
        return replace(made, options=options)

    def job(self, paths: dict[str, tuple[str, str]]) -> worker_group.Job:
        path, module = paths[self.way]
        spec = ModelSpec(
            path,
            "fp32",
            "fp32",
            max_batch=self.max_batch,
            slice_tokens=self.slice_tokens,
            shard_weights=self.shard,
            offload=self.offload,
            module=module,
        )
        return worker_group.Job(self.plan, spec, self.given, conditioning=self.conditioning)


def cases() -> Iterator[Case]:
    for plan in PLANS:
        yield Case(plan, way="one file")
        plain = Case(plan)
        yield plain
        yield replace(plain, size=(2, 7, 5), batch=3, max_batch=2, slice_tokens=4)
        yield replace(plain, size=(1, 2, 4), batch=2, skip_blocks=(0, 5))  # 2 tokens
        yield replace(plain, strengths=(0.7,), batch=2)
        yield replace(plain, strengths=())
        yield replace(plain, shard="on")
        yield replace(plain, shard="on", offload="on", batch=3)


CASES = list(cases())


@pytest.fixture(scope="module")
def paths(tmp_path_factory) -> dict[str, tuple[str, str]]:
    """The model and its module, by how many files they are in."""
    folder, weights = tmp_path_factory.mktemp("vace"), tiny.random_weights(VACE)
    module = {name: weight for name, weight in weights.items() if name.startswith("vace_")}
    base = {name: weight for name, weight in weights.items() if name not in module}
    return {
        "one file": (tiny.write_weights(folder / "one.safetensors", weights), ""),
        "module": (
            tiny.write_weights(folder / "base.safetensors", base),
            tiny.write_weights(folder / "module.safetensors", module),
        ),
    }


@pytest.fixture(scope="module")
def alone(paths) -> WanModel:
    return model_class(VACE).from_checkpoint(paths["one file"][0])


@pytest.fixture(scope="module")
def outcome(tmp_path_factory, paths) -> worker_group.Outcome:
    return worker_group.run(4, [case.job(paths) for case in CASES], tmp_path_factory.mktemp("gloo"))


@pytest.mark.parametrize("number", range(len(CASES)), ids=[str(case) for case in CASES])
def test_vace_in_stages_gives_what_one_process_gives(outcome, alone, number):
    case = CASES[number]
    with torch.inference_mode():
        expected = alone(*case.given, case.conditioning)
    assert tiny.relative_error(outcome.latents[number], expected) <= 2e-6


@pytest.mark.parametrize("number", range(0, len(CASES), len(CASES) // len(PLANS)))
def test_each_rank_holds_its_part_and_no_more(outcome, number):
    assert max(outcome.held[number]) == 4 * held_parameters(VACE, CASES[number].plan)


# What is where.


def test_a_stage_holds_the_vace_blocks_behind_its_own():
    shapes = VACE.shapes()
    for stages in (1, 2, 3, 4, 8):
        parts = parts_of(VACE, ParallelPlan(stages, pipeline_parallel=stages), dict.fromkeys(shapes, 1))
        for number, block in ((0, 0), (1, 4)):
            name = f"vace_blocks.{number}.after_proj.weight"
            assert [name in part for part in parts] == [f"blocks.{block}.modulation" in part for part in parts]
        for name in ("vace_patch_embedding.bias", "vace_blocks.0.before_proj.weight"):
            assert [name in part for part in parts] == [True] + [False] * (stages - 1)
        assert set().union(*parts) == set(shapes)


def test_blocks_are_counted_and_run_in_turn():
    assert VACE.run_order(range(8)) == [0, 8, 1, 2, 3, 4, 9, 5, 6, 7]
    assert VACE.run_order(range(1, 5)) == [1, 2, 3, 4, 9]
    assert VACE.block_number("vace_blocks.1.ffn.0.weight") == 9 and VACE.block_number("head.head.bias") is None
    assert Stage.of(0, 3).most_blocks(VACE) == 4  # 0, its VACE block, 1 and 2
    assert PRESETS["14b"].run_order(range(3)) == [0, 1, 2]


@pytest.mark.parametrize("stages", [2, 4])
def test_the_parts_of_14b_are_alike(stages):
    plan = ParallelPlan(stages, pipeline_parallel=stages)
    assert 1 < held_parameters(VACE_14B, plan) * stages / VACE_14B.parameters < 1.15


def test_streams_are_passed_on_while_a_vace_block_is_to_come(alone):
    conditioning = Case(PLANS[0]).conditioning
    assert [alone.carried(block, conditioning) for block in (0, 2, 4, 5, 6, 8)] == [2, 2, 2, 0, 0, 0]
    assert alone.carried(2, NOTHING) == 0
