"""WanVideo Parallel VAE Decode against VAE Decode in a real ComfyUI."""

from __future__ import annotations

import uuid

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from testkit.comfyui.comfy_server import ComfyServer
from testkit.comfyui.graphs import conditions, ksampler, link, node, pool_model, video
from testkit.tiny import relative_error, sentences
from testkit.vae_reference import native_names, tiny_vae

FILES = {vae: f"random_wan_{vae}_vae.safetensors" for vae in ("2.1", "2.2")}
LOADERS = {
    "2.1": node("VAELoader", vae_name=FILES["2.1"]),
    "2.2": node("NarrowWan22VAE", vae_name=FILES["2.2"], dim=4),
}
CHANNELS = {"2.1": 16, "2.2": 48}
EXACT = 1e-5

pytestmark = pytest.mark.timeout(300)  # Wan 2.1's VAE has its released size
WORKERS = {"workers": link("model_config")}
CONFIG = {name: inputs for name, inputs in pool_model().items() if name == "model_config"}


@pytest.fixture(scope="module", autouse=True)
def vae_files(server: ComfyServer) -> None:
    """Wan 2.1's VAE in its released size, which any ComfyUI loads, and a narrow one of Wan 2.2's."""
    folder = server.base / "models" / "vae"
    folder.mkdir(exist_ok=True)
    for vae, dim in (("2.1", 96), ("2.2", 4)):
        weights = native_names(tiny_vae(dim=dim, vae=vae).state_dict())
        save_file({name: tensor.half().contiguous() for name, tensor in weights.items()}, folder / FILES[vae])


def images(server: ComfyServer, graph: dict, output: list) -> tuple[torch.Tensor, str]:
    """Run `graph` up to an IMAGE; the tensor, and its device."""
    name = uuid.uuid4().hex
    outcome = server.run({**graph, "save": node("SaveImageTensor", images=output, name=name)}, 240)
    assert outcome.state == "success", f"{outcome.node_type}: {outcome.message}\n{server.log[-3000:]}"
    with safe_open(server.base / "output" / f"{name}.safetensors", "pt") as file:
        return file.get_tensor("images"), file.metadata()["device"]


def decoding(latent: dict, loader: dict = LOADERS["2.1"], **inputs: object) -> dict:
    return {
        **latent,
        "vae": loader,
        "ours": node("WanVideoParallelVAEDecode", samples=link("latent"), vae=link("vae"), **inputs),
        "native": node("VAEDecode", samples=link("latent"), vae=link("vae")),
    }


def random_latent(vae: str = "2.1", **size: int) -> dict:
    return {"latent": node("RandomLatent", seed=3, channels=CHANNELS[vae], **size)}


@pytest.mark.parametrize("size", [{"rows": 3, "columns": 5}, {"frames": 1, "batch": 2}], ids=str)
@pytest.mark.parametrize("vae", FILES)
def test_the_images_are_those_of_vae_decode(server: ComfyServer, vae: str, size: dict):
    graph = {**CONFIG, **decoding(random_latent(vae, **size), LOADERS[vae], **WORKERS)}
    ours, device = images(server, without(graph, "native"), link("ours"))
    native, native_device = images(server, without(graph, "ours", "model_config"), link("native"))
    assert ours.shape == native.shape and ours.dtype == native.dtype and device == native_device
    assert relative_error(ours, native) <= EXACT


@pytest.mark.parametrize("vae", FILES)
def test_the_latent_is_that_of_vae_encode(server: ComfyServer, vae: str):
    graph = {
        **CONFIG,
        "images": node("RandomImages", seed=1, count=6, width=52, height=40),
        "vae": LOADERS[vae],
        "ours": node("WanVideoParallelVAEEncode", pixels=link("images"), vae=link("vae"), **WORKERS),
        "native": node("VAEEncode", pixels=link("images"), vae=link("vae")),
    }
    ours = server.sample(without(graph, "native"), link("ours"), 240)
    native = server.sample(without(graph, "ours", "model_config"), link("native"), 240)
    assert ours.shape == native.shape and relative_error(ours, native) <= EXACT


def test_the_workers_that_sampled_decode_what_they_sampled(server: ComfyServer):
    graph = {**pool_model(), **conditions(), **video(), **ksampler(steps=1)}
    graph |= {
        "vae": LOADERS["2.1"],
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


@pytest.mark.parametrize("vae, other", [("2.1", "2.2"), ("2.2", "2.1")])
def test_a_latent_of_another_model_is_refused(server: ComfyServer, vae: str, other: str):
    graph = {**CONFIG, **decoding(random_latent(other), LOADERS[vae], **WORKERS)}
    assert_refused(server, without(graph, "native"))


@pytest.mark.parametrize(
    "loader", [node("VAELoader", vae_name="pixel_space"), node("PoolingVAE", channels=16, scale=8)], ids=str
)
def test_a_vae_that_is_none_of_wans_is_refused(server: ComfyServer, loader: dict):
    graph = {**CONFIG, **decoding(random_latent(), loader, **WORKERS)}
    assert_refused(server, without(graph, "native"))
    graph = {
        **CONFIG,
        "images": node("RandomImages", seed=1, count=1, width=32, height=32),
        "vae": loader,
        "ours": node("WanVideoParallelVAEEncode", pixels=link("images"), vae=link("vae"), **WORKERS),
        "result": node("SaveLatentTensor", samples=link("ours"), name="refused"),
    }
    assert_refused(server, graph, "WanVideoParallelVAEEncode")


def without(graph: dict, *names: str) -> dict:
    return {name: inputs for name, inputs in graph.items() if name not in names}


def assert_refused(server: ComfyServer, graph: dict, refuser: str = "WanVideoParallelVAEDecode") -> None:
    if "result" not in graph:
        graph = {**graph, "result": node("PreviewImage", images=link("ours"))}
    outcome = server.run(graph)
    assert outcome.state == "error" and outcome.node_type == refuser
    assert sentences(outcome.message.strip()) >= 2, outcome.message
