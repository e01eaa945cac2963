"""A model divided by tensor and pipeline parallelism, alone and with every other kind, gives what one process gives."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
from testkit import tiny, worker_group
from testkit.format_files import write_gguf, written
from testkit.shared.divided import STEPS, STREAMED_SIZES, UNEVEN, Case, step_inputs, streamed_in_one_process
from wan_parallel.distributed.approximate.schedule import FILL, STALE
from wan_parallel.distributed.approximate.strategies.pipefusion import cut
from wan_parallel.distributed.parallel.model_division import held_parameters
from wan_parallel.distributed.plan.degrees import ParallelPlan, PatchSplit
from wan_parallel.distributed.protocol.requests import Displaced
from wan_parallel.distributed.protocol.specs import ModelSpec
from wan_parallel.wanvideo.base.config import PRESETS, WanConfig
from wan_parallel.wanvideo.base.grid import Grid
from wan_parallel.wanvideo.model.model import WanModel

# Every pair of kinds, and each size alone, on 4 ranks.
PLANS = [
    ParallelPlan(4, tensor_parallel=4),
    ParallelPlan(4, pipeline_parallel=4),
    ParallelPlan(4, tensor_parallel=2, ulysses_degree=2),
    ParallelPlan(4, tensor_parallel=2, ring_degree=2),
    ParallelPlan(4, tensor_parallel=2, data_parallel=2),
    ParallelPlan(4, pipeline_parallel=2, ulysses_degree=2),
    ParallelPlan(4, pipeline_parallel=2, ring_degree=2),
    ParallelPlan(4, pipeline_parallel=2, data_parallel=2),
    ParallelPlan(4, pipeline_parallel=2, tensor_parallel=2),
]


def cases(plans: list[ParallelPlan]) -> list[Case]:
    made = []
    for plan in plans:
        plain = Case(plan)
        made += [plain]
        made += [replace(plain, size=(2, 7, 5), batch=3, by_frame=True, slice_tokens=4)]
        made += [replace(plain, size=(2, 7, 5), batch=5, max_batch=2)]
        made += [replace(plain, size=(1, 2, 4))]  # 2 tokens
        made += [replace(plain, size=(3, 16, 16), compute="bf16")]
    return made


CASES = [
    *cases(PLANS),
    Case(PLANS[0], overlap=False),
    Case(PLANS[0], size=(2, 7, 5), batch=3, slice_tokens=4, overlap=False),
]


@pytest.fixture(scope="module")
def path(tmp_path_factory) -> str:
    return tiny.write_checkpoint(tmp_path_factory.mktemp("divided") / "uneven.safetensors", UNEVEN)


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> list[str]:
    """Quantised files whose blocks of numbers lie across the borders between four ranks."""
    folders = [tmp_path_factory.mktemp("quantised") for _ in QUANTISED]
    return [
        write_gguf(folder / "model.gguf", kind.removeprefix("GGUF "), QUANTISED_CONFIG)[0]
        if kind.startswith("GGUF")
        else written(folder, kind, config=QUANTISED_CONFIG)[0]
        for folder, kind in zip(folders, QUANTISED, strict=True)
    ]


@pytest.fixture(scope="module")
def outcome(tmp_path_factory, path, files) -> worker_group.Outcome:
    jobs = [case.job(path) for case in CASES] + displaced_jobs(path) + streamed_jobs(path) + quantised_jobs(files)
    return worker_group.run(4, jobs, tmp_path_factory.mktemp("gloo"))


def chosen(compute: str) -> pytest.MarkDecorator:
    numbers = [number for number, case in enumerate(CASES) if case.compute == compute]
    return pytest.mark.parametrize("number", numbers, ids=[str(CASES[number]) for number in numbers])


@chosen("fp32")
def test_a_divided_model_gives_what_one_process_gives(outcome, path, number):
    assert tiny.relative_error(outcome.latents[number], CASES[number].alone(path, "fp32")) <= 2e-6


@chosen("bf16")
def test_a_divided_model_is_about_as_precise_in_bf16_as_one_process(outcome, path, number):
    case = CASES[number]
    precise = case.alone(path, "fp32")
    alone = tiny.relative_error(case.alone(path, "bf16"), precise)
    # Each tensor-parallel rank rounds its partial sum, and each sum of two is rounded again.
    assert tiny.relative_error(outcome.latents[number], precise) <= (1.1 + 0.1 * case.plan.tensor_parallel) * alone


@pytest.mark.parametrize("number", range(0, len(CASES) - 2, (len(CASES) - 2) // len(PLANS)))
def test_each_rank_holds_its_part_of_the_weights_and_no_more(outcome, number):
    assert max(outcome.held[number]) == 4 * held_parameters(UNEVEN, CASES[number].plan)


# Displaced patches, which go on where a model is divided.

SAME_PATCHES = [ParallelPlan(4, **{f"{kind}_parallel": 2}) for kind in ("data", "tensor", "pipeline")]  # 2 ranks share


def displaced_jobs(path: str) -> list[worker_group.Job]:
    """A step that leaves its keys and values behind, and one that uses them, under each plan."""
    jobs = []
    for plan in SAME_PATCHES:
        for step, kind in enumerate((FILL, STALE)):
            given = tiny.inputs(UNEVEN, (2, 24, 8), batch=2)
            given = given._replace(x=given.x * (1 + 0.1 * step), timestep=given.timestep - 20 * step)
            part_in_run = Displaced(kind, f"run of {plan}", ("conditional", "unconditional"), PatchSplit())
            jobs.append(worker_group.Job(plan, ModelSpec(path, "fp32", "fp32"), given, part_in_run))
    return jobs


def test_displaced_patches_are_the_same_on_a_divided_model(outcome, path):
    fill, stale, *divided = outcome.latents[len(CASES) : len(CASES) + 2 * len(SAME_PATCHES)]
    for number, latent in enumerate(divided):
        assert tiny.relative_error(latent, stale if number % 2 else fill) <= 2e-6
    exact = WanModel.from_checkpoint(path)(*displaced_jobs(path)[1].given)
    assert tiny.relative_error(stale, exact) > 1e-3


# PipeFusion.

STREAMED = [
    ParallelPlan(4, pipeline_parallel=4),
    ParallelPlan(4, pipeline_parallel=2, tensor_parallel=2),
    ParallelPlan(4, pipeline_parallel=2, ulysses_degree=2),
    ParallelPlan(4, pipeline_parallel=2, ring_degree=2),
    ParallelPlan(4, pipeline_parallel=2, data_parallel=2),
]


def streamed_jobs(path: str) -> list[worker_group.Job]:
    jobs = []
    for plan, size in itertools.product(STREAMED, STREAMED_SIZES):
        for step, kind in enumerate(STEPS):
            given = step_inputs(size, step)
            run, branch_ids = f"run of {plan} {size}", ("conditional", "unconditional")
            part_in_run = Displaced(kind, run, branch_ids, PatchSplit(), strategy="pipefusion")
            jobs.append(worker_group.Job(plan, ModelSpec(path, "fp32", "fp32"), given, part_in_run, "pipefusion"))
    return jobs


@pytest.mark.parametrize("number", range(len(STREAMED) * len(STREAMED_SIZES)))
def test_streamed_patches_see_fresh_keys_behind_them_and_stale_ones_ahead(outcome, path, number):
    plan, size = list(itertools.product(STREAMED, STREAMED_SIZES))[number]
    first = len(CASES) + 2 * len(SAME_PATCHES) + number * len(STEPS)
    expected = streamed_in_one_process(path, plan, size)
    for latent, wanted in zip(outcome.latents[first : first + len(STEPS)], expected, strict=True):
        assert tiny.relative_error(latent, wanted) <= 2e-6
    exact = [WanModel.from_checkpoint(path)(*step_inputs(size, step)) for step in range(len(STEPS))]
    assert tiny.relative_error(expected[0], exact[0]) <= 2e-6
    assert 1e-4 < tiny.relative_error(expected[2], exact[2]) < 0.2


# Quantised weights.

QUANTISED = ["ComfyUI's newer scaled", "int8 convrot", "nvfp4", "mxfp8", "GGUF Q8_0", "GGUF Q4_K"]
QUANTISED_CONFIG = WanConfig(dim=512, ffn_dim=768, num_heads=4, num_layers=2, text_dim=64)
QUANTISED_PLANS = [PLANS[0], PLANS[-1]]


def quantised_jobs(files: list[str]) -> list[worker_group.Job]:
    given = tiny.inputs(QUANTISED_CONFIG, batch=2)
    pairs = itertools.product(QUANTISED_PLANS, files)
    return [worker_group.Job(plan, ModelSpec(file, "fp32", "fp32"), given) for plan, file in pairs]


@pytest.mark.parametrize("number", range(len(QUANTISED_PLANS) * len(QUANTISED)))
def test_parts_of_quantised_weights_are_those_of_the_whole(outcome, files, number):
    latent = outcome.latents[number - len(QUANTISED_PLANS) * len(QUANTISED)]
    model = WanModel.from_checkpoint(files[number % len(files)])
    assert tiny.relative_error(latent, model(*tiny.inputs(QUANTISED_CONFIG, batch=2))) <= 2e-6


@pytest.mark.parametrize("frames, stages, patches", [(21, 2, 8), (21, 4, 16), (1, 4, 16), (1, 2, 8)])
def test_patches_are_runs_of_whole_frames_or_of_whole_rows(frames, stages, patches):
    grid = Grid(frames, 30, 52)
    edges = cut(grid, stages)
    assert len(edges) == patches and edges[0][0] == 0 and edges[-1][1] == grid.tokens
    assert all(one[1] == two[0] for one, two in itertools.pairwise(edges))
    unit = 30 * 52 if frames >= patches else 52
    assert all(start % unit == 0 for start, _ in edges)


def test_what_lies_behind_a_video_goes_first():
    grid = Grid(9, 2, 3, context_tokens=20)
    assert cut(grid, 2) == [(54, 64), (64, 74), (0, 12), *((6 * i, 6 * i + 6) for i in range(2, 9))]


def test_a_video_of_few_rows_has_few_patches():
    assert cut(Grid(1, 3, 4), 2) == [(0, 4), (4, 8), (8, 12)]


@pytest.mark.parametrize("size", ["1.3b", "14b"])
@pytest.mark.parametrize("tensor, pipeline", [(2, 1), (4, 1), (1, 2), (1, 4), (2, 2), (2, 4)])
def test_a_part_of_a_released_model_is_little_more_than_its_share(size, tensor, pipeline):
    config = PRESETS[size]
    plan = ParallelPlan(tensor * pipeline, tensor_parallel=tensor, pipeline_parallel=pipeline)
    share = held_parameters(config, plan) * tensor * pipeline / config.parameters
    assert 1 < share < 1.15, share
