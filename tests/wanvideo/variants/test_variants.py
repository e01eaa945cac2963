"""Variants of Wan: the function of diffusers' classes, on one device and shared by several workers."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file
from testkit import tiny
from torch.nn import functional as F
from wan_parallel.distributed.approximate.schedule import FILL, STALE
from wan_parallel.distributed.plan.degrees import PatchSplit
from wan_parallel.distributed.protocol.requests import Displaced
from wan_parallel.distributed.protocol.specs import ModelSpec
from wan_parallel.wanvideo.base.conditioning import Conditioning, check, extended
from wan_parallel.wanvideo.base.config import WanConfig
from wan_parallel.wanvideo.base.grid import grid_of, patchify
from wan_parallel.wanvideo.base.options import Options, RopeOptions
from wan_parallel.wanvideo.checkpoint.header import read_header
from wan_parallel.wanvideo.checkpoint.weight_source import open_weights
from wan_parallel.wanvideo.model.model import WanModel, model_class
from wan_parallel.wanvideo.variants.animate import Animate
from wan_parallel.wanvideo.variants.fun_camera import FunCamera
from wan_parallel.wanvideo.variants.fun_control import Reference
from wan_parallel.wanvideo.variants.humo import Humo
from wan_parallel.wanvideo.variants.s2v import S2V
from wan_parallel.wanvideo.variants.vace import Vace

SIZE = (3, 6, 8)
TEXT = 512  # diffusers' image-to-video model takes whatever is in front of the last 512 tokens for the image


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, str]:
    """A checkpoint of every variant."""
    folder = tmp_path_factory.mktemp("variants")
    return {
        name: tiny.write_checkpoint(folder / f"{name}.safetensors", config) for name, config in tiny.VARIANTS.items()
    }


@pytest.fixture(scope="module")
def single(models):
    """Gives the model of a variant in this process."""
    built: dict[str, WanModel] = {}

    def get(name: str) -> WanModel:
        if name not in built:
            built[name] = model_class(tiny.VARIANTS[name]).from_checkpoint(models[name])
        return built[name]

    return get


def given(config: WanConfig, batch: int = 1, size: tuple[int, int, int] = SIZE, **more) -> tuple:
    inputs = tiny.inputs(config, size, batch, text_tokens=TEXT)
    return (*inputs, tiny.conditioning(config, inputs.x, **more))


def spec_of(path: str, **options) -> ModelSpec:
    return ModelSpec(path, "fp32", "fp32", **options)


# What the header tells.


@pytest.mark.parametrize("name", tiny.VARIANTS)
@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
def test_a_header_tells_the_variant(tmp_path, name, prefix):
    config = tiny.VARIANTS[name]
    path = tiny.write_layout(tmp_path / "model.safetensors", tiny.layout(config, prefix=prefix))
    assert read_header(path).config == config


@pytest.mark.parametrize("name", tiny.VARIANTS)
def test_the_model_has_the_tensors_that_the_configuration_names(single, name):
    shapes = {key: tuple(weight.shape) for key, weight in single(name).state_dict().items()}
    assert shapes == tiny.VARIANTS[name].shapes()


BIG = WanConfig(dim=5120, ffn_dim=13824, num_heads=40, num_layers=40)
HUMO_AUDIO = Humo(features=8 * 5 * 1280, hidden=512, width=1536, tokens=16)
SMALL = WanConfig(dim=1536, ffn_dim=8960, num_heads=12, num_layers=30)


@pytest.mark.parametrize(
    "config, parameters, tensors, variant",
    [
        (replace(BIG, in_dim=36), 14_288_901_184, 1095, "image-to-video"),
        (replace(BIG, in_dim=36, image_dim=1280), 16_394_878_784, 1303, "image-to-video"),
        (replace(BIG, in_dim=36, image_dim=1280, image_positions=514), 16_395_536_704, 1304, "image-to-video"),
        (BIG.having(Reference(16), in_dim=48, image_dim=1280), 16_395_457_344, 1305, "Fun-Control"),
        (BIG.having(FunCamera(24), in_dim=32, image_dim=1280), 16_898_128_704, 1309, "Fun-Camera"),
        (BIG.having(Vace(8, 96)), 17_337_592_896, 1331, "VACE"),
        (BIG.having(HUMO_AUDIO, in_dim=36), 17_055_925_312, 1583, "HuMo"),
        (BIG.having(Animate(), in_dim=36, image_dim=1280), 17_274_816_884, 1427, "Animate"),
        (BIG.having(S2V()), 16_295_755_609, 1260, "S2V"),
        (SMALL.having(Vace(15, 96)), 2_153_972_032, 1264, "VACE"),
    ],
    ids=[
        *("I2V A14B", "I2V 2.1", "FLF2V", "Fun-Control", "Fun-Camera", "VACE 14B", "HuMo 17B", "Animate", "S2V"),
        "VACE 1.3B",
    ],
)
def test_the_released_models_have_the_published_sizes(config, parameters, tensors, variant):
    assert (config.parameters, len(config.shapes()), config.variant) == (parameters, tensors, variant)


# The same function as diffusers'.


@pytest.mark.parametrize("name", ["i2v-2.2", "i2v-2.1"])
def test_image_to_video_is_that_of_diffusers(models, single, name):
    config = tiny.VARIANTS[name]
    x, timestep, context, conditioning = given(config, batch=2)
    reference = tiny.diffusers_model(models[name], config)
    expected = reference(x, timestep, context, conditioning.image, return_dict=False)[0]
    out = single(name)(x, timestep, context, conditioning)
    assert out.shape == (2, 16, *SIZE)
    assert tiny.relative_error(out, expected) <= 1e-5


def test_first_and_last_frame_are_those_of_diffusers(models, single):
    x, timestep, context, conditioning = given(tiny.FIRST_LAST)
    images = conditioning.image.unflatten(1, (2, -1))[0]  # diffusers takes one image a batch item
    expected = tiny.diffusers_model(models["flf2v"], tiny.FIRST_LAST)(x, timestep, context, images, return_dict=False)
    assert tiny.relative_error(single("flf2v")(x, timestep, context, conditioning), expected[0]) <= 1e-5


def test_animate_is_that_of_diffusers(models, single):
    x, timestep, context, conditioning = given(tiny.ANIMATE, batch=2)
    expected = tiny.diffusers_model(models["animate"], tiny.ANIMATE)(
        x,
        timestep,
        context,
        conditioning.image,
        pose_hidden_states=conditioning.pose,
        face_pixel_values=conditioning.face,
        return_dict=False,
    )[0]
    model = single("animate")
    assert tiny.relative_error(model(x, timestep, context, conditioning), expected) <= 1e-5
    for missing in ("pose", "face"):  # each of them shows
        without = model(x, timestep, context, replace(conditioning, **{missing: None}))
        assert tiny.relative_error(without, expected) > 0.01


@pytest.mark.parametrize("strength", [1.0, 0.3])
def test_vace_is_that_of_diffusers(models, single, strength):
    x, timestep, context, conditioning = given(tiny.VACE, batch=2, strength=strength)
    scale = torch.full((tiny.VACE[Vace].blocks,), strength)
    expected = tiny.diffusers_model(models["vace"], tiny.VACE)(
        x,
        timestep,
        context,
        control_hidden_states=conditioning.vace[:, 0],
        control_hidden_states_scale=scale,
        return_dict=False,
    )[0]
    assert tiny.relative_error(single("vace")(x, timestep, context, conditioning), expected) <= 1e-5


def test_vace_of_strength_0_is_text_to_video(models, single, tmp_path):
    x, timestep, context, conditioning = given(tiny.VACE, strength=0.0)
    model = single("vace")
    assert tiny.relative_error(model(x, timestep, context, conditioning), model(x, timestep, context)) <= 1e-6


def test_two_vace_contexts_add_up(single):
    x, timestep, context, conditioning = given(tiny.VACE, contexts=2)
    model, options = single("vace"), Options(vace_strengths=(0.7, 0.0))
    both = model(x, timestep, context, replace(conditioning, options=options))
    one = Conditioning(vace=conditioning.vace[:, :1], options=Options(vace_strengths=(0.7,)))
    assert tiny.relative_error(both, model(x, timestep, context, one)) <= 1e-6
    assert tiny.relative_error(model(x, timestep, context, conditioning), both) > 0.01


# What diffusers has no class for, against the convolutions of the original.


def test_a_reference_is_embedded_by_its_own_convolution_in_front_of_the_video(single):
    x, timestep, context, conditioning = given(tiny.FUN_CONTROL)
    model, seen = single("fun-control"), []
    hook = model.blocks[0].register_forward_pre_hook(lambda module, args: seen.append(args[0].clone()))
    out = model(x, timestep, context, conditioning)
    hook.remove()
    front = F.conv2d(conditioning.reference, model.ref_conv.weight, model.ref_conv.bias, stride=2)
    video = model.patch_embedding(patchify(x))
    expected = torch.cat([front.flatten(2).transpose(1, 2), video], dim=1)
    assert tiny.relative_error(seen[0], expected) <= 1e-6
    assert out.shape == (1, 16, *SIZE)
    without = model(x, timestep, context, replace(conditioning, reference=None))
    assert tiny.relative_error(without, out) > 0.01


def test_a_camera_path_is_added_to_the_embedding_by_the_published_adapter(single):
    x, timestep, context, conditioning = given(tiny.FUN_CAMERA)
    model, seen = single("fun-camera"), []
    hook = model.blocks[0].register_forward_pre_hook(lambda module, args: seen.append(args[0].clone()))
    model(x, timestep, context, conditioning)
    hook.remove()
    adapter = model.control_adapter
    residual = adapter.residual_blocks[0]
    frames = conditioning.camera.transpose(1, 2).flatten(0, 1)
    y = F.conv2d(F.pixel_unshuffle(frames, 8), adapter.conv.weight, adapter.conv.bias, stride=2)
    inner = F.relu(F.conv2d(y, residual.conv1.weight, residual.conv1.bias, padding=1))
    y = y + F.conv2d(inner, residual.conv2.weight, residual.conv2.bias, padding=1)
    tokens = y.flatten(2).transpose(1, 2).reshape(1, -1, tiny.FUN_CAMERA.dim)
    assert tiny.relative_error(seen[0], model.patch_embedding(patchify(x)) + tokens) <= 1e-5


def test_extra_frames_are_seen_by_the_video_and_left_out_of_the_result(model):
    x, timestep, context = tiny.inputs()
    frames = torch.randn(1, 16, 2, *SIZE[1:])
    out = model(x, timestep, context, Conditioning(extra_frames=frames))
    longer = model(torch.cat([x, frames], dim=2), timestep, context)
    assert torch.equal(out, longer[:, :, : SIZE[0]])


def test_without_clip_tokens_the_text_stands_in_for_the_image_as_in_comfyui(single):
    x, timestep, context, _ = given(tiny.I2V_CLIP)
    model, seen = single("i2v-2.1"), []
    hook = model.blocks[0].cross_attn.k_img.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    model(x, timestep, context)
    hook.remove()
    assert torch.equal(seen[0], model.text_embedding(context))


def test_skipped_blocks_do_not_run(model, tmp_path):
    given_ = tiny.inputs()
    out = model(*given_, Conditioning(options=Options(skip_blocks=(1, 7))))
    path = tmp_path / "shorter.safetensors"
    weights = tiny.random_weights(tiny.TINY)
    save_file({name: w for name, w in weights.items() if not name.startswith("blocks.1.")}, path)
    assert tiny.relative_error(out, WanModel.from_checkpoint(str(path))(*given_)) <= 1e-6


def test_scaled_and_shifted_positions_are_those_of_a_coarser_and_farther_grid(model):
    given_ = tiny.inputs(size=(2, 8, 8))
    plain = model(*given_)
    moved = model(*given_, Conditioning(options=Options(rope=RopeOptions(shift_t=3.0, shift_y=5.0, shift_x=-2.0))))
    scaled = model(*given_, Conditioning(options=Options(rope=RopeOptions(scale_y=0.5))))
    assert tiny.relative_error(moved, plain) <= 1e-5  # attention sees only differences of positions
    assert tiny.relative_error(scaled, plain) > 1e-3


# Shared by workers.


@pytest.mark.parametrize("name", tiny.VARIANTS)
def test_two_workers_give_the_result_of_one_model(pool_of, models, single, name):
    inputs = given(tiny.VARIANTS[name], batch=2, size=(3, 6, 10))
    out = pool_of(2).forward(spec_of(models[name]), *inputs[:3], conditioning=inputs[3])
    assert tiny.relative_error(out, single(name)(*inputs)) <= 2e-6


@pytest.mark.parametrize("name", ["fun-control", "fun-camera", "vace", "scail-2", "humo", "dancer", "animate"])
@pytest.mark.parametrize("workers, plan", [(1, {}), (4, {}), (4, {"data_parallel": 2})], ids=str)
def test_every_split_gives_the_result_of_one_model(pool_of, models, single, name, workers, plan):
    inputs = given(tiny.VARIANTS[name], batch=2, size=(2, 4, 6), **({"contexts": 2} if name == "vace" else {}))
    pool, spec = pool_of(workers, **plan), spec_of(models[name], max_batch=1 if plan else 2, slice_tokens=5)
    expected = single(name)(*inputs)
    assert tiny.relative_error(pool.forward(spec, *inputs[:3], conditioning=inputs[3]), expected) <= 2e-6
    pool.unload()


DIVIDED = {"pipeline_parallel": 2, "tensor_parallel": 2}


@pytest.mark.parametrize("name", tiny.VARIANTS)
def test_a_divided_model_gives_the_result_of_the_whole(pool_of, models, single, name):
    inputs = given(tiny.VARIANTS[name], batch=2, size=(3, 6, 10))
    pool = pool_of(4, **DIVIDED)
    out = pool.forward(spec_of(models[name]), *inputs[:3], conditioning=inputs[3])
    assert tiny.relative_error(out, single(name)(*inputs)) <= 2e-6
    pool.unload()


def test_more_workers_than_tokens(pool_of, models, single):
    for name in ("fun-camera-2.2", "vace", "fun-control-2.2", "scail-2", "humo", "dancer", "animate", "s2v"):
        inputs = given(tiny.VARIANTS[name], size=(1, 2, 2))
        out = pool_of(4).forward(spec_of(models[name]), *inputs[:3], conditioning=inputs[3])
        assert tiny.relative_error(out, single(name)(*inputs)) <= 2e-6


@pytest.mark.parametrize("name", ["fun-camera", "vace", "fun-control"])
def test_any_tokens_in_any_order_get_what_is_theirs(single, name):
    """As displaced patches hold them: the tokens of a band of rows of every frame."""
    inputs = given(tiny.VARIANTS[name])
    model = single(name)
    x, conditioning = extended(inputs[0], inputs[3])
    grid = grid_of(x)

    def embedded(part):
        tokens = model.embed(patchify(x)[:, part], grid, part, conditioning)
        sides = model.side_streams(tokens, grid, part, conditioning, [])
        return [tokens, *sides.get("vace", [])]

    index = torch.tensor([14, 3, 35, 20, 21, 8])
    for got, whole in zip(embedded(index), embedded(slice(0, grid.tokens)), strict=True):
        assert tiny.relative_error(got, whole[:, index]) <= 1e-6


def test_a_conditioning_is_written_once_and_anew_when_it_changes(pool_of, models, single):
    pool, spec = pool_of(2), spec_of(models["vace"])
    for seed in (1, 1, 2, 1):
        inputs = given(tiny.VACE, batch=2, seed=seed)
        same = replace(inputs[3], vace=inputs[3].vace[:1].expand(2, -1, -1, -1, -1, -1))
        for conditioning in (same, inputs[3]):
            out = pool.forward(spec, *inputs[:3], conditioning=conditioning)
            assert tiny.relative_error(out, single("vace")(*inputs[:3], conditioning)) <= 2e-6
    assert torch.equal(pool.forward(spec, *inputs[:3]), pool.forward(spec, *inputs[:3], conditioning=Conditioning()))


def test_plain_options_reach_the_workers(pool_of, spec, model):
    conditioning = Conditioning(
        extra_frames=torch.randn(2, 16, 2, *SIZE[1:]),
        options=Options(skip_blocks=(0,), rope=RopeOptions(scale_t=0.5, shift_x=2.0)),
    )
    inputs = tiny.inputs(batch=2)
    expected = model(*inputs, conditioning)
    assert tiny.relative_error(pool_of(2).forward(spec, *inputs, conditioning=conditioning), expected) <= 2e-6


ROUNDED = ["i2v-2.1", "vace", "fun-camera", "fun-control", "scail-2", "humo", "dancer", "animate", "s2v"]


@pytest.mark.parametrize("name", ROUNDED)
def test_16_bit_stays_close(pool_of, models, single, name):
    inputs = given(tiny.VARIANTS[name])
    spec = ModelSpec(models[name], "bf16", "bf16")
    out = pool_of(2).forward(spec, *inputs[:3], conditioning=inputs[3])
    assert tiny.relative_error(out, single(name)(*inputs)) <= 0.02


@pytest.mark.parametrize("name", ROUNDED)
def test_weights_in_fp8_stay_close(pool_of, models, single, name):
    inputs = given(tiny.VARIANTS[name])
    out = pool_of(2).forward(ModelSpec(models[name], "fp8_e4m3fn", "fp32"), *inputs[:3], conditioning=inputs[3])
    assert 1e-4 < tiny.relative_error(out, single(name)(*inputs)) <= 0.1


@pytest.mark.parametrize("name", ["i2v-2.1", "flf2v", "vace"])
def test_files_with_the_names_of_diffusers_are_the_same_model(tmp_path, single, name):
    weights = tiny.random_weights(tiny.VARIANTS[name])
    save_file({tiny.diffusers_name(key): weight for key, weight in weights.items()}, tmp_path / "model.safetensors")
    inputs = given(tiny.VARIANTS[name])
    out = WanModel.from_checkpoint(str(tmp_path / "model.safetensors"))(*inputs)
    assert torch.equal(out, single(name)(*inputs)) or tiny.relative_error(out, single(name)(*inputs)) <= 1e-6


def test_the_folder_that_diffusers_writes_for_animate_is_the_same_model(tmp_path, models):
    folder = tmp_path / "transformer"
    tiny.diffusers_model(models["animate"], tiny.ANIMATE).save_pretrained(folder, max_shard_size="5MB")
    assert len(list(folder.glob("*-of-*.safetensors"))) > 2
    theirs, ours = open_weights(str(folder)), open_weights(models["animate"])
    assert theirs.config == tiny.ANIMATE
    for name in tiny.ANIMATE.shapes():
        assert torch.equal(theirs.tensor(name), ours.tensor(name)), name


# By displaced patches.


@pytest.mark.parametrize("name", ["i2v-2.1", "fun-control", "fun-camera", "humo", "dancer", "scail", "animate"])
@pytest.mark.parametrize("mode", ["spatial", "temporal"])
def test_a_stale_step_with_the_inputs_of_the_step_before_is_the_exact_one(pool_of, models, single, name, mode):
    inputs = given(tiny.VARIANTS[name], size=(4, 8, 8))
    pool, spec = pool_of(2), spec_of(models[name])
    step = Displaced(FILL, f"{name} {mode}", ("a",), PatchSplit(mode, 16), manager="native")
    for kind in (FILL, STALE):
        part = replace(step, kind=kind)
        out = pool.forward(spec, *inputs[:3], conditioning=inputs[3], displaced=part)
        assert tiny.relative_error(out, single(name)(*inputs)) <= 2e-6


# Wrong inputs.


@pytest.mark.parametrize(
    "change, text",
    [
        ({"image": torch.zeros(1, 5, 96)}, "does not take"),
        ({"vace": torch.zeros(1, 1, 96, 3, 6, 4)}, "needs [1, 1, 96, 3, 6, 8]"),
        ({"vace": torch.zeros(1, 2, 96, 3, 6, 8)}, "needs [1, 1, 96, 3, 6, 8]"),
        ({"extra_frames": torch.zeros(1, 16, 2, 6, 8)}, "cannot be joined"),
        ({"extra_frames": torch.zeros(1, 20, 2, 6, 8)}, "needs [1, 16, any, 6, 8]"),
    ],
)
def test_a_conditioning_that_does_not_fit_is_refused(change, text):
    x, _, _, conditioning = given(tiny.VACE)
    with pytest.raises(ValueError) as error:
        check(tiny.VACE, x, replace(conditioning, **change))
    assert text in str(error.value) and tiny.sentences(str(error.value)) == 2
