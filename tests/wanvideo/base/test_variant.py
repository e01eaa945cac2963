"""A variant is one class: whatever asks about variants finds what a new one says, without being changed."""

from __future__ import annotations

import pickle
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from testkit import tiny
from wan_parallel.distributed.parallel.pipeline import Stage
from wan_parallel.distributed.parallel.tensor import TensorShard, split_of
from wan_parallel.distributed.plan.placement import activation_bytes, demand_of
from wan_parallel.nodes.common.refusals import WrongVariant, refuse_inputs
from wan_parallel.nodes.model.conditioning_inputs import check_start_image, from_comfyui, latent_node
from wan_parallel.wanvideo.base import variant as variants
from wan_parallel.wanvideo.base.conditioning import NOTHING, Conditioning, check
from wan_parallel.wanvideo.base.config import WanConfig
from wan_parallel.wanvideo.base.grid import Grid, Part, patchify
from wan_parallel.wanvideo.base.shapes import Shapes, linear, patch_embedding
from wan_parallel.wanvideo.base.variant import (
    COLUMNS,
    ROWS,
    Input,
    Key,
    SideAttention,
    TensorShapes,
    Variant,
    keys,
    registered,
)
from wan_parallel.wanvideo.checkpoint.header import read_header
from wan_parallel.wanvideo.checkpoint.weight_source import is_quantized_at_load
from wan_parallel.wanvideo.model.layers import BlockInputs, Linear, PatchEmbedding
from wan_parallel.wanvideo.model.model import Sides, WanModel, model_class
from wan_parallel.wanvideo.variants.fun_camera import FunCamera
from wan_parallel.wanvideo.variants.vace import Vace

CARRIED = {
    "clip_fea": ("a CLIP vision embedding of a start image", "WanImageToVideo"),
    "reference_latent": ("a reference latent", "Wan22FunControlToVideo"),
    "vace_context": ("a VACE control video", "WanVaceToVideo"),
    "vace_strength": ("the strength of a VACE control video", "WanVaceToVideo"),
    "camera_conditions": ("a camera path", "WanCameraImageToVideo"),
    "face_pixel_values": ("a face video", "WanAnimateToVideo"),
    "control_video": ("a control video", "WanSoundImageToVideo"),
    "reference_motion": ("the video so far", "WanSoundImageToVideo"),
    "context_latents": ("source or reference videos", "BerniniConditioning"),
    "audio_embed": ("an audio embedding", "WanHuMoImageToVideo, WanDancerVideo or WanSoundImageToVideo"),
    "pose_latents": ("a pose video", "WanSCAILToVideo or WanAnimateToVideo"),
    "clip_fea_ref": ("a CLIP vision embedding of a reference image", "WanDancerVideo"),
    "fps": ("a frame rate", "WanDancerVideo"),
    "audio_inject_scale": ("a strength of music", "WanDancerVideo"),
    "sam_latents": ("masks of the pose video", "WanSCAILToVideo"),
    "ref_mask_latents": ("masks of the reference images", "WanSCAILToVideo"),
}
KINDS = ["t2v", "i2v", "vace", "camera", "camera_2.2", "humo", "scail", "scail2", "wandancer", "s2v", "animate"]
ROOT = Path(variants.__file__).parents[2]


@dataclass(frozen=True)
class _Depth:
    """Fields of the toy variant, which is defined in a fixture so that no other test meets it."""

    channels: int


