"""Which forwards of a MODEL's sampling runs take part in displaced patches, and what its loader's widgets mean."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from testkit import tiny
from testkit.tiny import sentences
from wan_parallel.distributed.approximate import kv_buffers
from wan_parallel.distributed.approximate.displaced_memory import TooLarge
from wan_parallel.distributed.approximate.patch_layout import split_grid
from wan_parallel.distributed.approximate.schedule import PatchSettings
from wan_parallel.distributed.parallel.sequence import MissingPackage
from wan_parallel.distributed.plan.degrees import ParallelPlan, PatchSplit, PlanError
from wan_parallel.distributed.protocol.reports import Exchange
from wan_parallel.distributed.protocol.specs import ModelSpec, PoolSettings
from wan_parallel.nodes.common.settings import SettingsError, USPConfig
from wan_parallel.nodes.distrifusion.distrifusion_settings import DistriFusionConfig
from wan_parallel.nodes.distrifusion.patch_picture import draw_layout
from wan_parallel.nodes.model.patch_runs import SYNC_FREQUENCY, PatchRuns, lane_names
from wan_parallel.wanvideo.base.grid import Grid

CPU = DistriFusionConfig(device="cpu")
SETTINGS = PatchSettings(PatchSplit("spatial", 32), warmup_steps=2, sync_frequency=10)
LATENT = torch.ones(1, 16, 3, 8, 8)


def runs_of(num_gpus: int = 2, fraction: float = 1.0, data_parallel: int = 1, **settings: object) -> PatchRuns:
    """On a stand-in for a pool, of which nothing but settings and results is read."""
    plan = ParallelPlan(num_gpus, data_parallel=data_parallel)
    exchange = Exchange("native", 100, 1.0, 0.5, 10)
    pool = SimpleNamespace(
        settings=PoolSettings(plan, "cpu", fraction),
        launcher_pid=1,
        last=SimpleNamespace(exchanges=(exchange,) * num_gpus),
    )
    return PatchRuns(replace(SETTINGS, **settings), tiny.TINY, ModelSpec("x", "fp32", "fp32"), pool)


def options(*branches: str, steps: int = 8, **more: object) -> dict:
    labels = list(range(len(branches)))
    return {"uuids": list(branches), "cond_or_uncond": labels, "sample_sigmas": torch.ones(steps + 1), **more}


def kinds(runs: PatchRuns, asked: list[dict], x: torch.Tensor = LATENT, patches: str = "") -> list[str | None]:
    """What successive forwards are told to be, with a latent that is denoised a little each time."""
    found = []
    for step, given in enumerate(asked):
        now = x * (1 + 0.01 * step)
        with runs.step(now, torch.full((len(x),), 900.0 - step), given, patches, lambda nbytes: None) as displaced:
            found.append(displaced and displaced.kind)
    return found


def test_warm_up_then_stale_steps_and_a_new_run_warms_up_again():
    runs = runs_of()
    for _ in range(2):
        runs.begin()
        assert kinds(runs, [options("a")] * 5) == ["exact", "fill", "stale", "stale", "stale"]
    assert (len(runs.record.synchronous), len(runs.record.stale)) == (2, 3)
    assert runs.record.received == 300 and runs.record.last.index == 4


def test_a_vace_model_runs_exactly():
    runs = runs_of()
    runs.config = tiny.VACE
    assert kinds(runs, [options("a")] * 4) == [None] * 4
    assert "VACE" in runs.record.exact_because


def test_the_samplers_frequency_wins_over_the_loaders():
    assert kinds(runs_of(), [options("a", **{SYNC_FREQUENCY: 1})] * 4) == ["exact"] * 4
    often = kinds(runs_of(), [options("a", **{SYNC_FREQUENCY: 2})] * 6)
    assert often == ["exact", "fill", "stale", "fill", "stale", "fill"]


@pytest.mark.parametrize(
    "gpus, given, why",
    [
        (2, options("a", context_window=object()), "context windows"),
        (2, options("a", steps=2), "no more steps than the warm-up"),
        (2, options("a", "b"), "branches cannot be told apart"),
        (1, options("a"), "one GPU to itself"),
        (2, options("a", patches_replace={"dit": {("double_block", 1): print}}), "SkipLayerGuidanceDiT"),
    ],
)
def test_where_the_method_has_no_place_every_forward_is_exact(gpus, given, why):
    runs = runs_of(gpus)
    assert kinds(runs, [given] * 4) == [None] * 4
    assert why in runs.record.exact_because and len(runs.record.synchronous) == 4


def test_a_forward_that_fails_or_is_cancelled_starts_the_run_anew():
    runs = runs_of()
    kinds(runs, [options("a")] * 3)
    with (
        pytest.raises(KeyboardInterrupt),
        runs.step(LATENT, torch.tensor([800.0]), options("a"), "", lambda nbytes: None),
    ):
        raise KeyboardInterrupt  # as ComfyUI's interrupt, it is no Exception
    assert kinds(runs, [options("a")] * 2) == ["exact", "fill"]


def test_a_lora_or_a_new_pool_starts_the_run_anew():
    runs = runs_of()
    assert kinds(runs, [options("a")] * 3)[-1] == "stale"
    assert kinds(runs, [options("a")], patches="lora") == ["exact"]
    runs.pool.launcher_pid = 2
    assert kinds(runs, [options("a")], patches="lora") == ["exact"]


def test_every_branch_and_video_has_a_lane_of_its_own():
    both = lane_names({"uuids": ["p", "n"], "cond_or_uncond": [0, 1]}, 4)
    assert both == ("p:0:0", "p:0:1", "n:1:0", "n:1:1")
    assert lane_names({}, 2) == ("0", "1")
    assert lane_names({"uuids": ["p", "n"], "cond_or_uncond": [0, 1]}, 3) is None


def test_branches_in_forwards_of_their_own_add_up_and_warm_up_apart():
    runs = runs_of()
    assert kinds(runs, [options("p"), options("n")] * 3) == ["exact"] * 2 + ["fill"] * 2 + ["stale"] * 2
    assert runs.record.branches == 2


@pytest.mark.parametrize("data_parallel, ways", [(1, "split_cfg"), (2, "kv_buffers")])
def test_a_video_whose_buffers_do_not_fit_is_refused_before_it_starts(data_parallel, ways):
    runs = runs_of(4, fraction=1e-4, data_parallel=data_parallel)
    size = (2, 16, 101, 64, 64)
    with pytest.raises(TooLarge) as refusal:
        runs.check(size, options("p", "n"))
    assert ways in str(refusal.value) and ("split_cfg" in str(refusal.value)) == (data_parallel == 1)
    runs.check(size, options("p", "n", **{SYNC_FREQUENCY: 1}))  # exact: needs no buffers
    runs.check(size, options("p", "n", steps=2))


def test_a_video_that_cannot_be_cut_is_refused_before_it_starts():
    with pytest.raises(PlanError, match="4 GPUs cannot share"):
        runs_of(4).check(tuple(LATENT.shape), options("p"))


def test_the_official_manager_is_refused_in_the_loader_where_it_is_not_installed(monkeypatch):
    monkeypatch.setattr(kv_buffers, "official_version", str)
    with pytest.raises(MissingPackage, match="Run: pip install --no-deps"):
        runs_of(manager="official")


@pytest.mark.parametrize(
    "widgets",
    [{"world_size": 4}, {"rank": 1}, {"num_gpus": 3, "world_size": 3, "split_cfg": True}, {"device": "tpu"}],
    ids=str,
)
def test_widgets_that_cannot_work_are_refused_in_two_sentences(widgets):
    with pytest.raises(SettingsError) as refusal:
        replace(CPU, **widgets).validate()
    assert sentences(str(refusal.value)) >= 2


def test_the_widgets_reach_pool_model_and_patches(checkpoint):
    sizes = replace(CPU, num_gpus=4, world_size=0, split_cfg=True, patch_overlap=16)
    config = replace(sizes, kv_buffers="fp8", warmup_steps=3, manager="native")
    config.validate()
    assert config.pool_settings().plan == ParallelPlan(4, data_parallel=2)
    settings = config.patch_settings()
    assert settings.split == PatchSplit("spatial", 64, 16)
    assert (settings.warmup_steps, settings.fp8_buffers, settings.manager) == (3, True, "native")
    spec = replace(config, precision="fp32", quantization="fp8_e4m3fn").model_spec(checkpoint)
    assert (spec.weight_dtype, spec.compute_dtype) == ("fp8_e4m3fn", "fp32")
    assert config.model_spec(checkpoint).weight_dtype == "bf16"


def test_an_exact_and_a_displaced_model_of_one_size_share_the_workers():
    assert CPU.pool_settings() == USPConfig(device="cpu", parallel_plan="as_set").pool_settings()


@pytest.mark.parametrize("mode", ["spatial", "temporal", "spatiotemporal"])
@pytest.mark.parametrize("ranks", [1, 2, 8])
def test_the_picture_of_a_layout(mode, ranks):
    layout = split_grid(Grid(21, 30, 52), PatchSplit(mode, 32, 16), ranks, 16)
    picture = draw_layout(layout, "a layout", torch.rand(48, 83, 3))
    assert picture.shape[0] == 1 and picture.shape[2:] == (992, 3) and picture.dtype == torch.float32
    assert picture.min() >= 0 and picture.max() <= 1
    grey = draw_layout(layout, "a layout")
    colours = {tuple(colour) for colour in (grey[0, ::2, 30::9] * 255).int().flatten(0, 1).tolist()}
    assert len(colours) > ranks
