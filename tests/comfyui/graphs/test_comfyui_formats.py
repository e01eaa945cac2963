"""Quantised files, GGUF and diffusers' layout in a real ComfyUI, against the stock loader where it can read them."""

from __future__ import annotations

import pytest
import torch
from testkit.comfyui.comfy_server import ComfyServer, QueueRefused
from testkit.comfyui.graphs import conditions, ksampler, link, lora, node, pool_model, stock_model, video
from testkit.tiny import relative_error

EXACT = 1e-5  # relative error of fp32 arithmetic in another order


def sampled(server: ComfyServer, model: dict, sampler: dict | None = None) -> torch.Tensor:
    return server.sample({**model, **conditions(), **video(), **(sampler or ksampler())}, link("sampler"))


@pytest.mark.parametrize("kind", ["fp8-older", "fp8-newer", "nvfp4", "mxfp8"])
def test_a_quantised_file_gives_what_its_numbers_mean_and_what_comfyui_makes_of_it(server, kind):
    file = f"{kind}/quantised.safetensors"
    ours = sampled(server, pool_model(file=file))
    assert relative_error(ours, sampled(server, stock_model(file=f"{kind}/meant.safetensors"))) <= EXACT
    if kind != "fp8-older" and not (server.comfyui / "comfy" / "quant_ops.py").is_file():
        return  # this ComfyUI is older than the format, and makes noise of the file or refuses it
    assert relative_error(ours, sampled(server, stock_model(file=file))) <= EXACT


@pytest.mark.parametrize("file", ["plain.safetensors", "odd.safetensors"])
def test_a_lora_on_fp8_changes_the_result_and_leaves_it_again(server, file):
    model = pool_model(file="fp8-newer/quantised.safetensors")
    before = sampled(server, model)
    merged = sampled(server, {**model, **lora("model", file, 1.0)}, ksampler(model="lora"))
    meant = {**stock_model(file="fp8-newer/meant.safetensors"), **lora("model", file, 1.0)}
    change = relative_error(merged, before)
    # rounding the merged matrices to fp8 again moves each by 2.6 %
    error = relative_error(merged, sampled(server, meant, ksampler(model="lora")))
    print(f"the LoRA changes {change:.2f}, rounding again {error:.3f}")
    assert error < 0.1 and change > 3 * error
    assert torch.equal(sampled(server, model), before)


def test_gguf_files_and_diffusers_folders_are_listed_beside_what_comfyui_lists(server):
    options = server.get("/object_info/XDitUSPWanVideoModelLoader")
    required = options["XDitUSPWanVideoModelLoader"]["input"]["required"]["model"]
    names = required[1]["options"] if required[0] == "COMBO" else required[0]
    assert {"tiny-Q4_K.gguf", "Tiny-Diffusers/transformer", "tiny.safetensors"} <= set(names)
    assert not any("-of-0000" in name for name in names)
    assert "tiny-Q4_K.gguf" not in server.get("/models/diffusion_models")  # ComfyUI's own lists stay as they are


def test_a_folder_of_diffusers_gives_the_same_as_the_file_of_the_authors(server):
    folder = sampled(server, pool_model(file="Tiny-Diffusers/transformer"))
    assert relative_error(folder, sampled(server, stock_model())) <= EXACT


def test_a_gguf_file_gives_what_its_blocks_mean(server):
    gguf = sampled(server, pool_model(file="tiny-Q4_K.gguf"))
    meant = sampled(server, stock_model(file="tiny-Q4_K-meant.safetensors"))
    assert relative_error(gguf, meant) <= EXACT


def test_a_gguf_file_that_is_cut_short_is_refused_when_queued(server):
    graph = {**pool_model(file="cut-short.gguf"), **conditions(), **video(), **ksampler()}
    with pytest.raises(QueueRefused) as refusal:
        server.queue({**graph, "out": node("SaveLatentTensor", samples=link("sampler"), name="refused")})
    assert "cut-short.gguf is cut short" in " ".join(refusal.value.texts)


def test_the_status_says_how_the_weights_are_held(server):
    for file, text in (
        ("fp8-newer/quantised.safetensors", "weights scaled fp8 e4m3 and fp32"),
        ("nvfp4/quantised.safetensors", "weights nvfp4 and fp32"),
        ("tiny.safetensors", "weights fp32,"),
    ):
        status = {"status": node("XDitUSPStatus", model=link("model"), after=link("sampler"))}
        graph = {**pool_model(file=file), **conditions(), **video(), **ksampler(), **status}
        assert text in server.run(graph).outputs["status"]["text"][0]


def test_fp8_at_load_is_near_the_full_precision(server):
    full = sampled(server, stock_model())
    fp8 = sampled(server, pool_model(loader={"base_precision": "fp8_e4m3fn"}))
    assert 1e-3 < relative_error(fp8, full) < 0.1
