"""Nodes open what ComfyUI lists and nothing else, and a refusal does not show which files there are."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import testkit

REPORT = """
import asyncio, json, os, sys, threading
from testkit.comfyui import stub
stub.install()
import folder_paths
root = sys.argv[1]

def search(folder, excluded_dir_names=None):
    walk = list(os.walk(folder, followlinks=True))
    files = [os.path.relpath(os.path.join(at, file), folder) for at, _, names in walk for file in names]
    return files, {at: os.path.getmtime(at) for at, _, _ in walk}

folder_paths.get_folder_paths = lambda kind: [os.path.join(root, kind)]
folder_paths.recursive_search = search
folder_paths.get_filename_list = lambda kind: [
    name for name in search(os.path.join(root, kind))[0] if name.endswith(".safetensors")
]
from wan_parallel.nodes.common import model_files
from wan_parallel.nodes.common.validation import check_file

def tried(find, name):
    try:
        return find(name)
    except model_files.CheckpointError as error:
        return f"refused: {error}"

async def served_meanwhile():
    served = threading.Event()
    async def serve():
        served.set()
    def read(path):
        assert served.wait(20), "the server waits for the file"
    return (await asyncio.gather(check_file(read, "a.safetensors"), serve()))[0]

asked = json.loads(sys.argv[2])
print(json.dumps({
    "names": model_files.model_names(),
    **{kind: [tried(getattr(model_files, kind), name) for name in names] for kind, names in asked.items()},
    "served meanwhile": asyncio.run(served_meanwhile()),
}))
"""
WRONG = ["../secret.safetensors", "", ".", "..", "a\0b", "x" * 10_000, 5, True, {"a": 1}, ["a.safetensors"]]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders of models as ComfyUI has them, and a file outside of them."""
    folder = tmp_path_factory.mktemp("models")
    for name in (
        "diffusion_models/a.safetensors",
        "diffusion_models/sub/b.gguf",
        "secret.safetensors",
        "loras/l.safetensors",
    ):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    shards = folder / "diffusion_models" / "Wan" / "transformer"
    shards.mkdir(parents=True)
    (shards / "diffusion_pytorch_model.safetensors.index.json").touch()
    (folder / "elsewhere").mkdir()
    (folder / "elsewhere" / "linked.safetensors").touch()
    (folder / "loras" / "linked.safetensors").symlink_to(folder / "elsewhere" / "linked.safetensors")
    return folder


def report(root: Path, **asked: list) -> dict:
    folder = testkit.ROOT / "tests" / "support"
    command = [sys.executable, "-c", REPORT, str(root), json.dumps(asked)]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_names_of_the_list_have_paths_and_all_others_one_refusal(root):
    secret, absent = str(root / "secret.safetensors"), str(root / "absent.safetensors")
    inside = [
        str(root / "diffusion_models" / "a.safetensors"),
        "sub/../a.safetensors",
        "/a.safetensors",
        "sub",
        "/etc/passwd",
    ]
    listed = ["a.safetensors", "sub/b.gguf", "Wan/transformer"]
    found = report(root, model_path=[*listed, secret, absent, *inside, *WRONG])
    assert sorted(found["names"]) == sorted(listed)
    assert found["model_path"][:3] == [str(root / "diffusion_models" / name) for name in listed]
    refusals = found["model_path"][3:]
    assert all(text.startswith("refused: ") and len(text) < 300 for text in refusals)
    assert len({text.partition(" is not in the list of ")[2] for text in refusals}) == 1
    assert refusals[0].replace("secret", "absent") == refusals[1]


def test_paths_from_other_nodes_are_those_of_listed_files(root):
    lora, linked = str(root / "loras" / "l.safetensors"), os.path.realpath(root / "loras" / "linked.safetensors")
    module, folder = str(root / "diffusion_models" / "sub" / "b.gguf"), str(root / "diffusion_models/Wan/transformer")
    outside = [
        str(root / "secret.safetensors"),
        str(root / "loras" / ".." / "secret.safetensors"),
        "l.safetensors",
        *WRONG,
    ]
    found = report(root, listed_lora=[lora, linked, module, *outside], listed_model=[module, folder, lora, *outside])
    assert found["listed_lora"][:2] == [lora, linked] and found["listed_model"][:2] == [module, folder]
    for texts in (found["listed_lora"][2:], found["listed_model"][2:]):
        assert all(text.startswith("refused: ") for text in texts)
        assert len({text.partition(" is not in the list of ")[2] for text in texts}) == 1


def test_the_server_goes_on_while_a_file_is_checked(root):
    assert report(root)["served meanwhile"] is True
