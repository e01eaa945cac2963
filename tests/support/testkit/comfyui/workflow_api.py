"""A workflow file of the browser's format as the graph that the browser would queue."""

from __future__ import annotations

import json
from pathlib import Path

from testkit.comfyui.comfy_server import ComfyServer


def api_graph(path: Path, server: ComfyServer) -> dict:
    """Node id -> class and inputs, with the links and the widget values in the order of ComfyUI's own node list."""
    workflow = json.loads(path.read_text(encoding="utf-8"))
    sources = {number: [str(node), slot] for number, node, slot, *_ in workflow["links"]}
    graph = {}
    for node in workflow["nodes"]:
        if node["type"] == "Note":
            continue
        inputs = {slot["name"]: sources[slot["link"]] for slot in node["inputs"] if slot["link"] is not None}
        names = [name for name in widgets(node["type"], server) if name not in inputs]
        inputs |= dict(zip(names, node["widgets_values"], strict=False))
        inputs.pop(AFTER_SEED, None)
        graph[str(node["id"])] = {"class_type": node["type"], "inputs": inputs}
    return graph


AFTER_SEED = "control_after_generate"  # a widget that the browser adds and keeps for itself
_WIDGETS = {"INT", "FLOAT", "STRING", "BOOLEAN", "COMBO", "COMFY_DYNAMICCOMBO_V3"}


def widgets(node_type: str, server: ComfyServer) -> list[str]:
    """The names of a node's widgets, top to bottom."""
    known = server.get(f"/object_info/{node_type}")[node_type]["input"]
    names = []
    for name, (kind, *options) in {**known.get("required", {}), **known.get("optional", {})}.items():
        if isinstance(kind, list) or kind in _WIDGETS:
            names.append(name)
            if options and options[0].get(AFTER_SEED):
                names.append(AFTER_SEED)
    return names
