"""Prompts name files that the nodes list, and no file makes the server wait."""

from __future__ import annotations

import os

import pytest
from testkit import hostile
from testkit.comfyui.graphs import link, node, pool_model
from testkit.comfyui.refusals import error_text, refused_text

LISTED = "is not in the list of models/{}. Choose one of the list; press R in the browser where the file is new."


@pytest.fixture
def outside(server, tmp_path):
    """A file outside of ComfyUI's folders that any loader could read, and a path without a file."""
    there = tmp_path / "there.safetensors"
    there.write_bytes((server.base / "models" / "diffusion_models" / "tiny.safetensors").read_bytes())
    return [str(there), str(tmp_path / "gone.safetensors"), f"../../../../../../../..{there}"]


def graphs_naming(name: object) -> dict[str, dict]:
    """For each node of ours with a name of a file: a graph that gives `name`."""
    module = node("XDitUSPVACEModuleSelect", vace_model=name)
    displaced = node(
        "OfficialDistriFusionModelLoader", model=name, precision="fp32", quantization="disabled", device="cpu"
    )
    displaced["inputs"] |= {"num_gpus": 2, "patch_size": 64, "patch_overlap": 8, "split_mode": "spatial"}
    displaced["inputs"] |= {"world_size": 2, "rank": 0, "attention_mode": "auto"}
    return {
        "loader": pool_model(file=name),
        "module": {**pool_model(loader={"vace_model": link("module")}), "module": module},
        "displaced": {"model": displaced},
    }


@pytest.mark.parametrize("where", ["loader", "module", "displaced"])
def test_a_path_outside_of_the_folders_is_refused_whether_it_exists_or_not(server, outside, where):
    texts = [refused_text(server, graphs_naming(path)[where]) for path in (*outside, "a\0b", 5)]
    assert all(LISTED.format("diffusion_models") in text for text in texts)


@pytest.mark.parametrize("name, folder", [("lora", "loras"), ("vace_model", "diffusion_models")])
def test_paths_that_a_prompt_gives_for_the_output_of_a_node_are_refused(server, outside, name, folder):
    for path in outside:
        graph = pool_model(loader={name: {"__value__": [{"path": path, "strength": 1.0}]}})
        assert LISTED.format(folder) in error_text(server, graph)


def test_a_gguf_file_with_a_count_beyond_its_end_and_a_pipe_are_refused_at_once(server):
    models = server.base / "models" / "diffusion_models"
    bomb = hostile.gguf_bytes([("x", 9, hostile.gguf_array(4, 2**31))], [])
    (models / "bomb.gguf").write_bytes(bomb + bytes(1_800_000))
    os.mkfifo(models / "pipe.safetensors")
    try:
        assert "is cut short or its header is corrupt" in refused_text(server, pool_model(file="bomb.gguf"))
        assert "is a folder, a pipe or a device" in refused_text(server, pool_model(file="pipe.safetensors"))
    finally:
        (models / "bomb.gguf").unlink()
        (models / "pipe.safetensors").unlink()
