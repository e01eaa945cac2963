"""Sparse attention on a real GPU: against its reference, over heads, and in workers."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from testkit import tiny
from wan_parallel.distributed.client.pool import Pool
from wan_parallel.distributed.plan.degrees import ParallelPlan
from wan_parallel.distributed.protocol.specs import ModelSpec, PoolSettings
from wan_parallel.wanvideo.attention import kitchen, sparse
from wan_parallel.wanvideo.base.attention_choice import AttentionChoice, SparseSettings, sparse_bytes
from wan_parallel.wanvideo.base.config import WanConfig

if not torch.cuda.is_available():
    pytest.skip("needs a CUDA GPU", allow_module_level=True)
if kitchen.refusal("") is not None or torch.cuda.get_device_capability() < (8, 0):
    pytest.skip("needs comfy-kitchen 0.2.33 and a GPU of sm_80", allow_module_level=True)

CUDA, BF16 = torch.device("cuda", 0), torch.bfloat16
FOUR_HEADS = WanConfig(dim=512, ffn_dim=1024, num_heads=4, num_layers=3)
KEEP = SparseSettings(keep=0.1, extra_tokens=256, dense_blocks=(1,), min_tokens=0, sigma_start=0.9)


@pytest.fixture(scope="module")
def heads() -> list[torch.Tensor]:
    generator = torch.Generator(CUDA).manual_seed(0)
    return [torch.randn(1, 6000, 5, 128, device=CUDA, generator=generator).to(BF16) for _ in range(3)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_the_kernel_is_its_reference_where_both_choose_the_same_blocks(dtype):
    sparse.load(CUDA, dtype, 128)  # compares them


@pytest.mark.parametrize("options", [{"topk_ratio": 0.1}, {"tau": 1.3}, {"topk_ratio": 0.1, "token_aug": 256}], ids=str)
def test_heads_have_the_same_bits_whatever_is_beside_them(heads, options):
    attend = sparse.load(CUDA, BF16, 128)
    whole = attend(*heads, **options)
    parts = [attend(*(x[:, :, part] for x in heads), **options) for part in (slice(0, 2), slice(2, 5))]
    assert torch.equal(whole, torch.cat(parts, dim=2)) and torch.equal(whole, attend(*heads, **options))


def test_the_kernel_takes_no_more_memory_than_is_counted():
    attend, tokens = sparse.load(CUDA, BF16, 128), 32760
    qkv = [torch.randn(1, tokens, 8, 128, device=CUDA, dtype=BF16) for _ in range(3)]
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    out = attend(*qkv, topk_ratio=0.1, token_aug=256)
    assert torch.cuda.max_memory_allocated() - before - out.nbytes <= 1.1 * sparse_bytes(tokens, 8)


@pytest.fixture(scope="module")
def spec(tmp_path_factory) -> ModelSpec:
    path = tmp_path_factory.mktemp("sparse") / "four.safetensors"
    return ModelSpec(tiny.write_checkpoint(path, FOUR_HEADS), "bf16", "bf16")


@pytest.fixture(scope="module")
def pools() -> Iterator[list[Pool]]:
    made = [Pool(PoolSettings(ParallelPlan(n), device="cuda")) for n in (1, 2) if n <= torch.cuda.device_count()]
    yield made
    for pool in made:
        pool.close()


def test_a_pool_gives_on_two_gpus_what_it_gives_on_one(pools, spec):
    given, choice = tiny.inputs(FOUR_HEADS, (5, 40, 60), text_tokens=512), AttentionChoice(KEEP, 0.5)
    outs = [pool.forward(spec, *given, attention=choice) for pool in pools]
    for pool, out in zip(pools, outs, strict=True):
        assert torch.equal(pool.forward(spec, *given, attention=choice), out)
        early = pool.forward(spec, *given, attention=replace(choice, sigma=0.95))
        assert torch.equal(early, pool.forward(spec, *given))
        assert 1e-4 < tiny.relative_error(out, early) < 0.5
        assert tiny.relative_error(out, outs[0]) <= 1e-2  # products of fewer rows round otherwise
