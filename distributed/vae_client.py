"""The client's side of decoding with the workers' VAE: sends weights once, the latent, and gets frames."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from ..wanvideo.checkpoint import DTYPES
from ..wanvideo.vae import SCALE, check_latent, frames_of, working_bytes
from .arena import Arena, needed
from .messages import DecodeVAE, LoadVAE, VAEOptions
from .pool import Poll, Pool
from .vae import share_frame

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class VAEWeights:
    """A VAE as it is sent to workers.

    Args:
        key: another one for every other set of weights.
        shapes: of its weights, under their names in Wan's files.
        tensors: gives them; only called when the workers need them.
    """

    key: str
    shapes: Mapping[str, tuple[int, ...]]
    tensors: Callable[[], Mapping[str, torch.Tensor]]


@dataclass(frozen=True)
class Decoded:
    """Frames float32 [B, frames, H, W, 3] from 0 to 1, and the seconds that the slowest worker took."""

    frames: torch.Tensor
    seconds: float


def decode(
    pool: Pool,
    vae: VAEWeights,
    latent: torch.Tensor,
    dtype: str,
    options: VAEOptions | None = None,
    poll: Poll | None = None,
    make_room: Callable[[int], object] | None = None,
    progress: Callable[[int], object] | None = None,
) -> Decoded:
    """Decode latents on all workers, each a strip of every frame.

    Args:
        latent: [B, C, T, h, w] as the VAE knows it, any float dtype and device.
        dtype: "fp32", "fp16" or "bf16", of weights and activations.
        poll, make_room: as in `Pool.forward`, as are the errors.
        progress: called with the number of frames that are there, of all latents.

    Raises:
        VAEError: the VAE or the latent is none that can be decoded here.
        PlacementError: the video does not fit into the GPUs' memory.
    """
    options = options or VAEOptions()
    check_latent(vae.shapes, tuple(latent.shape))
    workers = pool.settings.plan.num_gpus
    strips = share_frame(*latent.shape[-2:], workers, options.axis)
    if len(strips.parts) < workers:
        log.info("The latent has %d rows or columns to share: so many workers decode it.", len(strips.parts))
    with pool.session(poll):
        if make_room is not None and pool.settings.device == "cuda":
            itemsize = DTYPES[dtype].itemsize
            make_room(working_bytes(vae.shapes, strips.most, itemsize, options.piece_mib * 2**20))
        key = f"{vae.key}-{dtype}"
        if key not in pool.vaes:
            _send(pool, vae, key, dtype, poll)
        source = Arena(latent.numel() * 4)
        given = source.write(latent.detach().float())
        batch, _, frames, rows, columns = latent.shape
        shape = batch, frames_of(frames), SCALE * rows, SCALE * columns, 3
        result = Arena(4 * torch.Size(shape).numel() + 8 * workers + 64)
        done, out = result.allocate(torch.int64, (workers,)), result.allocate(torch.float32, shape)
        counts, decoded = result.view(done)[: len(strips.parts)], result.view(out)

        def watch() -> None:
            if poll is not None:
                poll()
            if progress is not None:
                progress(int(counts.min()))

        seconds = pool.ask(
            lambda number: DecodeVAE(number, key, source.ref, given, result.ref, out, done, options),
            (source, result),
            watch,
        )
    return Decoded(decoded, seconds)


def _send(pool: Pool, vae: VAEWeights, key: str, dtype: str, poll: Poll | None) -> None:
    """Give the workers the weights of the decoder, in place of any that they have."""
    tensors = {name: tensor.to(DTYPES[dtype]) for name, tensor in vae.tensors().items() if is_decoders(name)}
    arena = Arena(needed(tensors.values()))
    refs = {name: arena.write(tensor) for name, tensor in tensors.items()}
    pool.ask(lambda number: LoadVAE(number, key, dtype, arena.ref, refs), (arena,), poll)
    log.info("The VAE's decoder (%.0f MiB, %s) is on the workers.", arena.nbytes / 2**20, dtype)


def is_decoders(name: str) -> bool:
    """Whether a weight of the VAE takes part in decoding."""
    return name.startswith(("decoder.", "conv2."))
