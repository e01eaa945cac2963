"""The VAE's decoder on GPUs: its kernels, its error beside torch's own, its memory, and strips on several GPUs."""

from __future__ import annotations

import pytest
import torch
from tiny import relative_error
from torch.nn import functional as F

if not torch.cuda.is_available():
    pytest.skip("needs a CUDA GPU", allow_module_level=True)

from wan_parallel.distributed.messages import PoolSettings, VAEOptions
from wan_parallel.distributed.plan import ParallelPlan
from wan_parallel.distributed.pool import acquire
from wan_parallel.distributed.vae_client import VAEWeights, decode
from wan_parallel.wanvideo.vae import Decoder, WholeFrame, decoder_shapes, random_weights, working_bytes
from wan_parallel.wanvideo.vae_ops import VAEOps, norm

CUDA = torch.device("cuda", 0)
HALVES = (torch.bfloat16, torch.float16)
WEIGHTS = random_weights()
SHAPES = decoder_shapes()


def ops(dtype: torch.dtype) -> VAEOps:
    made = VAEOps(CUDA, dtype)
    if made.triton is None:
        pytest.skip("Triton does not work on this machine")
    return made


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("size", [(2, 5, 7), (3, 33, 130)], ids=str)
@pytest.mark.parametrize(
    "channels, kernel",
    [
        *(((16, 384), (3, 3, 3)), ((384, 384), (3, 3, 3)), ((192, 384), (3, 3, 3)), ((192, 192), (3, 3, 3))),
        *(((96, 96), (3, 3, 3)), ((96, 3), (3, 3, 3)), ((384, 768), (3, 1, 1)), ((384, 192), (3, 3))),
        *(((192, 96), (3, 3)), ((48, 40), (3, 3, 3))),
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


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("channels", [96, 192, 384])
def test_norm_and_silu_write_the_interior_of_a_buffer_and_nothing_else(dtype, channels):
    x, gamma = torch.randn(3, 7, 33, channels, device=CUDA).to(dtype), torch.randn(channels, device=CUDA).to(dtype)
    buffer = torch.zeros(5, 9, 35, channels, device=CUDA, dtype=dtype)
    ops(dtype).norm_silu(x, gamma, buffer[2:, 1:-1, 1:-1])
    interior = buffer[2:, 1:-1, 1:-1].clone()
    assert relative_error(interior, F.silu(norm(x.double(), gamma.double()))) <= torch.finfo(dtype).eps
    buffer[2:, 1:-1, 1:-1] = 0
    assert not buffer.any()


def decoded(dtype: torch.dtype, convolution: str, latent: torch.Tensor, piece_bytes: int = 2**29) -> torch.Tensor:
    weights = {name: tensor.to(CUDA, dtype) for name, tensor in WEIGHTS.items()}
    decoder = Decoder(weights, VAEOps(CUDA, dtype, convolution))
    torch.cuda.reset_peak_memory_stats()
    with torch.inference_mode():
        pieces = [piece.float().cpu() for piece in decoder.decode(latent.to(CUDA), frame_of(latent), piece_bytes)]
    return torch.cat(pieces)


def frame_of(latent: torch.Tensor) -> WholeFrame:
    return WholeFrame(tuple(latent.shape[-2:]))


@pytest.fixture
def no_tf32():
    allowed, torch.backends.cudnn.allow_tf32 = torch.backends.cudnn.allow_tf32, False
    yield
    torch.backends.cudnn.allow_tf32 = allowed


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_the_error_is_that_of_torchs_convolutions(dtype, no_tf32):
    ops(dtype)
    latent = torch.randn(16, 3, 12, 18)
    exact = decoded(torch.float32, "conv3d", latent)
    ours, torchs = (relative_error(decoded(dtype, kind, latent), exact) for kind in ("triton", "conv3d"))
    assert ours <= 1.2 * torchs


def test_memory_stays_within_what_is_expected():
    latent = torch.randn(16, 6, 60, 104)
    for piece in (2**28, 2**29):
        decoded(torch.bfloat16, "auto", latent, piece)
        weights = 2 * sum(tensor.numel() * 2 for tensor in WEIGHTS.values())  # also in the kernels' own order
        used = torch.cuda.max_memory_allocated() - weights
        assert used <= working_bytes(SHAPES, (60, 104), 2, piece)


@pytest.mark.parametrize("gpus", [1, 2, 4])
def test_strips_on_gpus_give_the_frames_of_one(gpus, no_tf32):
    if torch.cuda.device_count() < gpus:
        pytest.skip(f"needs {gpus} CUDA GPUs")
    latent = torch.randn(1, 16, 3, 12, 18)
    exact = decoded(torch.float32, "conv3d", latent[0]).add(1).div(2).clamp(0, 1)
    error = relative_error(decoded(torch.bfloat16, "conv3d", latent[0]).add(1).div(2).clamp(0, 1), exact)
    pool = acquire(PoolSettings(ParallelPlan(gpus), device="cuda"))
    try:
        for options in (VAEOptions(), VAEOptions(axis="rows", piece_mib=1), VAEOptions(convolution="conv3d")):
            frames = decode(pool, VAEWeights("random", SHAPES, lambda: WEIGHTS), latent, "bf16", options).frames[0]
            assert relative_error(frames, exact) <= 1.2 * error
    finally:
        pool.close()
