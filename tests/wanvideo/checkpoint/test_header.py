"""The configuration is read off a checkpoint's header alone, and what cannot run is refused in two sentences."""

from __future__ import annotations

import json
import pickle
import random
import struct
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from testkit import tiny
from wan_parallel.wanvideo.base.config import PRESETS, WanConfig
from wan_parallel.wanvideo.base.tensor_info import CheckpointError
from wan_parallel.wanvideo.checkpoint.header import Header, read_header
from wan_parallel.wanvideo.checkpoint.weight_source import Checkpoint, open_weights
from wan_parallel.wanvideo.variants.fun_camera import FunCamera
from wan_parallel.wanvideo.variants.fun_control import Reference
from wan_parallel.wanvideo.variants.vace import Vace

PREFIXES = ("model.diffusion_model.", "diffusion_model.", "", "model.", "model.model.", "net.", "generator.model.")


def refusal(path: Path) -> str:
    """The message with which the file is refused."""
    with pytest.raises(CheckpointError) as error:
        read_header(path)
    return str(error.value)


@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16"])
@pytest.mark.parametrize("prefix", PREFIXES)
def test_every_prefix_and_dtype_is_read(tmp_path, prefix, dtype):
    path = tiny.write_layout(tmp_path / "model.safetensors", tiny.layout(dtype=dtype, prefix=prefix))
    header = read_header(path)
    assert header.prefix == prefix
    assert header.config == tiny.TINY
    assert set(header.tensors) == set(tiny.TINY.shapes())
    assert {info.dtype for info in header.tensors.values()} == {dtype}
    assert header.nbytes == tiny.TINY.parameters * (4 if dtype == "F32" else 2)


@pytest.mark.parametrize("prefix", PREFIXES)
def test_tensors_are_read_by_their_names_without_prefix(tmp_path, prefix):
    path = tiny.write_checkpoint(tmp_path / "model.safetensors", dtype=torch.bfloat16, prefix=prefix)
    checkpoint = Checkpoint(path)
    for name, weight in tiny.random_weights(tiny.TINY).items():
        assert torch.equal(checkpoint.tensor(name), weight.bfloat16())


def test_mixed_dtypes_and_parts_of_a_full_checkpoint_are_no_obstacle(tmp_path):
    tensors = tiny.layout(prefix="model.diffusion_model.")
    for name, (_, shape) in tensors.items():
        if len(shape) != 2:
            tensors[name] = ("F32", shape)
    tensors["first_stage_model.decoder.weight"] = ("F16", (3, 3))
    tensors["text_encoders.umt5xxl.shared.weight"] = ("F8_E4M3", (8, 8))
    header = read_header(tiny.write_layout(tmp_path / "full.safetensors", tensors, {"format": "pt"}))
    assert header.config == tiny.TINY
    assert header.metadata == {"format": "pt"}
    assert "first_stage_model.decoder.weight" not in header.tensors


@pytest.mark.parametrize(
    "size, parameters, tensors",
    [("1.3b", 1_418_996_800, 825), ("5b", 4_999_787_712, 825), ("14b", 14_288_491_584, 1095)],
)
def test_released_sizes_have_the_parameters_of_the_official_models(size, parameters, tensors):
    assert PRESETS[size].parameters == parameters
    assert len(PRESETS[size].shapes()) == tensors


def test_a_14b_file_is_understood_in_a_fifth_of_a_second_without_reading_its_weights(tmp_path):
    path = tiny.write_layout(tmp_path / "wan2.2_t2v_high_14B.safetensors", tiny.layout(PRESETS["14b"]))
    assert path.stat().st_size > 28e9
    before, seconds = bytes_read(), []
    for _ in range(3):
        start = time.perf_counter()
        header = read_header(path)
        seconds.append(time.perf_counter() - start)
    assert bytes_read() - before < 3 * 1_000_000
    assert min(seconds) < 0.2
    assert header.config == PRESETS["14b"]
    assert header.config.num_heads == 40


def bytes_read() -> int:
    """Bytes that this process has read, cached or not."""
    fields = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return int(fields["rchar"])


