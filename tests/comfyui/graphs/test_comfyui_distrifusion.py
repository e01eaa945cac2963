"""The DistriFusion nodes in a real ComfyUI: exact where they must be, close where they are stale, refused in words."""

from __future__ import annotations

import itertools
import os
import re
import signal
import time

import pytest
import torch
from PIL import Image
from testkit.comfyui.comfy_server import ComfyServer, QueueRefused
from testkit.comfyui.distrifusion import LOADER, patch_model
from testkit.comfyui.graphs import conditions, ksampler, link, lora, node, pool_model, stage, video
from testkit.processes import wait_until_gone
from testkit.tiny import relative_error

SEEDS = itertools.count(5000)
STEPS = 8
OPTIONAL = [
    "attention_mode",
    "warmup_steps",
    "kv_buffers",
    "split_cfg",
    "manager",
    "gpu_memory_fraction",
    "device",
    "gpus",
]
SAMPLER = {"steps": STEPS, "sampler_name": "euler", "scheduler": "simple", "denoise": 1.0, "sync_frequency": 10}


def patch_sampler(model: str = "model", cfg: float = 1.0, seed: int = 7, **widgets: object) -> dict:
    inputs = {"positive": link("positive"), "negative": link("negative"), "latent_image": link("latent")}
    widgets = {"model": link(model), **inputs, "seed": seed, "cfg": cfg, **SAMPLER, **widgets}
    return {"sampler": node("OfficialDistriFusionSampler", **widgets)}


PLAIN = {**patch_model(), **conditions(), **video(64, 64)}


def sampled(server: ComfyServer, graph: dict, output: str = "sampler") -> torch.Tensor:
    return server.sample({**PLAIN, **graph}, link(output))


def exact(server: ComfyServer, graph: dict | None = None, **sampler: object) -> torch.Tensor:
    """The same sampling with a MODEL of the XDit+USP loader."""
    sampler = {"cfg": 1.0, "steps": STEPS, **sampler}
    return sampled(server, {**pool_model(max_batch_size=1), **ksampler(**sampler), **(graph or {})})


def run_with_status(server: ComfyServer, graph: dict, **status: object) -> tuple[str, dict]:
    """Sample and ask the status node; its text and the prompt's outputs."""
    asked = node("OfficialDistriFusionStatus", model=link("model"), after=link("sampler"), **status)
    outcome = server.run({**PLAIN, **graph, "status": asked})
    assert outcome.state == "success", outcome.message
    return outcome.outputs["status"]["text"][0], outcome.outputs


def error_text(server: ComfyServer, graph: dict) -> str:
    saved = node("SaveLatentTensor", samples=link("sampler"), name="refused")
    outcome = server.run({**PLAIN, **patch_sampler(seed=next(SEEDS)), **graph, "out": saved})
    assert outcome.state == "error"
    return outcome.message


@pytest.mark.parametrize("cfg", [1.0, 4.0])
def test_sync_frequency_1_is_the_exact_model_bit_for_bit(server, cfg):
    ours = sampled(server, patch_sampler(cfg=cfg, sync_frequency=1))
    assert torch.equal(ours, exact(server, cfg=cfg))


def test_as_many_warmup_steps_as_steps_are_exact(server):
    assert torch.equal(sampled(server, {**patch_model(warmup_steps=STEPS), **patch_sampler()}), exact(server))


@pytest.mark.parametrize(
    "widgets",
    [{}, {"split_mode": "temporal", "manager": "host"}, {"kv_buffers": "fp8", "patch_overlap": 16}],
    ids=str,
)
def test_stale_steps_come_close_and_the_next_prompt_warms_up_again(server, widgets):
    graph = {**patch_model(**widgets), **patch_sampler(cfg=4.0)}
    first = sampled(server, graph)
    error = relative_error(first, exact(server, cfg=4.0))
    print(f"relative error {error:.1e}")
    assert 0 < error < 0.2
    server.free()  # a cached result would prove nothing
    assert torch.equal(sampled(server, graph), first)


