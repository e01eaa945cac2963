"""What nodes find that look into the transformer, beside ComfyUI's own model of the same dimensions."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import testkit
from testkit import tiny
from testkit.tiny import sentences

ROOT = testkit.ROOT
SCRIPT = ROOT / "tests" / "support" / "testkit" / "comfyui" / "inside" / "parts_script.py"
# The first has an image embedding, so that every part is there; ComfyUI takes the widths for granted.
CONFIGS = {
    name: replace(config, text_dim=4096, image_dim=1280 if config.image_dim else 0, image_positions=0)
    for name, config in {
        "i2v": tiny.I2V_CLIP,
        "t2v": tiny.TINY,
        "vace": tiny.VACE,
        "control": tiny.FUN_CONTROL,
        "camera": tiny.FUN_CAMERA,
    }.items()
}


@pytest.fixture(scope="module")
def found(comfyui_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> dict:
    folder = tmp_path_factory.mktemp("parts")
    files = [tiny.write_checkpoint(folder / f"{name}.safetensors", config) for name, config in CONFIGS.items()]
    command = [os.environ.get("COMFYUI_PYTHON", sys.executable), "-s", str(SCRIPT), str(ROOT), *files]
    done = subprocess.run(command, cwd=comfyui_dir, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("name", CONFIGS)
def test_sizes_shapes_and_names_are_those_of_comfyui(found, name):
    blocks = CONFIGS[name].num_layers
    assert found["differences"][name] == {
        **{key: [] for key in ("modules", "methods", "parameters", "shapes", "names")},
        "sizes": {},
        "blocks": [blocks, blocks],
        "block": [256, 256],
    }


def test_whatever_is_called_or_replaced_is_named_with_what_to_do(found):
    for name, text in found["reached"].items():
        assert "runs in the XDit+USP workers" in text and "Load Diffusion Model" in text, (name, text)
        assert sentences(text) == 2, text
        part = name.removesuffix(".call").removesuffix(".set").replace(".class", ".__class__").removesuffix(".hook")
        if part not in ("object patch", "transformer", "load_state_dict", "pickle"):
            assert f"(diffusion_model.{part})" in text, (name, text)
    assert "diffusion_model.blocks.0.cross_attn.forward" in found["reached"]["object patch"]
    assert "EasyCache" in found["reached"]["forward_orig"] and "ScaleROPE" in found["reached"]["rope_encode"]


def test_probing_works_as_on_any_module(found):
    probed = found["probed"]
    assert probed["hasattr"] == [True, False, False] and probed["getattr"] == "default"
    assert probed["state"] == [True, None, False]
    assert "workers" in probed["repr"] and probed["dtype"] == "torch.float32"
    assert probed["count"] == CONFIGS["i2v"].parameters
    assert probed["object"] and probed["iterated"] == [True, True]
    assert probed["copied"] == [True, True] and probed["copy"] and probed["moved"]
    assert len(probed["hooked"]) == 1


def test_a_compiled_transformer_is_not_compiled_and_that_is_said_once(found):
    compiled = found["compiled"]
    assert compiled["results"] == [True] * 4 and compiled["untouched"]
    assert len(compiled["lines"]) == 1 and "Remove the node that compiles it." in compiled["lines"][0]