# Files that are broken.


def whole_file(folder: Path) -> Path:
    return tiny.write_layout(folder / "model.safetensors", tiny.layout())


def cut(path: Path, size: int) -> Path:
    with open(path, "r+b") as file:
        file.truncate(size)
    return path


def test_a_missing_file_is_refused(tmp_path):
    text = refusal(tmp_path / "gone.safetensors")
    assert "gone.safetensors does not exist" in text and tiny.sentences(text) == 2


def test_a_folder_without_a_model_is_refused(tmp_path):
    text = refusal(tmp_path)
    assert "holds 0 .safetensors files" in text and tiny.sentences(text) == 2


@pytest.mark.parametrize("size", [0, 5, 8, 100, 5000])
def test_a_download_that_stopped_in_the_header_is_refused(tmp_path, size):
    text = refusal(cut(whole_file(tmp_path), size))
    assert "its download stopped early" in text and tiny.sentences(text) == 2


@pytest.mark.parametrize("missing", [1, 1_000_000])
def test_a_download_that_stopped_in_the_weights_is_refused(tmp_path, missing):
    path = whole_file(tmp_path)
    text = refusal(cut(path, path.stat().st_size - missing))
    assert "is cut short" in text and tiny.sentences(text) == 2


@pytest.mark.parametrize(
    "header",
    [
        b"\xff" * 64,
        b"not json at all",
        b'{"a": ',
        b"[]",
        b"null",
        b"[" * 100_000,
        b'{"a": {"dtype": "F32", "shape": [2]}}',
        b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": [8, 0]}}',
        b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 7]}}',
        b'{"a": {"dtype": "F32", "shape": [-2], "data_offsets": [0, 8]}}',
        b'{"a": {"dtype": "F32", "shape": [Infinity], "data_offsets": [0, 8]}}',
        b'{"a": {"dtype": 3, "shape": [2], "data_offsets": [0, 8]}}',
    ],
    ids=lambda header: header[:40].decode(errors="replace"),
)
def test_a_corrupt_header_is_refused(tmp_path, header):
    text = refusal(tiny.write_header(tmp_path / "model.safetensors", header, 8))
    assert "header of model.safetensors is corrupt" in text and tiny.sentences(text) == 2


def test_any_damage_to_a_header_is_noticed_or_harmless(tmp_path):
    rng = random.Random(0)
    odd = [None, True, -1, 0, 1.5, 2**70, float("inf"), float("nan"), "x", "F64", [], [0], [1, 2, 3], {}, {"a": 1}]
    source = whole_file(tmp_path)
    raw = source.read_bytes()[8:]
    original = raw[: raw.rindex(b"}") + 1]
    refused = 0
    for _ in range(150):
        header = json.loads(original)
        for name in rng.sample(sorted(header), rng.choice([1, 3])):
            if rng.random() < 0.2:
                header[name] = rng.choice(odd)
            else:
                header[name][rng.choice(["dtype", "shape", "data_offsets"])] = rng.choice(odd)
        path = tiny.write_header(tmp_path / "damaged.safetensors", json.dumps(header).encode(), 10**7)
        try:
            assert isinstance(read_header(path), Header)
        except CheckpointError as error:
            assert tiny.sentences(str(error)) == 2
            refused += 1
    assert refused > 100


def test_a_model_with_a_lost_tensor_is_refused(tmp_path):
    tensors = tiny.layout()
    del tensors["blocks.1.cross_attn.norm_k.weight"]
    text = refusal(tiny.write_layout(tmp_path / "model.safetensors", tensors))
    assert "blocks.1.cross_attn.norm_k.weight" in text and tiny.sentences(text) == 2


def test_a_width_that_no_wan_has_is_refused(tmp_path):
    config = WanConfig(dim=192, ffn_dim=512, num_heads=2, num_layers=1)
    text = refusal(tiny.write_layout(tmp_path / "model.safetensors", tiny.layout(config)))
    assert "has width 192" in text and tiny.sentences(text) == 2


# Files of other kinds.


