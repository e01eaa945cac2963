#!/usr/bin/env python3
"""Write the example workflows of released models into example_workflows/, with a picture of each.

    python3 tools/example_workflows.py          # the .json files; --thumbnails draws the .jpg files too (needs pillow)

One place says what the examples have in common; a new input of XDit+USP Config reaches all of them by running this
again. Settings of samplers and file names are those of ComfyUI's own templates for the same models.
"""

from __future__ import annotations

import argparse
import json
import sys
import uuid
from dataclasses import astuple, dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import bootstrap  # noqa: E402

bootstrap.load_pack()
from wan_parallel.nodes.common.settings import USPConfig  # noqa: E402

FOLDER = ROOT / "example_workflows"
WAN21 = "Comfy-Org/Wan_2.1_ComfyUI_repackaged"
WAN22 = "Comfy-Org/Wan_2.2_ComfyUI_Repackaged"
TEXT_ENCODER = "umt5_xxl_fp8_e4m3fn_scaled.safetensors"
VAE, VAE_22 = "wan_2.1_vae.safetensors", "wan2.2_vae.safetensors"
NEGATIVE = (
    "overexposed, static, blurred details, subtitles, worst quality, low quality, JPEG artefacts, ugly, deformed, "
    "extra fingers, still picture, cluttered background"
)
MODEL = "XDITUSPWANVIDEOMODEL,MODEL"
_GREEN, _RED, _NOTE = ("#232", "#353"), ("#322", "#533"), ("#432", "#653")
_OPTIONAL = 7  # the shape of an input that may stay open
Source = tuple[dict, int]


@dataclass
class Workflow:
    """Nodes and links in the format that the browser saves."""

    name: str
    nodes: list[dict] = field(default_factory=list)
    links: list[list] = field(default_factory=list)
    groups: list[dict] = field(default_factory=list)

    def add(
        self,
        kind: str,
        at: tuple[int, int],
        size: tuple[int, int],
        inputs: dict[str, tuple[str, Source | None]] | None = None,
        outputs: dict[str, str] | None = None,
        widgets: list[Any] | None = None,
        title: str = "",
        colors: tuple[str, str] = ("", ""),
        models: list[dict] | None = None,
    ) -> dict:
        """A node; an input is (type, source), where a source of None stays open."""
        core = not kind.startswith("XDitUSP")
        properties: dict[str, Any] = {"Node name for S&R": kind, "cnr_id": "comfy-core" if core else "wan-parallel"}
        properties["ver"] = "0.3.64" if core else "0.1.0"
        if models:
            properties["models"] = models
        node: dict[str, Any] = {
            "id": len(self.nodes) + 1,
            "type": kind,
            "pos": list(at),
            "size": list(size),
            "flags": {},
            "order": len(self.nodes),
            "mode": 0,
            "inputs": [],
            "outputs": [{"name": name, "type": type_, "links": []} for name, type_ in (outputs or {}).items()],
            "properties": {} if kind == "Note" else properties,
            "widgets_values": widgets or [],
        }
        if title:
            node["title"] = title
        if colors[0]:
            node["color"], node["bgcolor"] = colors
        self.nodes.append(node)
        for name, (type_, source) in (inputs or {}).items():
            self.connect(node, name, type_, source)
        return node

    def connect(self, node: dict, name: str, type_: str, source: Source | None) -> None:
        """Give a node one more input, and its link."""
        slot: dict[str, Any] = {"name": name, "type": type_, "link": None}
        if source is None:
            slot["shape"] = _OPTIONAL
        else:
            other, output = source
            slot["link"] = len(self.links) + 1
            leaving = other["outputs"][output]
            leaving["links"].append(slot["link"])
            self.links.append([slot["link"], other["id"], output, node["id"], len(node["inputs"]), leaving["type"]])
        node["inputs"].append(slot)

    def group(self, title: str, *members: dict, color: str = "#3f789e") -> None:
        """A frame around nodes."""
        left, top = (min(node["pos"][axis] for node in members) for axis in (0, 1))
        right, bottom = (max(node["pos"][axis] + node["size"][axis] for node in members) for axis in (0, 1))
        bounding = [left - 10, top - 80, right - left + 20, bottom - top + 90]
        entry = {"id": len(self.groups) + 1, "title": title, "bounding": bounding, "color": color}
        self.groups.append({**entry, "font_size": 24, "flags": {}})

    def json(self) -> str:
        """The file's text."""
        workflow = {
            "id": str(uuid.uuid5(uuid.NAMESPACE_URL, f"https://github.com/wanparallel/wan-parallel/{self.name}")),
            "revision": 0,
            "last_node_id": len(self.nodes),
            "last_link_id": len(self.links),
            "nodes": self.nodes,
            "links": self.links,
            "groups": self.groups,
            "config": {},
            "extra": {"ds": {"scale": 0.5, "offset": [60, 120]}},
            "version": 0.4,
        }
        return json.dumps(workflow, indent=2) + "\n"


