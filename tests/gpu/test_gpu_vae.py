"""Wan's VAEs on GPUs: their kernels, their error beside torch's own, their memory, and strips on several GPUs."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from testkit.tiny import relative_error
from torch.nn import functional as F

if not torch.cuda.is_available():
    pytest.skip("needs a CUDA GPU", allow_module_level=True)

from wan_parallel.distributed.client.pool import acquire
from wan_parallel.distributed.client.vae_client import VAEWeights, decode, encode
from wan_parallel.distributed.plan.degrees import ParallelPlan
from wan_parallel.distributed.protocol.requests import VAEOptions
from wan_parallel.distributed.protocol.specs import PoolSettings
from wan_parallel.wanvideo.example.vae_random import RELEASED, random_weights, vae_shapes
from wan_parallel.wanvideo.vae.vae_coder import Decoder, Encoder
from wan_parallel.wanvideo.vae.vae_layers import WholeFrame
from wan_parallel.wanvideo.vae.vae_layout import HALVES, KINDS, working_bytes
from wan_parallel.wanvideo.vae.vae_ops import VAEOps, norm

CUDA = torch.device("cuda", 0)
HALF_PRECISIONS = (torch.bfloat16, torch.float16)
SIZE = {"2.1": (3, 12, 18), "2.2": (3, 6, 9)}  # latent frames, rows and columns


@cache
def weights_of(vae: str, half: str = "decoder") -> dict[str, torch.Tensor]:
    return random_weights(vae, half)


def latent_of(vae: str, size: tuple[int, int, int]) -> torch.Tensor:
    return torch.randn(RELEASED[vae].latent, *size, generator=torch.Generator().manual_seed(1))


def video_of(vae: str, size: tuple[int, int, int]) -> torch.Tensor:
    frames, rows, columns = 4 * size[0] - 3, size[1] * KINDS[vae].scale, size[2] * KINDS[vae].scale
    return torch.rand(frames, rows, columns, 3, generator=torch.Generator().manual_seed(2))


def ops(dtype: torch.dtype) -> VAEOps:
    made = VAEOps(CUDA, dtype)
    if made.triton is None:
        pytest.skip("Triton does not work on this machine")
    return made


@pytest.mark.parametrize("dtype", HALF_PRECISIONS, ids=str)
@pytest.mark.parametrize("size", [(2, 5, 7), (3, 33, 130)], ids=str)
@pytest.mark.parametrize(
    "channels, kernel",
    [
        *(((16, 384), (3, 3, 3)), ((384, 384), (3, 3, 3)), ((192, 384), (3, 3, 3)), ((192, 192), (3, 3, 3))),
        *(((96, 96), (3, 3, 3)), ((96, 3), (3, 3, 3)), ((384, 768), (3, 1, 1)), ((384, 192), (3, 3))),
        *(((192, 96), (3, 3)), ((48, 40), (3, 3, 3))),
        *(((48, 1024), (3, 3, 3)), ((1024, 512), (3, 3, 3)), ((512, 512), (3, 3)), ((256, 12), (3, 3, 3))),
        *(((160, 160), (3, 3, 3)), ((160, 320), (3, 3, 3)), ((640, 96), (3, 3, 3))),
    ],
    ids=str,
)
def test_a_convolution_is_torchs(dtype, size, channels, kernel):
    (before, after), (frames, rows, columns) = channels, size
    kt, kh, kw = (1, *kernel) if len(kernel) == 2 else kernel
    buffer = torch.randn(frames + kt - 1, rows + kh - 1, columns + kw - 1, before, device=CUDA).to(dtype)
    weight = (torch.randn(after, before, *kernel, device=CUDA) / (before * kt * kh * kw) ** 0.5).to(dtype)
    bias = torch.randn(after, device=CUDA).to(dtype)
    whole = weight.double().view(after, before, kt, kh, kw)
    expected = F.conv3d(buffer.double().permute(3, 0, 1, 2)[None], whole, bias.double())[0].permute(1, 2, 3, 0)
    conv = ops(dtype).conv(weight, bias)
    assert relative_error(conv(buffer, None), expected) <= torch.finfo(dtype).eps
    residual = torch.randn(expected.shape, device=CUDA).to(dtype)
    assert relative_error(conv(buffer, residual), expected + residual.double()) <= torch.finfo(dtype).eps


@pytest.mark.parametrize("dtype", HALF_PRECISIONS, ids=str)
@pytest.mark.parametrize("channels", [96, 160, 192, 384, 1024])
def test_norm_and_silu_write_the_interior_of_a_buffer_and_nothing_else(dtype, channels):
    x, gamma = torch.randn(3, 7, 33, channels, device=CUDA).to(dtype), torch.randn(channels, device=CUDA).to(dtype)
    buffer = torch.zeros(5, 9, 35, channels, device=CUDA, dtype=dtype)
    ops(dtype).norm_silu(x, gamma, buffer[2:, 1:-1, 1:-1])
    interior = buffer[2:, 1:-1, 1:-1].clone()
    assert relative_error(interior, F.silu(norm(x.double(), gamma.double()))) <= torch.finfo(dtype).eps
    buffer[2:, 1:-1, 1:-1] = 0
    assert not buffer.any()


def decoded(
    dtype: torch.dtype, convolution: str, vae: str, latent: torch.Tensor, piece_bytes: int = 2**29
) -> torch.Tensor:
    decoder = Decoder(on_gpu(vae, "decoder", dtype), VAEOps(CUDA, dtype, convolution))
    torch.cuda.reset_peak_memory_stats()
    with torch.inference_mode():
        pieces = decoder.decode(latent.to(CUDA), WholeFrame(tuple(latent.shape[-2:])), piece_bytes)
        return torch.cat([piece.float().cpu() for piece in pieces])


def encoded(
    dtype: torch.dtype, convolution: str, vae: str, video: torch.Tensor, piece_bytes: int = 2**29
) -> torch.Tensor:
    encoder, scale = Encoder(on_gpu(vae, "encoder", dtype), VAEOps(CUDA, dtype, convolution)), KINDS[vae].scale
    size = video.shape[1] // scale, video.shape[2] // scale
    torch.cuda.reset_peak_memory_stats()
    with torch.inference_mode():
        pieces = encoder.encode(video, WholeFrame(size), piece_bytes)
        return torch.cat([piece.float().cpu() for piece in pieces])


def on_gpu(vae: str, half: str, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    return {name: tensor.to(CUDA, dtype) for name, tensor in weights_of(vae, half).items()}


@pytest.fixture
def no_tf32():
    allowed, torch.backends.cudnn.allow_tf32 = torch.backends.cudnn.allow_tf32, False
    yield
    torch.backends.cudnn.allow_tf32 = allowed


@pytest.mark.parametrize("dtype", HALF_PRECISIONS, ids=str)
@pytest.mark.parametrize("vae", KINDS)
def test_the_error_is_that_of_torchs_convolutions(vae, dtype, no_tf32):
    ops(dtype)
    for run, given in ((decoded, latent_of(vae, SIZE[vae])), (encoded, video_of(vae, SIZE[vae]))):
        exact = run(torch.float32, "conv3d", vae, given)
        ours, torchs = (relative_error(run(dtype, kind, vae, given), exact) for kind in ("triton", "conv3d"))
        assert ours <= 1.2 * torchs, run.__name__


@pytest.mark.parametrize("half", HALVES)
@pytest.mark.parametrize("vae, size", [("2.1", (6, 60, 104)), ("2.2", (6, 44, 80))])
def test_memory_stays_within_what_is_expected(vae, size, half):
    run, given = (decoded, latent_of(vae, size)) if half == "decoder" else (encoded, video_of(vae, size))
    for piece in (2**28, 2**29):
        run(torch.bfloat16, "auto", vae, given, piece)
        weights = 2 * sum(tensor.numel() * 2 for tensor in weights_of(vae, half).values())  # also in the kernels' order
        used = torch.cuda.max_memory_allocated() - weights
        assert used <= working_bytes(vae_shapes(vae, half), half, size[1:], 2, piece)


@pytest.mark.parametrize("gpus, speeds", [(1, ()), (2, ()), (2, (3, 1)), (4, ())], ids=str)
@pytest.mark.parametrize("vae", KINDS)
def test_strips_on_gpus_give_the_frames_and_the_latent_of_one(vae, gpus, speeds, no_tf32):
    if torch.cuda.device_count() < gpus:
        pytest.skip(f"needs {gpus} CUDA GPUs")
    latent, video = latent_of(vae, SIZE[vae]), video_of(vae, SIZE[vae])
    exact = decoded(torch.float32, "conv3d", vae, latent).add(1).div(2).clamp(0, 1)
    error = relative_error(decoded(torch.bfloat16, "conv3d", vae, latent).add(1).div(2).clamp(0, 1), exact)
    exact_latent = encoded(torch.float32, "conv3d", vae, video)
    latent_error = relative_error(encoded(torch.bfloat16, "conv3d", vae, video), exact_latent)
    whole = {name: tensor for half in HALVES for name, tensor in weights_of(vae, half).items()}
    sent = VAEWeights(f"random {vae}", {name: tuple(tensor.shape) for name, tensor in whole.items()}, lambda: whole)
    pool = acquire(PoolSettings(ParallelPlan(gpus, speeds=speeds), device="cuda"))
    try:
        for options in (VAEOptions(), VAEOptions(axis="rows", piece_mib=1), VAEOptions(convolution="conv3d")):
            frames = decode(pool, sent, latent[None], "bf16", options).frames[0]
            assert relative_error(frames, exact) <= 1.2 * error
            found = encode(pool, sent, video, "bf16", options)[0].permute(1, 2, 3, 0)
            assert relative_error(found, exact_latent) <= 1.2 * latent_error
    finally:
        pool.close()
