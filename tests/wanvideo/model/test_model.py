"""The DiT on one device: the function that Wan's authors published, in every precision."""

from __future__ import annotations

import math

import pytest
import torch
from testkit import tiny
from wan_parallel.wanvideo.base.config import WanConfig
from wan_parallel.wanvideo.base.grid import grid_of, pad_to_patch, patchify, unpatchify
from wan_parallel.wanvideo.model.layers import slices, take_turns
from wan_parallel.wanvideo.model.model import WanModel
from wan_parallel.wanvideo.ops.rope import apply_rope, rope_table

FIVE_B_LIKE = WanConfig(dim=256, ffn_dim=512, num_heads=2, num_layers=2, in_dim=48, out_dim=48, text_dim=64)
THREE_HEADS = WanConfig(dim=384, ffn_dim=640, num_heads=3, num_layers=3, text_dim=96)
DEEP = WanConfig(dim=256, ffn_dim=512, num_heads=2, num_layers=8, text_dim=64)
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def wrapped(x: torch.Tensor) -> torch.Tensor:
    """x with an even height and width, continued from the other side."""
    return torch.nn.functional.pad(x, (0, x.shape[-1] % 2, 0, x.shape[-2] % 2, 0, 0), mode="circular")


def diffusers_output(reference: torch.nn.Module, x, timestep, context) -> torch.Tensor:
    """diffusers' result for any height and width; `timestep` [B], or one for each token [B, tokens]."""
    out = reference(wrapped(x), timestep, context, return_dict=False)[0]
    return out[..., : x.shape[-2], : x.shape[-1]]


@pytest.fixture(scope="module")
def reference(checkpoint) -> torch.nn.Module:
    """diffusers' model with the weights of `checkpoint`, in fp32."""
    return tiny.diffusers_model(checkpoint)


# The same function as diffusers'.


@pytest.mark.parametrize(
    "size", [(1, 2, 2), (3, 6, 8), (5, 4, 14), (2, 7, 8), (3, 6, 9), (2, 5, 5), (1, 1, 1)], ids=str
)
def test_the_output_is_that_of_diffusers_for_any_size(model, reference, size):
    given = tiny.inputs(size=size)
    out = model(*given)
    assert out.shape == given.x.shape and out.dtype == torch.float32
    assert tiny.relative_error(out, diffusers_output(reference, *given)) <= 1e-5


@pytest.mark.parametrize("timestep", [0.0, 1.0, 37.25, 500.0, 999.0, 1000.0])
def test_the_output_is_that_of_diffusers_at_any_timestep(model, reference, timestep):
    given = tiny.inputs(timestep=timestep)
    assert tiny.relative_error(model(*given), diffusers_output(reference, *given)) <= 1e-5