def file_of(repository: str, folder: str, name: str) -> list[dict]:
    """Where the browser offers to download a file from."""
    url = f"https://huggingface.co/{repository}/resolve/main/split_files/{folder}/{name}"
    return [{"name": name, "url": url, "directory": folder}]


class Example(Workflow):
    """What all examples have: a column of notes and loaders, one of models, prompts, sampling, and the video."""

    def note(self, text: str) -> None:
        self.add("Note", (0, 0), (420, 560), widgets=[text], title="Read me", colors=_NOTE)

    def config(self, use_fp16: bool) -> dict:
        settings = USPConfig(num_gpus=2, use_fp16=use_fp16, use_bf16=not use_fp16)
        outputs = {"xdit_usp_config": "XDITUSPCONFIG"}
        return self.add("XDitUSPConfig", (460, 0), (360, 560), outputs=outputs, widgets=list(astuple(settings)))

    def model(self, config: dict, row: int, file: str, repository: str, precision: str, title: str = "") -> Source:
        inputs = {
            "xdit_usp_config": ("XDITUSPCONFIG", (config, 0)),
            "lora": ("WANVIDLORA", None),
            "vace_model": ("VACEPATH", None),
        }
        models = file_of(repository, "diffusion_models", file)
        widgets, at = [file, precision, "auto"], (860, 290 * row)
        loader = "XDitUSPWanVideoModelLoader"
        node = self.add(loader, at, (420, 150), inputs, {"model": MODEL}, widgets, title, models=models)
        return node, 0

    def lora(self, model: Source, row: int, file: str) -> Source:
        models = file_of(WAN22, "loras", file)
        size, widgets = (420, 90), [file, 1.0]
        at = (1320, 290 * row)
        inputs, outputs = {"model": ("MODEL", model)}, {"MODEL": "MODEL"}
        return self.add("LoraLoaderModelOnly", at, size, inputs, outputs, widgets, models=models), 0

    def shift(self, model: Source, row: int, shift: float) -> Source:
        at, inputs = (1320, 290 * row + 150), {"model": ("MODEL", model)}
        return self.add("ModelSamplingSD3", at, (420, 60), inputs, {"MODEL": "MODEL"}, [shift]), 0

    def models_group(self) -> None:
        kinds = ("XDitUSPConfig", "XDitUSPWanVideoModelLoader", "LoraLoaderModelOnly", "ModelSamplingSD3")
        self.group("Model on all GPUs", *(node for node in self.nodes if node["type"] in kinds))

    def texts(self, prompt: str) -> tuple[Source, Source]:
        models = file_of(WAN21, "text_encoders", TEXT_ENCODER)
        widgets = [TEXT_ENCODER, "wan", "default"]
        clip = self.add("CLIPLoader", (0, 720), (420, 110), outputs={"CLIP": "CLIP"}, widgets=widgets, models=models)
        encoded = []
        for row, (text, title, colors) in enumerate(
            [(prompt, "Prompt", _GREEN), (NEGATIVE, "Negative prompt", _RED)],
        ):
            at, inputs = (460, 720 + 210 * row), {"clip": ("CLIP", (clip, 0))}
            outputs = {"CONDITIONING": "CONDITIONING"}
            encoded.append(self.add("CLIPTextEncode", at, (400, 160), inputs, outputs, [text], title, colors))
        self.group("Prompts", clip, *encoded)
        return (encoded[0], 0), (encoded[1], 0)

    def vae(self, file: str, repository: str) -> Source:
        models = file_of(repository, "vae", file)
        return self.add("VAELoader", (0, 880), (420, 60), outputs={"VAE": "VAE"}, widgets=[file], models=models), 0

    def image(self, at: tuple[int, int], title: str) -> dict:
        outputs = {"IMAGE": "IMAGE", "MASK": "MASK"}
        return self.add("LoadImage", at, (420, 320), outputs=outputs, widgets=["example.png", "image"], title=title)

    def sampler(
        self, kind: str, at: tuple[int, int], inputs: dict[str, Source], widgets: list, title: str = ""
    ) -> Source:
        typed = {
            "model": ("MODEL", inputs["model"]),
            "positive": ("CONDITIONING", inputs["positive"]),
            "negative": ("CONDITIONING", inputs["negative"]),
            "latent_image": ("LATENT", inputs["latent"]),
        }
        size = (360, 262) if kind == "KSampler" else (360, 334)
        return self.add(kind, at, size, typed, {"LATENT": "LATENT"}, widgets, title), 0

    def experts(self, models: tuple[Source, Source], given: dict[str, Source], steps: int, cfg: float) -> Source:
        """Two KSamplerAdvanced, half of the steps each."""
        half = steps // 2
        first = ["enable", 42, "randomize", steps, cfg, "euler", "simple", 0, half, "enable"]
        second = ["disable", 0, "fixed", steps, cfg, "euler", "simple", half, 10000, "disable"]
        inputs = {**given, "model": models[0]}
        noisy = self.sampler("KSamplerAdvanced", (1340, 720), inputs, first, "High noise: the first half")
        inputs = {**given, "model": models[1], "latent": noisy}
        done = self.sampler("KSamplerAdvanced", (1740, 720), inputs, second, "Low noise: the second half")
        self.group("Sampling", noisy[0], done[0])
        return done

    def video(self, samples: Source, vae: Source, fps: float, x: int, model: Source) -> None:
        """Decode, save, and say what the workers do."""
        inputs = {"samples": ("LATENT", samples), "vae": ("VAE", vae)}
        decode = self.add("VAEDecode", (x, 720), (220, 50), inputs, {"IMAGE": "IMAGE"})
        inputs = {"images": ("IMAGE", (decode, 0)), "audio": ("AUDIO", None)}
        create = self.add("CreateVideo", (x + 260, 720), (270, 80), inputs, {"VIDEO": "VIDEO"}, [fps])
        widgets = ["video/WanParallel", "auto", "auto"]
        save = self.add("SaveVideo", (x, 860), (530, 400), {"video": ("VIDEO", (create, 0))}, {}, widgets)
        self.group("Video", decode, create, save)
        inputs = {"model": ("MODEL", model), "after": ("*", samples)}
        status = self.add("XDitUSPStatus", (1780, 0), (490, 60), inputs, {"status": "STRING"})
        inputs, title = {"source": ("*", (status, 0))}, "What the workers do"
        shown = self.add("PreviewAny", (1780, 120), (490, 440), inputs, {}, [], title)
        self.group("Status", status, shown, color="#444")


