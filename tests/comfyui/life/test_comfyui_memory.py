"""In a real ComfyUI: wherever the weights live, and however often they are offloaded, the result is the same."""

from __future__ import annotations

import re

import pytest
import torch
from testkit.comfyui.graphs import conditions, ksampler, link, lora, node, pool_model, stage, video


def graph(model: dict, seed: int, room: float | None = None) -> dict:
    """A sampling, then perhaps somebody who wants `room` bytes, then another sampling."""
    nodes = {**model, **conditions(), **video(), **ksampler(seed=seed, steps=2)}
    between = link("sampler")
    if room is not None:
        nodes["room"] = node("WantRoom", samples=between, nbytes=room)
        between = link("room")
    second = {"again": node("KSampler", **{**nodes["sampler"]["inputs"], "latent_image": between, "seed": seed + 1})}
    return {**nodes, **second}


@pytest.mark.parametrize("shard", ["off", "on"])
@pytest.mark.parametrize("room", [1000.0, 1e25], ids=["a little", "all there is"])
def test_weights_step_out_for_another_model_and_come_back(server, shard, room):
    model, seed = pool_model(shard_weights=shard), 40 if shard == "on" else 41
    expected = server.sample(graph(model, seed), link("again"))
    launcher = re.search(r"launcher pid \d+", server.run(status_of(model)).outputs["status"]["text"][0])[0]
    assert torch.equal(server.sample(graph(model, seed, room), link("again")), expected)
    text = server.run(status_of(model)).outputs["status"]["text"][0]
    assert launcher in text
    assert ("1/2 of each block on each of 2 GPUs" if shard == "on" else "whole on each GPU") in text
    hosted = [float(mib) for mib in re.findall(r"MiB there and ([\d.]+) MiB in host memory", text)]
    assert len(hosted) == 2 and min(hosted) > 0  # the copies that they left in host memory


def status_of(model: dict) -> dict:
    return {**model, "status": node("XDitUSPStatus", model=link("model"))}


def test_both_experts_step_out_between_ten_prompts_and_stay_right(server):
    def experts(room: float | None) -> dict:
        nodes = {**pool_model("high"), **pool_model("low", "tiny-low.safetensors"), **conditions(), **video()}
        nodes |= stage("first", "high", "latent", 0, 2, True)
        between = "first"
        if room is not None:
            nodes["room"] = node("WantRoom", samples=link("first"), nbytes=room)
            between = "room"
        nodes |= stage("second", "low", between, 2, 4, False)
        if room is not None:
            nodes["decode"] = node("WantRoom", samples=link("second"), nbytes=room)
        return nodes

    expected = server.sample(experts(None), link("second"))
    for turn in range(10):
        got = server.sample(experts(1e25 + turn * 1e20), link("decode"))
        assert torch.equal(got, expected)


def test_every_place_of_the_weights_gives_the_same_latent_with_a_lora_too(server):
    def sampled(**config: str) -> torch.Tensor:
        nodes = {**pool_model("plain", **config), **lora("plain", "plain.safetensors", 0.8, "model")}
        return server.sample({**nodes, **conditions(), **video(), **ksampler(seed=77, steps=1)}, link("sampler"))

    whole = sampled(shard_weights="off", offload="off")
    for shard, offload in (("on", "off"), ("off", "on"), ("on", "on")):
        assert torch.equal(sampled(shard_weights=shard, offload=offload), whole)
