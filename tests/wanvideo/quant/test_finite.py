"""Numbers that are none are found in every type and format."""

from __future__ import annotations

import pytest
import torch
from testkit import format_files, tiny
from wan_parallel.wanvideo.checkpoint.weight_source import open_weights
from wan_parallel.wanvideo.quant.finite import is_finite

FLOATS = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2]


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_nan_and_infinity_are_found_and_the_largest_numbers_are_none(dtype):
    info = torch.finfo(dtype)
    finite = torch.tensor([[0.0, -0.0, info.max], [info.min, info.tiny, 1.0]], dtype=torch.float64).to(dtype)
    assert is_finite(finite) and is_finite(finite.T) and is_finite(finite[:0])
    for bad in (torch.nan, -torch.nan, *([] if dtype == torch.float8_e4m3fn else [torch.inf, -torch.inf])):
        broken = torch.cat([finite.double(), torch.full((1, 3), bad, dtype=torch.float64)]).to(dtype)
        assert not is_finite(broken) and is_finite(broken[:2]), bad


def test_every_nan_of_a_small_type_counts():
    everything = torch.arange(256, dtype=torch.uint8)
    for dtype in (torch.float8_e4m3fn, torch.float8_e5m2):
        values = everything.view(dtype)
        assert [is_finite(value[None]) for value in values] == values.float().isfinite().tolist()


def test_integers_are_always_numbers():
    assert is_finite(torch.tensor([-1, 2**62]))


@pytest.mark.parametrize("kind", format_files.STORED)
def test_the_weights_of_every_format_are_numbers_until_one_is_not(tmp_path, kind):
    path, _ = format_files.written(tmp_path, kind)
    source = open_weights(path)
    for name in ("blocks.0.self_attn.q.weight", "blocks.1.ffn.2.weight", "head.modulation"):
        assert is_finite(source.tensor(name)), name


def test_a_scale_that_is_no_number_is_found(tmp_path):
    stored, _ = format_files.new_comfy(tiny.random_weights(tiny.TINY))
    stored["blocks.0.ffn.0.weight_scale"][3] = torch.nan
    source = open_weights(tiny.write_weights(tmp_path / "fp8.safetensors", stored))
    assert not is_finite(source.tensor("blocks.0.ffn.0.weight")) and is_finite(source.tensor("blocks.1.ffn.0.weight"))


@pytest.mark.filterwarnings("ignore:invalid value")
def test_a_scale_in_a_block_of_gguf_that_is_no_number_is_found(tmp_path):
    weights = tiny.random_weights(tiny.TINY)
    weights["blocks.0.ffn.0.weight"][3, 5] = torch.nan
    path, _ = format_files.write_gguf(tmp_path / "wan.gguf", "Q8_0", weights=weights)
    source = open_weights(path)
    assert not is_finite(source.tensor("blocks.0.ffn.0.weight")) and is_finite(source.tensor("blocks.1.ffn.0.weight"))