def t2v_a14b() -> Example:
    example = Example("wan22_a14b_t2v_example")
    high, low = (f"wan2.2_t2v_{noise}_noise_14B_fp8_scaled.safetensors" for noise in ("high", "low"))
    example.note(
        _read_me(
            "Wan 2.2 A14B text to video: 20 steps, the first ten by the high-noise model, the others by the low-noise "
            "one. Both stay on the GPUs while they fit, so that changing over costs nothing.",
            {"diffusion_models": (high, low), "text_encoders": (TEXT_ENCODER,), "vae": (VAE,)},
            f"{WAN22} (text encoder: {WAN21})",
            "cfg is above 1, so each step has two branches: with 4 GPUs or more, data_parallel_size 2 puts them on two "
            "halves of the GPUs, which then talk less.",
        )
    )
    config = example.config(use_fp16=False)
    loaded = [
        example.model(config, row, file, WAN22, "bf16", title)
        for row, (file, title) in enumerate(((high, "High-noise model"), (low, "Low-noise model")))
    ]
    models = tuple(example.shift(model, row, 8.0) for row, model in enumerate(loaded))
    example.models_group()
    positive, negative = example.texts(
        "A street musician plays the guitar in an old subway station, commuters pass by, dim warm light, grainy film"
    )
    vae = example.vae(VAE, WAN22)
    size = [832, 480, 81, 1]
    latent = example.add(
        "EmptyHunyuanLatentVideo",
        (900, 720),
        (400, 130),
        outputs={"LATENT": "LATENT"},
        widgets=size,
        title="Size and length",
    )
    given = {"positive": positive, "negative": negative, "latent": (latent, 0)}
    example.video(example.experts(models, given, 20, 3.5), vae, 16.0, 2140, models[1])
    return example


