"""Decoding through a pool of real workers: frames, memory, Cancel, and what happens when a worker dies."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest
import testkit
import torch
from testkit import tiny
from wan_parallel.distributed.client.failures import WorkerDied
from wan_parallel.distributed.client.pool import Pool, acquire, running
from wan_parallel.distributed.client.vae_client import VAEWeights, decode, encode
from wan_parallel.distributed.plan.degrees import ParallelPlan
from wan_parallel.distributed.protocol.requests import VAEOptions
from wan_parallel.distributed.protocol.specs import ModelSpec, PoolSettings
from wan_parallel.wanvideo.example.vae_random import RELEASED, random_weights, vae_shapes
from wan_parallel.wanvideo.vae.vae_coder import Decoder, Encoder
from wan_parallel.wanvideo.vae.vae_layers import WholeFrame
from wan_parallel.wanvideo.vae.vae_layout import HALVES, KINDS
from wan_parallel.wanvideo.vae.vae_ops import VAEError, VAEOps

DIM = 8
WEIGHTS = random_weights("2.1", "decoder", DIM)
VAE = VAEWeights("a", vae_shapes("2.1", "decoder", DIM), lambda: WEIGHTS)
LATENT = torch.randn(2, 16, 3, 4, 5, generator=torch.Generator().manual_seed(0))
LONG = torch.randn(1, 16, 40, 8, 8, generator=torch.Generator().manual_seed(0))
ONE_FRAME = VAEOptions(piece_mib=0)


class GivenUp(BaseException):
    """As ComfyUI's interrupt, no Exception."""


@pytest.fixture(scope="module")
def pool() -> Iterator[Pool]:
    pool = acquire(PoolSettings(ParallelPlan(2), device="cpu"))
    yield pool
    pool.close()


def expected(latent: torch.Tensor, weights: dict[str, torch.Tensor] = WEIGHTS) -> torch.Tensor:
    decoder = Decoder(weights, VAEOps(torch.device("cpu"), torch.float32))
    with torch.inference_mode():
        videos = [torch.cat(list(decoder.decode(z, WholeFrame(tuple(z.shape[-2:]))))) for z in latent]
    return ((torch.stack(videos) + 1) / 2).clamp(0, 1)


def test_two_workers_decode_what_one_process_does(pool):
    seen: list[int] = []
    frames = decode(pool, VAE, LATENT, "fp32", ONE_FRAME, progress=seen.append).frames
    assert frames.shape == (2, 9, 32, 40, 3) and frames.dtype == torch.float32
    assert tiny.relative_error(frames, expected(LATENT)) <= 1e-5
    assert seen == sorted(seen) and all(0 <= count <= 18 for count in seen)


def test_weights_travel_once_and_another_vae_takes_their_place(pool):
    sent: list[str] = []

    def vae(key: str) -> VAEWeights:
        return VAEWeights(key, VAE.shapes, lambda: sent.append(key) or WEIGHTS)

    for key in ("b", "b", "c", "c"):
        decode(pool, vae(key), LATENT[:1, :, :1], "fp32")
    assert sent == ["b", "c"]
    assert [worker.vae_bytes for worker in pool.status().workers] == [sum(t.nbytes for t in WEIGHTS.values())] * 2


def test_unloading_the_models_drops_the_vae(pool, tmp_path):
    pool.unload()  # what an earlier test left there would be unloaded to make room, and the VAE with it
    tiny.write_checkpoint(tmp_path / "tiny.safetensors", tiny.TINY)
    spec = ModelSpec(str(tmp_path / "tiny.safetensors"), "fp32", "fp32")
    decode(pool, VAE, LATENT[:1, :, :1], "fp32")
    pool.ensure_ready(spec)
    assert pool.models.vaes
    pool.unload(spec)
    assert not pool.models.vaes
    assert [worker.vae_bytes for worker in pool.status().workers] == [0, 0]
    decode(pool, VAE, LATENT[:1, :, :1], "fp32")


def test_more_workers_than_rows_decode_with_as_many_as_there_are(pool):
    latent = LATENT[:1, :, :, :1, :1]
    frames = decode(pool, VAE, latent, "fp32").frames
    assert tiny.relative_error(frames, expected(latent)) <= 1e-5


