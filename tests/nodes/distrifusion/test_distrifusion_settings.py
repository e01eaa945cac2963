"""What the widgets of Official DistriFusion Model Loader mean to a pool and its patches, and what is refused."""

from __future__ import annotations

from dataclasses import replace

import pytest
from testkit.tiny import sentences
from wan_parallel.distributed.plan.degrees import ParallelPlan, PatchSplit
from wan_parallel.nodes.common.settings import SettingsError, USPConfig
from wan_parallel.nodes.distrifusion.distrifusion_settings import DistriFusionConfig

CPU = DistriFusionConfig(device="cpu")


@pytest.mark.parametrize(
    "widgets",
    [
        {"world_size": 4},
        {"rank": 1},
        {"num_gpus": 3, "world_size": 3, "split_cfg": True},
        {"device": "tpu"},
        {"gpus": "1,2"},
    ],
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


def test_the_gpus_reach_the_pool():
    assert DistriFusionConfig(device="cuda", gpus="2,3").pool_settings().gpus == ("2", "3")


def test_an_exact_and_a_displaced_model_of_one_size_share_the_workers():
    assert CPU.pool_settings() == USPConfig(device="cpu", parallel_plan="as_set").pool_settings()
