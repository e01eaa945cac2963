"""InfiniteTalk: tokens that hear the speech of their frame, and who of two speakers they belong to."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from testkit import infinitetalk_files, tiny
from wan_parallel.distributed.approximate.schedule import FILL, STALE
from wan_parallel.distributed.parallel.model_division import most_held
from wan_parallel.distributed.plan.degrees import ParallelPlan, PatchSplit
from wan_parallel.distributed.plan.placement import PlacementError, needed_bytes
from wan_parallel.distributed.planner.search import PlanRequest, Room, choose, placed
from wan_parallel.distributed.protocol.machine import Machine
from wan_parallel.distributed.protocol.requests import Displaced
from wan_parallel.distributed.protocol.specs import ModelSpec, PoolSettings
from wan_parallel.distributed.weights.lora_transfer import LoraSet
from wan_parallel.nodes.common.refusals import NotOnWorkers, refuse_transformer_options
from wan_parallel.nodes.model.infinitetalk_patch import (
    file_of,
    has_two_speakers,
    infinitetalk_inputs,
    loaded_elsewhere,
    without_infinitetalk,
)
from wan_parallel.wanvideo.base.conditioning import NOTHING, check
from wan_parallel.wanvideo.base.config import PRESETS
from wan_parallel.wanvideo.base.grid import Grid
from wan_parallel.wanvideo.base.lora import Difference, LowRank, merge
from wan_parallel.wanvideo.base.options import Options
from wan_parallel.wanvideo.base.tensor_info import CheckpointError
from wan_parallel.wanvideo.checkpoint.vace_module import read_model
from wan_parallel.wanvideo.model.layers import OverSequence
from wan_parallel.wanvideo.model.model import WanModel
from wan_parallel.wanvideo.variants.infinitetalk import InfiniteTalk, Speech, speaker_positions

CONFIG = tiny.INFINITETALK
BASE = replace(CONFIG, additions=())


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> tuple[str, str]:
    """An image-to-video model, and the layers for it, with a block more than it has."""
    folder, weights = tmp_path_factory.mktemp("talk"), tiny.random_weights(CONFIG)
    base = {name: weight for name, weight in weights.items() if not infinitetalk_files.is_infinitetalk(name)}
    module = infinitetalk_files.write_patch(folder / "talk.safetensors", CONFIG, dtype=torch.float32, blocks=3)
    return tiny.write_weights(folder / "i2v.safetensors", base), module


@pytest.fixture(scope="module")
def model(files) -> WanModel:
    """The model that both are, in this process."""
    return WanModel.from_checkpoint(files[0], module=files[1])


def given(speakers: int = 2, batch: int = 1, size: tuple[int, int, int] = (3, 6, 8)) -> tuple:
    """Inputs with the masks of so many speakers; the third is of nobody."""
    inputs = tiny.inputs(CONFIG, size, batch)
    conditioning = replace(tiny.conditioning(CONFIG, inputs.x), options=Options(audio_scale=0.7))
    masks = torch.cat([conditioning.speakers, 1 - conditioning.speakers[:, :1]], dim=1)
    return *inputs, replace(conditioning, speakers=masks[:, :speakers] if speakers > 1 else None)


def spec_of(files: tuple[str, str], **options) -> ModelSpec:
    return ModelSpec(files[0], "fp32", "fp32", module=files[1], **options)


# Numbers of ComfyUI 0.30.0's classes for the same weights and inputs: every 197th of the result.
COMFYUI = {
    1: [
        -1.638972,
        2.273716,
        1.583707,
        1.556533,
        2.16724,
        0.30737,
        -0.17918,
        0.197367,
        1.94957,
        0.76209,
        0.33713,
        0.344829,
    ],
    2: [
        -1.542923,
        2.458872,
        1.400675,
        1.621701,
        1.951034,
        0.350152,
        -0.153132,
        0.332299,
        1.982014,
        0.705375,
        0.233737,
        0.183479,
    ],
    3: [
        -1.575295,
        2.449716,
        1.397479,
        1.610562,
        1.958475,
        0.348967,
        -0.157843,
        0.463258,
        2.009342,
        0.745883,
        0.233146,
        0.175737,
    ],
}


@pytest.mark.parametrize("speakers", COMFYUI)
def test_it_is_that_of_comfyui(model, speakers):
    out = model(*given(speakers)).flatten()[::197]
    assert tiny.relative_error(out, torch.tensor(COMFYUI[speakers])) <= 1e-5


def test_what_hears_nothing_is_the_model_alone(files, model):
    *inputs, conditioning = given()
    silent = replace(conditioning, audio=None, speakers=None, options=Options())
    alone = WanModel.from_checkpoint(files[0])
    assert torch.equal(model(*inputs, silent), alone(*inputs, silent))
    assert tiny.relative_error(model(*inputs, conditioning), alone(*inputs, silent)) > 0.1


DIVIDED = {"tensor_parallel": 2, "pipeline_parallel": 2}
PLANS = [
    *((1, {}), (2, {}), (2, {"data_parallel": 2})),
    *((4, {}), (4, {"ulysses_degree": 2, "ring_degree": 2}), (4, {"tensor_parallel": 2}), (4, DIVIDED)),
]


@pytest.mark.parametrize("workers, plan", PLANS, ids=str)
def test_every_split_gives_the_result_of_one_model(pool_of, files, model, workers, plan):
    pool, spec = pool_of(workers, **plan), spec_of(files, slice_tokens=7)
    for speakers, batch in ((1, 2), (3, 2), (2, 1)):
        inputs = given(speakers, batch, size=(3, 6, 10))
        out = pool.forward(spec, *inputs[:3], conditioning=inputs[3])
        assert tiny.relative_error(out, model(*inputs)) <= 2e-6
    pool.unload()


def test_more_workers_than_tokens(pool_of, files, model):
    pool, inputs = pool_of(4), given(size=(1, 2, 2))
    out = pool.forward(spec_of(files), *inputs[:3], conditioning=inputs[3])
    assert tiny.relative_error(out, model(*inputs)) <= 2e-6
    pool.unload()


@pytest.mark.parametrize("options", [{"shard_weights": "on", "offload": "off"}, {"offload": "on"}], ids=str)
def test_layers_are_shared_and_step_out_as_the_blocks_do(pool_of, files, model, options):
    pool, inputs = pool_of(2), given()
    out = pool.forward(spec_of(files, **options), *inputs[:3], conditioning=inputs[3])
    assert tiny.relative_error(out, model(*inputs)) <= 2e-6
    pool.unload()


def test_a_lora_of_the_layers_reaches_ranks_that_have_a_part(pool_of, files):
    pool, inputs, dim = pool_of(4, tensor_parallel=2), given(3), CONFIG.dim
    layer = "blocks.1.audio_cross_attn"
    changes = {
        f"{layer}.{name}.weight": [LowRank(torch.randn(rows, 4), torch.randn(4, columns), 0.02)]
        for name, rows, columns in (("q_linear", dim, dim), ("kv_linear", 2 * dim, 48), ("proj", dim, dim))
    }
    changes[f"{layer}.kv_linear.bias"] = [Difference(torch.randn(2 * dim), 0.3)]
    changes[f"{layer}.proj.bias"] = [Difference(torch.randn(dim), 0.3)]
    out = pool.forward(spec_of(files), *inputs[:3], LoraSet("talk-lora", lambda: changes), conditioning=inputs[3])
    plain = pool.forward(spec_of(files), *inputs[:3], conditioning=inputs[3])
    merged = WanModel.from_checkpoint(files[0], module=files[1])
    assert tiny.relative_error(plain, merged(*inputs)) <= 2e-6
    weights = dict(merged.weights())
    for name, patches in changes.items():
        merged.set_weight(name, merge(weights[name], patches))
    assert tiny.relative_error(out, merged(*inputs)) <= 2e-6 < 1e-3 < tiny.relative_error(out, plain)
    pool.unload()


GIB = 2**30
P480 = 21 * 30 * 52
LAYERS = 4.5  # GiB of the layers of 14B


def test_layers_of_14b_count_where_a_plan_is_chosen(tmp_path):
    config, audio = replace(PRESETS["14b"], in_dim=36, image_dim=1280), InfiniteTalk(768)
    path = str(tiny.write_layout(tmp_path / "i2v.safetensors", tiny.layout(config, "F16")))
    module = layout(tmp_path / "talk.safetensors", config.having(audio))
    choices, held = [], []
    for beside in ("", module):
        header = read_model(path, beside)
        spec = ModelSpec(path, slice_tokens=8192, module=beside)
        asked = PlanRequest(ParallelPlan(4), PoolSettings(ParallelPlan(4)), header.config, spec, P480, 2)
        with pytest.raises(PlacementError, match="GiB are missing") as refusal:
            placed(replace(asked, spec=replace(spec, offload="off")), ParallelPlan(4), Room((8 * GIB,) * 4))
        held.append((most_held(header.config, spec, ParallelPlan(4, tensor_parallel=4)), missing(str(refusal.value))))
        choices.append(choose(asked, Machine(), Room((12 * GIB,) * 4))[0])
    without, choice = choices
    assert choice.demand.whole - without.demand.whole == pytest.approx(LAYERS * GIB, rel=0.01)
    assert (choice.placement.share, choice.demand.fixed) == (4, without.demand.fixed)
    assert needed_bytes(choice.demand, 4, choice.placement.resident) <= 12 * GIB
    assert choice.placement.resident < without.placement.resident
    assert 1.05 < choice.seconds / without.seconds < 1.15
    (tensor, lack), (tensor_with, lack_with) = held
    assert tensor_with - tensor == pytest.approx(LAYERS * GIB / 4, rel=0.01)
    assert lack_with - lack == pytest.approx(LAYERS * (1 / 4 + 2 / 40), rel=0.02)  # a share, and two blocks in passing


def missing(refusal: str) -> float:
    return float(re.search(r"([\d.]+) GiB are missing", refusal)[1])


@pytest.mark.parametrize("weights, compute, most", [("bf16", "bf16", 0.03), ("fp8_e4m3fn", "fp32", 0.1)])
def test_fewer_bits_stay_close(pool_of, files, model, weights, compute, most):
    inputs, pool = given(3), pool_of(2)
    out = pool.forward(ModelSpec(files[0], weights, compute, module=files[1]), *inputs[:3], conditioning=inputs[3])
    assert 1e-4 < tiny.relative_error(out, model(*inputs)) <= most
    pool.unload()


@pytest.mark.parametrize("speakers", [1, 2])
@pytest.mark.parametrize("mode", ["spatial", "temporal"])
def test_by_displaced_patches(pool_of, files, model, mode, speakers):
    """With one speaker a step with the inputs of the one before is the exact one; with two every step is exact."""
    inputs, other = given(speakers, size=(4, 8, 8)), given(speakers, size=(4, 8, 8))
    other[0].neg_()
    pool, spec = pool_of(2), spec_of(files)
    step = Displaced(FILL, f"{mode} {speakers}", ("a",), PatchSplit(mode, 16), manager="native")
    for kind, what in ((FILL, inputs), (STALE, inputs), (STALE, other)):
        part = replace(step, kind=kind)
        out = pool.forward(spec, *what[:3], conditioning=what[3], displaced=part)
        stale = what is other and speakers == 1
        assert (tiny.relative_error(out, model(*what)) <= 2e-6) != stale


# Who a token belongs to.


def test_a_token_has_a_place_on_the_part_of_the_speaker_it_looks_at():
    looks = torch.tensor([[[0.1, 0.3, 0.2], [0.5, 0.2, 0.1], [0.2, 0.1, 0.4], [0.3, 0.2, 0.1]]])
    places = speaker_positions(looks, None)
    assert tiny.relative_error(places, torch.tensor([[24.0, 4.0, 12.0, 2.0]])) <= 1e-6


def test_ranks_that_see_a_part_of_the_tokens_agree_on_the_places():
    looks = torch.rand(2, 9, 2, generator=torch.Generator().manual_seed(0))
    both = torch.stack([looks, -looks]).amax(dim=2)
    over = OverSequence(add=lambda x: x, largest=lambda x: torch.maximum(x, both))
    parts = [speaker_positions(looks[:, part], over) for part in (slice(0, 4), slice(4, 9), slice(9, 9))]
    assert torch.equal(torch.cat(parts, dim=1), speaker_positions(looks, None))


def test_the_keys_of_the_first_frame_come_from_the_ranks_that_have_them():
    k, grid, sums = torch.randn(1, 24, 2, 4), Grid(3, 2, 4), torch.zeros(1, 8, 2, 4)
    for part in (slice(0, 5), slice(5, 17), slice(17, 24)):
        speech = Speech(k, None, 1.0, grid, part, OverSequence(add=sums.add_, largest=lambda x: x))
        speech.first_keys(k[:, part])
    assert torch.equal(sums, k[:, :8])


# The file of the layers.


def test_headers_alone_tell_both(files):
    header = read_model(*files)
    assert header.config == CONFIG and header.config.variant == "image-to-video"
    assert header.tensors.keys() == CONFIG.shapes().keys()


def refusal(path: str, module: str) -> str:
    with pytest.raises(CheckpointError) as error:
        read_model(path, module)
    assert tiny.sentences(str(error.value)) == 2
    return str(error.value)


def layout(path: Path, config: tiny.WanConfig, without: str = "nothing") -> str:
    shapes = {"audio_proj.proj1.weight": (8, 64), **config[InfiniteTalk].shapes(config)}
    return str(tiny.write_layout(path, {k: ("F16", shape) for k, shape in shapes.items() if not k.startswith(without)}))


def test_layers_that_do_not_fit_are_refused(tmp_path, files):
    base, module = files[0], tmp_path / "talk.safetensors"
    assert "made for a model of width 2560, but" in refusal(base, layout(module, replace(CONFIG, dim=2560)))
    assert "8 tensors are missing" in refusal(base, layout(module, replace(CONFIG, num_layers=1)))
    assert "blocks.1.norm_x.bias" in refusal(base, layout(module, CONFIG, "blocks.1.norm_x"))
    vace = str(tiny.write_layout(tmp_path / "vace.safetensors", tiny.layout(tiny.VACE)))
    assert "is a VACE model, and" in refusal(vace, files[1])


# What ComfyUI's node leaves in a MODEL.


class MultiTalkCrossAttnPatch:
    """By the name of ComfyUI's class."""

    def __init__(self, model_patch: object = None, audio_scale: float = 0.5):
        self.model_patch, self.audio_scale = model_patch, audio_scale


