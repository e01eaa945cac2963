"""Code of other packs is named by its method and its pack. Needs no ComfyUI."""

from __future__ import annotations

import functools
import types
from importlib import util

import pytest
import torch
from wan_parallel.nodes.common.origin import asking_code, origin_of, origins_of


def closure(module: str):
    class Guide:
        def patch(self):
            return lambda: None

        def __call__(self):
            pass

    Guide.__module__, Guide.__qualname__ = module, "Guide"
    made = Guide().patch()
    made.__module__, made.__qualname__ = module, "Guide.patch.<locals>.<lambda>"
    return made, Guide()


@pytest.mark.parametrize(
    "module, pack",
    [
        ("comfy_extras.nodes_nag", "comfy_extras.nodes_nag"),
        ("/data/custom_nodes/ComfyUI-KJNodes.nodes.model_optimization_nodes", "ComfyUI-KJNodes"),
        ("C:\\ComfyUI\\custom_nodes\\some-pack", "some-pack"),
        ("custom_nodes.a_pack.b", "a_pack"),
    ],
)
def test_the_method_and_the_pack_are_named(module, pack):
    function, instance = closure(module)
    assert origin_of(function) == origin_of(functools.partial(function)) == f"Guide.patch in {pack}"
    assert origin_of(instance) == f"Guide in {pack}"
    assert origin_of(types.MethodType(function, instance)) == f"Guide.patch in {pack}"
    assert origins_of([function, instance, function]) == f"Guide.patch in {pack}, Guide in {pack}"


def module_in(folder, text):
    folder.mkdir(parents=True)
    (folder / "nodes.py").write_text(text)
    spec = util.spec_from_file_location(f"{folder}.nodes", folder / "nodes.py")
    module = util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_whoever_calls_is_named_through_what_only_passes_on(tmp_path):
    passing = "def run(inner, ask):\n    return inner(ask)\n"
    inner = module_in(tmp_path / "custom_nodes" / "Inner-Pack", "def reach(ask):\n    return ask()\n")
    stock = module_in(tmp_path / "comfy_extras", "def extra(ask):\n    return ask()\n")
    outer = module_in(tmp_path / "custom_nodes" / "Outer", passing)
    between = module_in(tmp_path / "comfy", passing)
    part = torch.nn.Identity()
    part.forward = asking_code
    assert outer.run(inner.reach, part) == "reach in Inner-Pack"
    assert stock.extra(asking_code) == "extra in comfy_extras.nodes"
    assert outer.run(lambda ask: between.run(lambda _: ask(), ask), asking_code) == ""  # ComfyUI's samplers, say


def test_nobody_is_named_where_no_node_calls():
    assert asking_code() == ""
