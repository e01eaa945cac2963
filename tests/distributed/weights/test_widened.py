"""A control LoRA gives the patch embedding more channels, and so the model of the workers, however it is spread."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from testkit import tiny
from testkit.shared.lora_changes import normal
from wan_parallel.distributed.protocol.specs import ModelSpec
from wan_parallel.distributed.weights.lora_transfer import LoraSet
from wan_parallel.wanvideo.base.lora import Replacement
from wan_parallel.wanvideo.checkpoint.vace_module import read_model
from wan_parallel.wanvideo.checkpoint.weight_source import open_weights, storage_bytes_of
from wan_parallel.wanvideo.model.model import WanModel

PATCH = "patch_embedding.weight"
WIDE = replace(tiny.TINY, in_dim=32)
PLAIN, GIVEN = tiny.inputs(), tiny.inputs(WIDE)


@pytest.fixture(scope="module")
def path(tmp_path_factory) -> Path:
    return Path(tiny.write_checkpoint(tmp_path_factory.mktemp("wide") / "wan.safetensors"))


def spec_of(path: Path, **options) -> ModelSpec:
    return ModelSpec(str(path), "fp32", "fp32", **options)


def test_the_further_channels_of_a_file_are_zeros(path):
    source, narrow = open_weights(str(path), in_dim=32), open_weights(str(path)).tensor(PATCH)
    assert source.config == WIDE and source.tensor(PATCH).shape == (256, 32, 1, 2, 2)
    assert torch.equal(source.tensor(PATCH)[:, :16], narrow) and not source.tensor(PATCH)[:, 16:].any()
    sizes = storage_bytes_of(str(path), torch.float32, in_dim=32)
    assert sizes[PATCH] == 2 * storage_bytes_of(str(path), torch.float32)[PATCH]
    assert read_model(str(path), in_dim=16) == read_model(str(path))


@pytest.mark.parametrize("degrees", [{}, {"tensor_parallel": 2}, {"pipeline_parallel": 2}], ids=str)
def test_a_wider_model_is_the_plain_one_until_a_lora_fills_its_channels(tmp_path, pool_of, path, degrees):
    pool, spec = pool_of(2, **degrees), spec_of(path, in_dim=32, shard_weights="off" if degrees else "on")
    x = torch.cat([PLAIN.x, torch.ones_like(PLAIN.x)], dim=1)
    plain = WanModel.from_checkpoint(str(path))(*PLAIN)
    assert tiny.relative_error(pool.forward(spec, x, *PLAIN[1:]), plain) <= 1e-5

    weights = tiny.random_weights(tiny.TINY) | {PATCH: 0.1 * normal(256, 32, 1, 2, 2)}
    filled = WanModel.from_checkpoint(tiny.write_weights(tmp_path / "filled.safetensors", weights))
    loras = LoraSet(f"wide {degrees}", lambda: {PATCH: [Replacement(weights[PATCH])]})
    assert tiny.relative_error(pool.forward(spec, *GIVEN, loras=loras), filled(*GIVEN)) <= 1e-5
    assert tiny.relative_error(pool.forward(spec, x, *PLAIN[1:]), plain) <= 1e-5
    assert tiny.relative_error(pool.forward(spec_of(path), *PLAIN), plain) <= 1e-5