class Bomb:
    """Leaves a trace where a pickle of it is opened."""

    def __init__(self, trace: Path):
        self.trace = trace

    def __reduce__(self):
        return Path.touch, (self.trace,)


@pytest.mark.parametrize("name", ["wan.pt", "wan.ckpt", "wan.pth", "wan.safetensors"])
@pytest.mark.parametrize("new_format", [True, False], ids=["zip", "legacy"])
def test_a_pickle_is_refused_unopened_whatever_its_name(tmp_path, name, new_format):
    trace = tmp_path / "opened"
    path = tmp_path / name
    torch.save({"weight": Bomb(trace)}, path, _use_new_zipfile_serialization=new_format)
    text = refusal(path)
    assert "is a pickle file" in text and tiny.sentences(text) == 2
    assert not trace.exists()


@pytest.mark.parametrize("length", [0x4B50, 0x4B80], ids=["PK", "0x80"])
def test_a_header_length_that_begins_like_a_pickle_is_not_one(tmp_path, length):
    path = Path(tiny.write_checkpoint(tmp_path / "wan.safetensors"))
    content = path.read_bytes()
    (before,) = struct.unpack("<Q", content[:8])
    header, weights = content[8 : 8 + before], content[8 + before :]
    path.write_bytes(struct.pack("<Q", length) + header.ljust(length) + weights)
    assert read_header(path).config == tiny.TINY


def test_a_bare_pickle_is_refused(tmp_path):
    path = tmp_path / "wan.safetensors"
    path.write_bytes(pickle.dumps({"weight": 1}))
    text = refusal(path)
    assert "is a pickle file" in text and tiny.sentences(text) == 2


def test_a_gguf_file_under_another_name_is_refused(tmp_path):
    path = tmp_path / "wan-Q4.safetensors"
    path.write_bytes(b"GGUF" + bytes(1000))
    text = refusal(path)
    assert "is a GGUF file under another name" in text and tiny.sentences(text) == 2


def test_a_file_that_is_called_gguf_and_is_none_is_refused(tmp_path):
    path = tmp_path / "wan-Q4.gguf"
    path.write_bytes(b"<html>" + bytes(1000))
    text = refusal(path)
    assert "is not a GGUF file" in text and tiny.sentences(text) == 2


@pytest.mark.parametrize(
    "key",
    ["diffusion_model.blocks.0.self_attn.q.lora_A.weight", "lora_unet_blocks_0_ffn_0.lora_down.weight"],
)
def test_a_lora_is_refused_with_the_node_that_loads_it(tmp_path, key):
    path = tmp_path / "lora.safetensors"
    save_file({key: torch.zeros(4, 8)}, path)
    text = refusal(path)
    assert "is a LoRA" in text and "LoraLoaderModelOnly" in text and tiny.sentences(text) == 2


def test_another_model_is_refused(tmp_path):
    tensors = {"model.diffusion_model.input_blocks.0.0.weight": ("F16", (320, 4, 3, 3))}
    text = refusal(tiny.write_layout(tmp_path / "sd15.safetensors", tensors))
    assert "is a Stable Diffusion model, not a Wan video model" in text and tiny.sentences(text) == 2


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
def test_a_variant_that_is_not_there_yet_is_refused(tmp_path, prefix):
    tensors = {**tiny.layout(prefix=prefix), f"{prefix}blocks.0.cross_attn.ip_adapter.k.weight": ("BF16", (4,))}
    text = refusal(tiny.write_layout(tmp_path / "variant.safetensors", tensors))
    assert "Lynx" in text and "later version" in text and tiny.sentences(text) == 2


