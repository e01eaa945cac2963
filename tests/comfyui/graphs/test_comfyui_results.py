"""Native against pool, in a real ComfyUI: the same graph with the stock loader and with ours, in fp32."""

from __future__ import annotations

import pytest
import torch
from PIL import Image
from testkit.comfyui import graphs
from testkit.comfyui.comfy_server import QueueRefused
from testkit.comfyui.graphs import (
    conditions,
    custom_sampler,
    ksampler,
    link,
    lora,
    node,
    pool_model,
    stage,
    stock_model,
    video,
)
from testkit.comfyui.results import EXACT, assert_same, plain, sampled
from testkit.tiny import relative_error


def test_ksampler_without_cfg(server):
    assert_same(server, lambda loader: plain(loader, cfg=1.0))


def test_ksampler_with_cfg(server):
    assert_same(server, lambda loader: plain(loader, cfg=5.0))


def test_a_sampler_with_noise_of_its_own(server):
    assert_same(server, lambda loader: plain(loader, sampler_name="dpmpp_2m_sde"))


def test_model_sampling_shift(server):
    def graph(loader):
        shift = {"shift": node("ModelSamplingSD3", model=link("model"), shift=5.0)}
        return {**plain(loader), **shift, **ksampler(model="shift")}

    assert_same(server, graph)


def test_two_stages_with_two_models(server):
    def graph(loader):
        return {
            **loader("high"),
            **loader("low", file="tiny-low.safetensors"),
            **conditions(),
            **video(),
            **stage("first", "high", "latent", 0, 2, first=True),
            **stage("second", "low", "first", 2, 4, first=False),
        }

    assert_same(server, graph, output="second")


def test_custom_sampler_with_uni_pc(server):
    assert_same(server, lambda loader: {**loader(), **conditions(), **video(), **custom_sampler()})


@pytest.mark.parametrize("kind", ["EasyCache", "LazyCache"])
def test_a_cache_skips_the_same_steps(server, kind):
    def graph(loader):
        cache = node(
            kind,
            model=link("model"),
            reuse_threshold=3.0,  # few steps change a random model by less
            start_percent=0.1,
            end_percent=0.95,
            verbose=False,
        )
        return {**plain(loader), "cache": cache, **ksampler(model="cache", steps=6)}

    cached = assert_same(server, graph)
    assert relative_error(sampled(server, plain(stock_model, steps=6)), cached) > 1e-4


def test_conditions_of_unequal_length(server):
    assert_same(server, lambda loader: {**plain(loader), **conditions(512, 300)})


@pytest.mark.parametrize("size", [(40, 56, 5), (72, 40, 1), (24, 24, 13)])
def test_odd_latent_sizes(server, size):
    assert_same(server, lambda loader: {**plain(loader), **video(*size)})


@pytest.mark.parametrize("masked", [False, True])
def test_wan22_5b_with_a_timestep_for_each_frame(server, masked):
    def graph(loader):
        nodes = {**loader(file="wan22-5b.safetensors"), **conditions()}
        nodes["video"] = node("RandomLatent", seed=3, channels=48)
        nodes["mask"] = node("SolidMask", value=0.4, width=4, height=4)
        nodes["masked"] = node("SetLatentNoiseMask", samples=link("video"), mask=link("mask"))
        return {**nodes, **ksampler(latent_image=link("masked" if masked else "video"))}

    assert_same(server, graph)


def test_a_batch_of_videos(server):
    assert_same(server, lambda loader: {**plain(loader), **video(batch=3)})


@pytest.mark.parametrize(
    "config",
    [
        {"num_gpus": 1},
        {"num_gpus": 4},
        {"num_gpus": 4, "data_parallel_size": 2},
        {"num_gpus": 2, "data_parallel_size": 2},
        {"num_gpus": 2, "ulysses_degree": 1, "ring_degree": 2, "overlap_p2p_comm": False},
        {"num_gpus": 2, "enable_activation_checkpointing": False, "max_batch_size": 1},
        {"num_gpus": 2, "pipeline_parallel_size": 2},
        {"num_gpus": 4, "pipeline_parallel_size": 2, "tensor_parallel_size": 2},
        {"num_gpus": 4, "parallel_plan": "auto"},
        {"num_gpus": 2, "gpu_shares": "3, 1"},
    ],
    ids=str,
)
def test_every_plan_gives_the_native_result(server, config):
    def graph(loader):
        return {**plain(loader), **loader(file="four-heads.safetensors")}

    native = sampled(server, graph(stock_model))
    error = relative_error(
        sampled(server, graph(lambda file="": pool_model(file="four-heads.safetensors", **config))), native
    )
    print(f"relative error {error:.1e}")
    assert error <= EXACT


