"""The names of LoRA files of every kind lead to the weights that they mean."""

from __future__ import annotations

import logging

import pytest
from testkit import tiny
from wan_parallel.nodes.model.loras.lora_names import expert_of, with_native_names
from wan_parallel.wanvideo.checkpoint.diffusers_names import diffusers_name, original_name
from wan_parallel.wanvideo.variants.vace import Vace

CONFIG = tiny.WanConfig(dim=256, ffn_dim=512, num_heads=2, num_layers=12, image_dim=96, image_positions=10).having(
    Vace(6, 96)
)
WEIGHTS = list(CONFIG.shapes())


def test_both_ways_between_the_names_of_diffusers_and_of_the_authors():
    names = [name for name in WEIGHTS if "vace_patch" not in name and "patch_emb" not in name]
    assert {name: diffusers_name(name) for name in names} == {name: tiny.diffusers_name(name) for name in names}
    assert [original_name(diffusers_name(name)) for name in names] == names


@pytest.mark.parametrize(
    "key, native",
    [
        ("diffusion_model.blocks.1.self_attn.q.lora_A.weight", "blocks.1.self_attn.q.lora_A.weight"),
        ("lora_unet_blocks_10_ffn_0.lora_down.weight", "blocks.10.ffn.0.lora_down.weight"),
        ("lora_unet__blocks_1_cross_attn_k_img.alpha", "blocks.1.cross_attn.k_img.alpha"),
        ("transformer.blocks.1.attn1.to_out.0.lora_B.weight", "blocks.1.self_attn.o.lora_B.weight"),
        ("transformer.blocks.1.attn2.add_k_proj.lora_B.weight", "blocks.1.cross_attn.k_img.lora_B.weight"),
        ("blocks.11.ffn.net.0.proj.lora_A.weight", "blocks.11.ffn.0.lora_A.weight"),
        ("blocks.0.norm2.diff", "blocks.0.norm3.diff"),
        ("base_model.model.blocks.0.ffn.2.lora_A.default.weight", "blocks.0.ffn.2.lora_A.default.weight"),
        ("base_model.model.transformer.proj_out.lora_A.weight", "head.head.lora_A.weight"),
        ("pipe.dit.time_projection.1.lora_B.default.weight", "time_projection.1.lora_B.default.weight"),
        ("transformer.condition_embedder.time_proj.lora_A.weight", "time_projection.1.lora_A.weight"),
        ("lycoris_blocks_1_attn2_to_q.lokr_w1", "blocks.1.cross_attn.q.lokr_w1"),
        ("lora_transformer_blocks_1_attn1_to_out_0.lora_up.weight", "blocks.1.self_attn.o.lora_up.weight"),
        ("vace_blocks.2.after_proj.lora_A.weight", "vace_blocks.2.after_proj.lora_A.weight"),
        ("diffusion_model.head.modulation.diff", "head.modulation.diff"),
    ],
)
def test_a_tensor_finds_its_weight(key, native):
    assert with_native_names("a", {key: 7}, WEIGHTS) == {f"diffusion_model.{native}": 7}


def test_tensors_of_no_weight_are_counted_and_left_out(caplog):
    keys = ["blocks.0.ffn.0.diff", "blocks.12.ffn.0.diff", *(f"text.{i}.alpha" for i in range(6)), "plain"]
    with caplog.at_level(logging.WARNING):
        assert list(with_native_names("my lora", dict.fromkeys(keys), WEIGHTS)) == [
            "diffusion_model.blocks.0.ffn.0.diff"
        ]
    assert "LoRA my lora: 1 of 9 tensors belong to this model" in caplog.text
    assert "blocks.12.ffn.0.diff" in caplog.text and "and 3 more" in caplog.text


def test_a_lora_for_another_model_is_refused():
    with pytest.raises(ValueError, match=r"none of its 2 tensors belongs to this one \(a.lora_A.weight, b\)") as error:
        with_native_names("sdxl", {"a.lora_A.weight": 1, "b": 2}, WEIGHTS)
    assert tiny.sentences(str(error.value)) == 2


# Files with a LoRA for each expert of Wan 2.2.

HIGH, LOW = "wan2.2_t2v_high_noise_14B_fp16.safetensors", "Wan2.2-T2V-A14B-LowNoise-Q4_K_M.gguf"


@pytest.mark.parametrize(
    "high, low",
    [
        ("transformer.blocks.0.attn1.to_q", "transformer_2.blocks.0.attn1.to_q"),
        ("base_model.model.transformer.blocks.0.attn1.to_q", "base_model.model.transformer_2.blocks.0.attn1.to_q"),
        ("diffusion_model.transformer_1.blocks.0.self_attn.q", "diffusion_model.transformer_2.blocks.0.self_attn.q"),
        ("pipe.dit.blocks.0.self_attn.q", "pipe.dit2.blocks.0.self_attn.q"),
        ("high_noise_model.blocks.0.self_attn.q", "low_noise_model.blocks.0.self_attn.q"),
    ],
)
def test_each_expert_takes_its_half_of_a_file_for_both(high, low):
    lora = {f"{high}.lora_A.weight": "high", f"{low}.lora_A.weight": "low"}
    for model, half in ((HIGH, "high"), (LOW, "low")):
        taken = with_native_names("both", lora, WEIGHTS, f"/models/{model}")
        assert taken == {"diffusion_model.blocks.0.self_attn.q.lora_A.weight": half}
    with pytest.raises(ValueError, match="one half for the high-noise") as error:
        with_native_names("both", lora, WEIGHTS, "/models/wan.safetensors")
    assert "wan.safetensors" in str(error.value) and tiny.sentences(str(error.value)) == 2


def test_a_file_for_one_expert_is_taken_by_the_model_that_it_is_given_to(caplog):
    lora = {"transformer_2.blocks.0.attn1.to_q.lora_A.weight": 7}
    with caplog.at_level(logging.INFO):
        for model in (HIGH, LOW, "wan.safetensors"):
            assert list(with_native_names("low", lora, WEIGHTS, model).values()) == [7]
    assert "the half for the low-noise model is taken for wan.safetensors" in caplog.text


@pytest.mark.parametrize(
    "path, expert",
    [
        (f"/m/{HIGH}", "high"),
        (f"/m/{LOW}", "low"),
        ("/m/Wan2_2-I2V-A14B-LOW_fp8_e4m3fn_scaled_KJ.safetensors", "low"),
        ("/m/low_noise_model/diffusion_pytorch_model-00001-of-00006.safetensors", "low"),
        ("/m/Wan2.2/transformer_2", "low"),
        ("/m/wan-slow-highway.safetensors", None),
        ("/m/wan-high-and-low.safetensors", None),
        ("/m/wan2.1_t2v_14B.safetensors", None),
    ],
)
def test_an_expert_is_known_by_the_name_of_its_file_or_folder(path, expert):
    assert expert_of(path) == expert


def test_the_first_of_two_diffusers_folders_is_the_high_noise_expert(tmp_path):
    (tmp_path / "transformer").mkdir()
    assert expert_of(str(tmp_path / "transformer")) is None
    (tmp_path / "transformer_2").mkdir()
    assert expert_of(str(tmp_path / "transformer")) == "high"
