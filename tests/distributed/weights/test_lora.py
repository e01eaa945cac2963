"""LoRA changes are merged as ComfyUI merges them, and undone without a trace."""

from __future__ import annotations

import os
import resource
import signal
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
from safetensors.torch import save_file
from testkit import tiny
from testkit.shared.lora_changes import lora_set, normal, some_lora, uuids
from wan_parallel.distributed.client.failures import PoolError
from wan_parallel.distributed.protocol.specs import ModelSpec
from wan_parallel.distributed.weights.lora_transfer import LoraSet
from wan_parallel.wanvideo.base.lora import Difference, LoraError, LowRank, Replacement, merge, narrow_delta
from wan_parallel.wanvideo.model.model import WanModel

# The arithmetic.


@pytest.fixture
def weight() -> torch.Tensor:
    return torch.randn(6, 8, generator=torch.Generator().manual_seed(0))


def test_a_low_rank_change_is_added_with_its_scale(weight):
    up, down = normal(6, 2), normal(2, 8)
    merged = merge(weight, [LowRank(up, down, 0.7)])
    assert torch.allclose(merged, weight + 0.7 * up @ down, atol=1e-6)


def test_a_difference_is_added_with_its_scale(weight):
    diff = normal(6, 8)
    assert torch.allclose(merge(weight, [Difference(diff, -1.5)]), weight - 1.5 * diff, atol=1e-6)


def test_the_base_scale_weakens_the_weight_not_the_change(weight):
    up, down, diff = normal(6, 2), normal(2, 8), normal(6, 8)
    expected = (weight * 0.5 + up @ down) * 0.25 + 2 * diff
    patches = [LowRank(up, down, 1.0, base_scale=0.5), Difference(diff, 2.0, base_scale=0.25)]
    assert torch.allclose(merge(weight, patches), expected, atol=1e-6)


def test_changes_apply_in_their_order(weight):
    diff, new = normal(6, 8), normal(6, 8, seed=2)
    assert torch.equal(merge(weight, [Difference(diff, 1.0), Replacement(new)]), new)
    assert torch.allclose(merge(weight, [Replacement(new), Difference(diff, 1.0)]), new + diff, atol=1e-6)