def test_pipefusion_is_exact_at_first_and_near_in_the_end(server):
    def graph(loader, steps):
        return {**plain(loader, steps=steps), **video(frames=33)}

    def streamed(**_: object) -> dict:
        return pool_model(pipeline_parallel_size=2, pipeline_mode="pipefusion")

    assert relative_error(sampled(server, graph(streamed, 4)), sampled(server, graph(stock_model, 4))) <= EXACT
    native = sampled(server, graph(stock_model, 8))
    for _ in range(2):  # the second prompt warms up anew
        nodes = {**graph(streamed, 8), "status": node("XDitUSPStatus", model=link("model"), after=link("sampler"))}
        assert 1e-6 < relative_error(sampled(server, nodes), native) < 0.2
    assert "pipeline 2 (pipefusion) x Ulysses 1" in server.run(nodes).outputs["status"]["text"][0]


@pytest.mark.parametrize("file", ["plain.safetensors", "odd.safetensors"])
@pytest.mark.parametrize("strength", [1.0, 0.5])
def test_lora_at_any_strength(server, file, strength):
    def graph(loader):
        return {**plain(loader), **lora("model", file, strength), **ksampler(model="lora")}

    with_lora = assert_same(server, graph)
    assert relative_error(sampled(server, plain(stock_model)), with_lora) > 0.01


def test_two_loras_on_top_of_each_other(server):
    def graph(loader):
        first = lora("model", "plain.safetensors", 0.8)
        second = lora("lora", "odd.safetensors", -0.6, name="lora2")
        return {**plain(loader), **first, **second, **ksampler(model="lora2")}

    assert_same(server, graph)


def test_a_lora_is_undone_exactly(server):
    def graph(model, seed):
        loras = lora("model", "plain.safetensors", 1.0)
        return {**plain(pool_model), **loras, **ksampler(model=model, seed=seed)}

    before = sampled(server, graph("model", seed=21))
    with_lora = sampled(server, graph("lora", seed=21))
    server.free()  # a cached result would prove nothing
    after = sampled(server, graph("model", seed=21))
    assert relative_error(with_lora, before) > 0.01
    assert torch.equal(before, after)


def test_lora_input_of_the_loader_acts_as_the_stock_lora_loader(server):
    stock = sampled(
        server,
        {**plain(pool_model), **lora("model", "plain.safetensors", 0.7), **ksampler(model="lora")},
    )
    ours = pool_model(loader={"lora": link("loras")})
    loras = {"loras": node("WanVideoLoraList", name="plain.safetensors", strength=0.7, blocks="")}
    assert torch.equal(sampled(server, {**plain(pool_model), **loras, **ours}), stock)


@pytest.mark.parametrize(
    "widgets, base_precision, bound",
    [
        ({"use_fp16": True}, "bf16", 0.02),  # the seed's pair
        ({"use_bf16": True}, "fp32", 0.02),
        ({}, "bf16", 0.02),
    ],
)
def test_sixteen_bit_pairs_stay_close(server, widgets, base_precision, bound):
    native = sampled(server, plain(stock_model))
    ours = pool_model(loader={"base_precision": base_precision}, **widgets)
    error = relative_error(sampled(server, {**plain(pool_model), **ours}), native)
    print(f"relative error {error:.1e}")
    assert 0 < error < bound


@pytest.mark.parametrize("mode", ["linear", "linear+attention"])
def test_fp8_mode_stays_near_and_says_so(server, mode):
    native = sampled(server, plain(stock_model))
    graph = {**plain(pool_model), **pool_model(loader={"fp8_mode": mode})}
    assert 1e-3 < relative_error(sampled(server, graph), native) < 0.2
    graph["status"] = node("XDitUSPStatus", model=link("model"), after=link("sampler"))
    outcome = server.run(graph)
    assert "fp8 mode (lossy): products" in outcome.outputs["status"]["text"][0]


def test_status_says_what_runs(server):
    graph = {**plain(pool_model, seed=22)}
    graph["status"] = node("XDitUSPStatus", model=link("model"), after=link("sampler"))
    for _ in range(2):  # an identical prompt: the sampler is cached, the status is not
        outcome = server.run(graph)
        assert outcome.state == "success", outcome.message
        text = outcome.outputs["status"]["text"][0]
        assert "2 workers are ready on cpu" in text
        assert "tiny.safetensors: weights fp32, activations fp32, attention sdpa" in text
        assert "rank 1" in text and "hop" in text and "native" in text
        assert text.count("last forward: compute") == text.count("after the last forward: weights") == 2


