"""The shipped tiny Wan in a real ComfyUI: one prompt and seed give one video, whoever runs the model."""

from __future__ import annotations

import pytest
import testkit
import torch
from PIL import Image
from testkit.comfyui.comfy_server import ComfyServer, QueueRefused
from testkit.comfyui.graphs import link, node, pool_model, stock_model
from testkit.comfyui.workflow_api import api_graph
from testkit.tiny import relative_error
from wan_parallel.distributed.plan.degrees import ParallelPlan
from wan_parallel.distributed.protocol.specs import PoolSettings
from wan_parallel.tools import demo
from wan_parallel.tools.tiny_wan.classifier import Scene, classify, prompted
from wan_parallel.tools.tiny_wan.judging import T2V_FILE, VAE_FILE, Sampling
from wan_parallel.tools.tiny_wan.vae import denormalise
from wan_parallel.wanvideo.example.tiny_text import VOCABULARY

WORKFLOW = testkit.ROOT / "example_workflows" / "tiny_wan_demo.json"
PROMPT, SEED = "a red circle moves right over a blue background", 5
EXACT = 1e-5  # relative error
ROUNDING = 1 / 255 + 1e-6  # one level of a PNG's 256

pytestmark = pytest.mark.skipif(
    not (T2V_FILE.is_file() and VAE_FILE.is_file()),
    reason=f"{T2V_FILE.name} and {VAE_FILE.name} are not in example_workflows/models",
)


@pytest.fixture(scope="module", autouse=True)
def models(server: ComfyServer) -> None:
    """Links the shipped files into the server's model folders."""
    for folder, file in (("diffusion_models", T2V_FILE), ("vae", VAE_FILE)):
        target = server.base / "models" / folder / file.name
        target.parent.mkdir(exist_ok=True)
        target.symlink_to(file)


@pytest.fixture(scope="module")
def loads_small_vaes(server: ComfyServer) -> None:
    version = server.get("/system_stats")["system"]["comfyui_version"]
    if tuple(int(part) for part in version.split(".")[:3]) < (0, 3, 76):
        pytest.skip(f"the VAELoader of ComfyUI {version} takes Wan 2.1 VAEs of width 96 alone")


@pytest.fixture(scope="module")
def native(server: ComfyServer) -> torch.Tensor:
    """The latent of ComfyUI's own loader and model."""
    return server.sample(sampling(stock_model(file=T2V_FILE.name)), link("sampler"))


@pytest.fixture(scope="module")
def demo_latent() -> torch.Tensor:
    """What the demo samples on two workers, as the DiT sees it."""
    return demo.sample(PoolSettings(ParallelPlan(2), device="cpu"), PROMPT, SEED, Sampling(), "demo").latent


def sampling(model: dict, prompt: str = PROMPT) -> dict:
    """The sampling of example_workflows/tiny_wan_demo.json with another model."""
    how = Sampling()
    sampler = node(
        "KSampler",
        model=link("shift"),
        seed=SEED,
        steps=how.steps,
        cfg=how.guidance,
        sampler_name="euler",
        scheduler="simple",
        positive=link("positive"),
        negative=link("negative"),
        latent_image=link("latent"),
        denoise=1.0,
    )
    return {
        **model,
        "shift": node("ModelSamplingSD3", model=link("model"), shift=how.shift),
        "positive": node("TinyWanTextEncode", prompt=prompt),
        "negative": node("TinyWanTextEncode", prompt=""),
        "latent": node("EmptyHunyuanLatentVideo", width=how.size, height=how.size, length=how.frames, batch_size=1),
        "sampler": sampler,
    }


