"""Both VAEs give the frames and latents of diffusers' AutoencoderKLWan, whole or in strips, in pieces of any size."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
import testkit  # noqa: F401 (registers wan_parallel, also in the processes of the group)
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from testkit import gloo_group, hostile, vae_reference
from testkit.tiny import relative_error, sentences
from wan_parallel.distributed.protocol.requests import VAEOptions
from wan_parallel.distributed.worker.vae_worker import FrameStrips, Strip, share_frame
from wan_parallel.wanvideo.example.vae_random import RELEASED, random_weights, vae_shapes
from wan_parallel.wanvideo.vae.vae_coder import Decoder, Encoder
from wan_parallel.wanvideo.vae.vae_layers import WholeFrame
from wan_parallel.wanvideo.vae.vae_layout import (
    HALVES,
    KINDS,
    VAEKind,
    check_latent,
    frames_of,
    kind_of,
    latent_frames,
    working_bytes,
)
from wan_parallel.wanvideo.vae.vae_ops import VAEError, VAEOps

EXACT = 1e-5  # relative error
CPU = torch.device("cpu")
DIMS = {"2.1": 8, "2.2": 4}
SHAPES = vae_shapes("2.1", "decoder", DIMS["2.1"])
STRIPS = [  # which VAE, latent rows and columns, what is shared, among how many ranks, and how fast these are
    *(("2.1", (5, 7), "auto", 2, ()), ("2.1", (5, 7), "rows", 3, ()), ("2.1", (7, 3), "auto", 4, ())),
    *(("2.1", (7, 3), "columns", 4, ()), ("2.2", (2, 5), "auto", 2, ())),
    *(("2.2", (3, 5), "rows", 3, ()), ("2.2", (5, 2), "auto", 4, ())),
    *(("2.1", (5, 9), "auto", 3, (5, 1, 2)), ("2.2", (5, 3), "auto", 2, (1, 4))),
]
SIZES = [(3, 5, 7), (2, 7, 3), (1, 4, 4)]  # latent frames, rows and columns: odd, upright, a single image


@dataclass(frozen=True)
class Reference:
    """diffusers' model of one VAE, and its weights under Wan's names."""

    name: str
    model: torch.nn.Module
    weights: dict[str, torch.Tensor]

    @property
    def kind(self) -> VAEKind:
        return KINDS[self.name]

    def decode(self, z: torch.Tensor) -> torch.Tensor:
        with torch.inference_mode():
            return self.model.decode(z[None], return_dict=False)[0][0].permute(1, 2, 3, 0)

    def encode(self, video: torch.Tensor) -> torch.Tensor:
        with torch.inference_mode():
            latent = self.model.encode(video.permute(3, 0, 1, 2)[None] * 2 - 1).latent_dist
        return latent.mean[0].permute(1, 2, 3, 0)


def reference_of(vae: str) -> Reference:
    model = vae_reference.tiny_vae(dim=DIMS[vae], vae=vae)
    return Reference(vae, model, vae_reference.native_names(model.state_dict()))


@pytest.fixture(scope="module", params=KINDS)
def reference(request: pytest.FixtureRequest) -> Reference:
    return reference_of(request.param)


def latent(vae: str, size: tuple[int, int, int]) -> torch.Tensor:
    return torch.randn(RELEASED[vae].latent, *size, generator=torch.Generator().manual_seed(1))


def video(vae: str, frames: int, size: tuple[int, int]) -> torch.Tensor:
    rows, columns = (KINDS[vae].scale * length for length in size)
    return torch.rand(frames, rows, columns, 3, generator=torch.Generator().manual_seed(2))


def decoded(decoder: Decoder, z: torch.Tensor, piece_bytes: int) -> list[torch.Tensor]:
    with torch.inference_mode():
        return list(decoder.decode(z, WholeFrame(tuple(z.shape[-2:])), piece_bytes))


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("convolution", ["conv3d", "conv3d_ncdhw", "conv2d"])
def test_the_frames_are_those_of_diffusers(reference, size, convolution):
    z, scale = latent(reference.name, size), reference.kind.scale
    decoder = Decoder(reference.weights, VAEOps(CPU, torch.float32, convolution))
    frames = torch.cat(decoded(decoder, z, 2**29)).clamp(-1, 1)
    assert frames.shape == (frames_of(size[0]), scale * size[1], scale * size[2], 3)
    assert relative_error(frames, reference.decode(z)) <= EXACT


@pytest.mark.parametrize("frames, whole", [(1, 1), (7, 2), (13, 4)])
@pytest.mark.parametrize("piece_bytes", [1, 2**29])
def test_the_latent_is_that_of_diffusers(reference, frames, whole, piece_bytes):
    pixels = video(reference.name, frames, (3, 5))
    encoder = Encoder(reference.weights, VAEOps(CPU, torch.float32))
    with torch.inference_mode():
        ours = torch.cat(list(encoder.encode(pixels, WholeFrame((3, 5)), piece_bytes)))
    assert len(ours) == whole == latent_frames(frames)
    assert relative_error(ours, reference.encode(pixels)) <= EXACT


@pytest.mark.parametrize("piece_bytes", [1, 40_000, 150_000])
def test_pieces_of_any_size_give_the_same_frames(reference, piece_bytes):
    z = latent(reference.name, (4, 4, 5))
    decoder = Decoder(reference.weights, VAEOps(CPU, torch.float32))
    whole, pieces = decoded(decoder, z, 2**29), decoded(decoder, z, piece_bytes)
    assert len(whole) == 1 and len(pieces) > 1
    assert relative_error(torch.cat(pieces), whole[0]) <= EXACT


def test_strips_of_2_to_4_ranks_are_the_whole(tmp_path):
    references = {vae: reference_of(vae) for vae in KINDS}
    for vae, reference in references.items():
        save_file(reference.weights, tmp_path / f"{vae}.safetensors")
    results = gloo_group.run(4, _run_strips, tmp_path, tmp_path)
    for case in STRIPS:
        vae, size, axis, ranks, speeds = case
        strips, reference = share_frame(*size, ranks, VAEOptions(axis=axis, speeds=speeds)), references[vae]
        frames = joined([rank.get(f"decoder {case}") for rank in results], strips, reference.kind.scale)
        assert relative_error(frames.clamp(-1, 1), reference.decode(latent(vae, (3, *size)))) <= EXACT, case
        latents = joined([rank.get(f"encoder {case}") for rank in results], strips, 1)
        assert relative_error(latents, reference.encode(video(vae, 6, size))) <= EXACT, case


def joined(parts: list[torch.Tensor | None], strips: FrameStrips, scale: int) -> torch.Tensor:
    """The strips of the ranks that have one, side by side."""
    used = [part for part in parts if part is not None]
    assert [part.shape[1 + strips.axis] for part in used] == [scale * (stop - start) for start, stop in strips.parts]
    return torch.cat(used, dim=1 + strips.axis)


def _run_strips(rank: int, _world: int, folder: Path) -> gloo_group.Results:
    results, ops = {}, VAEOps(CPU, torch.float32)
    for case in STRIPS:
        vae, size, axis, ranks, speeds = case
        strips = share_frame(*size, ranks, VAEOptions(axis=axis, speeds=speeds))
        piece_bytes = 60_000 if ranks == 3 else 2**29
        if rank >= len(strips.parts):
            continue
        weights, frame = load_file(folder / f"{vae}.safetensors"), Strip(rank, strips)
        mine = latent(vae, (3, *size))[(slice(None), slice(None), *strips.of(rank))]
        results[f"decoder {case}"] = torch.cat(list(Decoder(weights, ops).decode(mine, frame, piece_bytes)))
        mine = video(vae, 6, size)[(slice(None), *strips.of(rank, KINDS[vae].scale))]
        results[f"encoder {case}"] = torch.cat(list(Encoder(weights, ops).encode(mine, frame, piece_bytes)))
    return results


def test_the_longer_side_is_shared_and_no_rank_without_rows():
    assert share_frame(90, 160, 4, VAEOptions()).parts == ((0, 40), (40, 80), (80, 120), (120, 160))
    assert share_frame(90, 160, 4, VAEOptions()).axis == 1 and share_frame(160, 90, 4, VAEOptions()).axis == 0
    assert share_frame(2, 3, 8, VAEOptions()).parts == ((0, 1), (1, 2), (2, 3))
    assert share_frame(23, 4, 8, VAEOptions()).most == (3, 4)
    assert share_frame(90, 160, 3, VAEOptions(speeds=(2, 1, 1))).parts == ((0, 80), (80, 120), (120, 160))
    assert share_frame(2, 1, 3, VAEOptions(speeds=(1, 9, 9))).parts == ((0, 1), (1, 2))


@pytest.mark.parametrize("vae", KINDS)
def test_a_released_file_is_recognised_and_random_weights_have_its_shapes(vae):
    with torch.device("meta"):
        model = vae_reference.build(RELEASED[vae].encoder, RELEASED[vae].decoder, vae)
    header = {name: tuple(t.shape) for name, t in vae_reference.native_names(model.state_dict()).items()}
    assert [kind_of(header, half) for half in HALVES] == [KINDS[vae]] * 2
    assert header == vae_shapes(vae, "decoder") | vae_shapes(vae, "encoder")
    tiny = random_weights(vae, "decoder", DIMS[vae])
    assert {name: tuple(t.shape) for name, t in tiny.items()} == vae_shapes(vae, "decoder", DIMS[vae])


@pytest.mark.parametrize("vae, size", [("2.1", (90, 160)), ("2.2", (44, 80))])
@pytest.mark.parametrize("half", HALVES)
def test_smaller_pieces_and_strips_need_less_memory(vae, size, half):
    shapes, strip = vae_shapes(vae, half), (size[0], size[1] // 4)
    whole, quarter, least = (
        working_bytes(shapes, half, part, 2, piece) for part, piece in ((size, 2**29), (strip, 2**29), (strip, 2**26))
    )
    assert least < quarter < whole and quarter < 8 * 2**30


@pytest.mark.parametrize("half", HALVES)
@pytest.mark.parametrize(
    "change",
    [
        {  # Wan 2.2's layers, and all else of Wan 2.1
            "decoder.upsamples.0.upsamples.0.residual.2.weight": (32, 32, 3, 3, 3),
            "encoder.downsamples.0.downsamples.0.residual.2.weight": (8, 8, 3, 3, 3),
        },
        {"decoder.head.2.weight": (12, 8, 3, 3, 3), "encoder.conv1.weight": (8, 12, 3, 3, 3)},  # four pixels as one
        {"decoder.head.2.weight": (4, 8, 3, 3, 3), "encoder.conv1.weight": (8, 4, 3, 3, 3)},  # with transparency
        {"decoder.conv1.weight": (8, 16, 3, 3), "encoder.conv1.weight": (8, 3, 3, 3)},  # of images
    ],
)
def test_other_vaes_are_refused_in_two_sentences(half, change):
    shapes = vae_shapes("2.1", "decoder", 8) | vae_shapes("2.1", "encoder", 8)
    assert kind_of(shapes, half) == KINDS["2.1"]
    for other in (shapes | change, {"decoder.mid.block_1.norm1.weight": (512,)}, {}):
        with pytest.raises(VAEError) as refusal:
            kind_of(other, half)
        assert sentences(str(refusal.value)) >= 2


def test_a_half_that_is_missing_is_refused():
    with pytest.raises(VAEError, match="no encoder"):
        kind_of(vae_shapes("2.2", "decoder", 4), "encoder")


@pytest.mark.parametrize("size", [(1, 48, 2, 4, 4), (16, 2, 4, 4), (1, 16, 0, 4, 4)], ids=str)
def test_latents_of_another_model_are_refused_in_two_sentences(size):
    with pytest.raises(VAEError) as refusal:
        check_latent(SHAPES, size)
    assert sentences(str(refusal.value)) >= 2


def test_triton_is_refused_where_it_cannot_run():
    with pytest.raises(VAEError) as refusal:
        VAEOps(CPU, torch.bfloat16, "triton")
    assert sentences(str(refusal.value)) >= 2


def test_weights_of_any_shapes_are_a_vae_or_refused():
    sizes = st.lists(st.sampled_from((0, 1, 3, 12, 64, 2**31)), max_size=6).map(tuple)
    known = [(name, half) for name in DIMS for half in HALVES]

    @hostile.seeded(60)
    @given(st.data())
    def check(data: st.DataObject) -> None:
        name, half = data.draw(st.sampled_from(known))
        shapes = vae_shapes(name, half, DIMS[name])
        for _ in range(data.draw(st.integers(1, 3))):
            changed = data.draw(st.sampled_from(sorted(shapes)))
            if data.draw(st.booleans()):
                shapes[changed] = data.draw(sizes)
            else:
                shapes[changed.replace(".0.", data.draw(st.sampled_from((".1.", f".{'9' * 90}.", ".x."))), 1)] = (3,)
        try:
            assert working_bytes(shapes, half, (4, 4), 2) > 0
        except VAEError as error:
            assert sentences(str(error)) == 2

    check()