@pytest.mark.parametrize("name", KINDS)
def test_two_workers_decode_and_encode_what_one_process_does(pool, name):
    weights = {key: tensor for half in HALVES for key, tensor in random_weights(name, half, 4).items()}
    vae = VAEWeights(f"whole {name}", {key: tuple(tensor.shape) for key, tensor in weights.items()}, lambda: weights)
    latent = torch.randn(1, RELEASED[name].latent, 2, 4, 3, generator=torch.Generator().manual_seed(2))
    frames = decode(pool, vae, latent, "fp32", ONE_FRAME).frames
    scale = KINDS[name].scale
    assert frames.shape == (1, 5, 4 * scale, 3 * scale, 3)
    assert tiny.relative_error(frames, expected(latent, weights)) <= 1e-5
    seen: list[int] = []
    ours = encode(pool, vae, frames[0], "fp32", ONE_FRAME, progress=seen.append)
    encoder = Encoder(weights, VAEOps(torch.device("cpu"), torch.float32))
    with torch.inference_mode():
        theirs = torch.cat(list(encoder.encode(frames[0], WholeFrame((4, 3)))))
    assert ours.shape == latent.shape and seen == sorted(seen) and all(0 <= count <= 2 for count in seen)
    assert tiny.relative_error(ours[0].permute(1, 2, 3, 0), theirs) <= 1e-5
    assert pool.models.vaes == {f"whole {name}-fp32-{half}" for half in HALVES}


@pytest.mark.parametrize("name", KINDS)
def test_images_that_are_no_whole_number_of_latent_pixels_are_refused(pool, name):
    with pytest.raises(VAEError, match=f"multiples of {KINDS[name].scale} ") as refusal:
        encode(pool, VAEWeights("e", vae_shapes(name, "encoder", 4), dict), torch.rand(5, 40, 24, 3)[:, :-2], "fp32")
    assert tiny.sentences(str(refusal.value)) >= 2


@pytest.mark.parametrize("half", HALVES)
def test_another_vae_is_refused_before_the_workers_hear_of_it(pool, half):
    vae = VAEWeights("f", {"decoder.mid.block_1.norm1.weight": (512,)}, dict)
    with pytest.raises(VAEError, match=f"no {half} of"):
        if half == "decoder":
            decode(pool, vae, LATENT, "fp32")
        else:
            encode(pool, vae, torch.rand(5, 32, 24, 3), "fp32")


def test_bf16_is_near(pool):
    frames = decode(pool, VAE, LATENT[:1], "bf16").frames
    assert 1e-5 < tiny.relative_error(frames, expected(LATENT[:1])) < 2e-2


def test_cancel_ends_a_decode_between_pieces_and_the_pool_goes_on(pool):
    decode(pool, VAE, LATENT[:1, :, :1], "fp32")
    begin = time.monotonic()

    def poll() -> None:
        if time.monotonic() > begin + 0.3:
            raise GivenUp

    with pytest.raises(GivenUp):
        decode(pool, VAE, LONG, "fp32", ONE_FRAME, poll=poll)
    assert time.monotonic() - begin < 3
    workers = pool.worker_pids
    frames = decode(pool, VAE, LATENT[:1], "fp32").frames
    assert tiny.relative_error(frames, expected(LATENT[:1])) <= 1e-5
    assert pool.worker_pids == workers
    assert time.monotonic() - begin < 30  # not after all of the long video


def test_a_killed_worker_fails_the_decode_and_the_pool_comes_back(pool):
    decode(pool, VAE, LATENT[:1, :, :1], "fp32")
    killed: list[float] = []

    def poll() -> None:
        if not killed:
            os.kill(pool.worker_pids[1], signal.SIGKILL)
            killed.append(time.monotonic())

    with pytest.raises(WorkerDied):
        decode(pool, VAE, LONG, "fp32", ONE_FRAME, poll=poll)
    assert time.monotonic() - killed[0] < 5
    assert not pool.models.vaes
    frames = decode(pool, VAE, LATENT[:1], "fp32").frames  # new workers get the weights again
    assert tiny.relative_error(frames, expected(LATENT[:1])) <= 1e-5


def test_the_pool_that_runs_is_found(pool):
    decode(pool, VAE, LATENT[:1, :, :1], "fp32")
    assert running() is pool


def test_the_benchmark_runs():
    program = testkit.ROOT / "benchmarks" / "vae_decode.py"
    command = [sys.executable, str(program), "--res", "2x2x3", "--gpus", "2", "--device", "cpu", "--dim", "4"]
    command += ["--precision", "fp32", "--iters", "1", "--vae", ",".join(KINDS)]
    lines = subprocess.run(command, check=True, capture_output=True, text=True, timeout=120).stdout.splitlines()
    rows = [json.loads(line) for line in lines]
    assert [row["vae"] for row in rows] == list(KINDS)
    for row in rows:
        assert row["finite"] and row["error"] <= 1e-5 and row["s"] > 0 and row["gpus"] == 2
