"""What displaced patches need of a GPU's memory, against figures worked out by hand."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from testkit.tiny import sentences
from wan_parallel.distributed.approximate.displaced_memory_estimate import (
    PatchMemory,
    TooLarge,
    capacity,
    check_run,
    check_weights,
    host_memory,
    patch_memory,
    weight_bytes,
    working_bytes,
)
from wan_parallel.distributed.approximate.kv_buffers import Codec, make_buffers
from wan_parallel.distributed.approximate.patch_layout import split_grid, token_pixels
from wan_parallel.distributed.comm.host_kv import HostManager
from wan_parallel.distributed.plan.degrees import PatchSplit
from wan_parallel.wanvideo.base.config import PRESETS
from wan_parallel.wanvideo.base.grid import Grid
from wan_parallel.wanvideo.checkpoint.weight_source import DTYPES

P480, P720, TI2V = Grid(21, 30, 52), Grid(21, 45, 80), Grid(31, 22, 40)


def buffer_bytes(config, cut, compute_dtype: str, fp8: bool = False, manager: str = "native") -> int:
    """Of one batch item on each GPU."""
    return patch_memory(config, cut, "bf16", compute_dtype, fp8_buffers=fp8, manager=manager).buffers


def layout(size: str, grid: Grid, ranks: int, mode: str = "spatial"):
    return split_grid(grid, PatchSplit(mode, 32), ranks, token_pixels(PRESETS[size]))


@pytest.mark.parametrize(
    "size, grid, gigabytes",
    [("1.3b", P480, 6.04), ("1.3b", P720, 13.9), ("14b", P480, 26.8), ("14b", P720, 61.9), ("5b", TI2V, 10.1)],
)
def test_buffers_hold_the_keys_and_values_of_all_layers_and_tokens(size, grid, gigabytes):
    found = buffer_bytes(PRESETS[size], layout(size, grid, 1), "bf16") / 1e9
    assert found == pytest.approx(gigabytes, rel=0.005)


@pytest.mark.parametrize("mode", ["spatial", "temporal", "spatiotemporal"])
@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_more_gpus_do_not_shrink_the_buffers_but_uneven_patches_pad_them(mode, ranks):
    cut = layout("14b", P480, ranks, mode)
    found = buffer_bytes(PRESETS["14b"], cut, "bf16")
    assert found == 40 * ranks * max(cut.counts) * 2 * 5120 * 2
    assert found >= buffer_bytes(PRESETS["14b"], layout("14b", P480, 1), "bf16")


@pytest.mark.parametrize("fp8", [False, True])
def test_the_figure_is_what_the_workers_allocate(fp8):
    config, cut = PRESETS["1.3b"], layout("1.3b", Grid(1, 4, 6), 2)
    codec = Codec(1, max(cut.counts), config.num_heads, config.head_dim, DTYPES["bf16"], fp8)
    buffers, host = make_buffers("native", 0, 0, 2, "cpu", None), HostManager(0, 2, torch.device("cpu"))
    for manager in (buffers, host):
        for _ in range(config.num_layers):
            manager.register_tensor(codec.shape, codec.dtype)
    buffers.create_buffer()
    allocated = sum(b.nbytes for i in range(config.num_layers) for b in buffers.get_buffer_list(i))
    assert buffer_bytes(config, cut, "bf16", fp8) == allocated
    host.create_buffer(SimpleNamespace(words=[[0, 0], [0, 0]]))
    assert buffer_bytes(config, cut, "bf16", fp8, "host") == host.nbytes
    both = patch_memory(config, cut, "bf16", "bf16", items=2, fp8_buffers=fp8, manager="host")
    assert both.host == 2 * 2 * host.registered_bytes  # branches, ranks


def test_weights_are_in_their_dtype_and_small_tensors_in_float32():
    config = PRESETS["14b"]
    assert weight_bytes(config, "fp32") == 4 * config.parameters
    assert weight_bytes(config, "bf16") == pytest.approx(2 * config.parameters, rel=0.002)
    assert weight_bytes(config, "fp8_e4m3fn") == pytest.approx(config.parameters, rel=0.02)  # embeddings in bf16


def test_the_whole_is_its_parts_and_branches_count_twice():
    config, cut = PRESETS["14b"], layout("14b", P480, 4)
    one, two = (patch_memory(config, cut, "bf16", "bf16", items=n) for n in (1, 2))
    assert two.buffers == 2 * one.buffers and (two.weights, two.working) == (one.weights, one.working)
    assert one.total == one.weights + one.buffers + one.working
    both = patch_memory(config, cut, "bf16", "bf16", items=2, at_once=2)
    assert both.working == 2 * one.working
    halved = patch_memory(config, cut, "bf16", "bf16", items=2, fp8_buffers=True)
    assert halved.buffers == pytest.approx(two.buffers / 2 * (1 + 4 / 128))  # a scale for each token and head


def test_working_memory_is_at_least_a_layers_keys_and_values_and_less_with_slices():
    config, cut = PRESETS["1.3b"], layout("1.3b", P720, 2)
    whole, sliced = (working_bytes(config, cut, "bf16", tokens) for tokens in (0, 1024))
    assert 3 * 2 * P720.tokens * 1536 * 2 < sliced < whole


def test_what_does_not_fit_is_refused_with_figures_and_ways_out():
    need = PatchMemory(28 * 2**30, 54 * 2**30, 4 * 2**30)
    check_run(need, need.total, ["set kv_buffers to fp8"])
    with pytest.raises(TooLarge) as refusal:
        check_run(need, need.total - 1, ["set kv_buffers to fp8"])
    text = str(refusal.value)
    assert sentences(text) >= 2
    host = PatchMemory(2**30, 2**30, 2**30, host=2 * host_memory())
    with pytest.raises(TooLarge, match="of pinned host memory"):
        check_run(host, host.total, [])
    for said in ("86.0 GiB", "54.0 GiB", "fewer frames", "kv_buffers to fp8", "sync_frequency 1", "XDit+USP"):
        assert said in text


def test_weights_that_do_not_fit_alone_are_refused():
    weights = weight_bytes(PRESETS["14b"], "bf16")
    check_weights(PRESETS["14b"], "bf16", weights)
    with pytest.raises(TooLarge, match=r"26\.6 GiB") as refusal:
        check_weights(PRESETS["14b"], "bf16", weights - 1)
    assert sentences(str(refusal.value)) >= 2


def test_workers_on_the_cpu_share_the_hosts_memory():
    assert capacity("cpu", range(4), 0.5) == pytest.approx(capacity("cpu", range(1), 1.0) / 8, abs=4)
