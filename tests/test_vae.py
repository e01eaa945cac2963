"""The VAE's decoder gives the frames of diffusers' AutoencoderKLWan, whole or in strips, in pieces of any size."""

from __future__ import annotations

from pathlib import Path

import gloo_group
import pack  # noqa: F401 (registers wan_parallel, also in the processes of the group)
import pytest
import torch
import vae_reference
from safetensors.torch import load_file, save_file
from tiny import relative_error, sentences
from wan_parallel.distributed.vae import Strip, share_frame
from wan_parallel.wanvideo.vae import (
    Decoder,
    VAEError,
    WholeFrame,
    check_latent,
    check_vae,
    decoder_shapes,
    frames_of,
    random_weights,
    working_bytes,
)
from wan_parallel.wanvideo.vae_encoder import Encoder, latent_frames
from wan_parallel.wanvideo.vae_ops import VAEOps

EXACT = 1e-5  # relative error
CPU = torch.device("cpu")
DIM = 8
SHAPES = decoder_shapes(DIM)
STRIPS = [  # latent rows and columns, what is shared, and among how many ranks
    *(((5, 7), "auto", ranks) for ranks in (2, 3, 4)),
    *(((5, 7), "rows", 3), ((7, 3), "auto", 4), ((7, 3), "columns", 4)),
]
SIZES = [(3, 5, 7), (2, 7, 3), (1, 4, 4)]  # latent frames, rows and columns: odd, upright, a single image


