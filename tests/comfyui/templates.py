"""ComfyUI's own Wan templates as graphs that a test can run: tiny models, small videos, random images and texts.

A template is what a user opens from the browser's list. Only what a test cannot have is exchanged: the text encoder,
the VAE, CLIP vision and the files of images and videos, each for a node of helper_nodes.py that gives random numbers
of the same kind. The samplers, the conditioning, the model patches and the LoRA loaders stay as they are.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import tiny
from comfy_server import ComfyServer
from graphs import node
from wan_parallel.wanvideo.config import WanConfig
from workflow_api import AFTER_SEED, widgets

SMALL = {"width": 64, "height": 64, "length": 9}
MOST_STEPS = 6  # of a single sampler; two that share a schedule keep theirs
BYPASSED, MUTED = 4, 2

_T2V = replace(tiny.TINY, text_dim=4096)
_CLIP = {"image_dim": 1280}
# By a part of the file's name; the first match counts.
_VARIANTS = (
    ("5b_fun_control", replace(_T2V, in_dim=148, out_dim=48, reference_dim=48)),
    ("fun_control_5b", replace(_T2V, in_dim=148, out_dim=48, reference_dim=48)),
    ("fun_inpaint_5b", replace(_T2V, in_dim=100, out_dim=48)),
    ("ti2v_5b", replace(_T2V, in_dim=48, out_dim=48)),
    ("vace", replace(_T2V, num_layers=4, vace_layers=2, vace_dim=96)),
    ("2.2_fun_camera", replace(_T2V, in_dim=36, camera_dim=24)),
    ("2.2_fun_control", replace(_T2V, in_dim=52, reference_dim=16)),
    ("2.2_fun_inpaint", replace(_T2V, in_dim=36)),
    ("2.2_i2v", replace(_T2V, in_dim=36)),
    ("fun_camera", replace(_T2V, in_dim=32, camera_dim=24, **_CLIP)),
    ("fun_control", replace(_T2V, in_dim=48, **_CLIP)),
    ("fun_inp", replace(_T2V, in_dim=36, **_CLIP)),
    ("flf2v", replace(_T2V, in_dim=36, image_positions=514, **_CLIP)),
    ("i2v", replace(_T2V, in_dim=36, **_CLIP)),
    ("t2v", _T2V),
)
LATER = {"animate": "face_adapter.fuser_blocks.0.k_norm.weight", "s2v": "audio_injector.injector.0.k.weight"}
"""Variants that are refused by name, and a tensor that tells them."""


def later(name: str) -> str:
    """The tensor that tells a variant which is refused, by a file's or template's name; else ""."""
    return next((marker for part, marker in LATER.items() if part in name.lower()), "")


def config_of(file: str) -> WanConfig:
    """Tiny dimensions of the variant of a published file."""
    return next(config for part, config in _VARIANTS if part in file.lower())


class Template:
    """One template; `files` gives the names in its active loaders."""

    def __init__(self, path: Path):
        self.name = path.stem
        workflow = json.loads(path.read_text(encoding="utf-8"))
        self.nodes = {entry["id"]: entry for entry in workflow["nodes"]}
        self.links = {number: (source, slot) for number, source, slot, *_ in workflow["links"]}

    def files(self, *types: str) -> list[str]:
        """The first widgets of the active nodes of these types."""
        return [n["widgets_values"][0] for n in self.nodes.values() if n["type"] in types and _active(n)]

    def graph(self, server: ComfyServer, loader: Callable[..., dict]) -> tuple[dict, list[list]]:
        """The graph in API format with models from `loader`, and the latents that are decoded in the end."""
        walk = _Walk(self, server, loader)
        decoders = [n for n in self.nodes.values() if n["type"].startswith("VAEDecode") and _active(n)]
        latents = [walk.source(_input(n, "samples")["link"]) for n in decoders]
        return walk.graph, [latent for i, latent in enumerate(latents) if latent and latent not in latents[:i]]


class _Walk:
    """Translates the nodes that are reached from the latents."""

    def __init__(self, template: Template, server: ComfyServer, loader: Callable[..., dict]):
        self.template, self.server, self.loader = template, server, loader
        self.graph: dict[str, dict] = {}

    def source(self, link: int | None) -> object:
        """What a link brings: [node, slot], a plain value, or None where it leads nowhere."""
        if link is None or link not in self.template.links:
            return None
        number, slot = self.template.links[link]
        entry = self.template.nodes[number]
        if entry["type"] == "PrimitiveNode":  # of the browser alone
            return entry["widgets_values"][0]
        if entry["type"] == "Reroute":
            return self.source(entry["inputs"][0]["link"])
        if entry.get("mode") == BYPASSED:
            return self._through(entry, slot)
        if entry.get("mode") == MUTED:
            return None
        return self._replaced(entry, slot) or self._kept(entry, slot)

    def _through(self, entry: dict, slot: int) -> object:
        """What a bypassed node hands on: its first input of the same type."""
        kind = entry["outputs"][slot]["type"]
        return next((self.source(i["link"]) for i in entry["inputs"] if i["type"] == kind and i.get("link")), None)

    def _replaced(self, entry: dict, slot: int) -> list | None:
        name, kind = str(entry["id"]), entry["type"]
        values = entry.get("widgets_values") or [""]
        seed = zlib.crc32(str(values[0]).encode()) % 2**31
        if kind == "UNETLoader":
            self.graph |= self.loader(name, file=values[0])
            return [name, 0]
        images = {"seed": seed, "width": SMALL["width"], "height": SMALL["height"]}
        channels = 48 if "2.2" in str(values[0]) else 16  # of a VAE
        video = node("RandomImages", count=SMALL["length"], **images)
        by_type = {
            "CLIPLoader": node("NoCLIP"),
            "CLIPTextEncode": node("RandomConditioning", seed=seed, tokens=512, width=4096),
            "VAELoader": node("PoolingVAE", channels=channels, scale=channels // 3 if channels == 48 else 8),
            "CLIPVisionEncode": node("RandomClipVision", seed=entry["id"]),
            "LoadImage": node("RandomImages", count=1, **images)
            if slot == 0
            else node("SolidMask", value=0.3, width=SMALL["width"], height=SMALL["height"]),
            "GetVideoComponents": video,
            "Canny": video,  # needs a package that ComfyUI can do without
        }
        if kind not in by_type:
            return None
        self.graph[f"{name}-{slot}"] = by_type[kind]
        return [f"{name}-{slot}", 0]

    def _kept(self, entry: dict, slot: int) -> list:
        name, kind = str(entry["id"]), entry["type"]
        if name not in self.graph:
            names, values = widgets(kind, self.server), entry.get("widgets_values") or []
            if isinstance(values, dict):
                values = [values.get(widget) for widget in names]
            inputs = dict(zip(names, values, strict=False))
            inputs |= {i["name"]: self.source(i["link"]) for i in entry.get("inputs", ()) if i.get("link")}
            inputs.pop(AFTER_SEED, None)
            self.graph[name] = node(kind, **_small(kind, {k: v for k, v in inputs.items() if v is not None}))
        return [name, slot]


def _small(kind: str, inputs: dict) -> dict:
    small = {name: size for name, size in SMALL.items() if name in inputs}  # linked ones as well
    if kind == "KSampler":
        small["steps"] = min(inputs["steps"], MOST_STEPS)
    return {**inputs, **small}


def _active(entry: dict) -> bool:
    return entry.get("mode", 0) not in (BYPASSED, MUTED)


def _input(entry: dict, name: str) -> dict:
    return next(slot for slot in entry["inputs"] if slot["name"] == name)