def test_status_tells_about_run_and_layout(server):
    graph = {**patch_model(patch_overlap=16), **patch_sampler(cfg=4.0, sync_frequency=3, seed=next(SEEDS))}
    text, _ = run_with_status(server, graph)
    print(text)
    assert "distrifuser" in text and "2 workers on cpu: ready" in text
    assert re.search(r"rank 1: CPU, [\d.]+ GiB used, [\d.]+ GiB free, link: CPU", text)
    assert "patches of the last run: 3 latent frames of 4 x 4 tokens" in text
    assert "rank 1: latent frames 0 to 2, token rows 2 to 3, 50.0 % of the tokens" in text
    assert "step 8 was the last" in text and "every 3. step is synchronous" in text
    assert "(4 synchronous)" in text and "(4 stale)" in text  # two to warm up, the 5th and the 8th
    assert "exchanged by" in text and "hidden behind computation" in text
    assert "for 2 batch items" in text
    again, _ = run_with_status(server, graph)  # an identical prompt: the sampler is cached, the status is not
    assert "step 8 was the last" in again


def test_status_draws_the_patches_over_a_frame(server):
    graph = {
        **patch_sampler(seed=next(SEEDS)),
        "frame": node("EmptyImage", width=64, height=64, batch_size=1, color=0x808080),
        "saved": node("SaveImage", images=link("status", 1), filename_prefix="patches"),
    }
    _, outputs = run_with_status(server, graph, frame=link("frame"))
    entry = outputs["saved"]["images"][0]
    picture = Image.open(server.base / "output" / entry["subfolder"] / entry["filename"]).convert("RGB")
    upper, lower = picture.getpixel((100, 200)), picture.getpixel((100, 560))
    assert picture.width == 992 and upper != lower
    assert upper[0] > upper[2] and lower[2] > lower[0]  # orange over blue


def test_status_before_any_run(server):
    graph = {**patch_model(num_gpus=4, world_size=4), "status": node("OfficialDistriFusionStatus", model=link("model"))}
    outcome = server.run(graph)
    assert outcome.state == "success", outcome.message
    text = outcome.outputs["status"]["text"][0]
    assert "not started; they start with the next sampling step" in text
    assert "832x480, 81 frames, before the first run" in text and "nothing has been sampled yet" in text


def test_the_loader_says_what_videos_need(server):
    outcome = server.run({**patch_model(), "text": node("PreviewAny", source=link("model", 1))})
    assert outcome.state == "success", outcome.message
    text = outcome.outputs["text"]["text"][0]
    assert "spatial patches, patch_size 32, patch_overlap 0" in text
    assert "81 frames of 832x480 with cfg above 1:" in text and "81 frames of 1280x720" in text
    assert "K/V buffers" in text and "fits" in text


def test_a_stock_ksampler_runs_the_model_by_patches(server):
    stock = sampled(server, ksampler(cfg=1.0, steps=STEPS))
    assert torch.equal(stock, sampled(server, patch_sampler(sync_frequency=10)))


def test_a_lora_between_two_runs(server):
    plain = sampled(server, patch_sampler())
    with_lora = {**lora("model", "plain.safetensors", 1.0), **patch_sampler("lora")}
    changed = sampled(server, with_lora)
    truth = exact(server, {**lora("model", "plain.safetensors", 1.0), **ksampler("lora", cfg=1.0, steps=STEPS)})
    assert relative_error(changed, truth) < 0.2 and relative_error(changed, plain) > 0.01
    server.free()
    assert torch.equal(sampled(server, patch_sampler()), plain)


def test_two_stages_with_two_models(server):
    def graph(high: dict, low: dict) -> dict:
        first = stage("first", "high", "latent", 0, 2, first=True)
        return {**high, **low, **first, **stage("second", "low", "first", 2, 4, first=False)}

    low = {"model": "tiny-low.safetensors", "warmup_steps": 1}
    ours = sampled(server, graph(patch_model("high", warmup_steps=1), patch_model("low", **low)), "second")
    pool = graph(pool_model("high", max_batch_size=1), pool_model("low", file="tiny-low.safetensors", max_batch_size=1))
    error = relative_error(ours, sampled(server, pool, "second"))
    print(f"relative error {error:.1e}")
    assert 0 < error < 0.3


