"""WanVideo Parallel VAE Decode against VAE Decode in a real ComfyUI."""

from __future__ import annotations

import uuid

import pytest
import torch
from comfy_server import ComfyServer
from graphs import conditions, ksampler, link, node, pool_model, video
from safetensors import safe_open
from safetensors.torch import save_file
from tiny import relative_error, sentences
from vae_reference import native_names, tiny_vae

VAE = "random_wan_2.1_vae.safetensors"
EXACT = 1e-5

pytestmark = pytest.mark.timeout(300)  # the VAE has its released size
CONFIG = {name: inputs for name, inputs in pool_model().items() if name == "model_config"}


@pytest.fixture(scope="module", autouse=True)
def vae_file(server: ComfyServer) -> None:
    """A VAE of the released size, which any ComfyUI loads."""
    folder = server.base / "models" / "vae"
    folder.mkdir(exist_ok=True)
    weights = native_names(tiny_vae(dim=96).state_dict())
    save_file({name: tensor.half().contiguous() for name, tensor in weights.items()}, folder / VAE)


def images(server: ComfyServer, graph: dict, output: list) -> tuple[torch.Tensor, str]:
    """Run `graph` up to an IMAGE; the tensor, and its device."""
    name = uuid.uuid4().hex
    outcome = server.run({**graph, "save": node("SaveImageTensor", images=output, name=name)}, 240)
    assert outcome.state == "success", f"{outcome.node_type}: {outcome.message}\n{server.log[-3000:]}"
    with safe_open(server.base / "output" / f"{name}.safetensors", "pt") as file:
        return file.get_tensor("images"), file.metadata()["device"]


def decoding(latent: dict, **inputs: object) -> dict:
    return {
        **latent,
        "vae": node("VAELoader", vae_name=VAE),
        "ours": node("WanVideoParallelVAEDecode", samples=link("latent"), vae=link("vae"), **inputs),
        "native": node("VAEDecode", samples=link("latent"), vae=link("vae")),
    }


def random_latent(**size: int) -> dict:
    return {"latent": node("RandomLatent", seed=3, channels=16, **size)}


@pytest.mark.parametrize("size", [{"rows": 3, "columns": 5}, {"frames": 1, "batch": 2}], ids=str)
def test_the_images_are_those_of_vae_decode(server: ComfyServer, size: dict):
    graph = {**decoding(random_latent(**size), precision="auto", workers=link("model_config")), **CONFIG}
    ours, device = images(server, without(graph, "native"), link("ours"))
    native, native_device = images(server, without(graph, "ours", "model_config"), link("native"))
    assert ours.shape == native.shape and ours.dtype == native.dtype and device == native_device
    assert relative_error(ours, native) <= EXACT


def test_the_latent_is_that_of_vae_encode(server: ComfyServer):
    graph = {
        **CONFIG,
        "images": node("RandomImages", seed=1, count=6, width=44, height=24),
        "vae": node("VAELoader", vae_name=VAE),
        "ours": node(
            "WanVideoParallelVAEEncode", pixels=link("images"), vae=link("vae"), workers=link("model_config")
        ),
        "native": node("VAEEncode", pixels=link("images"), vae=link("vae")),
    }
    ours = server.sample(without(graph, "native"), link("ours"), 240)
    native = server.sample(without(graph, "ours", "model_config"), link("native"), 240)
    assert ours.shape == native.shape and relative_error(ours, native) <= EXACT


def test_the_workers_that_sampled_decode_what_they_sampled(server: ComfyServer):
    graph = {**pool_model(), **conditions(), **video(), **ksampler(steps=1)}
    graph |= {
        "vae": node("VAELoader", vae_name=VAE),
        "ours": node("WanVideoParallelVAEDecode", samples=link("sampler"), vae=link("vae")),
        "native": node("VAEDecode", samples=link("sampler"), vae=link("vae")),
        "status": node("XDitUSPStatus", model=link("model"), after=link("ours")),
    }
    ours, _ = images(server, without(graph, "native"), link("ours"))
    native, _ = images(server, without(graph, "ours", "status"), link("native"))
    assert relative_error(ours, native) <= EXACT


def test_a_model_of_comfyui_is_refused_as_workers(server: ComfyServer):
    graph = decoding(random_latent(), precision="fp32", workers=link("stock"))
    graph["stock"] = node("UNETLoader", unet_name="tiny.safetensors", weight_dtype="default")
    assert_refused(server, without(graph, "native"))


def test_a_latent_of_another_model_is_refused(server: ComfyServer):
    graph = {**decoding(random_latent(), workers=link("model_config")), **CONFIG}
    graph["latent"] = node("RandomLatent", seed=3, channels=48)
    assert_refused(server, without(graph, "native"))


def without(graph: dict, *names: str) -> dict:
    return {name: inputs for name, inputs in graph.items() if name not in names}


def assert_refused(server: ComfyServer, graph: dict) -> None:
    outcome = server.run({**graph, "preview": node("PreviewImage", images=link("ours"))})
    assert outcome.state == "error" and outcome.node_type == "WanVideoParallelVAEDecode"
    assert sentences(outcome.message.strip()) >= 2, outcome.message
