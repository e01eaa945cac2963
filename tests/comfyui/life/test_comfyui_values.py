"""Values that nobody picks by hand, over the API and over links: a sentence that names the input, never a traceback."""

from __future__ import annotations

from typing import Any

import pytest
from testkit.comfyui.comfy_server import ComfyServer, QueueRefused
from testkit.comfyui.distrifusion import patch_model
from testkit.comfyui.graphs import conditions, link, node, pool_model, video
from testkit.comfyui.refusals import OUTPUT, PLAIN, error_text, refused_text
from testkit.tiny import sentences

SAMPLER = {"seed": 1, "steps": 2, "cfg": 1.0, "sampler_name": "euler", "scheduler": "simple", "denoise": 1.0}


def odd(kind: str) -> dict:
    """A node whose output has every type and this value."""
    return {"odd": node("AnyThing", kind=kind)}


@pytest.mark.parametrize(
    "config, named",
    [
        ({"parallel_plan": "garbage"}, 'parallel_plan cannot be "garbage". Choose one of: auto, as_set.'),
        ({"parallel_plan": {"a": 1}}, "parallel_plan cannot be a value of type dict."),
        ({"parallel_plan": 5}, "parallel_plan cannot be 5."),
        ({"gpu_shares": "1e308,1"}, 'gpu_shares is "1e308,1"'),
        ({"gpu_shares": "x" * 100_000}, "gpu_shares is"),
        ({"gpu_shares": {"__value__": [1, 1]}}, "gpu_shares is"),
        ({"device": "\0"}, r'device cannot be "\u0000".'),
        ({"device": "\ud800"}, r'device cannot be "\ud800".'),
        ({"num_gpus": 0}, "num_gpus cannot be 0. Set it to a whole number from 1 to 8."),
        ({"num_gpus": 10**30}, "num_gpus cannot be 1000000000000000000000000000000."),
        ({"ulysses_degree": -1}, "ulysses_degree cannot be -1. Set it to a whole number from 0 to 8."),
        ({"ring_degree": 99}, "ring_degree cannot be 99."),
        ({"pipeline_parallel_size": 0}, "pipeline_parallel_size cannot be 0."),
        ({"tensor_parallel_size": -(2**63)}, "tensor_parallel_size cannot be"),
        ({"data_parallel_size": 5}, "data_parallel_size cannot be 5."),
    ],
    ids=lambda value: str(value)[:60] if isinstance(value, dict) else "",
)
def test_what_comfyui_leaves_to_us_is_refused_when_queued(server, config, named):
    assert named in refused_text(server, pool_model(**config))


@pytest.mark.parametrize(
    "value",
    [None, {}, "1e400", "NaN", float("nan"), float("inf"), "", "two"],
    ids=repr,
)
def test_no_number_is_refused_when_queued_whoever_checks_it(server, value):
    assert "num_gpus" in refused_text(server, pool_model(num_gpus=value))


def test_an_unknown_model_value_is_refused_when_queued(server):
    for value in (5, {"a": 1}, "", "\0", "x" * 5000, "tiny.safetensors\n"):
        text = refused_text(server, pool_model(file=value))
        assert len(text) < 2000 and "Traceback" not in text


