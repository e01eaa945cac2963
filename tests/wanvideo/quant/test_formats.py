"""Every format of Wan files that people have on disk is read as what it stands for, and held in its bytes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import gguf
import numpy
import pytest
import torch
from safetensors.torch import load_file
from testkit import tiny
from testkit.format_files import STORED, block_matrices, in_tiles, write_gguf, written
from wan_parallel.distributed.protocol.specs import ModelSpec
from wan_parallel.distributed.weights.lora_transfer import LoraSet
from wan_parallel.wanvideo.base.lora import LowRank, merge
from wan_parallel.wanvideo.base.tensor_info import CheckpointError
from wan_parallel.wanvideo.checkpoint.header import read_header
from wan_parallel.wanvideo.checkpoint.weight_source import Checkpoint, file_stamp, total_storage_bytes
from wan_parallel.wanvideo.model.model import WanModel
from wan_parallel.wanvideo.quant.formats import gguf_blocks
from wan_parallel.wanvideo.quant.formats.block_scaled import BlockScaledWeight
from wan_parallel.wanvideo.quant.formats.fp8 import Fp8Weight
from wan_parallel.wanvideo.quant.formats.gguf_blocks import BLOCKS, GgufWeight
from wan_parallel.wanvideo.quant.formats.int8 import Int8Weight
from wan_parallel.wanvideo.quant.quantized import QuantizedWeight, as_tensor

GIVEN = tiny.inputs()


def normal(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    "kind, prefix", [*((kind, "") for kind in STORED), ("ComfyUI's newer scaled", "model.diffusion_model.")]
)
def test_a_quantised_file_computes_what_it_stands_for_in_its_own_bytes(tmp_path, kind, prefix):
    path, meant = written(tmp_path, kind, prefix)
    header = read_header(path)
    assert header.format == STORED[kind][1]
    assert header.config == tiny.TINY and set(header.tensors) == set(tiny.TINY.shapes())
    assert {name: info.shape for name, info in header.tensors.items()} == tiny.TINY.shapes()
    model = WanModel.from_checkpoint(path)
    reference = WanModel.from_checkpoint(meant)
    assert tiny.relative_error(model(*GIVEN), reference(*GIVEN)) <= 2e-6
    for name, weight in model.weights():
        assert tiny.relative_error(as_tensor(weight, torch.float32), reference.get_parameter(name)) < 1e-7
        if name in block_matrices(tiny.random_weights(tiny.TINY)):
            assert isinstance(weight, QuantizedWeight)
            of_rows, of_groups = (weight.components().get(name, torch.empty(0)) for name in ("scale", "scales"))
            assert weight.nbytes <= weight.shape.numel() + 4 * len(of_rows) + of_groups.numel()
    held = sum(weight.nbytes for _, weight in model.weights())
    assert 0.99 < total_storage_bytes(path, torch.float32) / held <= 1.0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_16_bit_arithmetic_rounds_the_dequantised_weights_once(tmp_path, dtype):
    path, meant = written(tmp_path, "ComfyUI's newer scaled")
    ours, theirs = (WanModel.from_checkpoint(file, dtype, dtype) for file in (path, meant))
    assert tiny.relative_error(ours(*GIVEN), theirs(*GIVEN)) <= 2e-6


def test_base_precision_applies_to_what_the_file_has_in_float(tmp_path):
    path, _ = written(tmp_path, "ComfyUI's newer scaled")
    for dtype, other in ((torch.bfloat16, torch.bfloat16), (torch.float8_e5m2, torch.bfloat16)):
        held = dict(WanModel.from_checkpoint(path, dtype).weights())
        assert held["blocks.0.ffn.0.weight"].format == "scaled fp8 e4m3"
        assert held["text_embedding.0.weight"].dtype == held["head.head.weight"].dtype == other


@pytest.mark.parametrize(
    "dtype, fields, name",
    [
        ("U8", {"format": "mxfp6"}, "mxfp6"),
        ("I8", {"format": "convrot_w4a4"}, "convrot_w4a4"),
        ("I8", None, "I8"),
        ("F4", None, "F4"),
    ],
)
def test_a_format_without_code_here_is_refused_by_its_name(tmp_path, dtype, fields, name):
    tensors = tiny.layout()
    tensors["blocks.0.ffn.0.weight"] = (dtype, tensors["blocks.0.ffn.0.weight"][1])
    metadata = {"_quantization_metadata": json.dumps({"layers": {"blocks.0.ffn.0": fields}})} if fields else None
    path = tiny.write_layout(tmp_path / "model.safetensors", tensors, metadata)
    with pytest.raises(CheckpointError, match=f"has {name} weights.* Use the fp8_scaled, GGUF, bf16") as error:
        read_header(path)
    assert tiny.sentences(str(error.value)) == 2


@pytest.mark.parametrize(
    "extra, metadata, text",
    [
        ({"blocks.0.ffn.0.weight_scale": ("F32", (3,))}, None, "a scale of shape [3]"),
        ({"blocks.0.ffn.0.weight_scale": ("U8", (1,))}, None, "a scale of shape [1] (U8)"),
        ({"blocks.0.ffn.0.comfy_quant": ("U8", (9,))}, None, "quantised layers is corrupt"),
        ({}, {"_quantization_metadata": "{"}, "quantised layers is corrupt"),
        ({}, {"_quantization_metadata": "[1]"}, "quantised layers is corrupt"),
    ],
    ids=["scale of 3", "scale in bytes", "note", "metadata", "metadata of another type"],
)
def test_scales_and_descriptions_that_make_no_sense_are_refused(tmp_path, extra, metadata, text):
    tensors = tiny.layout()
    tensors["blocks.0.ffn.0.weight"] = ("F8_E4M3", tensors["blocks.0.ffn.0.weight"][1])
    path = tiny.write_layout(tmp_path / "model.safetensors", {**tensors, **extra}, metadata)
    with pytest.raises(CheckpointError) as error:
        read_header(path)
    assert text in str(error.value) and tiny.sentences(str(error.value)) == 2


def test_lost_and_unknown_tensors_are_named_the_first_five_and_how_many(tmp_path):
    tensors = tiny.layout()
    lost = [name for name in tensors if "self_attn" in name and name.endswith("bias")]
    for name in lost:
        del tensors[name]
    with pytest.raises(CheckpointError) as error:
        read_header(tiny.write_layout(tmp_path / "model.safetensors", tensors))
    assert f"lacks {len(lost)} tensors" in str(error.value)
    assert f"{', '.join(lost[:5])} and {len(lost) - 5} more" in str(error.value)
    extra = {f"blocks.0.adapter.{i}": ("BF16", (2,)) for i in range(7)}
    with pytest.raises(CheckpointError, match=r"has 7 tensors.*adapter\.0, .*adapter\.4 and 2 more"):
        read_header(tiny.write_layout(tmp_path / "model.safetensors", {**tiny.layout(), **extra}))


# NVFP4 and MXFP8.


@pytest.mark.parametrize("kind", ["nvfp4", "mxfp8"])
@pytest.mark.parametrize("what", ["lost", "short", "whole"])
def test_scales_that_do_not_fit_their_groups_are_refused(tmp_path, kind, what):
    path, _ = written(tmp_path, kind)
    tensors, layer = dict(load_file(path)), "blocks.0.ffn.0."
    if what == "short":
        tensors[f"{layer}weight_scale"] = tensors[f"{layer}weight_scale"][:128].clone()
    else:
        name = "weight_scale_2" if what == "whole" and kind == "nvfp4" else "weight_scale"
        del tensors[layer + name]
    with pytest.raises(CheckpointError, match=f"{layer}weight in {kind}, of which a scale is missing") as error:
        read_header(tiny.write_weights(tmp_path / "other.safetensors", tensors))
    assert tiny.sentences(str(error.value)) == 2


@pytest.mark.parametrize(
    "note, shape, text",
    [
        ({"format": ["nvfp4"]}, (512, 128), "weights, which this version cannot read"),
        ({"format": {}}, (512, 128), "weights, which this version cannot read"),
        ({"format": "nvfp4"}, (), "in nvfp4, of which a scale is missing"),
        ({"format": "mxfp8"}, (4,), "in mxfp8, of which a scale is missing"),
    ],
    ids=str,
)
def test_what_makes_no_sense_is_refused_in_words(tmp_path, note, shape, text):
    tensors = {**tiny.layout(), "blocks.0.ffn.0.weight": ("U8", shape)}
    metadata = {"_quantization_metadata": json.dumps({"layers": {"blocks.0.ffn.0": note}})}
    with pytest.raises(CheckpointError, match=text):
        read_header(tiny.write_layout(tmp_path / "model.safetensors", tensors, metadata))


def test_inputs_that_are_scaled_before_are_refused_by_the_formats_name(tmp_path):
    path, _ = written(tmp_path, "nvfp4")
    tensors = {**load_file(path), "blocks.0.ffn.0.pre_quant_scale": torch.ones(tiny.TINY.dim)}
    with pytest.raises(CheckpointError, match="has nvfp4 weights"):
        read_header(tiny.write_weights(tmp_path / "other.safetensors", tensors))


def test_every_number_of_four_bits_and_every_scale():
    values = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
    values = torch.cat((values, -values))
    packed = torch.arange(16, dtype=torch.uint8).view(8, 2)
    packed = (packed[:, 0] << 4 | packed[:, 1]).repeat(256, 1)  # a group for each scale there is
    scales = torch.arange(256, dtype=torch.uint8).view(256, 1)
    weight = BlockScaledWeight.of_file("NVFP4", packed, in_tiles(scales), torch.tensor(0.37))
    expected = values * scales.view(torch.float8_e4m3fn).double() * torch.tensor(0.37).double()
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        rounding = torch.finfo(dtype).eps
        assert torch.allclose(weight.dequantize(dtype), expected.to(dtype), rtol=rounding, atol=0, equal_nan=True)
    data = torch.full((256, 32), 1.5).to(torch.float8_e4m3fn)
    weight = BlockScaledWeight.of_file("MXFP8", data, in_tiles(scales), None).dequantize(torch.float32)
    assert torch.equal(weight[1:255, 0].double(), 1.5 * 2.0 ** (torch.arange(1.0, 255, dtype=torch.float64) - 127))


# GGUF.


@pytest.mark.parametrize("name", BLOCKS)
def test_blocks_are_dequantised_bit_for_bit_as_by_their_authors(name, monkeypatch):
    monkeypatch.setattr(gguf_blocks, "_CHUNK", 4 * 768)  # several chunks, the last one smaller
    block, kind = BLOCKS[name], gguf.GGMLQuantizationType[name]
    assert gguf.GGML_QUANT_SIZES[kind] == (block.numbers, block.nbytes)
    columns = 768
    raw = numpy.random.default_rng(0).integers(0, 256, (22, columns // block.numbers * block.nbytes), dtype=numpy.uint8)
    with numpy.errstate(all="ignore"):  # some random scales are not finite
        expected = torch.from_numpy(gguf.quants.dequantize(raw, kind))
    weight = GgufWeight(name, torch.from_numpy(raw), columns)
    assert weight.shape == (22, columns) and weight.nbytes == raw.nbytes
    for dtype in (torch.float32, torch.bfloat16):
        assert torch.allclose(weight.dequantize(dtype), expected.to(dtype), rtol=0, atol=0, equal_nan=True)
    for part in (weight.narrow(0, 5, 9), weight.narrow(1, 100, 300).narrow(0, 5, 9).narrow(1, 31, 64)):
        rows, cut = expected[5:14], expected[5:14, 131:195]
        wanted = rows if part.shape[1] == columns else cut
        assert torch.allclose(part.dequantize(torch.float32), wanted, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("kind", ["Q4_K", "Q5_K", "Q6_K", "Q8_0", "Q4_0", "Q3_K", "BF16", "F16", "F32"])
def test_a_gguf_file_computes_what_it_stands_for_in_its_own_bytes(tmp_path, kind):
    path, meant = write_gguf(tmp_path / f"wan-{kind}.gguf", kind)
    reference = tiny.write_weights(tmp_path / "meant.safetensors", meant)
    header = read_header(path)
    names = {"BF16": "bf16", "F16": "fp16", "F32": "fp32"}
    assert header.format == names.get(kind, f"GGUF {kind}") and header.config == tiny.TINY
    assert {name: info.shape for name, info in header.tensors.items()} == tiny.TINY.shapes()
    model = WanModel.from_checkpoint(path)
    for name, weight in model.weights():
        assert torch.equal(as_tensor(weight, torch.float32), meant[name])
    assert tiny.relative_error(model(*GIVEN), WanModel.from_checkpoint(reference)(*GIVEN)) <= 2e-6
    weight = dict(model.weights())["blocks.1.ffn.2.weight"]
    bits = {"Q4_K": 4.5, "Q5_K": 5.5, "Q6_K": 6.5625, "Q8_0": 8.5, "Q4_0": 4.5, "Q3_K": 3.4375}.get(kind, 32)
    assert weight.nbytes == weight.shape.numel() * bits / 8
    held = sum(weight.nbytes for _, weight in model.weights())
    assert total_storage_bytes(path, torch.float32) == held


@pytest.mark.parametrize("share", [0.0, 0.0001, 0.01, 0.3, 0.999])
def test_a_gguf_file_that_is_cut_short_is_refused(tmp_path, share):
    path, _ = write_gguf(tmp_path / "wan.gguf", "Q8_0")
    with open(path, "r+b") as file:
        file.truncate(int(Path(path).stat().st_size * share))
    with pytest.raises(CheckpointError, match="cut short or its header is corrupt") as error:
        read_header(path)
    assert tiny.sentences(str(error.value)) == 2


def test_any_damage_to_a_gguf_header_is_noticed_or_harmless(tmp_path):
    path, _ = write_gguf(tmp_path / "wan.gguf", "Q8_0")
    whole = Path(path).read_bytes()
    rng = numpy.random.default_rng(0)
    for _ in range(60):
        damaged = bytearray(whole)
        for place in rng.integers(4, 3000, 3):
            damaged[place] = rng.integers(0, 256)
        Path(path).write_bytes(damaged)
        try:
            read_header(path)
        except CheckpointError as error:
            assert tiny.sentences(str(error)) == 2, str(error)


def test_a_gguf_format_without_code_here_is_refused_by_its_name(tmp_path):
    writer = gguf.GGUFWriter(None, "wan")
    kind = gguf.GGMLQuantizationType.IQ4_XS
    writer.add_tensor("blocks.0.ffn.0.weight", numpy.zeros((2, 136), numpy.uint8), raw_dtype=kind)
    writer.write_header_to_file(tmp_path / "wan.gguf")
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(CheckpointError, match=r"has IQ4_XS tensors.* Use the Q4_K, Q5_K") as error:
        read_header(tmp_path / "wan.gguf")
    assert tiny.sentences(str(error.value)) == 2


def test_gguf_files_need_no_gguf_package(tmp_path, monkeypatch):
    path, _ = write_gguf(tmp_path / "wan.gguf", "Q8_0")
    monkeypatch.setitem(__import__("sys").modules, "gguf", None)
    assert read_header(path).format == "GGUF Q8_0"


# diffusers' layout.


@pytest.fixture(scope="module")
def diffusers_folders(tmp_path_factory, checkpoint) -> dict[str, Path]:
    """What diffusers itself saves, in one file and in shards."""
    folder = tmp_path_factory.mktemp("diffusers")
    model = tiny.diffusers_model(checkpoint)
    model.save_pretrained(folder / "whole")
    model.save_pretrained(folder / "sharded", max_shard_size="3MB")
    assert len(list((folder / "sharded").glob("*.safetensors"))) > 2
    return {"whole": folder / "whole", "sharded": folder / "sharded"}


def test_what_diffusers_saves_is_the_same_model(diffusers_folders, model):
    whole, sharded = diffusers_folders["whole"], diffusers_folders["sharded"]
    shard = sorted(sharded.glob("*-00002-of-*.safetensors"))[0]
    expected = model(*GIVEN)
    for path in (whole, whole / "diffusion_pytorch_model.safetensors", sharded, shard):
        header = read_header(path)
        assert header.config == tiny.TINY and set(header.tensors) == set(tiny.TINY.shapes())
        assert tiny.relative_error(WanModel.from_checkpoint(str(path))(*GIVEN), expected) <= 2e-6


def test_image_and_vace_names_of_diffusers_are_known():
    from wan_parallel.wanvideo.checkpoint.diffusers_names import original_name

    assert original_name("condition_embedder.image_embedder.ff.net.0.proj.weight") == "img_emb.proj.1.weight"
    assert original_name("condition_embedder.image_embedder.pos_embed") == "img_emb.emb_pos"
    assert original_name("blocks.3.attn2.add_k_proj.bias") == "blocks.3.cross_attn.k_img.bias"
    assert original_name("blocks.3.attn2.norm_added_k.weight") == "blocks.3.cross_attn.norm_k_img.weight"
    assert original_name("vace_blocks.0.proj_in.weight") == "vace_blocks.0.before_proj.weight"
    assert original_name("vace_blocks.7.proj_out.bias") == "vace_blocks.7.after_proj.bias"
    assert original_name("proj_out.bias") == "head.head.bias"
    for name in tiny.TINY.shapes():
        assert original_name(tiny.diffusers_name(name)) == name


def copied(folder: Path, to: Path) -> Path:
    return Path(shutil.copytree(folder, to / "transformer"))


def test_a_folder_that_lacks_a_shard_is_refused(diffusers_folders, tmp_path):
    folder = copied(diffusers_folders["sharded"], tmp_path)
    sorted(folder.glob("*.safetensors"))[1].unlink()
    with pytest.raises(CheckpointError, match=r"lacks 1 of the \d files.*-00002-of-.* Download") as error:
        read_header(folder)
    assert tiny.sentences(str(error.value)) == 2


def test_a_shard_that_is_cut_short_is_named(diffusers_folders, tmp_path):
    folder = copied(diffusers_folders["sharded"], tmp_path)
    shard = sorted(folder.glob("*.safetensors"))[1]
    with open(shard, "r+b") as file:
        file.truncate(shard.stat().st_size - 10)
    with pytest.raises(CheckpointError, match=f"{shard.name} is cut short"):
        read_header(folder)


@pytest.mark.parametrize("index", ["{", "[]", '{"weight_map": 3}', '{"weight_map": {"a": "../b.safetensors"}}'])
def test_a_corrupt_index_is_refused(diffusers_folders, tmp_path, index):
    folder = copied(diffusers_folders["sharded"], tmp_path)
    (folder / "diffusion_pytorch_model.safetensors.index.json").write_text(index)
    with pytest.raises(CheckpointError, match=r"index .* is corrupt") as error:
        read_header(folder)
    assert tiny.sentences(str(error.value)) == 2


def test_a_folder_without_one_model_is_refused(tmp_path, checkpoint):
    for name in ("a.safetensors", "b.safetensors"):
        shutil.copy(checkpoint, tmp_path / name)
    with pytest.raises(CheckpointError, match=r"holds 2 \.safetensors files and no index"):
        read_header(tmp_path)


def test_a_folder_has_another_stamp_when_one_of_its_files_has(diffusers_folders, tmp_path):
    folder = copied(diffusers_folders["sharded"], tmp_path)
    shard = sorted(folder.glob("*.safetensors"))[0]
    before = file_stamp(str(folder)), file_stamp(str(shard))
    shard.touch()
    assert file_stamp(str(folder)) != before[0] and file_stamp(str(shard)) != before[1]


# On workers, with LoRAs.


@pytest.mark.parametrize("kind", ["fp8", "gguf"])
def test_workers_run_quantised_files_merge_loras_and_undo_them_exactly(pool_of, tmp_path, kind):
    if kind == "fp8":
        path, _ = written(tmp_path, "ComfyUI's older scaled")
    else:
        path, _ = write_gguf(tmp_path / "wan-Q4_K.gguf", "Q4_K")
    pool, spec, d = pool_of(2), ModelSpec(path, "bf16", "fp32"), tiny.TINY.dim
    model = WanModel.from_checkpoint(path, torch.bfloat16)
    plain = pool.forward(spec, *GIVEN)
    assert tiny.relative_error(plain, model(*GIVEN)) <= 2e-6
    name = "blocks.0.self_attn.q.weight"
    changes = {name: [LowRank(normal(d, 4) * 0.2, normal(4, d, seed=2) * 0.2, 1.0)]}
    patched = pool.forward(spec, *GIVEN, LoraSet(f"{kind}-lora", lambda: changes))
    exact = merge(Checkpoint(path).tensor(name).dequantize(torch.float32), changes[name])
    held = dict(model.weights())[name].requantize(exact)
    assert tiny.relative_error(held.dequantize(torch.float32), exact) < (0.03 if kind == "fp8" else 0.006)
    assert isinstance(held, Fp8Weight) or held.format == "GGUF Q8_0"
    model.set_weight(name, held)
    assert tiny.relative_error(patched, model(*GIVEN)) <= 2e-6 < 1e-3 < tiny.relative_error(patched, plain)
    assert torch.equal(pool.forward(spec, *GIVEN), plain)


def test_a_changed_gguf_slice_of_odd_width_is_held_in_8_bits():
    weight = GgufWeight("Q8_0", torch.zeros(4, 34, dtype=torch.uint8), 32).narrow(1, 3, 10)
    again = weight.requantize(normal(4, 10))
    assert isinstance(again, Int8Weight) and tiny.relative_error(again.dequantize(torch.float32), normal(4, 10)) < 0.02
