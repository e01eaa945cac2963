"""The example workflows open in ComfyUI without a missing link, slot or widget."""

from __future__ import annotations

import json
from dataclasses import fields, replace
from pathlib import Path

import pytest
from wan_parallel.nodes.distrifusion_settings import DistriFusionConfig
from wan_parallel.nodes.settings import ATTENTION_MODES, USPConfig

WORKFLOWS = sorted((Path(__file__).parents[1] / "example_workflows").glob("*.json"))

# Counted in ComfyUI 0.3.64; what later versions add stands at the end and takes its default (seen in 0.30.0).
STOCK_WIDGETS = {
    "CLIPLoader": 3,
    "CLIPTextEncode": 1,
    "CreateVideo": 1,
    "EmptyHunyuanLatentVideo": 4,
    "KSampler": 7,  # with control_after_generate, which the browser adds behind the seed
    "ModelSamplingSD3": 1,
    "Note": 1,
    "PreviewAny": 0,  # the browser adds the text
    "PreviewImage": 0,
    "SaveVideo": 3,
    "VAEDecode": 0,
    "VAELoader": 1,
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
}
TRAILS = (
    ["KSampler", "ModelSamplingSD3", "XDitUSPWanVideoModelLoader", "XDitUSPConfig"],
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
    sampler = next(node for node in nodes.values() if node["type"] in ("KSampler", "OfficialDistriFusionSampler"))
    trail = [sampler["type"]]
    while (node := sources.get((sampler["id"], 0))) is not None:
        trail.append(node["type"])
        sampler = node
    assert trail in TRAILS
