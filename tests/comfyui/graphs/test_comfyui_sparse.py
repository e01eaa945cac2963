"""Sparse attention in a real ComfyUI: set by nodes like its own on the stock loader and on ours, and by our node."""

from __future__ import annotations

import subprocess

import pytest
import torch
from testkit.comfyui.graphs import conditions, ksampler, link, node, pool_model, video
from testkit.comfyui.refusals import error_text, refused_text
from testkit.comfyui.results import Loader, assert_same, sampled
from testkit.tiny import relative_error

LONG = {"width": 160, "height": 160, "frames": 13}  # 400 tokens, 7 blocks
HAS_KITCHEN = "from comfy_kitchen import sol_attn"


@pytest.fixture
def kitchen_server(server):
    """A ComfyUI whose comfy-kitchen has sparse attention."""
    if subprocess.run([server.python, "-c", HAS_KITCHEN], capture_output=True).returncode:
        pytest.skip("ComfyUI's Python has no comfy-kitchen with sparse attention")
    return server


def graph_of(loader: Loader, *patches: dict, steps: int = 3) -> dict:
    """Sampling with nodes in a row behind the loader."""
    graph, last = {**loader(), **conditions(), **video(**LONG)}, "model"
    for number, patch in enumerate(patches):
        name = f"patch{number}"
        graph[name] = {**patch, "inputs": {"model": link(last), **patch["inputs"]}}
        last = name
    return {**graph, **ksampler(model=last, steps=steps)}


STOCK = node("StockSparseAttention", keep=0.2, start_percent=0.4)


def test_the_stock_node_gives_on_workers_what_it_gives_on_the_stock_loader(kitchen_server):
    native = assert_same(kitchen_server, lambda loader: graph_of(loader, STOCK))
    dense = sampled(kitchen_server, graph_of(pool_model))
    assert relative_error(native, dense) > 1e-3


def test_so_do_a_threshold_and_the_dense_kernel_below(kitchen_server):
    patches = (node("StockAttentionBackend"), node("StockSparseAttention", tau=1.0, end_percent=0.7))
    assert_same(kitchen_server, lambda loader: graph_of(loader, *patches))


def test_our_node_gives_the_same_wherever_it_stands(kitchen_server):
    shift = node("ModelSamplingSD3", shift=5.0)
    ours = node(
        "XDitUSPSparseAttention",
        method="sla",
        tau=1.3,
        keep_percent=20.0,
        start_percent=0.4,
        end_percent=1.0,
        dense_blocks="",
        min_tokens=0,
        extra_tokens=0,
    )
    stock = sampled(kitchen_server, graph_of(pool_model, shift, STOCK))
    for patches in ((shift, ours), (ours, shift)):
        assert torch.equal(sampled(kitchen_server, graph_of(pool_model, *patches)), stock)


def ours(**changes: object) -> dict:
    settings = {"method": "sol-attn", "tau": 1.3, "keep_percent": 10.0, "start_percent": 0.2, "end_percent": 1.0}
    more = {"dense_blocks": "", "min_tokens": 0, "extra_tokens": 256}
    return node("XDitUSPSparseAttention", **{**settings, **more, **changes})


def test_a_video_of_few_tokens_is_dense(server):
    dense = sampled(server, graph_of(pool_model))
    assert torch.equal(sampled(server, graph_of(pool_model, ours(min_tokens=12288))), dense)


@pytest.mark.parametrize(
    "patches, said",
    [
        ((node("StockSparseAttention", vsa=True),), "set to vsa"),
        ((STOCK, STOCK), "Two Model Sparse Attention"),
        ((STOCK, ours()), "Remove one of them"),
        ((ours(dense_blocks="0, 2"),), "block 2, but this model has 2 blocks"),
        ((ours(start_percent=0.5, end_percent=0.4),), "no step lies between"),
    ],
    ids=str,
)
def test_what_cannot_be_honoured_is_refused_in_the_prompt(server, patches, said):
    assert said in error_text(server, graph_of(pool_model, *patches))


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"dense_blocks": "first"}, "no number of a block"),
        ({"keep_percent": 100.0}, "keep_percent"),
        ({"keep_percent": 0.0}, "keep_percent"),
        ({"tau": 5.0}, "tau"),
    ],
    ids=str,
)
def test_settings_out_of_their_range_are_refused_when_queued(server, changes, said):
    assert said in refused_text(server, graph_of(pool_model, ours(**changes)))


def test_a_ring_is_refused_with_the_degrees_that_work(server):
    def loader() -> dict:
        return pool_model(ring_degree=2)

    assert "Set ulysses_degree and ring_degree to 0" in error_text(server, graph_of(loader, ours(start_percent=0.0)))


def test_another_loaders_model_is_refused(server):
    stock = {"model": node("UNETLoader", unet_name="tiny.safetensors", weight_dtype="default")}
    assert "Connect XDit+USP WanVideo Model Loader" in error_text(server, graph_of(lambda: stock, ours()))


def test_a_comfy_kitchen_that_is_missing_or_too_old_is_named(server):
    if not subprocess.run([server.python, "-c", HAS_KITCHEN], capture_output=True).returncode:
        pytest.skip("ComfyUI's Python has a comfy-kitchen with sparse attention")
    message = error_text(server, graph_of(pool_model, ours(start_percent=0.0)))
    assert "comfy-kitchen" in message and "pip install --no-deps 'comfy-kitchen>=0.2.33'" in message
