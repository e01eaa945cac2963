"""The widgets of XDit+USP Config: what they mean to a pool, and what is refused. Needs no ComfyUI."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import testkit
import torch
from testkit.tiny import sentences
from wan_parallel.nodes.common.settings import SettingsError, USPConfig, place_of
from wan_parallel.wanvideo.base.config import PRESETS

CPU = USPConfig(device="cpu")


def test_the_defaults_are_accepted():
    CPU.validate()


@pytest.mark.parametrize(
    "widgets",
    [
        {"pipeline_parallel_size": 4},
        {"tensor_parallel_size": 4},
        {"num_gpus": 4, "pipeline_parallel_size": 2, "tensor_parallel_size": 4},
        {"num_gpus": 4, "tensor_parallel_size": 2, "usp_backend": "xfuser"},
        {"num_gpus": 3, "data_parallel_size": 2},
        {"num_gpus": 4, "ulysses_degree": 3},
        {"use_fp16": True, "use_bf16": True},
        {"device": "tpu"},
        {"gpu_shares": "2"},
        {"gpu_shares": "2, 1, 1"},
        {"gpu_shares": "2, 0"},
        {"gpu_shares": "2, nan"},
        {"gpu_shares": "fast, slow"},
        {"gpu_shares": ""},
        {"gpus": "0,1"},
        {"gpu_shares": "1e308,1"},
        {"gpu_shares": "1e308, 1.5"},
        {"gpu_shares": "5e-324, 1"},
        {"gpu_shares": "-1, -1"},
        {"gpu_shares": "1, \0" * 50_000},
    ],
    ids=str,
)
def test_what_cannot_work_is_refused_in_two_sentences(widgets):
    with pytest.raises(SettingsError) as refusal:
        replace(CPU, **widgets).validate()
    assert sentences(str(refusal.value)) >= 2


@pytest.mark.parametrize(
    "written, speeds",
    [
        ("auto", ()),
        ("even", ()),
        ("2, 1", (2, 1)),
        (" 60% / 30% ", (2, 1)),
        ("1:2", (1, 2)),
        ("1.5 1", (1000, 667)),
        ("5,5", ()),
        ("2e300, 1e300", (2, 1)),
        ("1000, 1", (1000, 1)),
    ],
)
def test_shares_of_the_gpus(written, speeds):
    config = replace(CPU, gpu_shares=written)
    config.validate()
    assert config.pool_settings().plan.speeds == speeds


@pytest.mark.parametrize(
    "written, names, by_speed", [("auto", "AB", True), ("auto", "AA", False), ("even", "AB", False)]
)
def test_only_gpus_of_different_kinds_are_measured(monkeypatch, written, names, by_speed):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: names[index])
    assert USPConfig(device="cuda", gpu_shares=written).pool_settings().by_speed is by_speed


@pytest.mark.parametrize(
    "written, names",
    [
        ("", ()),
        (" , ", ()),
        ("0,2,3", ("0", "2", "3")),
        (" 1; GPU-4234abcd  cuda:3,", ("1", "GPU-4234abcd", "cuda:3")),
    ],
)
def test_gpus_reach_the_pool_and_only_those_are_compared(monkeypatch, written, names):
    compared = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: compared.append(index) or "H200")
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda index: SimpleNamespace(uuid=f"{index + 2}234abcd-0")
    )
    config = USPConfig(device="cuda", gpus=written)
    config.validate()
    assert config.pool_settings().gpus == names
    assert compared == ([0, 1] if not names else [0, 2] if names[0] == "0" else [1, 2])


def test_the_status_names_the_gpu_of_each_rank():
    pool = USPConfig(device="cuda", gpu_shares="even", gpus="3,1").pool_settings()
    assert [place_of(pool, rank) for rank in (0, 1)] == ["cuda:3 ", "cuda:1 "]
    assert place_of(replace(pool, gpus=()), 1) == "cuda:1 " and place_of(replace(pool, device="cpu"), 1) == ""


@pytest.mark.parametrize("present", [0, 1])
def test_more_gpus_than_there_are_are_refused(monkeypatch, present):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: present)
    with pytest.raises(SettingsError) as refusal:
        USPConfig(num_gpus=2, device="cuda").validate()
    assert sentences(str(refusal.value)) >= 2


@pytest.mark.parametrize(
    "fp16, bf16, base, expected",
    [
        (True, False, "bf16", "fp16"),
        (False, True, "fp32", "bf16"),
        (False, False, "bf16", "bf16"),
        (False, False, "fp32", "fp32"),
    ],
)
def test_activations_have_the_precision_that_is_switched_on_or_that_of_the_weights(fp16, bf16, base, expected):
    assert replace(CPU, use_fp16=fp16, use_bf16=bf16).compute_dtype(base) == expected


@pytest.mark.parametrize("gpus, pipeline, tensor", [(2, 2, 1), (4, 2, 2), (8, 4, 2)])
def test_the_configurations_of_the_first_guides_run_as_written(gpus, pipeline, tensor):
    config = replace(CPU, num_gpus=gpus, pipeline_parallel_size=pipeline, tensor_parallel_size=tensor)
    config.validate()
    plan = config.pool_settings().plan
    for preset in PRESETS.values():
        plan.check_model(preset.num_heads, preset.num_layers)
    assert plan.sequence_ranks == 1


def test_every_widget_reaches_the_pool(checkpoint):
    config = replace(
        CPU,
        num_gpus=4,
        data_parallel_size=2,
        gpu_memory_fraction=0.5,
        overlap_p2p_comm=False,
        max_sequence_length=1024,
        max_batch_size=3,
        use_flash_attention=False,
        usp_backend="native",
        ulysses_degree=2,
        ring_degree=1,
        pipeline_mode="pipefusion",
    )
    assert config.pool_settings().pipeline_mode == "exact"  # there are no stages
    assert (
        replace(CPU, pipeline_parallel_size=2, pipeline_mode="pipefusion").pool_settings().pipeline_mode == "pipefusion"
    )
    pool, model = config.pool_settings(), config.model_spec(checkpoint, "fp32", "auto")
    assert (pool.plan.num_gpus, pool.plan.data_parallel) == (4, 2)
    assert (pool.plan.ulysses_degree, pool.plan.ring_degree) == (2, 1)
    assert (pool.memory_fraction, pool.overlap, pool.device, pool.usp_backend) == (0.5, False, "cpu", "native")
    assert (model.slice_tokens, model.max_batch, model.allow_flash, model.allow_sdpa) == (1024, 3, False, True)
    assert (model.weight_dtype, model.compute_dtype, model.attention) == ("fp32", "fp16", "auto")
    whole = replace(config, enable_activation_checkpointing=False).model_spec(checkpoint, "fp32", "auto")
    assert whole.slice_tokens == 0


def test_sizes_are_chosen_unless_they_are_to_run_as_set():
    assert CPU.pool_settings().auto and not replace(CPU, parallel_plan="as_set").pool_settings().auto
    assert not replace(CPU, usp_backend="xfuser").pool_settings().auto
    stages = replace(CPU, pipeline_parallel_size=2)
    assert stages.pool_settings().auto and not replace(stages, pipeline_mode="pipefusion").pool_settings().auto


def test_degrees_that_other_sizes_complete_are_refused_only_as_set():
    config = replace(CPU, num_gpus=4, ulysses_degree=2, ring_degree=1)
    config.validate()
    with pytest.raises(SettingsError, match="but 4 GPUs share each"):
        replace(config, parallel_plan="as_set").validate()
    with pytest.raises(SettingsError, match="does not divide"):
        replace(config, ulysses_degree=3, ring_degree=0).validate()


@pytest.mark.parametrize(
    "mode, switches",
    [
        ("auto", {"use_sdpa": False, "use_flash_attention": False}),
        ("sdpa_cudnn", {"use_sdpa": False}),
        ("flash_attn_2", {"use_flash_attention": False}),
    ],
)
def test_switched_off_attention_kernels_are_refused(checkpoint, mode, switches):
    with pytest.raises(SettingsError) as refusal:
        replace(CPU, **switches).model_spec(checkpoint, "bf16", mode)
    assert sentences(str(refusal.value)) >= 2


def test_sageattn_needs_neither_switch(checkpoint):
    config = replace(CPU, use_sdpa=False, use_flash_attention=False)
    assert config.model_spec(checkpoint, "bf16", "sageattn").attention == "sageattn"


def test_importing_the_pack_imports_neither_torch_nor_comfyui():
    """ComfyUI imports every pack at its start, and a worker imports this one without ComfyUI."""
    root = testkit.ROOT
    code = (
        "import sys, bootstrap; bootstrap.load_pack(); "
        "print(sorted({'torch', 'comfy', 'xfuser', 'yunchang'} & set(sys.modules)))"
    )
    found = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"
