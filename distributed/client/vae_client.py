"""The client's side of decoding and encoding with the workers' VAE: sends weights once, and gets frames or latents."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch

from ...wanvideo.checkpoint.weight_source import DTYPES
from ...wanvideo.vae.vae_layout import Half, check_latent, frames_of, kind_of, latent_frames, weights_of, working_bytes
from ...wanvideo.vae.vae_ops import VAEError
from ..protocol.requests import DecodeVAE, EncodeVAE, LoadVAE, VAEOptions
from ..shm.arena import needed
from ..worker.vae_worker import FrameStrips, share_frame
from .pool import Pool
from .preparation import MakeRoom
from .rpc import Poll

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
    make_room: MakeRoom | None = None,
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
    options = _with_speeds(options, pool)
    scale = kind_of(vae.shapes, "decoder").scale
    check_latent(vae.shapes, tuple(latent.shape))
    batch, _, frames, rows, columns = latent.shape
    shape = batch, frames_of(frames), scale * rows, scale * columns, 3
    work = _Work(pool, vae, dtype, options, (rows, columns), poll, progress)
    work.make_room("decoder", make_room)
    with pool.session(poll):
        work.prepare("decoder")
        decoded, seconds = work.run(DecodeVAE, "decoder", latent, shape)
    return Decoded(decoded, seconds)


def encode(
    pool: Pool,
    vae: VAEWeights,
    frames: torch.Tensor,
    dtype: str,
    options: VAEOptions | None = None,
    poll: Poll | None = None,
    make_room: MakeRoom | None = None,
    progress: Callable[[int], object] | None = None,
) -> torch.Tensor:
    """Encode a video on all workers, each a strip of every frame. Arguments and errors as of `decode`.

    Args:
        frames: [T, scale * h, scale * w, 3] from 0 to 1, any float dtype and device; a latent row is 8 pixels high,
            one of Wan 2.2's VAE 16.
        progress: called with the number of latent frames that are there.

    Returns:
        The mean of the latent, float32 [1, C, t, h, w].
    """
    options = _with_speeds(options, pool)
    scale = kind_of(vae.shapes, "encoder").scale
    count, height, width, channels = frames.shape
    if channels != 3 or height % scale or width % scale or not frames.numel():
        raise VAEError(
            f"The images have the shape {list(frames.shape)}, but this VAE encodes [frames, height, width, 3] with "
            f"multiples of {scale} pixels. Scale or crop them."
        )
    size = height // scale, width // scale
    shape = vae.shapes["conv1.weight"][0] // 2, latent_frames(count), *size
    work = _Work(pool, vae, dtype, options, size, poll, progress)
    work.make_room("encoder", make_room)
    with pool.session(poll):
        work.prepare("encoder")
        latent, _ = work.run(EncodeVAE, "encoder", frames, shape)
    return latent.unsqueeze(0)


def _with_speeds(options: VAEOptions | None, pool: Pool) -> VAEOptions:
    return replace(options or VAEOptions(), speeds=pool.settings.plan.speeds)


@dataclass(frozen=True)
class _Work:
    """One decode or encode of a frame of `size` latent rows and columns."""

    pool: Pool
    vae: VAEWeights
    dtype: str
    options: VAEOptions
    size: tuple[int, int]
    poll: Poll | None
    progress: Callable[[int], object] | None

    @property
    def strips(self) -> FrameStrips:
        """How the workers share a frame."""
        return share_frame(*self.size, self.pool.settings.plan.num_gpus, self.options)

    @property
    def name(self) -> str:
        """What the workers call the VAE in this precision."""
        return f"{self.vae.key}-{self.dtype}"

    def make_room(self, half: Half, make_room: MakeRoom | None) -> None:
        """Make room on the GPU that we share; without the pool's turn."""
        if make_room is not None and self.pool.settings.device == "cuda":
            itemsize, piece = DTYPES[self.dtype].itemsize, self.options.piece_mib * 2**20
            make_room(working_bytes(self.vae.shapes, half, self.strips.most, itemsize, piece))

    def prepare(self, half: Half) -> None:
        """Send the weights of a half that the workers don't have."""
        workers, used = self.pool.settings.plan.num_gpus, len(self.strips.parts)
        if used < workers:
            log.info("The latent has %d rows or columns to share: so many workers take part.", used)
        key = f"{self.name}-{half}"
        if key in self.pool.models.vaes:
            return
        dtype = DTYPES[self.dtype]
        tensors = {name: tensor.to(dtype) for name, tensor in weights_of(half, self.vae.tensors()).items()}
        arena = self.pool.make_arena(needed(tensors.values()))
        refs = {name: arena.write(tensor) for name, tensor in tensors.items()}
        self.pool.ask(lambda number: LoadVAE(number, self.name, key, self.dtype, arena.ref, refs), (arena,), self.poll)
        log.info("The VAE's %s (%.0f MiB, %s) is on the workers.", half, arena.nbytes / 2**20, self.dtype)

    def run(
        self, kind: type[DecodeVAE] | type[EncodeVAE], half: Half, given: torch.Tensor, shape: tuple[int, ...]
    ) -> tuple[torch.Tensor, float]:
        """Send the input, and wait for a result of `shape`; with the seconds of the slowest worker.

        The result lies where the workers have written it: a video is not copied again.
        """
        workers = self.pool.settings.plan.num_gpus
        source = self.pool.make_arena(given.numel() * 4)
        sent = source.write(given.detach().float())
        result = self.pool.make_arena(4 * math.prod(shape) + 8 * workers + 64)
        done, out = result.allocate(torch.int64, (workers,)), result.allocate(torch.float32, shape)
        counts, tensor = result.view(done)[: len(self.strips.parts)], result.view(out)

        def watch() -> None:
            if self.poll is not None:
                self.poll()
            if self.progress is not None:
                self.progress(int(counts.min()))

        seconds = self.pool.ask(
            lambda number: kind(number, f"{self.name}-{half}", source.ref, sent, result.ref, out, done, self.options),
            (source, result),
            watch,
        )
        return tensor, seconds