def test_the_product_takes_the_shape_of_a_convolution():
    weight = torch.zeros(6, 4, 1, 2, 2)
    up, down = normal(6, 3, 1, 1, 1), normal(3, 4, 1, 2, 2)
    merged = merge(weight, [LowRank(up, down, 1.0)])
    assert merged.shape == weight.shape
    assert torch.allclose(merged.flatten(1), up.flatten(1) @ down.flatten(1), atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_16_bit_weights_are_rounded_once_after_all_changes(weight, dtype):
    held = weight.to(dtype)
    patches = [Difference(normal(6, 8, seed=seed).to(dtype), 1e-3) for seed in range(20)]
    merged = merge(held, patches)
    assert merged.dtype == dtype
    expected = held.double() + sum(patch.scale * patch.diff.double() for patch in patches)
    assert torch.equal(merged, expected.to(dtype))


def test_the_weight_itself_is_left_alone(weight):
    before = weight.clone()
    new = normal(6, 8)
    merged = merge(weight, [Replacement(new)])
    merge(weight, [Difference(new, 1.0, base_scale=0.0)])
    merged.zero_()
    assert torch.equal(weight, before)
    assert new.any()


@pytest.mark.parametrize(
    "patch",
    [
        LowRank(torch.ones(6, 2), torch.ones(2, 9), 1.0),
        Difference(torch.ones(7, 8), 1.0),
        Replacement(torch.ones(8)),
    ],
    ids=lambda patch: type(patch).__name__,
)
def test_a_change_of_another_shape_is_refused(weight, patch):
    with pytest.raises(ValueError, match=r"does not fit a weight of shape \(6, 8\)") as error:
        merge(weight, [patch])
    assert tiny.sentences(str(error.value)) == 2


@pytest.mark.parametrize("dim, runs", [(0, [(0, 2)]), (0, [(2, 4)]), (1, [(3, 5)]), (0, [(1, 2), (4, 2)])], ids=str)
def test_a_part_of_a_weight_is_changed_as_the_whole_is(weight, dim, runs):
    def part_of(x: torch.Tensor) -> torch.Tensor:
        return torch.cat([x.narrow(dim, *run) for run in runs], dim)

    changes = [
        LowRank(normal(6, 2), normal(2, 8), 0.7, base_scale=0.5),
        LowRank(normal(8, 2), normal(2, 6), 0.3),  # of another shape with as many numbers
        Difference(normal(48), -1.5),
    ]
    for patches in (changes, [Replacement(normal(6, 8, seed=2)), *changes]):
        part = merge(part_of(weight), [narrow_delta(patch, (6, 8), dim, runs) for patch in patches])
        assert torch.allclose(part, part_of(merge(weight, patches)), atol=1e-6)


@pytest.mark.parametrize(
    "patch", [LowRank(torch.ones(6, 2), torch.ones(2, 9), 1.0), Difference(torch.ones(7, 8), 1.0)], ids=str
)
def test_a_change_of_another_shape_does_not_fit_a_part_either(patch):
    with pytest.raises(LoraError, match=r"does not fit a weight of shape \(6, 8\)"):
        narrow_delta(patch, (6, 8), 0, [(0, 3)])


# Through a pool.

GIVEN = tiny.inputs()


def merged_in_this_process(changes: dict[str, list]) -> torch.Tensor:
    """The output that the changes give on one process, from a file with merged weights."""
    weights = tiny.random_weights(tiny.TINY)
    weights |= {name: merge(weights[name], patches) for name, patches in changes.items()}
    return output_of(weights)


def output_of(weights: dict[str, torch.Tensor]) -> torch.Tensor:
    with TemporaryDirectory() as folder:
        save_file(weights, f"{folder}/merged.safetensors")
        return WanModel.from_checkpoint(f"{folder}/merged.safetensors")(*GIVEN)


DIVIDED = {"pipeline_parallel": 2, "tensor_parallel": 2}


@pytest.mark.parametrize("num_gpus, sizes", [(2, {}), (4, DIVIDED)], ids=str)
def test_a_lora_is_switched_on_changed_and_switched_off_exactly(pool_of, spec, num_gpus, sizes):
    pool = pool_of(num_gpus, **sizes)
    plain = pool.forward(spec, *GIVEN)
    outputs = []
    for strength in (1.0, 0.35, -0.5):
        patches = lora_set(some_lora(strength))
        outputs.append(pool.forward(spec, *GIVEN, patches))
        expected = merged_in_this_process(some_lora(strength))
        assert tiny.relative_error(outputs[-1], expected) <= 2e-6
        assert tiny.relative_error(plain, expected) > 1e-2
        assert {model.lora_uuid for worker in pool.status().workers for model in worker.models} >= {patches.uuid}
    again = pool.forward(spec, *GIVEN, lora_set(some_lora(1.0)))
    assert torch.equal(again, outputs[0])
    assert torch.equal(pool.forward(spec, *GIVEN), plain)


def test_a_lora_on_other_weights_leaves_none_of_the_former_behind(pool_of, spec):
    pool = pool_of(2)
    plain = pool.forward(spec, *GIVEN)
    changes = some_lora(1.0)
    pool.forward(spec, *GIVEN, lora_set(changes))
    only_bias = {"blocks.0.ffn.2.bias": changes["blocks.0.ffn.2.bias"]}
    out = pool.forward(spec, *GIVEN, lora_set(only_bias))
    assert tiny.relative_error(out, merged_in_this_process(only_bias)) <= 2e-6
    assert torch.equal(pool.forward(spec, *GIVEN), plain)


def test_patches_are_sent_only_when_their_uuid_changes(pool_of, spec):
    pool, built = pool_of(2), []

    def build() -> dict:
        built.append(1)
        return some_lora(1.0)

    patches = LoraSet(next(uuids), build)
    first = pool.forward(spec, *GIVEN, patches)
    assert torch.equal(pool.forward(spec, *GIVEN, patches), first)
    assert len(built) == 1
    pool.forward(spec, *GIVEN)
    assert torch.equal(pool.forward(spec, *GIVEN, patches), first)
    assert len(built) == 2


def test_a_lora_belongs_to_one_model_alone(pool_of, spec):
    pool = pool_of(2)
    in_bf16 = ModelSpec(spec.path, "bf16", "bf16")
    plain, plain_bf16 = pool.forward(spec, *GIVEN), pool.forward(in_bf16, *GIVEN)
    pool.forward(spec, *GIVEN, lora_set(some_lora(1.0)))
    assert torch.equal(pool.forward(in_bf16, *GIVEN), plain_bf16)
    assert torch.equal(pool.forward(spec, *GIVEN), plain)


def test_bf16_weights_are_merged_from_the_file_each_time(pool_of, spec):
    pool = pool_of(2)
    in_bf16 = ModelSpec(spec.path, "bf16", "fp32")
    plain = pool.forward(in_bf16, *GIVEN)
    for strength in (0.3, 0.3, 1e-3):
        pool.forward(in_bf16, *GIVEN, lora_set(some_lora(strength)))
    assert torch.equal(pool.forward(in_bf16, *GIVEN), plain)


@pytest.mark.parametrize(
    "name, error", [("blocks.1.ffn.2.weight", LoraError), ("blocks.9.no.such.weight", PoolError)], ids=str
)
@pytest.mark.parametrize("num_gpus, sizes", [(2, {}), (4, DIVIDED)], ids=str)
def test_a_patch_that_fails_halfway_leaves_no_half_merged_weights(pool_of, spec, name, error, num_gpus, sizes):
    pool = pool_of(num_gpus, **sizes)
    plain = pool.forward(spec, *GIVEN)
    pids = pool.worker_pids
    bad = {**some_lora(1.0), name: [Difference(torch.ones(3, 3), 1.0)]}  # names are merged in their order
    with pytest.raises(error):
        pool.forward(spec, *GIVEN, lora_set(bad))
    assert torch.equal(pool.forward(spec, *GIVEN), plain)
    assert pool.worker_pids == pids


def test_a_lora_of_another_size_is_refused_with_what_to_do(pool_of, spec):
    bad = {"blocks.1.ffn.2.weight": [Difference(torch.ones(3, 3), 1.0)]}
    with pytest.raises(LoraError, match=r"does not fit a weight of shape \(256, 512\). Use a LoRA made for this size"):
        pool_of(2).forward(spec, *GIVEN, lora_set(bad))


class Interrupted(BaseException):
    """As ComfyUI's, no Exception."""


def interrupt() -> None:
    raise Interrupted


def test_a_patch_that_is_interrupted_is_not_mistaken_for_done(own_pool, spec, model):
    plain = own_pool.forward(spec, *GIVEN)
    patches = lora_set(some_lora(1.0))
    worker = own_pool.worker_pids[1]
    os.kill(worker, signal.SIGSTOP)
    with pytest.raises(Interrupted):
        own_pool.forward(spec, *GIVEN, patches, poll=interrupt)
    os.kill(worker, signal.SIGCONT)
    assert torch.equal(own_pool.forward(spec, *GIVEN), plain)
    assert tiny.relative_error(own_pool.forward(spec, *GIVEN, patches), merged_in_this_process(some_lora(1.0))) <= 2e-6
    assert own_pool.worker_pids[1] == worker


@pytest.mark.parametrize("rank", [0, 1])
def test_a_patch_that_fails_on_one_rank_alone_is_not_mistaken_for_done(own_pool, tmp_path, rank):
    config = tiny.WanConfig(dim=256, ffn_dim=32768, num_heads=2, num_layers=1, text_dim=64)
    spec = ModelSpec(tiny.write_checkpoint(tmp_path / "wide.safetensors", config), "fp32", "fp32")
    plain = own_pool.forward(spec, *GIVEN)
    worker = own_pool.worker_pids[rank]
    changes = {"blocks.0.ffn.0.weight": [LowRank(normal(32768, 2), normal(2, 256), 0.1)]}
    patches = lora_set(changes)
    pages = int(Path(f"/proc/{worker}/statm").read_text().split()[0])
    limit = (pages + 1000) * resource.getpagesize()  # a merged copy of 32 MiB is too much
    unlimited = resource.prlimit(worker, resource.RLIMIT_AS, (limit, resource.RLIM_INFINITY))
    with pytest.raises(PoolError):
        own_pool.forward(spec, *GIVEN, patches)
    resource.prlimit(worker, resource.RLIMIT_AS, unlimited)
    assert own_pool.worker_pids[rank] == worker
    merged = own_pool.forward(spec, *GIVEN, patches)
    weights = tiny.random_weights(config)
    weights |= {name: merge(weights[name], change) for name, change in changes.items()}
    assert tiny.relative_error(merged, output_of(weights)) <= 2e-6
    assert torch.equal(own_pool.forward(spec, *GIVEN), plain)
