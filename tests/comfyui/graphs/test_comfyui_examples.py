"""The example workflows of released models in a real ComfyUI: they validate under the published file names, and sample.

The files of those names are tiny models of the same variants; text encoder, VAE and images are exchanged as for
ComfyUI's own templates (templates.py).
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import testkit
import torch
from testkit import tiny
from testkit.comfyui import loras
from testkit.comfyui.comfy_server import ComfyServer
from testkit.comfyui.templates import Template, config_of
from testkit.comfyui.workflow_api import api_graph

FOLDER = testkit.ROOT / "example_workflows"
EXAMPLES = sorted(FOLDER.glob("wan2*.json"))
LOADER = "XDitUSPWanVideoModelLoader"


@pytest.fixture(scope="module")
def examples(start_comfyui) -> Iterator[ComfyServer]:
    """A ComfyUI that has every file that the examples name."""
    server = start_comfyui()
    models = server.base / "models"
    for template in map(Template, EXAMPLES):
        for file in template.files(LOADER):
            tiny.write_checkpoint(models / "diffusion_models" / file, config_of(file), dtype=torch.float16)
        for file in template.files("LoraLoaderModelOnly"):
            loras.write_lora(models / "loras" / file, config_of(template.files(LOADER)[0]))
        for folder, kind in (("text_encoders", "CLIPLoader"), ("vae", "VAELoader")):
            (models / folder).mkdir(exist_ok=True)
            for file in template.files(kind):
                tiny.write_weights(models / folder / file, {"placeholder": torch.zeros(1)})
    inputs = server.base / "input"
    inputs.mkdir(exist_ok=True)
    for file in ("example.png", "control_video.mp4"):
        (inputs / file).write_bytes(b"only its name is looked at")
    yield server
    server.stop()


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_validates_with_the_published_file_names(examples, path):
    prompt = examples.queue(api_graph(path, examples))  # refused if a widget, link or file is wrong
    outcome = examples.wait(prompt)
    assert outcome.state == "error"  # the placeholder of the text encoder is none


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_samples_on_the_pool(examples, path):
    graph, latents = Template(path).graph(examples, loader=None)
    samples = examples.sample(graph, latents[0])
    assert samples.isfinite().all() and samples.std() > 0.05
    assert {node["class_type"] for node in graph.values()} >= {LOADER, "XDitUSPConfig"}
