"""Just enough of ComfyUI to import the nodes where there is none, and to read their schemas. Nothing of it runs."""

from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

MODULES = (
    *("comfy", "comfy.lora", "comfy.model_base", "comfy.model_detection", "comfy.model_management"),
    *("comfy.model_patcher", "comfy.patcher_extension", "comfy.samplers", "comfy.sd", "comfy.utils"),
    *("comfy.weight_adapter", "comfy_api", "comfy_api.latest", "comfy_execution", "comfy_execution.utils"),
    *("folder_paths", "nodes", "server"),
)


_IO_TYPES = {"AnyType": "*"}
"""ComfyUI's names of types that are not their own in capital letters."""


class _Kind:
    """A type of input or output, such as `io.Int`: what it is called with is kept."""

    def __init__(self, name: str):
        self.name = name

    def Input(self, input_id: str, **given: Any) -> SimpleNamespace:
        io_type = _IO_TYPES.get(self.name, self.name.upper())
        given = {"optional": False, **given}
        return SimpleNamespace(id=input_id, kind=self.name, get_io_type=lambda: io_type, **given)

    def Output(self, **given: Any) -> SimpleNamespace:
        return SimpleNamespace(kind=self.name, **given)


class _IO(ModuleType):
    ComfyNode = type("ComfyNode", (), {})
    Schema = SimpleNamespace
    Custom = _Kind

    def __getattr__(self, name: str) -> _Kind:
        return _Kind(name)


def install() -> None:
    """Put the stand-ins where `import` looks first. For a process of its own, as nothing takes them away again."""
    for name in MODULES:
        sys.modules[name] = MagicMock(name=name)
        package, _, module = name.rpartition(".")
        if package:
            setattr(sys.modules[package], module, sys.modules[name])
    sys.modules["comfy.model_base"].BaseModel = type("BaseModel", (), {})
    sys.modules["comfy.model_patcher"].ModelPatcher = type("ModelPatcher", (), {})
    sys.modules["comfy_api.latest"].ComfyExtension = type("ComfyExtension", (), {})
    sys.modules["comfy_api.latest"].io = _IO("io")
    sys.modules["comfy.samplers"].KSampler = SimpleNamespace(SAMPLERS=["euler"], SCHEDULERS=["simple"])
    sys.modules["folder_paths"].get_filename_list.return_value = ["a.safetensors"]
    sys.modules["folder_paths"].get_folder_paths.return_value = ["/no folder of models"]
    sys.modules["folder_paths"].recursive_search.return_value = [], {}