def test_the_status_has_a_picture_before_and_after_sampling(server):
    model = pool_model(num_gpus=1, gpu_memory_fraction=0.77)  # no other test starts this pool
    before = {**model, "status": node("XDitUSPStatus", model=link("model"))}
    sampling = plain(lambda: model, seed=23)
    after = {**sampling, "status": node("XDitUSPStatus", model=link("model"), after=link("sampler"))}
    sizes = {}
    for name, graph in (("before", before), ("after", after)):
        outcome = server.run({**graph, "picture": node("PreviewImage", images=link("status", 1))})
        assert outcome.state == "success", outcome.message
        (shown,) = outcome.outputs["picture"]["images"]
        with Image.open(server.base / "temp" / shown["subfolder"] / shown["filename"]) as picture:
            sizes[name] = picture.size
    assert sizes["before"][0] == sizes["after"][0] == 1024
    assert sizes["before"][1] < 150 < sizes["after"][1]


def test_status_says_what_was_chosen_and_why(server):
    graph = {**plain(pool_model), **pool_model(parallel_plan="auto")}
    graph["status"] = node("XDitUSPStatus", model=link("model"), after=link("sampler"))
    text = server.run(graph).outputs["status"]["text"][0]
    assert "sizes: chosen: 2 workers: data " in text and "for 2 items of" in text and "s expected" in text
    as_set = server.run({**plain(pool_model), "status": graph["status"]}).outputs["status"]["text"][0]
    assert "sizes: as set" in as_set


def test_unlike_shares_are_shown_and_checked_when_queued(server):
    graph = {**plain(pool_model), **pool_model(gpu_shares="3, 1")}
    graph["status"] = node("XDitUSPStatus", model=link("model"), after=link("sampler"))
    assert "shares of the video: as 3 to 1, by rank" in server.run(graph).outputs["status"]["text"][0]
    saved = node("SaveLatentTensor", samples=link("sampler"), name="refused")
    with pytest.raises(QueueRefused) as refusal:
        server.queue({**plain(pool_model), **pool_model(gpu_shares="3"), "out": saved})
    assert 'gpu_shares is "3", and num_gpus is 2' in " ".join(refusal.value.texts)
    with pytest.raises(QueueRefused) as refusal:
        server.queue({**plain(pool_model), **pool_model(gpus="0,1"), "out": saved})
    assert "gpus is 0,1, but the workers run on the CPU here" in " ".join(refusal.value.texts)


def test_nodes_show_the_promised_inputs(server):
    info = server.get("/object_info/XDitUSPConfig")["XDitUSPConfig"]
    assert info["display_name"] == "XDit+USP Config"
    assert info["category"] == "WanVideoWrapper/XDitUSP"
    assert info["output"] == ["XDITUSPCONFIG"] and info["output_name"] == ["xdit_usp_config"]
    assert info["input_order"]["required"] == list(graphs.CONFIG)
    assert info["input_order"]["optional"] == [
        "ulysses_degree",
        "ring_degree",
        "device",
        "usp_backend",
        "pipeline_mode",
        "shard_weights",
        "offload",
        "parallel_plan",
        "gpu_shares",
        "gpus",
    ]
    required = info["input"]["required"]
    limits = {name: (options["min"], options["max"]) for name, (_, options) in required.items() if "min" in options}
    assert limits == {
        "num_gpus": (1, 8),
        "gpu_memory_fraction": (0.1, 1.0),
        "pipeline_parallel_size": (1, 4),
        "tensor_parallel_size": (1, 4),
        "data_parallel_size": (1, 4),
        "max_batch_size": (1, 8),
        "max_sequence_length": (512, 8192),
    }
    assert required["max_sequence_length"][1]["default"] == 8192
    assert all(options["tooltip"] for _, options in required.values())

    info = server.get("/object_info/XDitUSPWanVideoModelLoader")["XDitUSPWanVideoModelLoader"]
    assert info["display_name"] == "XDit+USP WanVideo Model Loader"
    assert info["output"] == ["XDITUSPWANVIDEOMODEL,MODEL"] and info["output_name"] == ["model"]
    assert info["input_order"]["required"] == ["model", "base_precision", "xdit_usp_config"]
    assert info["input_order"]["optional"] == ["attention_mode", "lora", "vace_model", "fp8_mode"]

    info = server.get("/object_info/XDitUSPStatus")["XDitUSPStatus"]
    assert info["output"] == ["STRING", "IMAGE"] and info["output_name"] == ["status", "picture"]


@pytest.mark.parametrize(
    "node_id", ["XDitUSPConfig", "XDitUSPWanVideoModelLoader", "XDitUSPVACEModuleSelect", "XDitUSPStatus"]
)
def test_nodes_have_help_pages(server, node_id):
    assert server.get_text(f"/extensions/My-Wan-Pack/docs/{node_id}.md").startswith("# XDit+USP")
