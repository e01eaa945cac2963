"""A VACE module beside a text-to-video model is the VACE model that one file holds."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from testkit import format_files, tiny
from wan_parallel.distributed.protocol.messages import decode, encode
from wan_parallel.distributed.protocol.requests import Load
from wan_parallel.distributed.protocol.specs import ModelSpec
from wan_parallel.wanvideo.base.tensor_info import CheckpointError
from wan_parallel.wanvideo.checkpoint.header import read_header
from wan_parallel.wanvideo.checkpoint.vace_module import read_model, read_module
from wan_parallel.wanvideo.checkpoint.weight_source import Checkpoint, file_stamp
from wan_parallel.wanvideo.variants.vace import Vace

BASE = replace(tiny.VACE, additions=())
GIVEN = tiny.inputs(tiny.VACE)
CONDITIONING = tiny.conditioning(tiny.VACE, GIVEN.x)
Tensors = dict[str, torch.Tensor]


def is_module(name: str) -> bool:
    return name.startswith("vace_")


def plain(dtype: torch.dtype, prefix: str = ""):
    def write(path: Path, weights: Tensors) -> tuple[str, Tensors]:
        stored = {name: weight.to(dtype) for name, weight in weights.items()}
        tiny.write_weights(path.with_suffix(".safetensors"), {prefix + k: v for k, v in stored.items()})
        return f"{path}.safetensors", {name: weight.float() for name, weight in stored.items()}

    return write


def fp8(path: Path, weights: Tensors) -> tuple[str, Tensors]:
    """As kijai's scaled files."""
    matrices = [name for name, weight in weights.items() if weight.ndim == 2 and "blocks." in name]
    stored, meant = format_files.scaled(weights, "scale_weight", names=matrices)
    stored["scaled_fp8"] = torch.zeros(2, dtype=torch.float8_e4m3fn)
    return tiny.write_weights(path.with_suffix(".safetensors"), stored), meant


def gguf(path: Path, weights: Tensors) -> tuple[str, Tensors]:
    """As ComfyUI-GGUF's converter writes them."""
    return format_files.write_gguf(path.with_suffix(".gguf"), "Q8_0", weights=weights)


PAIRS = {
    "fp32 and fp32": (plain(torch.float32), plain(torch.float32)),
    "fp8 and bf16": (fp8, plain(torch.bfloat16)),
    "GGUF and bf16": (gguf, plain(torch.bfloat16)),
    "bf16 and fp8": (plain(torch.bfloat16), fp8),
    "fp16 and GGUF": (plain(torch.float16), gguf),
    "prefixed": (plain(torch.float32, "model.diffusion_model."), plain(torch.float32, "diffusion_model.")),
}


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[str, tuple[str, str, str]]:
    """For each pair of formats: the base, the module, and what both stand for in one float32 file."""
    weights, written = tiny.random_weights(tiny.VACE), {}
    for name, (base, module) in PAIRS.items():
        folder = tmp_path_factory.mktemp("pair")
        base_file, base_meant = base(folder / "base", {k: v for k, v in weights.items() if not is_module(k)})
        module_file, module_meant = module(folder / "module", {k: v for k, v in weights.items() if is_module(k)})
        one = tiny.write_weights(folder / "one.safetensors", {**base_meant, **module_meant})
        written[name] = base_file, module_file, one
    return written


@pytest.mark.parametrize("pair", PAIRS)
def test_both_files_are_the_model_of_the_one_file(pool_of, files, pair):
    base, module, one = files[pair]
    pool = pool_of(2)
    expected = pool.forward(ModelSpec(one, "fp32", "fp32"), *GIVEN, conditioning=CONDITIONING)
    spec = ModelSpec(base, "fp32", "fp32", module=module)
    out = pool.forward(spec, *GIVEN, conditioning=CONDITIONING)
    assert torch.equal(out, expected)
    assert spec.name in {model.name for model in pool.status().workers[1].models}
    without = pool.forward(ModelSpec(base, "fp32", "fp32"), *GIVEN)
    assert tiny.relative_error(out, without) > 1e-3
    pool.unload()


