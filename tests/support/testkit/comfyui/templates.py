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

from testkit import infinitetalk_files, tiny
from testkit.comfyui.comfy_server import ComfyServer
from testkit.comfyui.flat_workflow import BYPASSED, MUTED, FlatWorkflow, active
from testkit.comfyui.graphs import node
from testkit.comfyui.workflow_api import AFTER_SEED, widgets
from wan_parallel.wanvideo.base.config import WanConfig
from wan_parallel.wanvideo.variants.animate import Animate
from wan_parallel.wanvideo.variants.fun_camera import FunCamera
from wan_parallel.wanvideo.variants.fun_control import Reference
from wan_parallel.wanvideo.variants.s2v import S2V
from wan_parallel.wanvideo.variants.scail import Scail2
from wan_parallel.wanvideo.variants.vace import Vace

SMALL = {"width": 64, "height": 64, "length": 9}
MOST_STEPS = 6  # of a single sampler; two that share a schedule keep theirs
INFINITETALK_SMALL = {**SMALL, "length": 17}  # more than what a video that goes on takes over from the one before
FACE_SMALL, FACE_STEPS = {**SMALL, "length": 1}, 1  # ComfyUI takes 5 s for one face on a CPU, in every step
_SMALL = {"animate": FACE_SMALL, "infinitetalk": INFINITETALK_SMALL}  # by a part of the template's name

_T2V = replace(tiny.TINY, text_dim=4096)
_CLIP = {"image_dim": 1280}
# By a part of the file's name; the first match counts.
_VARIANTS = (
    ("5b_fun_control", _T2V.having(Reference(48), in_dim=148, out_dim=48)),
    ("fun_control_5b", _T2V.having(Reference(48), in_dim=148, out_dim=48)),
    ("fun_inpaint_5b", replace(_T2V, in_dim=100, out_dim=48)),
    ("ti2v_5b", replace(_T2V, in_dim=48, out_dim=48)),
    ("vace", _T2V.having(Vace(2, 96), num_layers=4)),
    ("2.2_fun_camera", _T2V.having(FunCamera(24), in_dim=36)),
    ("2.2_fun_control", _T2V.having(Reference(16), in_dim=52)),
    ("2.2_fun_inpaint", replace(_T2V, in_dim=36)),
    ("2.2_i2v", replace(_T2V, in_dim=36)),
    ("fun_camera", _T2V.having(FunCamera(24), in_dim=32, **_CLIP)),
    ("fun_control", replace(_T2V, in_dim=48, **_CLIP)),
    ("fun_inp", replace(_T2V, in_dim=36, **_CLIP)),
    ("dancer", _T2V.having(tiny.MUSIC, in_dim=36, **_CLIP)),
    ("scail_2", _T2V.having(Scail2(20, mask_dim=28), in_dim=20, **_CLIP)),
    ("animate", tiny.ANIMATE.having(Animate(), num_layers=5, text_dim=4096, **_CLIP)),
    ("s2v", tiny.S2V.having(S2V(), text_dim=4096)),
    ("bernini", _T2V),
    ("ati", replace(_T2V, in_dim=36, **_CLIP)),
    ("wanmove", replace(_T2V, in_dim=36, **_CLIP)),
    ("flf2v", replace(_T2V, in_dim=36, image_positions=514, **_CLIP)),
    (
        "i2v-14b-480p_fp8_e4m3fn_scaled_kj",
        replace(tiny.INFINITETALK, text_dim=4096, freq_dim=256, additions=(), **_CLIP),
    ),
    ("i2v", replace(_T2V, in_dim=36, **_CLIP)),
    ("t2v", _T2V),
)


def config_of(file: str) -> WanConfig:
    """Tiny dimensions of the variant of a published file."""
    return next(config for part, config in _VARIANTS if part in file.lower())


# Hand on their first input: random images have the size that they are resized to.
_AS_GIVEN = ("Reroute", "ResizeImageMaskNode", "ImageScaleToTotalPixels")


class NodeMissing(LookupError):
    """The ComfyUI at hand could not import a file of nodes, or is too old for it."""


