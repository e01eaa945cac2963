"""LoRAs of every kind of file: what ComfyUI makes of them on its own model, and what our workers do."""

from __future__ import annotations

import pytest
import torch
from testkit.comfyui import loras
from testkit.comfyui.graphs import conditions, ksampler, link, lora, node, pool_model, stage, stock_model, video
from testkit.comfyui.refusals import error_text
from testkit.comfyui.results import EXACT, assert_same, plain, sampled
from testkit.tiny import relative_error

STOCK_FILES = [*loras.STOCK_NAMES, *loras.ADAPTERS, "distilled"]


@pytest.fixture(scope="module")
def without_lora(server) -> torch.Tensor:
    return sampled(server, plain(stock_model))


@pytest.mark.parametrize("file", STOCK_FILES)
def test_a_lora_of_the_stock_loader(server, without_lora, file):
    def graph(loader):
        return {**plain(loader), **lora("model", f"{file}.safetensors", 0.8), **ksampler(model="lora")}

    assert relative_error(without_lora, assert_same(server, graph)) > 0.01


def test_four_loras_of_different_kinds_at_once(server):
    def graph(loader):
        nodes, last = plain(loader), "model"
        for i, (file, strength) in enumerate([("kohya", 0.5), ("LoKr", -0.4), ("distilled", 1.0), ("DoRA", 0.3)]):
            nodes |= lora(last, f"{file}.safetensors", strength, name=(last := f"lora{i}"))
        return {**nodes, **ksampler(model=last)}

    assert_same(server, graph)


def with_own_input(file: str, strength: float) -> dict:
    chosen = node("WanVideoLoraList", name=f"{file}.safetensors", strength=strength, blocks="")
    return {**plain(pool_model), **pool_model(loader={"lora": link("loras")}), "loras": chosen}


@pytest.mark.parametrize("file", [*loras.STOCK_NAMES, *loras.ADAPTERS, "distilled"])
def test_the_input_of_the_loader_reads_what_the_stock_loader_does(server, file):
    stock = {**plain(pool_model), **lora("model", f"{file}.safetensors", 0.8), **ksampler(model="lora")}
    assert relative_error(sampled(server, with_own_input(file, 0.8)), sampled(server, stock)) <= EXACT


@pytest.mark.parametrize("file", loras.OTHER_NAMES)
def test_the_input_of_the_loader_reads_the_names_of_others(server, file):
    stock = {**plain(stock_model), **lora("model", "native peft.safetensors", 0.8), **ksampler(model="lora")}
    assert relative_error(sampled(server, with_own_input(file, 0.8)), sampled(server, stock)) <= EXACT


def test_each_expert_has_loras_of_its_own(server):
    def graph(loader):
        return {
            **loader("high"),
            **loader("low", file="tiny-low.safetensors"),
            **conditions(),
            **video(),
            **lora("high", "native.safetensors", 1.0, name="high-lora"),
            **lora("low", "LoHa.safetensors", 0.7, name="low-lora"),
            **stage("first", "high-lora", "latent", 0, 2, first=True),
            **stage("second", "low-lora", "first", 2, 4, first=False),
        }

    assert_same(server, graph, output="second")


def test_loras_change_between_prompts_and_leave_nothing_behind(server, without_lora):
    def graph(loader, file, strength):
        return {**plain(loader), **lora("model", f"{file}.safetensors", strength), **ksampler(model="lora")}

    before = sampled(server, plain(pool_model))
    for file, strength in (("native", 1.0), ("DoRA", 0.5), ("distilled", 1.0), ("native", 0.25)):
        native = sampled(server, graph(stock_model, file, strength))
        assert relative_error(sampled(server, graph(pool_model, file, strength)), native) <= EXACT
    server.free()  # a cached result would prove nothing
    assert torch.equal(sampled(server, plain(pool_model)), before)
    assert relative_error(before, without_lora) <= EXACT


@pytest.mark.parametrize("file", ["native", "LoKr", "distilled"])
@pytest.mark.parametrize("model", ["fp8-older/quantised", "tiny-Q4_K"])
def test_a_lora_on_quantised_weights(server, file, model):
    """Merged and quantised again: near what ComfyUI gives where it has the same weights in float32."""
    meant = {"fp8-older/quantised": "fp8-older/meant", "tiny-Q4_K": "tiny-Q4_K-meant"}[model]
    suffix = "gguf" if model == "tiny-Q4_K" else "safetensors"

    def graph(loader: dict) -> dict:
        return {**plain(stock_model), **loader, **lora("model", f"{file}.safetensors", 1.0), **ksampler(model="lora")}

    ours = pool_model(file=f"{model}.{suffix}")
    before = sampled(server, {**plain(pool_model), **ours})
    merged = sampled(server, graph(ours))
    native = sampled(server, graph(stock_model(file=f"{meant}.safetensors")))
    change, error = relative_error(merged, before), relative_error(merged, native)
    print(f"{file} on {model}: the LoRA changes {change:.2f}, rounding again {error:.3f}")
    assert error < 0.1 and change > 3 * error
    server.free()
    assert torch.equal(sampled(server, {**plain(pool_model), **ours}), before)


# LoRAs for other models.


def stock_lora(file: str) -> dict:
    return {**lora("model", f"{file}.safetensors", 1.0), **ksampler(model="lora")}


@pytest.mark.parametrize(
    "file, text",
    [
        ("other-model", "has tensors for none of the 69 weights of this model"),
        ("diffusers", "read by the lora input of XDit+USP WanVideo Model Loader"),
        ("four-heads", "has tensors for 21 of the 69 weights of this model, and none has its weight's shape"),
    ],
)
def test_a_lora_for_another_model_is_refused_with_what_matched(server, file, text):
    assert text in error_text(server, stock_lora(file))


def test_a_lora_for_another_model_at_the_loader(server):
    text = error_text(server, with_own_input("other-model", 1.0))
    assert "LoRA other-model.safetensors is for another model: none of its 1 tensors belongs to this one" in text


def test_a_lora_that_matches_in_part_applies_and_says_so(server):
    def graph(loader):
        return {**plain(loader), **stock_lora("deeper")}

    assert_same(server, graph)
    native = sampled(server, graph(stock_model))
    assert relative_error(sampled(server, with_own_input("deeper", 1.0)), native) <= EXACT
    assert "LoRA deeper.safetensors: 61 of 91 tensors belong to this model" in server.log