def i2v_a14b() -> Example:
    example = Example("wan22_a14b_i2v_4steps_example")
    high, low = (f"wan2.2_i2v_{noise}_noise_14B_fp8_scaled.safetensors" for noise in ("high", "low"))
    fast = [f"wan2.2_i2v_lightx2v_4steps_lora_v1_{noise}_noise.safetensors" for noise in ("high", "low")]
    example.note(
        _read_me(
            "Wan 2.2 A14B image to video in 4 steps, with lightx2v's LoRA for each of the two models.",
            {"diffusion_models": (high, low), "loras": fast, "text_encoders": (TEXT_ENCODER,), "vae": (VAE,)},
            f"{WAN22} (text encoder: {WAN21})",
            "cfg is 1 with these LoRAs: a step has one branch, which all GPUs share. They are merged with the first "
            "step; changing them reads no model file again.",
        )
    )
    config = example.config(use_fp16=False)
    loaded = [
        example.model(config, row, file, WAN22, "bf16", title)
        for row, (file, title) in enumerate(((high, "High-noise model"), (low, "Low-noise model")))
    ]
    merged = [example.lora(model, row, file) for row, (model, file) in enumerate(zip(loaded, fast, strict=True))]
    models = tuple(example.shift(model, row, 5.0) for row, model in enumerate(merged))
    example.models_group()
    positive, negative = example.texts("The camera moves slowly around the subject, wind in the hair, soft daylight")
    vae = example.vae(VAE, WAN22)
    image = example.image((0, 1220), "Start image")
    inputs = {"positive": ("CONDITIONING", positive), "negative": ("CONDITIONING", negative), "vae": ("VAE", vae)}
    inputs |= {"clip_vision_output": ("CLIP_VISION_OUTPUT", None), "start_image": ("IMAGE", (image, 0))}
    outputs = {"positive": "CONDITIONING", "negative": "CONDITIONING", "latent": "LATENT"}
    start = example.add("WanImageToVideo", (900, 720), (400, 210), inputs, outputs, [640, 640, 81, 1])
    example.group("Image", image)
    given = {name: (start, slot) for slot, name in enumerate(outputs)}
    example.video(example.experts(models, given, 4, 1.0), vae, 16.0, 2140, models[1])
    return example


def ti2v_5b() -> Example:
    example = Example("wan22_5b_i2v_example")
    file = "wan2.2_ti2v_5B_fp16.safetensors"
    example.note(
        _read_me(
            "Wan 2.2 5B image to video at 720p, 24 frames a second. Without the start image (disconnect it) the same "
            "graph makes a video from the text alone.",
            {"diffusion_models": (file,), "text_encoders": (TEXT_ENCODER,), "vae": (VAE_22,)},
            f"{WAN22} (text encoder: {WAN21})",
            "The file is fp16, and so are weights and activations here.",
        )
    )
    config = example.config(use_fp16=True)
    model = example.shift(example.model(config, 0, file, WAN22, "fp16"), 0, 8.0)
    example.models_group()
    positive, negative = example.texts("The subject turns towards the camera and smiles, hand-held, evening light")
    vae = example.vae(VAE_22, WAN22)
    image = example.image((0, 1220), "Start image")
    inputs = {"vae": ("VAE", vae), "start_image": ("IMAGE", (image, 0))}
    latent = example.add(
        "Wan22ImageToVideoLatent", (900, 720), (400, 150), inputs, {"LATENT": "LATENT"}, [1280, 704, 121, 1]
    )
    example.group("Image", image)
    given = {"model": model, "positive": positive, "negative": negative, "latent": (latent, 0)}
    done = example.sampler("KSampler", (1340, 720), given, [42, "randomize", 20, 5.0, "uni_pc", "simple", 1.0])
    example.group("Sampling", done[0])
    example.video(done, vae, 24.0, 1760, model)
    return example