@pytest.mark.parametrize("text_tokens", [1, 77, 512])
def test_every_text_token_takes_part_padding_included(model, reference, text_tokens):
    given = tiny.inputs(text_tokens=text_tokens)
    given.context[:, text_tokens // 2 :] = 0  # as the text encoder leaves the slots behind the prompt
    assert tiny.relative_error(model(*given), diffusers_output(reference, *given)) <= 1e-5


def test_batch_items_with_different_timesteps_do_not_mix(model, reference):
    given = tiny.inputs(batch=2)
    out = model(*given)
    assert tiny.relative_error(out, diffusers_output(reference, *given)) <= 1e-5
    for i in range(2):
        alone = model(*(part[i : i + 1] for part in given))
        assert tiny.relative_error(out[i : i + 1], alone) <= 1e-6


@pytest.mark.parametrize("config", [FIVE_B_LIKE, THREE_HEADS], ids=["48 channels", "3 heads"])
@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
def test_other_dimensions_and_prefixes_give_the_output_of_diffusers(tmp_path, config, prefix):
    bare = tiny.write_checkpoint(tmp_path / "bare.safetensors", config, seed=3)
    path = tiny.write_checkpoint(tmp_path / "prefixed.safetensors", config, seed=3, prefix=prefix)
    given = tiny.inputs(config, batch=2)
    out = WanModel.from_checkpoint(path)(*given)
    assert tiny.relative_error(out, diffusers_output(tiny.diffusers_model(bare, config), *given)) <= 1e-5


@pytest.mark.parametrize("size", [(4, 6, 8), (3, 5, 7)], ids=str)
def test_a_timestep_for_each_frame_is_what_diffusers_does_token_by_token(tmp_path, size):
    path = tiny.write_checkpoint(tmp_path / "5b.safetensors", FIVE_B_LIKE)
    x, _, context = tiny.inputs(FIVE_B_LIKE, size=size, batch=2)
    frames = torch.linspace(0, 900, 2 * size[0]).view(2, size[0])  # the first frame of an image-to-video run has 0
    tokens = frames.repeat_interleave(math.ceil(size[1] / 2) * math.ceil(size[2] / 2), dim=1)
    expected = diffusers_output(tiny.diffusers_model(path, FIVE_B_LIKE), x, tokens, context)
    assert tiny.relative_error(WanModel.from_checkpoint(path)(x, frames, context), expected) <= 1e-5


def test_equal_timesteps_for_all_frames_are_one_timestep(model):
    x, timestep, context = tiny.inputs(batch=2)
    by_frame = timestep[:, None].expand(-1, x.shape[2])
    assert tiny.relative_error(model(x, by_frame, context), model(x, timestep, context)) <= 1e-6


@pytest.mark.parametrize("frames", [None, 5])
def test_modulation_is_computed_once_for_each_timestep_never_for_each_token(model, frames):
    x, timestep, context = tiny.inputs(size=(5, 8, 8), batch=2)
    rows = []
    hook = model.time_projection.register_forward_hook(lambda module, given, out: rows.append(out[..., 0].numel()))
    model(x, timestep if frames is None else timestep[:, None].expand(-1, frames), context)
    hook.remove()
    assert rows == [2 * (frames or 1)]


# Precision.


@pytest.fixture(scope="module")
def deep(tmp_path_factory) -> str:
    """A deeper model whose weights are bf16 numbers, so that every precision starts from the same ones."""
    path = tmp_path_factory.mktemp("deep") / "deep.safetensors"
    return tiny.write_checkpoint(path, DEEP, seed=4, dtype=torch.bfloat16)


@pytest.mark.parametrize("name", ["bf16", "fp16"])
def test_16_bit_output_is_closer_to_fp32_than_that_of_a_16_bit_residual_stream(deep, name):
    dtype = DTYPES[name]
    given = tiny.inputs(size=(5, 16, 16))
    exact = WanModel.from_checkpoint(deep)(*given)
    ours = WanModel.from_checkpoint(deep, torch.bfloat16, dtype)(*given)
    # diffusers keeps the residual stream in the dtype of the model, as ComfyUI does
    theirs = tiny.diffusers_model(deep, DEEP).to(dtype)
    rounded = theirs(given.x.to(dtype), given.timestep, given.context.to(dtype), return_dict=False)[0]
    our_error, their_error = tiny.relative_error(ours, exact), tiny.relative_error(rounded, exact)
    print(f"{name}: relative error {our_error:.2e}, with a {name} residual stream {their_error:.2e}")
    assert our_error < their_error / 2
    assert our_error < {"bf16": 5e-3, "fp16": 7e-4}[name]


@pytest.mark.parametrize("compute", DTYPES)
@pytest.mark.parametrize("weights", DTYPES)
def test_every_pair_of_weight_and_compute_precision_runs(deep, weights, compute):
    given = tiny.inputs(batch=2)
    exact = WanModel.from_checkpoint(deep)(*given)
    model = WanModel.from_checkpoint(deep, DTYPES[weights], DTYPES[compute])
    out = model(*given)
    assert out.dtype == torch.float32
    # every bf16 number that occurs here is an fp16 and an fp32 number as well, up to underflow
    assert tiny.relative_error(out, exact) <= {"fp32": 2e-5, "fp16": 7e-4, "bf16": 5e-3}[compute]


def test_products_are_held_in_the_weight_precision_and_small_tensors_in_fp32(deep):
    for name, weight in WanModel.from_checkpoint(deep, torch.float16).named_parameters():
        of_product = weight.ndim == 2 or (name.startswith("blocks.") and name.endswith(".bias") and "norm" not in name)
        assert weight.dtype == (torch.float16 if of_product else torch.float32), name
        assert not weight.requires_grad


def test_a_latent_of_any_float_type_gives_an_fp32_result(model):
    x, timestep, context = tiny.inputs()
    out = model(x.double(), timestep.double(), context.bfloat16())
    assert out.dtype == torch.float32 and out.isfinite().all()


@pytest.mark.parametrize("step", [1, 7, 35, 36, 1000])
def test_working_through_the_tokens_in_slices_changes_nothing(checkpoint, model, step):
    given = tiny.inputs(batch=2)  # 36 tokens
    frames = torch.linspace(0, 900, 6).view(2, 3)
    sliced = WanModel.from_checkpoint(checkpoint, slice_tokens=step)
    assert tiny.relative_error(sliced(*given), model(*given)) <= 1e-6
    by_frame = (given.x, frames, given.context)
    assert tiny.relative_error(sliced(*by_frame), model(*by_frame)) <= 1e-6


def test_slices_bound_the_feed_forward(checkpoint):
    model, widest = WanModel.from_checkpoint(checkpoint, slice_tokens=10), []
    hook = model.blocks[0].ffn.register_forward_hook(lambda module, given, out: widest.append(out.shape[1]))
    model(*tiny.inputs())
    hook.remove()
    assert widest == [10, 10, 10, 6]


# Parts.


@pytest.mark.parametrize(
    "at_once, expected",
    [
        (1, "0a 0b 0c 1a 1b 1c 2a 2b 2c"),
        (2, "0a 1a 0b 1b 0c 2a 1c 2b 2c"),  # 2a before 1c, which waits for what 1b began
        (5, "0a 1a 2a 0b 1b 2b 0c 1c 2c"),
    ],
)
def test_slices_are_worked_on_in_turn(at_once, expected):
    done = []

    def work(number):
        for part in "ab":
            done.append(f"{number}{part}")
            yield
        done.append(f"{number}c")

    take_turns((work(number) for number in range(3)), at_once)
    assert " ".join(done) == expected


@pytest.mark.parametrize(
    "arguments, lengths",
    [
        ((10, 0), [10]),
        ((10, 4), [4, 4, 2]),
        ((10, 0, 2), [5, 5]),
        ((9, 8, 2), [5, 4]),
        ((1, 0, 2), [1]),
        ((0, 0, 2), []),
    ],
)
def test_tokens_are_cut_into_slices(arguments, lengths):
    assert [s.stop - s.start for s in slices(*arguments)] == lengths


def test_the_tensors_have_the_names_of_the_original_model(model):
    assert {name: tuple(w.shape) for name, w in model.state_dict().items()} == tiny.TINY.shapes()


def complex128_table(grid: tuple[int, int, int], head_dim: int) -> torch.Tensor:
    """rope_params and rope_apply of Wan 2.1, in complex128: [tokens, head_dim / 2]."""
    rows = []
    sixth = 2 * (head_dim // 6)
    for position in ((f, r, c) for f in range(grid[0]) for r in range(grid[1]) for c in range(grid[2])):
        angles = [
            p / 10000.0 ** (i / dim)
            for p, dim in zip(position, (head_dim - 2 * sixth, sixth, sixth), strict=True)
            for i in range(0, dim, 2)
        ]
        rows.append([complex(math.cos(a), math.sin(a)) for a in angles])
    return torch.tensor(rows, dtype=torch.complex128)


@pytest.mark.parametrize("head_dim", [128, 64, 12])
def test_the_rope_table_is_that_of_the_original_in_double_precision(head_dim):
    grid = (3, 4, 5)
    table = rope_table(grid, head_dim)
    assert table.shape == (60, head_dim // 2) and table.dtype == torch.complex64
    assert (table - complex128_table(grid, head_dim)).abs().max() < 1e-7


def test_rope_stays_exact_far_from_the_origin():
    far = rope_table((1, 1, 900), 128)[-1]
    assert (far - complex128_table((1, 1, 900), 128)[-1]).abs().max() < 1e-7


def test_rope_turns_neighbouring_pairs():
    x = torch.randn(2, 60, 3, 64)
    table = complex128_table((3, 4, 5), 64)
    expected = torch.complex(x[..., 0::2].double(), x[..., 1::2].double()) * table[:, None]
    turned = apply_rope(x, table.to(torch.complex64))
    assert turned.shape == x.shape
    assert tiny.relative_error(turned[..., 0::2], expected.real) < 1e-6
    assert tiny.relative_error(turned[..., 1::2], expected.imag) < 1e-6


@pytest.mark.parametrize("size", [(1, 2, 2), (3, 6, 8), (3, 5, 8), (2, 6, 7), (2, 3, 3)], ids=str)
def test_every_token_goes_back_to_its_place(size):
    x = torch.randn(2, 16, *size)
    grid = grid_of(x)
    tokens = patchify(pad_to_patch(x))
    assert tokens.shape == (2, grid.tokens, 64)
    # the patch embedding has the channel first, the head of the model last
    as_head = tokens.view(2, grid.tokens, 16, 4).transpose(2, 3).flatten(2)
    assert torch.equal(unpatchify(as_head, grid, size), x)


def test_odd_sizes_wrap_round():
    x = torch.randn(1, 4, 2, 3, 5)
    assert torch.equal(pad_to_patch(x), wrapped(x))
    assert pad_to_patch(x[..., :2, :4]).shape == (1, 4, 2, 2, 4)


def test_the_patch_embedding_is_the_convolution_of_the_original(model):
    x = tiny.inputs().x
    weight, bias = model.patch_embedding.weight, model.patch_embedding.bias
    expected = torch.nn.functional.conv3d(x, weight, bias, stride=(1, 2, 2)).flatten(2).transpose(1, 2)
    assert tiny.relative_error(model.patch_embedding(patchify(x)), expected) < 1e-6