@pytest.mark.parametrize(
    "note, name",
    [
        ({"transformer": {"model_type": "animate2"}}, "Wan Animate-2"),
        ({"transformer": {"model_type": "flow_rvs"}}, "FlowRVS, but has the tensors of a Wan image-to-video model"),
        ({"transformer": {"model_type": ["t2v"]}}, "Wan ['t2v']"),
        ({"transformer": {"model_type": "t2v", "causal_ar": True}}, "causal"),
    ],
    ids=["animate2", "flow_rvs", "no name", "causal"],
)
def test_a_variant_with_the_tensors_of_another_is_refused_by_the_name_in_its_note(tmp_path, note, name):
    path = tmp_path / "variant.safetensors"
    text = refusal(tiny.write_layout(path, tiny.layout(tiny.I2V_CLIP), {"config": json.dumps(note)}))
    assert name in text and "later version" in text and tiny.sentences(text) == 2


def test_flow_rvs_is_told_from_text_to_video_by_its_note(tmp_path):
    note = {"config": json.dumps({"transformer": {"model_type": "flow_rvs"}})}
    noted = read_header(tiny.write_layout(tmp_path / "noted.safetensors", tiny.layout(), note))
    plain = read_header(tiny.write_layout(tmp_path / "plain.safetensors", tiny.layout()))
    assert noted.is_flow_rvs and not plain.is_flow_rvs
    assert noted.config == plain.config == tiny.TINY


FOREIGN = ['{"transformer": {"model_type": "i2v"}}', '{"transformer": [1]}', '{"other": 1}', "[]", "no JSON"]


@pytest.mark.parametrize("note", FOREIGN)
def test_other_notes_change_nothing(tmp_path, note):
    path = tiny.write_layout(tmp_path / "model.safetensors", tiny.layout(tiny.I2V_CLIP), {"config": note})
    assert read_header(path).config == tiny.I2V_CLIP


def test_a_model_with_fewer_channels_in_than_out_is_refused(tmp_path):
    config = WanConfig(dim=256, ffn_dim=512, num_heads=2, num_layers=1, in_dim=12)
    text = refusal(tiny.write_layout(tmp_path / "odd.safetensors", tiny.layout(config)))
    assert "12 channels in, 16 out" in text and tiny.sentences(text) == 2


def test_vace_blocks_that_cannot_be_spread_over_the_layers_are_refused(tmp_path):
    config = WanConfig(dim=256, ffn_dim=512, num_heads=2, num_layers=3).having(Vace(2, 96))
    text = refusal(tiny.write_layout(tmp_path / "odd.safetensors", tiny.layout(config)))
    assert "3 layers, 2 of VACE" in text and tiny.sentences(text) == 2


@pytest.mark.parametrize("marker", ["img_emb.proj.1.weight", "ref_conv.weight", "control_adapter.conv.weight"])
def test_a_variant_without_all_of_its_tensors_is_refused(tmp_path, marker):
    config = WanConfig(256, 512, 2, 1, in_dim=36, image_dim=1280).having(Reference(16), FunCamera(24))
    tensors = tiny.layout(config)
    shape = (3, *tensors[marker][1][1:])
    text = refusal(tiny.write_layout(tmp_path / "part.safetensors", {**tensors, marker: ("BF16", shape)}))
    assert "lacks 1 tensors" in text and marker in text and tiny.sentences(text) == 2


def test_a_vace_module_without_its_model_is_refused(tmp_path):
    tensors = {"vace_blocks.0.after_proj.weight": ("BF16", (4, 4)), "vace_patch_embedding.bias": ("BF16", (4,))}
    text = refusal(tiny.write_layout(tmp_path / "vace.safetensors", tensors))
    assert "VACE module" in text and tiny.sentences(text) == 2


# Random weights, for benchmarks.


def test_random_weights_are_the_same_in_every_call():
    first, second = open_weights("random:1.3b"), open_weights("random:1.3b")
    name = "blocks.3.self_attn.q.weight"
    assert first.tensor(name).shape == (1536, 1536)
    assert torch.equal(first.tensor(name), second.tensor(name))
    assert not torch.equal(first.tensor(name), first.tensor("blocks.4.self_attn.q.weight"))


def test_random_weights_of_an_unknown_size_are_refused():
    with pytest.raises(CheckpointError, match=r"no Wan of size 15b.*1\.3b, 5b, 14b") as error:
        open_weights("random:15b")
    assert tiny.sentences(str(error.value)) == 2
