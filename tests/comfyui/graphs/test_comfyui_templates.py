"""ComfyUI's own Wan templates, with nothing changed but the model loader, give the native result on the pool.

They come with ComfyUI (its `comfyui_workflow_templates` package); `COMFYUI_TEMPLATES` names another folder of them.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from testkit import format_files, infinitetalk_files, tiny
from testkit.comfyui import loras
from testkit.comfyui.comfy_server import ComfyServer
from testkit.comfyui.graphs import pool_model, stock_model
from testkit.comfyui.templates import NodeMissing, Template, config_of
from testkit.tiny import relative_error
from wan_parallel.wanvideo.variants.infinitetalk import InfiniteTalk

EXACT = 1e-5
_INFINITETALK = tiny.INFINITETALK.having(InfiniteTalk(width=16))
PATIENCE = 300.0  # seconds: the face encoder of Animate is slow on a CPU


def _folder() -> Path | None:
    if os.environ.get("COMFYUI_TEMPLATES"):
        return Path(os.environ["COMFYUI_TEMPLATES"])
    python = os.environ.get("COMFYUI_PYTHON", sys.executable)
    for package in ("comfyui_workflow_templates_json", "comfyui_workflow_templates"):  # older ones have no other
        code = f"import {package} as t; print(t.__path__[0])"
        found = subprocess.run([python, "-c", code], capture_output=True, text=True)
        folder = Path(found.stdout.strip()) / "templates"
        if found.returncode == 0 and folder.is_dir():
            return folder
    return None


def _templates() -> list[Template]:
    folder = _folder() if os.environ.get("COMFYUI_DIR") else None
    paths = sorted(folder.glob("*.json")) if folder else []
    paths = [path for path in paths if not path.name.startswith(("api_", "index"))]
    read = [Template(path) for path in paths if "wan2" in path.read_text(encoding="utf-8").lower()]
    wan = [t for t in read if any("wan" in file.lower() for file in t.files("UNETLoader"))]
    return [t for t in wan if not t.remote]


TEMPLATES = _templates()
if not TEMPLATES:
    pytest.skip("this ComfyUI has no template files of Wan", allow_module_level=True)


@pytest.fixture(scope="module")
def templates(start_comfyui) -> Iterator[ComfyServer]:
    """A ComfyUI that has every model and LoRA file of the templates, of tiny dimensions."""
    server = start_comfyui()
    folder = server.base / "models" / "diffusion_models"
    written: dict[object, Path] = {}
    for seed, file in enumerate(sorted({f for t in TEMPLATES for f in t.files("UNETLoader")})):
        if "int8_convrot" in file:
            _write_int8(folder, file)
        else:
            tiny.write_checkpoint(folder / file, config_of(file), seed=seed)
            written[config_of(file)] = folder / file
    for file in {f for t in TEMPLATES for f in t.files("ModelPatchLoader")}:
        infinitetalk_files.write_patch(server.base / "models" / "model_patches" / file, _INFINITETALK)
    for template in TEMPLATES:
        models = template.files("UNETLoader")
        for lora in template.files("LoraLoaderModelOnly", "LoraLoader"):
            loras.write_lora(server.base / "models" / "loras" / lora, config_of(models[0]))
    yield server
    server.stop()


def _write_int8(folder: Path, file: str) -> None:
    """The file as published, and what its numbers mean. ComfyUI itself multiplies in int8, and with a LoRA on it both
    round the changed weights to int8 again."""
    stored, meant = format_files.convrot(tiny.random_weights(config_of(file)))
    tiny.write_weights(folder / file, stored)
    tiny.write_weights(folder / f"meant-{file}", meant)


def _native_model(name: str, file: str) -> dict:
    return stock_model(name, f"meant-{file}" if "int8_convrot" in file else file)


@pytest.mark.timeout(4 * PATIENCE)
@pytest.mark.parametrize("template", TEMPLATES, ids=lambda t: t.name)
def test_a_template_gives_the_native_result(templates, template):
    try:
        native, latents = template.graph(templates, _native_model)
    except NodeMissing as error:
        pytest.skip(str(error))
    pool, _ = template.graph(templates, pool_model)
    assert latents
    as_published, _ = template.graph(templates, stock_model)
    for latent in latents:
        expected = templates.sample(native, latent, PATIENCE)
        error = relative_error(templates.sample(pool, latent, PATIENCE), expected)
        rounding = 0.0
        if as_published != native:
            rounding = relative_error(templates.sample(as_published, latent, PATIENCE), expected)
        print(f"{template.name}: relative error {error:.1e}, that of ComfyUI's rounding {rounding:.1e}")
        assert expected.isfinite().all() and error <= max(EXACT, rounding)
