"""The example workflows open in ComfyUI without a missing link, slot or widget."""

from __future__ import annotations

import importlib.util
import json
import sys
from dataclasses import fields, replace
from pathlib import Path

import pytest
import testkit
from wan_parallel.nodes.common.settings import ATTENTION_MODES, USPConfig
from wan_parallel.nodes.distrifusion.distrifusion_settings import DistriFusionConfig

_SPEC = importlib.util.spec_from_file_location("example_workflows", testkit.ROOT / "tools" / "example_workflows.py")
example_workflows = importlib.util.module_from_spec(_SPEC)
sys.modules[_SPEC.name] = example_workflows  # dataclasses look there
_SPEC.loader.exec_module(example_workflows)

WORKFLOWS = sorted((testkit.ROOT / "example_workflows").glob("*.json"))

# Counted in ComfyUI 0.3.64; what later versions add stands at the end and takes its default (seen in 0.30.0).
STOCK_WIDGETS = {
    "CLIPLoader": 3,
    "CLIPTextEncode": 1,
    "CreateVideo": 1,
    "EmptyHunyuanLatentVideo": 4,
    "GetVideoComponents": 0,
    "KSampler": 7,  # with control_after_generate, which the browser adds behind the seed
    "KSamplerAdvanced": 10,
    "LoadImage": 2,  # with the upload button
    "LoadVideo": 2,
    "LoraLoaderModelOnly": 2,
    "ModelSamplingSD3": 1,
    "Note": 1,
    "PreviewAny": 0,  # the browser adds the text
    "PreviewImage": 0,
    "SaveVideo": 3,
    "VAEDecode": 0,
    "TrimVideoLatent": 1,
    "VAELoader": 1,
    "Wan22ImageToVideoLatent": 4,
    "WanImageToVideo": 4,
    "WanVaceToVideo": 5,
}
OUR_WIDGETS = {
    "XDitUSPConfig": len(fields(USPConfig)),
    "XDitUSPWanVideoModelLoader": 3,  # model, base_precision, attention_mode
    "XDitUSPStatus": 0,
    "OfficialDistriFusionModelLoader": 1 + len(fields(DistriFusionConfig)),
    "OfficialDistriFusionSampler": 8,  # as KSampler, and sync_frequency
    "OfficialDistriFusionStatus": 0,
    "TinyWanTextEncode": 1,
}
PRECISION = {
    "xdit_usp_example": "bf16",
    "tiny_wan_demo": "fp32",
    "official_distrifusion_example": "bf16",
    "tiny_distrifusion_demo": "fp32",
    "wan22_a14b_t2v_example": "bf16",
    "wan22_a14b_i2v_4steps_example": "bf16",
    "wan22_5b_i2v_example": "fp16",
    "wan21_vace_control_example": "fp16",
}
TRAILS = (
    ["KSampler", "ModelSamplingSD3", "XDitUSPWanVideoModelLoader", "XDitUSPConfig"],
    ["KSamplerAdvanced", "ModelSamplingSD3", "XDitUSPWanVideoModelLoader", "XDitUSPConfig"],
    ["KSamplerAdvanced", "ModelSamplingSD3", "LoraLoaderModelOnly", "XDitUSPWanVideoModelLoader", "XDitUSPConfig"],
    ["OfficialDistriFusionSampler", "ModelSamplingSD3", "OfficialDistriFusionModelLoader"],
)

pytestmark = pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)


def read(path: Path) -> tuple[dict[int, dict], list[list]]:
    workflow = json.loads(path.read_text(encoding="utf-8"))
    assert workflow["version"] == 0.4
    nodes = {node["id"]: node for node in workflow["nodes"]}
    assert len(nodes) == len(workflow["nodes"])
    assert max(nodes) <= workflow["last_node_id"]
    assert max(link[0] for link in workflow["links"]) <= workflow["last_link_id"]
    return nodes, workflow["links"]


def test_every_link_joins_slots_that_exist_and_know_it(path: Path) -> None:
    nodes, links = read(path)
    for number, source, output, target, slot, kind in links:
        leaving, entering = nodes[source]["outputs"][output], nodes[target]["inputs"][slot]
        assert number in leaving["links"]
        assert entering["link"] == number
        assert leaving["type"] == kind
        assert entering["type"] == "*" or set(entering["type"].split(",")) & set(kind.split(","))