def test_context_windows_are_exact_and_the_status_says_so(server):
    def windows(model: str) -> dict:
        known = server.get("/object_info/WanContextWindowsManual")["WanContextWindowsManual"]["input"]["required"]
        defaults = {name: more[0]["default"] for name, (_, *more) in known.items() if more and "default" in more[0]}
        widgets = {"context_length": 9, "context_overlap": 5, "context_schedule": "standard_static"}
        return {"windows": node("WanContextWindowsManual", model=link(model), **{**defaults, **widgets})}

    longer = video(64, 64, frames=25)
    graph = {**longer, **windows("model")}
    text, _ = run_with_status(server, {**graph, **patch_sampler("windows", seed=11)})
    assert "every forward is exact and synchronous: context windows" in text
    ours = sampled(server, {**graph, **patch_sampler("windows", seed=11)})
    assert torch.equal(ours, exact(server, {**graph, **ksampler("windows", cfg=1.0, steps=STEPS, seed=11)}))


def test_split_cfg_gives_each_branch_half_of_the_gpus(server):
    graph = {**patch_model(num_gpus=4, world_size=4, split_cfg=True), **patch_sampler(cfg=4.0)}
    text, _ = run_with_status(server, graph)
    assert "the same in each of 2 groups of GPUs" in text and "rank 2: latent" not in text
    error = relative_error(sampled(server, graph), exact(server, cfg=4.0))
    assert 0 < error < 0.2


def test_a_worker_that_dies_in_a_stale_step_and_the_prompt_after(server):
    before = sampled(server, patch_sampler())
    slow = {**video(832, 448, 25), **patch_model(warmup_steps=1), **patch_sampler(seed=next(SEEDS))}
    status = {"status": node("XDitUSPStatus", model=link("model"))}
    text = server.run({**PLAIN, **status}).outputs["status"]["text"][0]
    workers = [int(pid) for pid in re.findall(r"rank \d+:.* pid (\d+)", text)]
    out = {"out": node("SaveLatentTensor", samples=link("sampler"), name="unused")}
    prompt = server.queue({**PLAIN, **slow, **out})
    wait_for_progress(server, 3)
    begin = time.monotonic()
    os.kill(workers[1], signal.SIGKILL)
    outcome = server.wait(prompt)
    seconds = time.monotonic() - begin
    print(f"failed after {seconds:.2f} s: {outcome.message}")
    assert outcome.state == "error" and "rank 1" in outcome.message and seconds < 5
    assert not wait_until_gone(workers, 5)
    server.free()
    assert torch.equal(sampled(server, patch_sampler()), before)


def test_cancel_in_a_stale_step_and_the_prompt_after(server):
    before = sampled(server, patch_sampler())
    slow = {**video(832, 448, 25), **patch_model(warmup_steps=1), **patch_sampler(seed=next(SEEDS))}
    prompt = server.queue({**PLAIN, **slow, "out": node("SaveLatentTensor", samples=link("sampler"), name="unused")})
    wait_for_progress(server, 3)
    begin = time.monotonic()
    server.interrupt()
    outcome = server.wait(prompt)
    seconds = time.monotonic() - begin
    print(f"cancelled after {seconds:.2f} s")
    assert outcome.state == "interrupted" and outcome.node_type == "OfficialDistriFusionSampler"
    assert seconds < 3  # the workers' buffers are given back, which waits for the block that runs
    server.free()
    assert torch.equal(sampled(server, patch_sampler()), before)


def wait_for_progress(server: ComfyServer, steps: int) -> None:
    """Wait until the sampler's progress bar on the console has got that far."""
    deadline = time.monotonic() + 60
    while not re.search(rf"\b{steps}/{STEPS}\b", server.log.split("got prompt")[-1]):
        assert time.monotonic() < deadline, server.log[-2000:]
        time.sleep(0.1)


