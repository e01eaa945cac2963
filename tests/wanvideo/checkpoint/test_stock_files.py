"""Files that ComfyUI loads are loaded: whatever stands before Wan's names, and whatever else lies in the file. Files
that it does not load are refused by what they are."""

from __future__ import annotations

from pathlib import Path

import gguf
import pytest
import torch
from testkit import format_files, tiny
from wan_parallel.wanvideo.base.tensor_info import CheckpointError
from wan_parallel.wanvideo.checkpoint.header import read_header
from wan_parallel.wanvideo.checkpoint.vace_module import read_model
from wan_parallel.wanvideo.checkpoint.weight_source import open_weights
from wan_parallel.wanvideo.model.model import WanModel
from wan_parallel.wanvideo.quant.quantized import as_tensor

WEIGHTS = tiny.random_weights(tiny.TINY)
OTHER = tiny.random_weights(tiny.TINY, seed=1)
GIVEN = tiny.inputs()
MATRIX = "blocks.1.ffn.0.weight"


@pytest.fixture(scope="module")
def expected(tmp_path_factory) -> torch.Tensor:
    return result(tiny.write_weights(tmp_path_factory.mktemp("plain") / "wan.safetensors", WEIGHTS))


def result(path: str) -> torch.Tensor:
    with torch.no_grad():
        return WanModel.from_checkpoint(path)(*GIVEN)


def refusal(path: str | Path) -> str:
    with pytest.raises(CheckpointError) as error:
        read_header(path)
    assert tiny.sentences(str(error.value)) == 2, str(error.value)
    return str(error.value)


def with_prefix(prefix: str, tensors=WEIGHTS) -> dict[str, torch.Tensor]:
    return {prefix + name: tensor for name, tensor in tensors.items()}


# Prefixes.


@pytest.mark.parametrize(
    "tensors",
    [
        with_prefix("model."),
        with_prefix("model.model."),
        with_prefix("net."),
        with_prefix("model.net."),
        with_prefix("_orig_mod."),
        {name.replace("blocks.1.", "blocks.1._orig_mod."): weight for name, weight in WEIGHTS.items()},
        with_prefix("model.", WEIGHTS) | with_prefix("model_ema.", OTHER) | {"vae.conv1.weight": torch.ones(3)},
        with_prefix("model.diffusion_model.", WEIGHTS) | {"blocks.0.ffn.0.weight": torch.ones(3)},
    ],
    ids=["model", "model.model", "net", "nested", "compiled", "compiled blocks", "with its average", "mixed"],
)
def test_whatever_stands_before_the_names_the_model_is_the_same(tmp_path, tensors, expected):
    assert torch.equal(result(tiny.write_weights(tmp_path / "wan.safetensors", tensors)), expected)


@pytest.mark.parametrize("prefix", ["model.", "net.", "model.model."])
@pytest.mark.parametrize("make", ["old_comfy", "new_comfy"])
def test_scales_are_found_behind_any_prefix(tmp_path, prefix, make):
    stored, meant = getattr(format_files, make)(dict(WEIGHTS))
    source = open_weights(tiny.write_weights(tmp_path / "fp8.safetensors", with_prefix(prefix, stored)))
    assert torch.equal(as_tensor(source.tensor(MATRIX), torch.float32), meant[MATRIX])


@pytest.mark.parametrize("noted", ["", "model."], ids=["without", "with"])
def test_notes_in_the_metadata_name_layers_with_and_without_the_prefix(tmp_path, noted):
    stored, meant = format_files.scaled(dict(WEIGHTS), "weight_scale")
    layers = {noted + name.removesuffix(".weight"): {"format": "float8_e4m3fn"} for name in WEIGHTS if "ffn" in name}
    metadata = {"_quantization_metadata": format_files.json.dumps({"layers": layers})}
    path = tiny.write_weights(tmp_path / "fp8.safetensors", with_prefix("model.", stored), metadata)
    assert torch.equal(as_tensor(open_weights(path).tensor(MATRIX), torch.float32), meant[MATRIX])


def test_a_file_with_two_models_is_refused(tmp_path):
    path = tiny.write_weights(tmp_path / "two.safetensors", with_prefix("generator.") | with_prefix("critic.", OTHER))
    assert "holds 2 Wan models, under critic. and generator.." in refusal(path)


# Tensors beside those of the model.

STRAYS = {
    "freqs": torch.ones(1024, 64),
    "blocks.0.self_attn.freqs": torch.ones(4),
    "rope.inv_freq": torch.ones(4),
    "counter": torch.zeros(1, dtype=torch.int64),
    "blocks.1.calls": torch.tensor(3, dtype=torch.int32),
    "vae.decoder.weight": torch.ones(3, 3),
    "text_encoder.shared.weight": torch.ones(3, 3),
}