def decoded(server: ComfyServer, graph: dict, latent: list) -> torch.Tensor:
    """Run `graph` and ComfyUI's VAE behind it; the video [3, frames, H, W] from -1 to 1, as PNGs have it."""
    outcome = server.run(
        {
            **graph,
            "vae": node("VAELoader", vae_name=VAE_FILE.name),
            "decoded": node("VAEDecode", samples=latent, vae=link("vae")),
            "saved": node("SaveImage", images=link("decoded"), filename_prefix="tiny"),
        }
    )
    assert outcome.state == "success", f"{outcome.node_type}: {outcome.message}"
    frames = []
    for entry in outcome.outputs["saved"]["images"]:
        picture = Image.open(server.base / "output" / entry["subfolder"] / entry["filename"]).convert("RGB")
        levels = torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8)
        frames.append(levels.view(picture.height, picture.width, 3).permute(2, 0, 1) / 127.5 - 1)
    return torch.stack(frames, dim=1)


@pytest.mark.parametrize("workers", [1, 2, 4])
def test_the_pool_gives_the_latent_of_comfyuis_own_loader(server, native, workers):
    pool = server.sample(sampling(pool_model(file=T2V_FILE.name, num_gpus=workers)), link("sampler"))
    error = relative_error(pool, native)
    print(f"{workers} workers: relative error {error:.1e}")
    assert native.std() > 0.1 and error <= EXACT


def test_the_demo_gives_the_latent_of_comfyuis_own_loader(native, demo_latent):
    error = relative_error(denormalise(demo_latent), native)
    print(f"demo: relative error {error:.1e}")
    assert error <= EXACT


@pytest.mark.timeout(600)  # three samplings and decodings, on a machine that may be busy
def test_native_pool_and_demo_give_one_video_and_it_follows_the_prompt(server, loads_small_vaes, demo_latent):
    graphs = [stock_model(file=T2V_FILE.name), pool_model(file=T2V_FILE.name)]
    videos = [decoded(server, sampling(model), link("sampler")) for model in graphs]
    videos.append(demo.pictures(demo.decode(demo_latent)).permute(3, 0, 1, 2) / 127.5 - 1)
    for video in videos[1:]:
        difference = (video - videos[0]).abs().max().item() / 2
        print(f"largest difference {255 * difference:.1f} of 255")
        assert difference <= ROUNDING
    assert classify(videos[0]) == prompted(PROMPT) == Scene("blue", {"red": "right"})


def test_the_example_workflow_writes_its_video_within_a_minute(server, loads_small_vaes):
    outcome = server.run(api_graph(WORKFLOW, server))
    assert outcome.state == "success", f"{outcome.node_type}: {outcome.message}"
    print(f"{outcome.seconds:.1f} s")
    assert outcome.seconds < 60
    assert next((server.base / "output" / "video").glob("tiny_wan*.mp4")).stat().st_size > 5_000


def test_the_distrifusion_example_writes_its_video(server, loads_small_vaes):
    outcome = server.run(api_graph(WORKFLOW.with_name("tiny_distrifusion_demo.json"), server))
    assert outcome.state == "success", f"{outcome.node_type}: {outcome.message}"
    print(f"{outcome.seconds:.1f} s")
    assert next((server.base / "output" / "video").glob("tiny_distrifusion*.mp4")).stat().st_size > 5_000


def test_words_that_the_model_does_not_know_are_refused_when_queued(server):
    graph = sampling(pool_model(file=T2V_FILE.name), "a pink cat moves up over a blue background")
    out = node("SaveLatentTensor", samples=link("sampler"), name="refused")
    with pytest.raises(QueueRefused) as refusal:
        server.queue({**graph, "out": out})
    assert refusal.value.status == 400
    text = " ".join(refusal.value.texts)
    assert 'does not know "pink", "cat". Write a prompt such as' in text
    assert all(word in text for word in VOCABULARY)


def test_unknown_words_from_a_linked_text_are_refused_when_it_runs(server):
    text = {"text": node("PrimitiveStringMultiline", value="a pink cat")}
    graph = sampling(pool_model(file=T2V_FILE.name)) | text
    graph["positive"] = node("TinyWanTextEncode", prompt=link("text"))
    outcome = server.run({**graph, "out": node("SaveLatentTensor", samples=link("sampler"), name="refused")})
    assert outcome.state == "error" and outcome.node_type == "TinyWanTextEncode"
    assert 'does not know "pink", "cat"' in outcome.message