def latent(size: tuple[int, int, int], seed: int = 1) -> torch.Tensor:
    return torch.randn(16, *size, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def reference() -> torch.nn.Module:
    return vae_reference.tiny_vae(dim=DIM)


@pytest.fixture(scope="module")
def weights(reference) -> dict[str, torch.Tensor]:
    return vae_reference.native_names(reference.state_dict())


def expected(reference: torch.nn.Module, z: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        return reference.decode(z[None], return_dict=False)[0][0].permute(1, 2, 3, 0)


def decoded(decoder: Decoder, z: torch.Tensor, piece_bytes: int) -> list[torch.Tensor]:
    with torch.inference_mode():
        return list(decoder.decode(z, WholeFrame(tuple(z.shape[-2:])), piece_bytes))


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("convolution", ["conv3d", "conv3d_ncdhw", "conv2d"])
def test_the_frames_are_those_of_diffusers(reference, weights, size, convolution):
    z = latent(size)
    decoder = Decoder(weights, VAEOps(CPU, torch.float32, convolution))
    frames = torch.cat(decoded(decoder, z, 2**29)).clamp(-1, 1)
    assert frames.shape == (frames_of(size[0]), 8 * size[1], 8 * size[2], 3)
    assert relative_error(frames, expected(reference, z)) <= EXACT


@pytest.mark.parametrize("frames, whole", [(1, 1), (7, 2), (13, 4)])
@pytest.mark.parametrize("piece_bytes", [1, 2**29])
def test_the_latent_is_that_of_diffusers(reference, weights, frames, whole, piece_bytes):
    video = torch.rand(frames, 24, 40, 3, generator=torch.Generator().manual_seed(2))
    encoder = Encoder(weights, VAEOps(CPU, torch.float32))
    with torch.inference_mode():
        ours = torch.cat(list(encoder.encode(video, WholeFrame((3, 5)), piece_bytes)))
        theirs = reference.encode(video.permute(3, 0, 1, 2)[None] * 2 - 1).latent_dist.mean[0].permute(1, 2, 3, 0)
    assert len(ours) == whole == latent_frames(frames)
    assert relative_error(ours, theirs) <= EXACT


@pytest.mark.parametrize("piece_bytes", [1, 40_000, 150_000])
def test_pieces_of_any_size_give_the_same_frames(weights, piece_bytes):
    z = latent((4, 4, 5))
    decoder = Decoder(weights, VAEOps(CPU, torch.float32))
    whole, pieces = decoded(decoder, z, 2**29), decoded(decoder, z, piece_bytes)
    assert len(whole) == 1 and len(pieces) > 1
    assert relative_error(torch.cat(pieces), whole[0]) <= EXACT


def test_strips_of_2_to_4_ranks_are_the_whole(reference, weights, tmp_path):
    save_file(weights, tmp_path / "vae.safetensors")
    results = gloo_group.run(4, _decode_strips, tmp_path, tmp_path / "vae.safetensors")
    for size, axis, ranks in STRIPS:
        whole = expected(reference, latent((3, *size)))
        strips, frames = share_frame(*size, ranks, axis), torch.full_like(whole, float("nan"))
        for rank in range(len(strips.parts)):
            frames[(slice(None), *strips.of(rank, 8))] = results[rank][f"{size} {axis} {ranks}"]
        assert relative_error(frames.clamp(-1, 1), whole) <= EXACT, (size, axis, ranks)


def _decode_strips(rank: int, _world: int, file: Path) -> gloo_group.Results:
    decoder, results = Decoder(load_file(file), VAEOps(CPU, torch.float32)), {}
    for size, axis, ranks in STRIPS:
        strips = share_frame(*size, ranks, axis)
        if rank < len(strips.parts):
            mine = latent((3, *size))[(slice(None), slice(None), *strips.of(rank))]
            pieces = decoder.decode(mine, Strip(rank, strips), 60_000 if ranks == 3 else 2**29)
            results[f"{size} {axis} {ranks}"] = torch.cat(list(pieces))
    return results


def test_the_longer_side_is_shared_and_no_rank_without_rows():
    assert share_frame(90, 160, 4).parts == ((0, 40), (40, 80), (80, 120), (120, 160))
    assert share_frame(90, 160, 4).axis == 1 and share_frame(160, 90, 4).axis == 0
    assert share_frame(2, 3, 8).parts == ((0, 1), (1, 2), (2, 3))
    assert share_frame(23, 4, 8).most == (3, 4)


def test_random_weights_have_the_shapes_of_diffusers(weights):
    assert {name: tuple(t.shape) for name, t in random_weights(DIM).items()} == SHAPES
    assert {name: tuple(t.shape) for name, t in weights.items() if name in SHAPES} == SHAPES


def test_smaller_pieces_and_strips_need_less_memory():
    shapes = decoder_shapes()
    needs = [working_bytes(shapes, size, 2, piece) for size, piece in (((90, 160), 2**29), ((90, 40), 2**29))]
    assert needs[0] > needs[1] > working_bytes(shapes, (90, 40), 2, 2**26)
    assert needs[1] < 8 * 2**30


@pytest.mark.parametrize(
    "shapes",
    [
        {"decoder.upsamples.0.upsamples.0.residual.2.weight": (1024, 1024, 3, 3, 3), **SHAPES},
        {"decoder.mid.block_1.norm1.weight": (512,)},
        {name: shape[:2] + shape[3:] if len(shape) == 5 else shape for name, shape in SHAPES.items()},
        {},
    ],
)
def test_other_vaes_are_refused_in_two_sentences(shapes):
    with pytest.raises(VAEError) as refusal:
        check_vae(shapes)
    assert sentences(str(refusal.value)) >= 2


@pytest.mark.parametrize("size", [(1, 48, 2, 4, 4), (16, 2, 4, 4), (1, 16, 0, 4, 4)], ids=str)
def test_latents_of_another_model_are_refused_in_two_sentences(size):
    with pytest.raises(VAEError) as refusal:
        check_latent(SHAPES, size)
    assert sentences(str(refusal.value)) >= 2


def test_triton_is_refused_where_it_cannot_run():
    with pytest.raises(VAEError) as refusal:
        VAEOps(CPU, torch.bfloat16, "triton")
    assert sentences(str(refusal.value)) >= 2