class MultiTalkGetAttnMapPatch:
    """By the name of ComfyUI's class."""

    ref_target_masks = torch.tensor([[True, False], [False, True]])


def options(layers: int = 1, places: int = 1) -> dict:
    patches = {
        "attn2_patch": [MultiTalkCrossAttnPatch() for _ in range(layers)],
        "attn1_patch": [MultiTalkGetAttnMapPatch() for _ in range(places)],
    }
    return {"patches": patches, "audio_embeds": torch.ones(1, 3, 64, 48)}


def test_what_the_node_left_is_read():
    speech = infinitetalk_inputs(options())
    joined = speech.joined(NOTHING, 2)
    assert joined.audio.shape == (2, 3, 64, 48) and joined.options.audio_scale == 0.5
    assert torch.equal(joined.speakers[1], torch.eye(2))
    assert infinitetalk_inputs(options(places=0)).joined(NOTHING, 1).speakers is None
    assert infinitetalk_inputs({}) is None and has_two_speakers(options()) and not has_two_speakers(options(places=0))


def test_what_is_left_of_the_options_may_be_refused():
    refuse_transformer_options(without_infinitetalk(options()))
    more = options()
    more["patches"]["attn2_patch"].append(object())
    with pytest.raises(NotOnWorkers, match="attn2_patch"):
        refuse_transformer_options(without_infinitetalk(more))