def test_no_slot_names_a_link_that_is_not_there(path: Path) -> None:
    nodes, links = read(path)
    numbers = {link[0] for link in links}
    assert len(numbers) == len(links)
    for node in nodes.values():
        assert {slot["link"] for slot in node["inputs"] if slot["link"] is not None} <= numbers
        assert {number for slot in node["outputs"] for number in slot["links"] or ()} <= numbers


def test_required_inputs_are_connected(path: Path) -> None:
    nodes, _ = read(path)
    for node in nodes.values():
        optional = [slot["name"] for slot in node["inputs"] if slot.get("shape") == 7]
        open_slots = [slot["name"] for slot in node["inputs"] if slot["link"] is None]
        assert set(open_slots) <= set(optional), node["type"]


def test_every_node_has_all_its_widget_values(path: Path) -> None:
    nodes, _ = read(path)
    for node in nodes.values():
        assert len(node["widgets_values"]) == (STOCK_WIDGETS | OUR_WIDGETS)[node["type"]], node["type"]


def test_our_widget_values_are_ones_that_run(path: Path, tmp_path: Path) -> None:
    nodes, _ = read(path)
    values = {node["type"]: node["widgets_values"] for node in nodes.values()}
    if "XDitUSPConfig" in values:
        config = configured(USPConfig, values["XDitUSPConfig"])
        config.plan.validate()
        model, *loader = values["XDitUSPWanVideoModelLoader"]
    else:
        model, *widgets = values["OfficialDistriFusionModelLoader"]
        config, loader = configured(DistriFusionConfig, widgets), []
        replace(config, device="cpu").validate()
        assert values["OfficialDistriFusionSampler"][-1] in range(1, 11)
        assert config.attention_mode in ATTENTION_MODES
    assert model.endswith(".safetensors")
    assert set(loader[1:]) <= set(ATTENTION_MODES)
    (tmp_path / model).touch()
    assert config.model_spec(str(tmp_path / model), *loader).compute_dtype == PRECISION[path.stem]


def configured(kind: type, values: list) -> USPConfig | DistriFusionConfig:
    """The widgets' values in their order, each of the type that its field has."""
    for field, value in zip(fields(kind), values, strict=True):
        assert type(value) is type(field.default), field.name
    return kind(*values)


def test_it_has_a_thumbnail_for_the_template_browser(path: Path) -> None:
    thumbnail = path.with_suffix(".jpg")
    assert thumbnail.read_bytes().startswith(b"\xff\xd8") and thumbnail.stat().st_size < 100_000


def test_the_model_goes_through_our_loader_to_a_sampler(path: Path) -> None:
    nodes, links = read(path)
    sources = {(target, slot): nodes[source] for _, source, _, target, slot, _ in links}
    samplers = [node for node in nodes.values() if node["type"] in {trail[0] for trail in TRAILS}]
    assert samplers
    for node in samplers:
        trail = [node["type"]]
        while (node := sources.get((node["id"], 0))) is not None:
            trail.append(node["type"])
        assert trail in TRAILS


def test_groups_frame_nodes(path: Path) -> None:
    workflow = json.loads(path.read_text(encoding="utf-8"))
    for group in workflow["groups"]:
        x, y, width, height = group["bounding"]
        assert any(x < node["pos"][0] < x + width and y < node["pos"][1] < y + height for node in workflow["nodes"])


def test_nodes_do_not_cover_each_other(path: Path) -> None:
    nodes, _ = read(path)
    boxes = [(*node["pos"], *node["size"], node["type"]) for node in nodes.values()]
    for i, (x, y, width, height, kind) in enumerate(boxes):
        for left, top, wide, high, other in boxes[i + 1 :]:
            apart = x + width <= left or left + wide <= x or y + height <= top or top + high <= y
            assert apart, (kind, other)


def test_written_ones_are_what_their_tool_writes(path: Path) -> None:
    written = {make().name: make().json() for make in example_workflows.EXAMPLES}
    if path.stem in written:  # run tools/example_workflows.py again
        assert path.read_text(encoding="utf-8") == written[path.stem]