@pytest.mark.parametrize(
    "graph, named",
    [
        (pool_model(gpu_memory_fraction=float("nan")), "gpu_memory_fraction cannot be nan."),
        ({**odd("nan"), **pool_model(num_gpus=link("odd"))}, "num_gpus cannot be nan."),
        ({**odd("huge"), **pool_model(ulysses_degree=link("odd"))}, "ulysses_degree cannot be a number of 1329 bits."),
        ({**odd("text"), **pool_model(usp_backend=link("odd"))}, 'usp_backend cannot be "garbage".'),
        ({**odd("none"), **pool_model(use_fp16=link("odd"))}, "use_fp16 cannot be None."),
        ({**odd("list"), **pool_model(gpu_shares=link("odd"))}, "gpu_shares cannot be a value of type list."),
        ({**odd("two"), **pool_model(loader={"model": link("odd")})}, "model cannot be 2. Choose a file"),
        ({**odd("text"), **pool_model(loader={"fp8_mode": link("odd")})}, 'fp8_mode cannot be "garbage".'),
        ({**odd("text"), **pool_model(loader={"lora": link("odd")})}, 'lora cannot be "garbage".'),
        ({**odd("list"), **pool_model(loader={"vace_model": link("odd")})}, "vace_model does not name"),
        ({**odd("text"), **pool_model(loader={"xdit_usp_config": link("odd")})}, "Connect that node to it"),
        (pool_model(loader={"xdit_usp_config": "text"}), "Connect that node to it"),
        ({**odd("nan"), **patch_model(warmup_steps=link("odd"))}, "warmup_steps cannot be nan."),
        ({**odd("text"), **patch_model(split_mode=link("odd"))}, 'split_mode cannot be "garbage".'),
        (patch_model(gpu_memory_fraction=float("nan")), "gpu_memory_fraction cannot be nan."),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_comes_over_links_is_refused_in_words(server, graph, named):
    text = error_text(server, graph)
    assert named in text and sentences(text) >= 2 and len(text) < 500


@pytest.mark.parametrize(
    "kind, named",
    [
        ("no frames", "empty"),
        ("no videos", "empty"),
        ("latent of NaN", "NaN or infinite"),
    ],
)
def test_a_latent_that_is_none_is_refused_by_any_sampler(server, kind, named):
    for sampler in ({}, distrifusion_sampler()):
        text = error_text(server, {"latent": node("OddLatent", kind=kind), **sampler})
        assert named in text and sentences(text) >= 2, text


def distrifusion_sampler(**inputs: Any) -> dict:
    """The DistriFusion nodes, which sample in the place of the stock sampler."""
    given = {name: link(name) for name in ("positive", "negative")}
    widgets = {"model": link("model"), **given, "latent_image": link("latent"), **SAMPLER, "sync_frequency": 1}
    return {**patch_model(), "sampler": node("OfficialDistriFusionSampler", **{**widgets, **inputs})}


@pytest.mark.parametrize(
    "inputs, kind, named",
    [
        ({"cfg": float("nan")}, "object", "cfg cannot be nan."),
        ({"steps": link("odd")}, "huge", "steps cannot be"),
        ({"scheduler": link("odd")}, "text", "scheduler cannot be"),
        ({"positive": link("odd")}, "text", "positive cannot be"),
        ({"positive": link("odd")}, "text of NaN", "The text at positive holds numbers that are NaN"),
        ({"latent_image": link("odd")}, "no samples", "latent_image cannot be"),
        ({"latent_image": link("odd")}, "complex latent", "complex64, and floating-point numbers are needed"),
        ({"model": link("odd")}, "text", "no patches"),
    ],
    ids=str,
)
def test_inputs_of_the_distrifusion_sampler(server, inputs, kind, named):
    text = error_text(server, {**odd(kind), **distrifusion_sampler(**inputs)})
    assert named in text and sentences(text) >= 2


@pytest.mark.parametrize(
    "node_id, inputs, kind, named",
    [
        ("WanVideoParallelVAEDecode", {"samples": "odd"}, "no samples", "samples cannot be"),
        ("WanVideoParallelVAEDecode", {"samples": "odd"}, "latent of NaN", "NaN or infinite"),
        ("WanVideoParallelVAEDecode", {"samples": "latent", "vae": "odd"}, "list", "This VAE holds no weights"),
        ("WanVideoParallelVAEDecode", {"samples": "latent", "workers": "odd"}, "text", "does not run in workers"),
        ("WanVideoParallelVAEEncode", {"pixels": "odd"}, "grey images", "pixels cannot be"),
        ("WanVideoParallelVAEEncode", {"pixels": "odd"}, "images of NaN", "NaN or infinite"),
    ],
    ids=str,
)
def test_inputs_of_the_vae_nodes(server, node_id, inputs, kind, named):
    vae = {"vae": node("PoolingVAE", channels=16, scale=8), **video(), **conditions()}
    given = {"vae": link("vae"), "workers": link("model_config")}
    given |= {name: link(source) for name, source in inputs.items()}
    out = {"out": node("SaveImageTensor", images=link("decoded"), name="x")}
    if node_id.endswith("Encode"):
        out = {"out": node("SaveLatentTensor", samples=link("decoded"), name="x")}
    text = failed_text(server, {**odd(kind), **pool_model(), **vae, "decoded": node(node_id, **given), **out})
    assert named in text and sentences(text) >= 2


def failed_text(server: ComfyServer, graph: dict) -> str:
    """Run a whole graph, which must fail, and return what the user reads."""
    outcome = server.run(graph)
    assert outcome.state == "error"
    return outcome.message.strip()


def test_the_errors_of_the_pack_are_shown_behind_its_name(server):
    """The browser shows the type of an error in front of its text."""
    prompt = server.queue({**PLAIN, **OUTPUT, "latent": node("OddLatent", kind="no frames")})
    server.wait(prompt)
    messages = dict(server.get(f"/history/{prompt}")[prompt]["status"]["messages"])
    assert messages["execution_error"]["exception_type"] == "WanParallel.InputError"


def test_a_size_that_patches_do_not_divide_is_sampled(server):
    graph = {**PLAIN, "latent": node("OddLatent", kind="latent")}
    assert server.sample(graph, link("sampler")).shape == (1, 16, 2, 5, 3)


def test_an_unknown_word_of_any_length_is_refused_when_queued(server):
    for prompt in ("\0", "\ud800 x", "purple " * 600, "z" * 100_000):
        graph = {"text": node("TinyWanTextEncode", prompt=prompt), "out": node("XDitUSPStatus", model=link("text"))}
        with pytest.raises(QueueRefused) as refusal:
            server.queue(graph)
        assert len(str(refusal.value)) < 5000