def test_both_files_are_divided_as_one_is(pool_of, files):
    base, module, one = files["fp8 and bf16"]
    pool = pool_of(4, pipeline_parallel=2, tensor_parallel=2)
    outs = [
        pool.forward(ModelSpec(path, "fp32", "fp32", module=beside), *GIVEN, conditioning=CONDITIONING)
        for path, beside in ((one, ""), (base, module))
    ]
    assert tiny.relative_error(outs[1], outs[0]) <= 2e-6
    pool.unload()


def test_headers_alone_tell_the_variant(files):
    base, module, one = files["GGUF and bf16"]
    assert read_model(base, module).config == read_header(one).config == tiny.VACE
    assert read_model(base).config == BASE


def test_a_spec_with_a_module_travels_whole():
    spec = ModelSpec("/models/wan.gguf", module="/models/module.safetensors")
    assert decode(encode(Load(1, spec, 0))).spec == spec
    assert spec.name == "wan.gguf + module.safetensors"


def refusal(path: str, module: str) -> str:
    with pytest.raises(CheckpointError) as error:
        read_model(path, module)
    assert tiny.sentences(str(error.value)) == 2
    return str(error.value)


def module_of(path: Path, config: tiny.WanConfig, without: str = "nothing") -> str:
    layout = {k: v for k, v in tiny.layout(config).items() if is_module(k) and not k.startswith(without)}
    return str(tiny.write_layout(path, layout))


def test_a_module_of_another_size_is_refused(tmp_path):
    base = str(tiny.write_layout(tmp_path / "base.safetensors", tiny.layout(replace(BASE, dim=1536, num_heads=12))))
    module = module_of(tmp_path / "module.safetensors", replace(tiny.VACE, dim=5120, num_heads=40))
    text = refusal(base, module)
    assert "module.safetensors is made for a model of width 5120 (14B)" in text
    assert "base.safetensors is one of width 1536 (1.3B)" in text


@pytest.mark.parametrize(
    "change, without, text",
    [
        ({"ffn_dim": 384}, "nothing", "6 tensors are missing, unknown or of another shape: vace_blocks.0.ffn.0"),
        ({}, "vace_blocks.1.after_proj", "2 tensors are missing"),
        ({}, "vace_patch_embedding", "vace_patch_embedding.weight"),
        ({"num_layers": 6, "additions": (Vace(3, 96),)}, "nothing", "3 VACE blocks beside 4 layers"),
    ],
)
def test_a_module_that_does_not_fit_is_refused(tmp_path, files, change, without, text):
    module = module_of(tmp_path / "module.safetensors", replace(tiny.VACE, **change), without)
    assert text in refusal(files["fp32 and fp32"][0], module)


def test_files_that_are_no_module_are_refused(tmp_path, files):
    base, module, one = files["fp32 and fp32"]
    assert "base.safetensors is no VACE module" in refusal(base, base)
    assert "is a whole VACE model, not a module" in refusal(base, one)
    assert "one.safetensors has VACE blocks already" in refusal(one, module)
    i2v = str(tiny.write_layout(tmp_path / "i2v.safetensors", tiny.layout(replace(BASE, in_dim=36))))
    assert "is an image-to-video model" in refusal(i2v, module)
    note = {"config": json.dumps({"transformer": {"model_type": "flow_rvs"}})}
    rvs = str(tiny.write_layout(tmp_path / "rvs.safetensors", tiny.layout(BASE), note))
    assert "rvs.safetensors is a FlowRVS model" in refusal(rvs, module)
    with pytest.raises(CheckpointError, match="is a VACE module without its Wan model"):
        read_header(module)
    with pytest.raises(CheckpointError, match="cut short"):
        cut = tmp_path / "cut.safetensors"
        cut.write_bytes(Path(module).read_bytes()[:300_000])
        read_module(str(cut))


def test_a_module_that_was_replaced_is_another_model(files, tmp_path):
    base, module, _ = next(iter(files.values()))
    copied = tmp_path / Path(module).name
    shutil.copy(module, copied)
    before = read_model(base, str(copied)).stamp
    assert before.startswith(file_stamp(base)) and Checkpoint(base, str(copied), before).header.stamp == before
    shutil.copy(module, tmp_path / "again")
    (tmp_path / "again").replace(copied)
    assert read_model(base, str(copied)).stamp != before
    with pytest.raises(CheckpointError, match="changed after it was queued"):
        Checkpoint(base, str(copied), before)
