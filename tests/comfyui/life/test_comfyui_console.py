"""Runs without faults leave no line in the console that a user would take for one, up to the end of the server."""

from __future__ import annotations

import itertools
import re
import signal
import time
import uuid
from collections.abc import Callable

import pytest
from testkit import tiny
from testkit.comfyui.comfy_server import ComfyServer
from testkit.comfyui.distrifusion import patch_model
from testkit.comfyui.graphs import conditions, ksampler, link, lora, node, pool_model, stage, video
from testkit.comfyui.variants import conditioned, sampler
from testkit.processes import descendants, wait_until_gone
from testkit.vae_reference import native_names, tiny_vae

FAULTS = re.compile(
    r"warn|error|traceback|exception|fail|fault|deprecat|leak|not found|"
    r"\d{12}|\de\+\d\d|"  # figures that are none
    r"custom_nodes|nodes\.(common|model|usp)|distributed\.",  # modules
    re.IGNORECASE,
)
SMALL = {**conditions(), **video()}
SLOW = {**pool_model(), **conditions(), **video(832, 448, 25)}
TWO_EXPERTS = {
    **pool_model("high"),
    **pool_model("low", "tiny-low.safetensors"),
    **SMALL,
    **stage("first", "high", "latent", 0, 2, True),
    **stage("sampler", "low", "first", 2, 4, False),
}
DISTRIFUSION = {**patch_model(), **conditions(), **video(64, 64), **ksampler(steps=4)}
IMAGE_TO_VIDEO = conditioned("WanImageToVideo", start_image="start")
VAE = "tiny_wan_2.2_vae.safetensors"
DECODED_AND_ENCODED = {
    **{name: inputs for name, inputs in pool_model().items() if name == "model_config"},
    "latent": node("RandomLatent", seed=3, channels=48),
    "vae": node("NarrowWan22VAE", vae_name=VAE, dim=4),
    "frames": node("WanVideoParallelVAEDecode", samples=link("latent"), vae=link("vae"), workers=link("model_config")),
    "sampler": node("WanVideoParallelVAEEncode", pixels=link("frames"), vae=link("vae")),
}
GRAPHS = {
    "text to video": {**pool_model(), **SMALL, **ksampler()},
    "chosen sizes": {**pool_model(parallel_plan="auto"), **SMALL, **ksampler()},
    "another seed": {**pool_model(), **SMALL, **ksampler(seed=8)},
    "image to video": {**pool_model(file="i2v-2.2.safetensors"), **IMAGE_TO_VIDEO, **sampler()},
    "LoRA": {**pool_model(), **SMALL, **lora("model", "plain.safetensors", 0.7), **ksampler("lora")},
    "two experts": TWO_EXPERTS,
    "a ring, tensors": {**pool_model(num_gpus=4, tensor_parallel_size=2, ring_degree=2), **SMALL, **ksampler()},
    "pipeline": {**pool_model(pipeline_parallel_size=2), **SMALL, **ksampler()},
    "fp8": {**pool_model(loader={"base_precision": "fp8_e4m3fn"}), **SMALL, **ksampler()},
    "offloaded": {**pool_model(shard_weights="on", offload="on"), **SMALL, **ksampler()},
    "DistriFusion": DISTRIFUSION,
    "VAE": DECODED_AND_ENCODED,
}


def run(server: ComfyServer, graph: dict) -> None:
    """Run a graph with a node that saves its latent, and the status nodes."""
    saved = {"out": node("SaveLatentTensor", samples=link("sampler"), name=uuid.uuid4().hex)}
    status = {}
    if "model_config" in graph and "model" in graph:
        status = {"status": node("XDitUSPStatus", model=link("model"), after=link("sampler"))}
    if graph is DISTRIFUSION:
        status = {"status": node("OfficialDistriFusionStatus", model=link("model"), after=link("sampler"))}
    outcome = server.run({**graph, **saved, **status})
    assert outcome.state == "success", outcome.message


def odd_lines(server: ComfyServer) -> list[str]:
    """Lines of the console behind the server's start that look like faults, and lines of ours that come twice."""
    lines = re.split(r"[\r\n]+", server.log.split("To see the GUI go to", 1)[1])
    odd = [line for line in lines if FAULTS.search(line)]
    ours = [line for line in lines if "[WanParallel" in line]
    assert ours
    return odd + [line for line, following in itertools.pairwise(ours) if line == following]


@pytest.mark.parametrize("end", [signal.SIGINT, signal.SIGTERM], ids=["Ctrl-C", "SIGTERM"])
def test_a_run_without_faults_reads_like_one(start_comfyui: Callable[..., ComfyServer], end):
    server = start_comfyui()
    (server.base / "models" / "vae").mkdir()
    tiny.write_weights(server.base / "models" / "vae" / VAE, native_names(tiny_vae(dim=4, vae="2.2").state_dict()))
    for graph in GRAPHS.values() if end == signal.SIGINT else [GRAPHS["text to video"]]:
        run(server, graph)
    slow = {**SLOW, **ksampler(), "out": node("SaveLatentTensor", samples=link("sampler"), name="cancelled")}
    cancelled = server.queue(slow)
    time.sleep(1.5)
    server.interrupt()
    assert server.wait(cancelled).state == "interrupted"
    server.free()
    time.sleep(1)
    run(server, GRAPHS["text to video"])
    server.queue({**slow, **ksampler(seed=9)})
    time.sleep(1.5)
    processes = descendants(server.pid)
    server.stop(end)
    assert wait_until_gone(processes, 15) == set()
    assert odd_lines(server) == []