class Template:
    """One template; `files` gives the names in its active loaders."""

    def __init__(self, path: Path):
        self.name = path.stem
        self.flat = FlatWorkflow(json.loads(path.read_text(encoding="utf-8")))

    def files(self, *types: str) -> list[str]:
        """The first widgets of the active nodes of these types."""
        return [n["widgets_values"][0] for n in self.flat.nodes.values() if n["type"] in types and active(n)]

    @property
    def remote(self) -> bool:
        """Whether a part of it runs on somebody else's computers."""
        return any(n["type"].startswith("Gemini") for n in self.flat.nodes.values() if active(n))

    def graph(self, server: ComfyServer, loader: Callable[..., dict]) -> tuple[dict, list[list]]:
        """The graph in API format with models from `loader`, and the latents that are decoded in the end."""
        walk = _Walk(self.flat, server, loader, self.name)
        decoders = [n for n in self.flat.nodes.values() if n["type"].startswith("VAEDecode") and active(n)]
        latents = [walk.value(_input(n, "samples")["link"]) for n in decoders]
        return walk.graph, [latent for i, latent in enumerate(latents) if latent and latent not in latents[:i]]


class _Walk:
    """Translates the nodes that are reached from the latents."""

    def __init__(self, flat: FlatWorkflow, server: ComfyServer, loader: Callable[..., dict], name: str):
        self.flat, self.server, self.loader = flat, server, loader
        self.small = next((small for part, small in _SMALL.items() if part in name), SMALL)
        self.most_steps = FACE_STEPS if self.small is FACE_SMALL else MOST_STEPS
        self.features = _INFINITETALK_FEATURES if self.small is INFINITETALK_SMALL else _FEATURES
        self.graph: dict[str, dict] = {}

    def value(self, link: str | None) -> object:
        """What a link brings: [node, slot], a plain value, or None where it leads nowhere."""
        begin = self.flat.source(link)
        if begin is None:
            held = self.flat.promoted(link)
            return None if held is None else self._literals(held[0]).get(held[1])
        name, slot = begin
        entry = self.flat.nodes[name]
        if entry.get("mode") == BYPASSED:
            return self._through(entry, slot)
        if entry.get("mode") == MUTED:
            return None
        if entry["type"] == "PrimitiveNode":  # of the browser alone
            return entry["widgets_values"][0]
        if entry["type"] == "CustomCombo":  # the choice, and which of them it is
            return entry["widgets_values"][slot]
        if entry["type"] in _AS_GIVEN:
            return self.value(entry["inputs"][0]["link"])
        if entry["type"] == "BatchImagesNode":
            return self._batched(entry)
        return self._replaced(entry, slot) or self._kept(entry, slot)

    def _through(self, entry: dict, slot: int) -> object:
        """What a bypassed node hands on: its first input of the same type."""
        kind = entry["outputs"][slot]["type"]
        return next((self.value(i["link"]) for i in entry["inputs"] if i["type"] == kind and i.get("link")), None)

    def _batched(self, entry: dict) -> object:
        """All images behind each other, without the package that this node's file needs."""
        images = [value for value in (self.value(i["link"]) for i in entry["inputs"]) if value is not None]
        joined = images[0]
        for number, image in enumerate(images[1:]):
            name = f"{entry['id']}-{number}"
            self.graph[name] = node("ImageBatch", image1=joined, image2=image)
            joined = [name, 0]
        return joined

    def _replaced(self, entry: dict, slot: int) -> list | None:
        name, kind = str(entry["id"]), entry["type"]
        values = entry.get("widgets_values") or [""]
        seed = zlib.crc32(str(values[0] if isinstance(values, list) else name).encode()) % 2**31
        if kind == "UNETLoader":
            self.graph |= self.loader(name, file=values[0])
            return [name, 0]
        new = _replacement(entry, slot, seed, self.small, self.features)
        if new is None:
            return None
        self.graph[f"{name}-{slot}"] = new
        return [f"{name}-{slot}", 0]

    def _kept(self, entry: dict, slot: int) -> list:
        name, kind = str(entry["id"]), entry["type"]
        if name not in self.graph:
            inputs = self._literals(entry)
            inputs |= {i["name"]: self.value(i["link"]) for i in entry["inputs"] if self.value(i["link"]) is not None}
            inputs.pop(AFTER_SEED, None)
            self.graph[name] = node(kind, **self._smaller(kind, {k: v for k, v in inputs.items() if v is not None}))
        return [name, slot]

    def _literals(self, entry: dict) -> dict:
        """What the widgets of a node hold, by name."""
        if not self.server.get(f"/object_info/{entry['type']}"):
            raise NodeMissing(f"This ComfyUI has no node {entry['type']}: install its requirements.txt")
        names, values = widgets(entry["type"], self.server), entry.get("widgets_values") or []
        if isinstance(values, dict):
            values = [values.get(widget) for widget in names]
        return self._smaller(entry["type"], dict(zip(names, values, strict=False)))

    def _smaller(self, kind: str, inputs: dict) -> dict:
        small = {name: size for name, size in self.small.items() if name in inputs}  # linked ones as well
        if kind in ("KSampler", "BasicScheduler"):
            steps = inputs["steps"]
            small["steps"] = min(steps, self.most_steps) if isinstance(steps, int) else self.most_steps
        return {**inputs, **small}