@pytest.mark.parametrize("prefix", ["", "model."])
def test_tensors_that_no_model_reads_are_ignored_and_named(tmp_path, prefix, expected):
    path = tiny.write_weights(tmp_path / "wan.safetensors", with_prefix(prefix, WEIGHTS | STRAYS))
    assert set(read_header(path).ignored) == {prefix + name for name in STRAYS}
    assert torch.equal(result(path), expected)


def test_no_tensor_of_any_variant_is_taken_for_a_stray(tmp_path):
    for name, config in tiny.VARIANTS.items():
        assert read_header(tiny.write_layout(tmp_path / f"{name}.safetensors", tiny.layout(config))).ignored == ()


def test_a_scale_of_fp8_weights_is_no_stray(tmp_path):
    stored, _ = format_files.old_comfy(dict(WEIGHTS))
    assert read_header(tiny.write_weights(tmp_path / "fp8.safetensors", stored)).ignored == ()


@pytest.mark.parametrize(
    "name, what",
    [
        ("blocks.0.cross_attn.ip_adapter.to_k_ip.weight", "of Lynx, which this version does not run"),
        ("condition_embedding_align.cross_attn.in_proj_bias", "SteadyDancer"),
        ("blocks.0.control_blocks_dense.proj.weight", "LongVie 2"),
        ("blocks.0.self_attn.q.lora_A.weight", "a LoRA that is not merged"),
        ("something_new.0.weight", "of an unknown Wan variant"),
        ("blocks.0.new_modulation", "of an unknown Wan variant"),
        ("blocks.0.self_attn.q.scale_of_weight", "that scale quantised weights in a way that neither ComfyUI"),
    ],
)
def test_modules_that_change_the_picture_are_refused_by_name(tmp_path, name, what):
    path = tiny.write_weights(tmp_path / "wan.safetensors", WEIGHTS | {name: torch.ones(4, 4)})
    assert what in (text := refusal(path)) and name in text


# Formats of other programs, and other models.


@pytest.mark.parametrize(
    "names, what",
    [
        (("transformer_blocks.0.attn.to_qkv.qweight", "transformer_blocks.0.attn.to_qkv.wscales"), "svdq"),
        (("head.modulation", "blocks.0.self_attn.q.qweight", "blocks.0.self_attn.q.smooth_factor"), "svdq"),
        (("blocks.0.ffn.0.weight", "blocks.0.ffn.0.weight.absmax"), "bitsandbytes' nf4"),
        (("blocks.0.ffn.0.weight", "blocks.0.ffn.0.weight.quant_state.bitsandbytes__nf4"), "bitsandbytes' nf4"),
        (("blocks.0.ffn.0.weight", "blocks.0.ffn.0.SCB"), "bitsandbytes' int8"),
        (("blocks.0.ffn.0.weight._data", "blocks.0.ffn.0.weight._scale"), "quanto"),
        (("blocks.0.ffn.0.qweight", "blocks.0.ffn.0.qzeros", "blocks.0.ffn.0.g_idx"), "GPTQ"),
        (("blocks.0.ffn.0.qweight", "blocks.0.ffn.0.qzeros", "blocks.0.ffn.0.scales"), "AWQ"),
        (("blocks.0.ffn.0.weight", "blocks.0.ffn.0.weight_scale_inv"), "weight_scale_inv"),
    ],
    ids=str,
)
def test_a_quantised_format_of_another_program_is_named_with_what_to_take_instead(tmp_path, names, what):
    whole = WEIGHTS | {name: torch.ones(2, 2, dtype=torch.int32) for name in names}
    for tensors in (whole, {name: whole[name] for name in names}):
        text = refusal(tiny.write_weights(tmp_path / "int4.safetensors", tensors))
        assert what in text and "fp8_scaled" in text


@pytest.mark.parametrize("prefix", ["", "model."])
def test_the_format_of_another_model_in_the_file_does_not_matter(tmp_path, prefix, expected):
    other = {f"{prefix}text_encoders.t5.shared.weight.absmax": torch.ones(3), "text_encoders.x.qweight": torch.ones(3)}
    assert torch.equal(result(tiny.write_weights(tmp_path / "wan.safetensors", with_prefix(prefix) | other)), expected)


