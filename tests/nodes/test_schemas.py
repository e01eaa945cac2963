"""The inputs of every node: saved workflows keep the values of widgets by position, so their order must not change."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from dataclasses import fields

import pytest
import testkit
from testkit.shared.guides import rows
from wan_parallel.nodes.common.settings import USPConfig
from wan_parallel.nodes.distrifusion.distrifusion_settings import DistriFusionConfig

INPUTS = {  # what is new goes to the end of its node
    "XDitUSPConfig": (
        "num_gpus gpu_memory_fraction pipeline_parallel_size tensor_parallel_size data_parallel_size use_fp16 use_bf16 "
        "enable_activation_checkpointing enable_gradient_checkpointing max_batch_size max_sequence_length "
        "overlap_p2p_comm use_flash_attention use_sdpa ulysses_degree ring_degree device usp_backend pipeline_mode "
        "shard_weights offload parallel_plan gpu_shares gpus"
    ),
    "XDitUSPWanVideoModelLoader": "model base_precision xdit_usp_config attention_mode lora vace_model fp8_mode",
    "XDitUSPStatus": "model after",
    "OfficialDistriFusionModelLoader": (
        "model precision quantization num_gpus patch_size patch_overlap split_mode world_size rank attention_mode "
        "warmup_steps kv_buffers split_cfg manager gpu_memory_fraction device gpus"
    ),
    "OfficialDistriFusionSampler": (
        "model positive negative latent_image seed steps cfg sampler_name scheduler denoise sync_frequency"
    ),
    "OfficialDistriFusionStatus": "model after frame",
    "TinyWanTextEncode": "prompt",
    "WanVideoParallelVAEDecode": "samples vae precision workers",
    "WanVideoParallelVAEEncode": "pixels vae precision workers",
    "XDitUSPVACEModuleSelect": "vace_model",
    "XDitUSPSparseAttention": (
        "model method tau keep_percent start_percent end_percent dense_blocks min_tokens extra_tokens"
    ),
}
REPORT = """
import asyncio, json
from testkit.comfyui import stub
stub.install()
from wan_parallel.nodes.extension import WanParallelExtension
nodes = asyncio.run(WanParallelExtension().get_node_list())
schemas = {node.define_schema().node_id: list(map(vars, node.define_schema().inputs)) for node in nodes}
never_equal = [
    node.define_schema().node_id
    for node in nodes
    if "fingerprint_inputs" in vars(node) and (node.fingerprint_inputs(),) != (node.fingerprint_inputs(),)
]
print(json.dumps({"schemas": schemas, "never equal": never_equal}, default=str))
"""


@pytest.fixture(scope="module")
def reported() -> dict:
    """The words of `REPORT`, from a process of its own."""
    folder = testkit.ROOT / "tests" / "support"
    command = [sys.executable, "-c", REPORT]
    return json.loads(subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True).stdout)


@pytest.fixture
def schemas(reported) -> dict[str, list[dict]]:
    """The inputs of every node, by the id of the node, as its schema gives them to ComfyUI."""
    return reported["schemas"]


def test_every_node_has_its_inputs_in_the_order_of_saved_workflows(schemas):
    assert {node: " ".join(given["id"] for given in inputs) for node, inputs in schemas.items()} == INPUTS


def test_every_input_says_what_it_is(schemas):
    for node, inputs in schemas.items():
        assert all(given["tooltip"].endswith(".") for given in inputs), node


def test_the_guide_has_every_input_of_the_sparse_node_with_its_default(schemas):
    table = [row for row in rows("Sparse attention")[1:] if row[0].startswith("`")]
    shown = [
        pair
        for names, defaults, _ in table
        for pair in zip(names.replace("`", "").split(", "), defaults.split(", "), strict=True)
    ]
    assert shown == [(given["id"], str(given["default"])) for given in schemas["XDitUSPSparseAttention"][1:]]


def test_every_node_has_a_page_that_explains_its_inputs():
    for node, inputs in INPUTS.items():
        page = (testkit.ROOT / "web" / "docs" / f"{node}.md").read_text(encoding="utf-8")
        assert {*inputs.split()} <= {*re.findall(r"\w+", page.lower())}, node


@pytest.mark.parametrize(
    "node, settings", [("XDitUSPConfig", USPConfig), ("OfficialDistriFusionModelLoader", DistriFusionConfig)]
)
def test_widgets_begin_with_the_defaults_of_the_settings_they_become(schemas, node, settings):
    widgets = {given["id"]: given["default"] for given in schemas[node] if given["id"] != "model"}
    defaults = {field.name: field.default for field in fields(settings)}
    assert widgets == defaults and list(widgets) == list(defaults)


def test_the_status_nodes_alone_run_with_every_prompt(reported):
    """ComfyUI compares tuples with fingerprints in them, and a tuple takes one and the same NaN for equal."""
    assert reported["never equal"] == ["XDitUSPStatus", "OfficialDistriFusionStatus"]
