"""The Wan variants on real GPUs: two of them give the result of one."""

from __future__ import annotations

import pytest
import torch
from testkit import tiny
from testkit.shared.on_gpu import DTYPES, SIZE, on_gpu
from testkit.tiny import relative_error
from wan_parallel.distributed.client.pool import acquire
from wan_parallel.distributed.plan.degrees import ParallelPlan
from wan_parallel.distributed.protocol.specs import ModelSpec, PoolSettings
from wan_parallel.wanvideo.model.model import model_class

if torch.cuda.device_count() < 2:
    pytest.skip("needs two CUDA GPUs", allow_module_level=True)


@pytest.fixture(scope="module", params=[{}, {"pipeline_parallel": 2}, {"tensor_parallel": 2}], ids=str)
def pool(request):
    pool = acquire(PoolSettings(ParallelPlan(2, **request.param), device="cuda"))
    yield pool
    pool.close()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", tiny.VARIANTS)
def test_two_gpus_give_the_result_of_one(pool, tmp_path, name, dtype):
    config = tiny.VARIANTS[name]
    path = tiny.write_checkpoint(tmp_path / f"{name}.safetensors", config)
    inputs = tiny.inputs(config, SIZE, batch=2, text_tokens=512)
    conditioning = on_gpu(tiny.conditioning(config, inputs.x))
    inputs = tuple(tensor.cuda() for tensor in inputs)
    with torch.inference_mode():
        exact = model_class(config).from_checkpoint(path, device="cuda")(*inputs, conditioning)
        alone = model_class(config).from_checkpoint(path, DTYPES[dtype], DTYPES[dtype], "cuda")(*inputs, conditioning)
    got = pool.forward(ModelSpec(path, dtype, dtype, max_batch=2), *inputs, conditioning=conditioning)
    pool.unload()
    error, error_alone = relative_error(got, exact), relative_error(alone, exact)
    print(f"{name} {dtype}: relative error {error:.1e}, one GPU {error_alone:.1e}")
    most = 1.35 if pool.settings.plan.tensor_parallel > 1 else 1.25  # each rank rounds its part of a sum
    assert error <= (1e-5 if dtype == "fp32" else most * error_alone)


@pytest.mark.parametrize("name", ["vace", "animate", "s2v", "dancer"])
def test_layers_of_variants_give_the_same_bits_wherever_they_live(pool, tmp_path, name):
    config = tiny.VARIANTS[name]
    path = tiny.write_checkpoint(tmp_path / f"{name}.safetensors", config)
    inputs = tiny.inputs(config, SIZE, batch=2)
    conditioning = on_gpu(tiny.conditioning(config, inputs.x, contexts=2 if name == "vace" else 1))
    inputs, outs = tuple(tensor.cuda() for tensor in inputs), []
    for shard, offload in (("off", "off"), ("on", "off"), ("off", "on"), ("on", "on")):
        spec = ModelSpec(path, "bf16", "bf16", shard_weights=shard, offload=offload)
        outs.append(pool.forward(spec, *inputs, conditioning=conditioning))
    pool.unload()
    assert all(torch.equal(out, outs[0]) for out in outs)