@pytest.mark.parametrize(
    "name, what, node",
    [
        ("encoder.block.0.layer.0.SelfAttention.q.weight", "a text encoder", "CLIPLoader"),
        ("token_embedding.weight", "a text encoder", "CLIPLoader"),
        ("decoder.middle.0.residual.0.gamma", "a VAE", "VAELoader"),
        ("vision_model.encoder.layers.0.mlp.fc1.weight", "a CLIP vision model", "CLIPVisionLoader"),
        ("wav2vec2.encoder.layers.0.attention.k_proj.weight", "an audio encoder", "AudioEncoderLoader"),
        ("double_blocks.0.img_attn.norm.key_norm.scale", "a Flux model", "Choose a Wan"),
        ("model.diffusion_model.double_blocks.0.img_attn.qkv.weight", "a Flux model", "Choose a Wan"),
        ("txt_in.individual_token_refiner.blocks.0.norm1.weight", "a HunyuanVideo model", "Choose a Wan"),
        ("blk.0.attn_q.weight", "a language model", "Choose a Wan"),
        ("patchify_proj.weight", "an LTX-Video model", "Choose a Wan"),
        ("blocks.0.audio_cross_attn.proj.weight", "InfiniteTalk", "ModelPatchLoader"),
        ("lora_unet_blocks_0_ffn_0.lokr_w1", "a LoRA", "LoraLoaderModelOnly"),
        ("diffusion_model.blocks.0.ffn.0.hada_w1_a", "a LoRA", "LoraLoaderModelOnly"),
        ("diffusion_model.blocks.0.ffn.0.oft_blocks", "a LoRA", "LoraLoaderModelOnly"),
    ],
)
def test_another_model_is_named_with_the_node_that_loads_it(tmp_path, name, what, node):
    text = refusal(tiny.write_weights(tmp_path / "other.safetensors", {name: torch.ones(2, 2), "x": torch.ones(1)}))
    assert what in text and node in text


# GGUF files whose converter could not write five dimensions.

PATCH = "patch_embedding.weight"


def write_gguf(path: Path, patch: torch.Tensor | None, kind: str = "F32", config=tiny.TINY) -> str:
    writer = gguf.GGUFWriter(str(path), "wan")
    for name, weight in tiny.random_weights(config).items():
        if weight.ndim <= 4:
            writer.add_tensor(name, weight.numpy())
    if patch is not None and kind == "F32":
        writer.add_tensor(PATCH, patch.contiguous().numpy())
    elif patch is not None:
        type_ = gguf.GGMLQuantizationType[kind]
        writer.add_tensor(PATCH, gguf.quants.quantize(patch.contiguous().numpy(), type_), raw_dtype=type_)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return str(path)


def test_a_gguf_file_without_its_patch_embedding_is_refused_by_what_is_missing(tmp_path):
    text = refusal(write_gguf(tmp_path / "wan.gguf", None))
    assert "lacks patch_embedding.weight" in text and "fix_5d_tensors" in text and "city96" in text


@pytest.mark.parametrize("shape", [(256, 64), (256, 16, 4), (256 * 16, 1, 2, 2), (256, 16, 2, 2)], ids=str)
def test_a_flattened_patch_embedding_gets_its_dimensions_back(tmp_path, shape, expected):
    path = write_gguf(tmp_path / "wan.gguf", WEIGHTS[PATCH].reshape(shape))
    assert read_header(path).tensors[PATCH].shape == WEIGHTS[PATCH].shape
    assert tiny.relative_error(result(path), expected) <= 1e-6


def test_a_flattened_patch_embedding_may_be_quantised(tmp_path):
    source = open_weights(write_gguf(tmp_path / "wan.gguf", WEIGHTS[PATCH].reshape(256, 64), "Q8_0"))
    assert source.tensor(PATCH).shape == WEIGHTS[PATCH].shape
    assert tiny.relative_error(source.tensor(PATCH), WEIGHTS[PATCH]) <= 1e-2


def test_numbers_in_another_order_are_refused(tmp_path):
    assert "patch_embedding.weight" in refusal(write_gguf(tmp_path / "wan.gguf", WEIGHTS[PATCH].reshape(256, 64).T))


# diffusers' Animate.


def test_joined_tensors_of_a_quantised_folder_are_read(tmp_path):
    stored = tiny.diffusers_weights(tiny.random_weights(tiny.ANIMATE))
    for part in ("to_k", "to_v"):
        name = f"face_adapter.0.{part}.weight"
        stored[name] = stored[name].to(torch.float8_e4m3fn)
    source = open_weights(tiny.write_weights(tmp_path / "animate.safetensors", stored))
    name = "face_adapter.fuser_blocks.0.linear1_kv.weight"
    assert source.tensor(name).shape == (512, 256) and not read_model(source.header.path).tensors[name].is_quantized


def test_strays_beside_a_prefix_are_left_out_without_a_word(tmp_path):
    path = tiny.write_weights(tmp_path / "wan.safetensors", with_prefix("net.") | {"other.freqs": torch.ones(1)})
    header = read_header(path)
    assert header.ignored == () and header.prefix == "net."