@pytest.mark.parametrize(
    "widgets, text",
    [
        ({"world_size": 4}, "several hosts are not supported yet. Set world_size to 2"),
        ({"rank": 1}, "Set rank to 0"),
        ({"num_gpus": 3, "world_size": 3, "split_cfg": True}, "split_cfg gives each branch"),
        ({"model": "cut-short.safetensors"}, "is cut short"),
        ({"patch_size": 136}, "patch_size"),
        ({"device": "tpu"}, "device is tpu"),
    ],
    ids=str,
)
def test_what_cannot_work_is_refused_when_queued(server, widgets, text):
    saved = node("SaveLatentTensor", samples=link("sampler"), name="refused")
    with pytest.raises(QueueRefused) as refusal:
        server.queue({**PLAIN, **patch_sampler(), **patch_model(**widgets), "out": saved})
    assert text in " ".join(refusal.value.texts)


@pytest.mark.parametrize(
    "graph, text",
    [
        (patch_model(patch_size=128), "patch_size 128 is larger than the frame, which is 64 pixels high"),
        (patch_model(num_gpus=4, world_size=4), "Set num_gpus to 2 or less, or patch_size to a smaller value"),
        (patch_model(num_gpus=4, world_size=0, split_mode="temporal"), "4 GPUs cannot share 3 latent frames"),
        ({**patch_model(patch_overlap=32), **video(64, 32)}, "patch"),
        (pool_model(), "Connect Official DistriFusion Model Loader, or sample this MODEL with KSampler"),
        (
            {**patch_model(gpu_memory_fraction=0.1, kv_buffers="as precision"), **video(2048, 2048, 401)},
            "set kv_buffers to fp8, set manager to host, which keeps the buffers in host memory, raise",
        ),
        (
            {**patch_model(gpu_memory_fraction=0.1), **video(2048, 2048, 401), **ksampler(cfg=1.0, steps=STEPS)},
            "DistriFusion needs",
        ),
    ],
    ids=["frame", "rows", "frames", "overlap", "model", "memory", "memory-stock"],
)
def test_what_cannot_be_sampled_is_refused_in_words(server, graph, text):
    assert text in error_text(server, graph)


def test_status_of_an_exact_model_is_refused(server):
    asked = node("OfficialDistriFusionStatus", model=link("model"))
    assert "Connect Official DistriFusion Model Loader" in error_text(server, {**pool_model(), "status": asked})


def test_fp8_weights(server):
    ours = sampled(server, {**patch_model(quantization="fp8_e4m3fn"), **patch_sampler()})
    assert relative_error(ours, exact(server)) < 0.2


def test_nodes_show_the_promised_inputs(server):
    def shown(node_id: str) -> dict:
        return server.get(f"/object_info/{node_id}")[node_id]

    loader = shown("OfficialDistriFusionModelLoader")
    assert loader["display_name"] == "🎯 Official DistriFusion Model Loader"
    assert loader["category"] == "WanVideoWrapper/Official DistriFusion"
    assert loader["output"] == ["OFFICIAL_DISTRIFUSION_MODEL,MODEL", "STRING"]
    assert loader["input_order"] == {"required": list(LOADER), "optional": OPTIONAL}
    limits = {name: options for name, (_, options) in loader["input"]["required"].items() if "min" in options}
    assert {name: (o["min"], o["max"], o["default"]) for name, o in limits.items()} == {
        "num_gpus": (1, 8, 2),
        "patch_size": (32, 128, 64),
        "patch_overlap": (0, 32, 0),
        "world_size": (0, 64, 0),
        "rank": (0, 63, 0),
    }
    assert limits["patch_size"]["step"] == limits["patch_overlap"]["step"] == 8
    sampler = shown("OfficialDistriFusionSampler")
    assert sampler["display_name"] == "🎯 Official DistriFusion Sampler" and sampler["output"] == ["LATENT"]
    stock = shown("KSampler")["input"]["required"]
    for name in ("sampler_name", "scheduler"):
        kind, *more = sampler["input"]["required"][name]
        assert (kind if isinstance(kind, list) else more[0]["options"]) == stock[name][0]
    status = shown("OfficialDistriFusionStatus")
    assert status["display_name"] == "🎯 Official DistriFusion Status" and status["output"] == ["STRING", "IMAGE"]
    for one in (loader, sampler, status):
        given = {**one["input"]["required"], **one["input"].get("optional", {})}
        assert all(options["tooltip"] for _, options in given.values())
        page = server.get_text(f"/extensions/My-Wan-Pack/docs/{one['name']}.md")
        assert page.startswith(f"# {one['display_name']}")