def vace_control() -> Example:
    example = Example("wan21_vace_control_example")
    file = "wan2.1_vace_14B_fp16.safetensors"
    example.note(
        _read_me(
            "VACE: a control video (depth, pose or edges) says how things move, a reference image what they look like.",
            {"diffusion_models": (file,), "text_encoders": (TEXT_ENCODER,), "vae": (VAE,)},
            WAN21,
            "Choose your own control video and reference image. wan2.1_vace_1.3B_fp16.safetensors works too; so does a "
            "text-to-video file with a VACE module in XDit+USP VACE Module Select, connected to vace_model.",
        )
    )
    config = example.config(use_fp16=True)
    model = example.shift(example.model(config, 0, file, WAN21, "fp16"), 0, 8.0)
    example.models_group()
    positive, negative = example.texts("A dancer in a red dress on a stage, spotlights, dark background")
    vae = example.vae(VAE, WAN21)
    video = example.add(
        "LoadVideo",
        (0, 1220),
        (420, 320),
        outputs={"VIDEO": "VIDEO"},
        widgets=["control_video.mp4", "image"],
        title="Control video",
    )
    outputs = {"images": "IMAGE", "audio": "AUDIO", "fps": "FLOAT"}
    frames = example.add("GetVideoComponents", (460, 1220), (220, 70), {"video": ("VIDEO", (video, 0))}, outputs)
    image = example.image((720, 1220), "Reference image")
    example.group("Control", video, frames, image)
    inputs = {"positive": ("CONDITIONING", positive), "negative": ("CONDITIONING", negative), "vae": ("VAE", vae)}
    inputs |= {"control_video": ("IMAGE", (frames, 0)), "control_masks": ("MASK", None)}
    inputs |= {"reference_image": ("IMAGE", (image, 0))}
    outputs = {"positive": "CONDITIONING", "negative": "CONDITIONING", "latent": "LATENT", "trim_latent": "INT"}
    start = example.add("WanVaceToVideo", (900, 720), (400, 250), inputs, outputs, [832, 480, 81, 1, 1.0])
    given = {name: (start, slot) for slot, name in enumerate(outputs)}
    widgets = [42, "randomize", 30, 6.0, "uni_pc", "simple", 1.0]
    done = example.sampler("KSampler", (1340, 720), {**given, "model": model}, widgets)
    trim = example.add(
        "TrimVideoLatent",
        (1340, 1060),
        (360, 60),
        {"samples": ("LATENT", done)},
        {"LATENT": "LATENT"},
        [0],
        "Cut off the reference",
    )
    example.connect(trim, "trim_amount", "INT", (start, 3))
    trim["inputs"][-1]["widget"] = {"name": "trim_amount"}
    example.group("Sampling", done[0], trim)
    example.video((trim, 0), vae, 16.0, 1760, model)
    return example


def _read_me(what: str, files: dict[str, Any], where: str, hint: str) -> str:
    lines = [f"{folder}/{name}" for folder, names in files.items() for name in names]
    return "\n\n".join(
        (
            what,
            "1. num_gpus: set it to the GPUs you have.",
            "2. Files, in ComfyUI/models:\n" + "\n".join(lines) + f"\nfrom huggingface.co/{where}.",
            "3. Queue. The workers start and load the models with the first step, and stay for the next prompts.",
            hint,
            "Everything but the two XDit+USP nodes is stock ComfyUI. More: XDIT_USP_README.md in the pack's folder.",
        )
    )


EXAMPLES = (t2v_a14b, i2v_a14b, ti2v_5b, vace_control)


def draw(example: Workflow, path: Path) -> None:
    """A small picture of the graph."""
    from PIL import Image, ImageDraw

    right = max(node["pos"][0] + node["size"][0] for node in example.nodes) + 60
    bottom = max(node["pos"][1] + node["size"][1] for node in example.nodes) + 60
    scale, left, top = 640 / (right + 60), 60, 120
    picture = Image.new("RGB", (640, int((bottom + top) * scale)), "#202020")
    pen, at = ImageDraw.Draw(picture), {node["id"]: node for node in example.nodes}

    def box(x: float, y: float, width: float, height: float) -> list[float]:
        return [(x + left) * scale, (y + top) * scale, (x + left + width) * scale, (y + top + height) * scale]

    for group in example.groups:
        pen.rounded_rectangle(box(*group["bounding"]), 4, fill="#2a3138", outline=group["color"])
        x, y, *_ = box(*group["bounding"])
        pen.text((x + 4, y + 1), group["title"], fill="#cccccc")
    for _, source, _, target, *_ in example.links:
        one, other = at[source], at[target]
        begin = box(one["pos"][0] + one["size"][0], one["pos"][1] + 20, 0, 0)[:2]
        pen.line([*begin, *box(*other["pos"], 0, 40)[:2]], fill="#7aa6c2", width=1)
    for node in example.nodes:
        ours = node["type"].startswith("XDitUSP")
        fill = "#274a2c" if ours else "#3a3a3a"
        pen.rounded_rectangle(box(*node["pos"], *node["size"]), 3, fill=fill, outline="#666")
        x, y, *_ = box(*node["pos"], 0, 0)
        pen.text((x + 3, y + 1), node.get("title", node["type"])[: int(node["size"][0] * scale / 6)], fill="#ffffff")
    picture.save(path, quality=85)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--thumbnails", action="store_true", help="draw the .jpg files too")
    options = parser.parse_args()
    for make in EXAMPLES:
        example = make()
        path = FOLDER / f"{example.name}.json"
        path.write_text(example.json(), encoding="utf-8")
        if options.thumbnails:
            draw(example, path.with_suffix(".jpg"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