def test_two_nodes_behind_one_another_are_refused():
    with pytest.raises(NotOnWorkers, match="Several WanInfiniteTalkToVideo") as error:
        infinitetalk_inputs(options(layers=2))
    assert tiny.sentences(str(error.value)) == 2


def test_comfyui_does_not_load_the_layers_for_itself():
    layers, other = object(), object()
    patched = {"patches": {"attn2_patch": [MultiTalkCrossAttnPatch(layers)]}}
    assert loaded_elsewhere(patched, [layers, other]) == [other]


def test_the_file_of_a_model_patch_is_the_one_with_its_numbers(tmp_path):
    modules = [torch.nn.Linear(3, 4) for _ in range(2)]
    paths = [
        tiny.write_weights(tmp_path / f"{i}.safetensors", {k: v.detach() for k, v in module.state_dict().items()})
        for i, module in enumerate(modules)
    ]
    (tmp_path / "broken.safetensors").write_bytes(b"12345678{")
    files = [str(tmp_path / "broken.safetensors"), *paths]
    patch = SimpleNamespace(model=modules[1], patches={})
    assert file_of(patch, files).path == paths[1]
    assert file_of(patch, iter(())).path == paths[1]  # known
    tiny.write_weights(tmp_path / "1.safetensors", {"weight": torch.zeros(4, 3), "bias": torch.zeros(40)})
    for changed in (patch, SimpleNamespace(model=modules[0], patches={"weight": ()})):
        with pytest.raises(NotOnWorkers, match="no safetensors file in models/model_patches") as error:
            file_of(changed, files)
        assert tiny.sentences(str(error.value)) == 2


# Wrong inputs.


@pytest.mark.parametrize(
    "change, text",
    [
        ({"audio": torch.zeros(1, 2, 6, 48)}, "needs [1, 3, any, 48]"),
        ({"speakers": torch.zeros(1, 2, 10)}, "needs [1, any, 12]"),
        ({"speakers": torch.zeros(1, 4, 12)}, "was given 4 masks"),
        ({"extra_frames": torch.zeros(1, 36, 2, 6, 8)}, "cannot be joined"),
    ],
)
def test_a_conditioning_that_does_not_fit_is_refused(change, text):
    x, _, _, conditioning = given()
    with pytest.raises(ValueError) as error:
        check(CONFIG, x, replace(conditioning, **change))
    assert text in str(error.value) and tiny.sentences(str(error.value)) == 2
    with pytest.raises(ValueError, match="does not take"):
        check(BASE, x, conditioning)