@pytest.fixture
def depth_class(monkeypatch: pytest.MonkeyPatch) -> type[Variant]:
    """A toy: a depth video that is added to the tokens, and again behind every second block."""
    registered()
    monkeypatch.setattr(variants, "_classes", list(variants._classes))

    class DepthModel(WanModel):
        def __init__(self, config: WanConfig, *args: Any, **options: Any):
            super().__init__(config, *args, **options)
            self.depth_embedding = PatchEmbedding(config[Depth].channels, config.dim)
            self.depth_again = torch.nn.ModuleList(
                Linear(config.dim, config.dim) for _ in range(config.num_layers // 2)
            )

        def embed_video(
            self, tokens: torch.Tensor, grid: Grid, video: Part, conditioning: Conditioning
        ) -> torch.Tensor:
            x = super().embed_video(tokens, grid, video, conditioning)
            if conditioning.depth is not None:
                x += self.depth_embedding(patchify(conditioning.depth)[:, video])
            return x

        def add_sides(
            self, x: torch.Tensor, sides: Sides, block: int, inputs: BlockInputs, conditioning: Conditioning
        ) -> None:
            super().add_sides(x, sides, block, inputs, conditioning)
            if conditioning.depth is not None and block % 2:
                x += self.depth_again[block // 2](x)

    @dataclass(frozen=True)
    class Depth(_Depth, Variant):
        name = "Depth"
        comfyui_names = ("depth",)
        node = "WanDepthToVideo"
        inputs = (
            Input(
                "depth",
                lambda own, asked: (asked.batch, own.channels, asked.frames, asked.height, asked.width),
                Key("depth_video", "a depth video", "WanDepthToVideo"),
            ),
        )
        start_image = False
        splits = ((r"depth_again\.\d+\.weight", COLUMNS), (r"depth_other\.weight", ROWS))
        rounded = frozenset({"depth_again"})
        first_stage = frozenset({"depth_embedding"})
        why_exact = "a depth video is not cut"

        @classmethod
        def read(cls, tensors: TensorShapes) -> Variant | None:
            channels = tensors.size("depth_embedding.weight", 1)
            return cls(channels) if channels else None

        def shapes(self, config: WanConfig) -> Shapes:
            shapes = patch_embedding("depth_embedding", self.channels, config.dim)
            for i in range(config.num_layers // 2):
                shapes |= linear(f"depth_again.{i}", config.dim, config.dim)
            return shapes

        def layers(self) -> type[WanModel]:
            return DepthModel

        def divides(self, config: WanConfig) -> bool:
            return config.num_layers % 2 == 0

        def block_number(self, config: WanConfig, name: str) -> int | None:
            part = name.split(".")
            return 2 * int(part[1]) + 1 if part[0] == "depth_again" else None

        def side_attention(self, config: WanConfig) -> SideAttention:
            return SideAttention(0.5, 1, config.dim)

        def token_bytes(self, contexts: int) -> int:
            return 4

    return Depth


@pytest.fixture
def config(depth_class) -> WanConfig:
    return tiny.TINY.having(depth_class(3), num_layers=4)


def test_a_new_variant_is_read_from_a_file_with_its_tensors(config, tmp_path):
    path = tmp_path / "depth.safetensors"
    note = {"config": '{"transformer": {"model_type": "depth"}}'}
    header = read_header(tiny.write_layout(path, tiny.layout(config), note))
    assert header.config == config and header.config.variant == "Depth"
    odd = replace(config, num_layers=3)
    with pytest.raises(ValueError, match="is an unknown Wan variant"):
        read_header(tiny.write_layout(path, tiny.layout(odd)))


def test_its_input_is_checked_translated_and_refused_elsewhere(config):
    x = tiny.inputs(config).x
    depth = torch.randn(1, 3, *x.shape[2:])
    assert from_comfyui(config, {}, {"depth_video": depth}).depth is depth
    check(config, x, Conditioning(depth=depth))
    with pytest.raises(ValueError, match=r"depth has shape \(1, 2, 3, 6, 8\).* needs \[1, 3, 3, 6, 8\]"):
        check(config, x, Conditioning(depth=depth[:, :2]))
    with pytest.raises(ValueError, match="has the input depth, which this text-to-video model does not take"):
        check(tiny.TINY, x, Conditioning(depth=depth))
    with pytest.raises(WrongVariant, match=r"a depth video \(depth_video\).* takes it, as WanDepthToVideo needs"):
        refuse_inputs({"depth_video": depth}, "text-to-video")
    assert latent_node(config) == "WanDepthToVideo"
    with pytest.raises(WrongVariant, match="start image"):
        check_start_image(replace(config, in_dim=20), object())


def test_its_tensors_are_divided_and_counted_as_it_says(config):
    assert (split_of("depth_again.0.weight"), split_of("depth_other.weight")) == (COLUMNS, ROWS)
    assert TensorShard(2).held_shape("depth_again.0.weight", (256, 256)) == (256, 128)
    first, last = Stage.of(0, 2), Stage.of(1, 2)
    assert first.holds("depth_embedding.weight", config) and not last.holds("depth_embedding.weight", config)
    assert first.holds("depth_again.0.weight", config) and not first.holds("depth_again.1.weight", config)
    demand = demand_of({"depth_again.1.weight": 256, "blocks.3.ffn.0.weight": 512, "head.weight": 1}, config, 0)
    assert (demand.fixed, demand.sizes) == (1, (768,))
    more = activation_bytes(config, 10, 1, 2, 0) - activation_bytes(replace(config, additions=()), 10, 1, 2, 0)
    assert more == 10 * config.dim * 4
    fp8 = (is_quantized_at_load(f"{name}.weight", 2, torch.float8_e4m3fn) for name in ("depth_again.0", "depth_b"))
    assert tuple(fp8) == (True, False)
    assert config.side_attention == SideAttention(0.5, 1, config.dim) and config.why_exact == "a depth video is not cut"


@pytest.mark.parametrize("beside", [(), (FunCamera(24),), (Vace(2, 96),)], ids=["alone", "with a camera", "with VACE"])
def test_its_layers_run_alone_and_beside_those_of_others(config, tmp_path, beside):
    both = config.having(*beside)
    x, timestep, context = tiny.inputs(both)
    model = WanModel.from_checkpoint(tiny.write_checkpoint(tmp_path / "model.safetensors", both))
    assert type(model) is model_class(both)
    others = tiny.conditioning(both, x)
    depth = torch.randn(1, 3, *x.shape[2:])
    check(both, x, others.having(depth=depth))
    with torch.inference_mode():
        results = [model(x, timestep, context, given) for given in (others.having(depth=depth), others)]
        if beside:
            results.append(model(x, timestep, context, NOTHING.having(depth=depth)))
    for i, result in enumerate(results):
        assert all(tiny.relative_error(result, other) > 1e-3 for other in results[:i])


def test_what_refusals_say_is_joined_of_all_variants():
    said = {name: (key.what, key.node) for name, key in keys().items() if key.what}
    assert said == CARRIED


def test_comfyui_names_of_all_variants_are_known():
    assert sorted(name for cls in registered() for name in cls.comfyui_names) == sorted(KINDS)


@pytest.mark.parametrize("name", tiny.VARIANTS)
def test_a_configuration_is_the_same_in_another_process(name):
    config = tiny.VARIANTS[name]
    assert config.variants and pickle.loads(pickle.dumps(config)) == config


def test_an_input_that_no_variant_has_is_refused():
    with pytest.raises(TypeError, match="no Wan variant has an input smell"):
        Conditioning(smell=torch.zeros(1))
    with pytest.raises(AttributeError):
        _ = NOTHING.smell


def test_the_tensors_of_a_variant_are_named_in_its_module_alone():
    """Beside the readers of files that hold the layers alone, the names that diffusers has for tensors, and the
    attributes of ComfyUI's class."""
    plain = {name.partition(".")[0] for name in tiny.FIRST_LAST.shapes()}
    parts = {name.partition(".")[0] for config in tiny.VARIANTS.values() for name in config.shapes()} - plain
    word = re.compile(rf"\b({'|'.join(sorted(parts))})\b")
    names = ("header", "vace_module", "infinitetalk_module", "diffusers_names")
    readers = {"nodes/model/remote_model.py", *(f"wanvideo/checkpoint/{name}.py" for name in names)}
    files = [path for folder in ("wanvideo", "distributed", "nodes") for path in (ROOT / folder).rglob("*.py")]
    naming = {path for path in files if word.search(path.read_text())}
    elsewhere = {str(path.relative_to(ROOT)) for path in naming if path.parent.name != "variants"}
    assert naming and elsewhere <= readers
