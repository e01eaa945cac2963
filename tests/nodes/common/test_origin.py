"""Code of other packs is named by its method and its pack. Needs no ComfyUI."""

from __future__ import annotations

import functools
import types
from importlib import util

import pytest
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


def test_whoever_asks_is_named_by_the_nearest_node(tmp_path):
    outer = module_in(tmp_path / "custom_nodes" / "Outer", "def run(inner, ask):\n    return inner(ask)\n")
    inner = module_in(tmp_path / "custom_nodes" / "Inner-Pack", "def reach(ask):\n    return ask()\n")
    stock = module_in(tmp_path / "comfy_extras", "def extra(ask):\n    return ask()\n")
    assert outer.run(inner.reach, asking_code) == "reach in Inner-Pack"
    assert stock.extra(asking_code) == "extra in comfy_extras.nodes"
    assert asking_code() == ""