def _replacement(entry: dict, slot: int, seed: int, small: dict, features: dict) -> dict | None:
    """What stands for a node that needs files or large models."""
    kind, size = entry["type"], {"width": small["width"], "height": small["height"]}
    video = node("RandomImages", count=small["length"], seed=seed, **size)
    audio = node("RandomAudio", seed=seed, seconds=1.0)
    if kind == "VAELoader":
        channels = 48 if "2.2" in entry["widgets_values"][0] else 16
        return node("PoolingVAE", channels=channels, scale=channels // 3 if channels == 48 else 8)
    by_slot = {
        "LoadImage": (node("RandomImages", count=1, seed=seed, **size), node("SolidMask", value=0.3, **size)),
        "GetVideoComponents": (video, audio, node("PrimitiveFloat", value=16.0)),
        "GetImageSize": tuple(node("PrimitiveInt", value=value) for value in (*size.values(), 1)),
        "Painter": (node("RandomImages", count=1, seed=seed, **size), node("RandomMask", seed=entry["id"], **size)),
    }
    if kind in by_slot:
        return by_slot[kind][slot]
    return {
        "CLIPLoader": node("NoCLIP"),
        "CLIPTextEncode": node("RandomConditioning", seed=seed, tokens=512, width=4096),
        "CLIPVisionEncode": node("RandomClipVision", seed=zlib.crc32(entry["id"].encode())),
        "Canny": video,  # needs a package that ComfyUI can do without
        "LoadAudio": audio,
        "AudioEncoderEncode": node("RandomAudioFeatures", seed=zlib.crc32(entry["id"].encode()), **features),
        # as with a long piece of music: first a coarse video of the whole, then its parts at the full rate
        "WanDancerEncodeAudio": node("RandomMusic", seed=seed, fps=30.0 if _linked(entry, "video_frames") else 6.0),
        "SAM3_Detect": node("SolidMask", value=0.3, **size),
        "SAM3_VideoTrack": node("RandomTracks", count=small["length"], seed=seed, **size),
        "DWPreprocessor": video,  # of other packs, as are the next two
        "DrawMaskOnImage": video,
        "BlockifyMask": node("SolidMask", value=1.0, **size),
    }.get(kind)


_FEATURES = {"layers": 25, "width": 1024, "count": 50}
_INFINITETALK_FEATURES = {"layers": infinitetalk_files.LAYERS, "width": infinitetalk_files.FEATURES, "count": 50}


def _linked(entry: dict, name: str) -> bool:
    return any(slot["name"] == name and slot["link"] is not None for slot in entry["inputs"])


def _input(entry: dict, name: str) -> dict:
    return next(slot for slot in entry["inputs"] if slot["name"] == name)
