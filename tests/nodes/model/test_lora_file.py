"""LoRA files with anything in them are refused in words, or their tensors can be computed with."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from testkit import hostile, tiny
from wan_parallel.nodes.model.lora_file import read_lora
from wan_parallel.nodes.model.lora_names import with_native_names
from wan_parallel.wanvideo.base.tensor_info import CheckpointError

LAYOUT = {
    f"{prefix}{end}": ("F32", shape)
    for prefix in ("diffusion_model.blocks.0.ffn.0.", "lora_unet_blocks_1_self_attn_q.", "transformer.proj_out.")
    for end, shape in (("lora_A.weight", (4, 256)), ("lora_B.weight", (512, 4)), ("alpha", ()), ("diff_b", (512,)))
}


def test_mutated_lora_files(tmp_path):
    path, read = tmp_path / "lora.safetensors", 0

    @hostile.seeded(120)
    @given(st.one_of(hostile.other_layouts(LAYOUT), hostile.safetensors_bytes(LAYOUT)))
    def check(file: tuple[bytes, int]) -> None:
        nonlocal read
        raw, size = file
        path.write_bytes(raw)
        with open(path, "r+b") as opened:
            opened.truncate(size)
        with hostile.harmless(tmp_path):
            try:
                lora = with_native_names("lora", read_lora(str(path)), tiny.TINY.shapes())
            except (CheckpointError, ValueError) as error:
                assert tiny.sentences(str(error)) >= 2 and len(str(error)) < 2_000
                return
        read += 1
        for name, tensor in lora.items():
            assert (tensor.float().sum().isfinite() and tensor.numel() == 1) or not name.endswith(".alpha")

    check()
    assert read > 10


@pytest.mark.parametrize(
    "tensors",
    [
        {"blocks.0.ffn.0.alpha": torch.zeros(2)},
        {"blocks.0.ffn.0.lora_A.weight": torch.zeros(0, 256)},
        {"blocks.0.ffn.0.lora_A.weight": torch.zeros(2, 4, dtype=torch.bool)},
    ],
    ids=str,
)
def test_a_tensor_that_no_lora_has_is_refused(tmp_path, tensors):
    path = tmp_path / "lora.safetensors"
    save_file(tensors, path)
    with pytest.raises(CheckpointError, match="is no LoRA or damaged") as error:
        read_lora(str(path))
    assert tiny.sentences(str(error.value)) == 2


@pytest.mark.parametrize("name", ["lora.pt", "lora.safetensors"])
def test_a_pickled_lora_is_not_opened(tmp_path: Path, name: str):
    (tmp_path / name).write_bytes(pickle.dumps({"a": 1}))
    with pytest.raises(CheckpointError, match="is a pickle file"):
        read_lora(str(tmp_path / name))
