"""Wan's VAEs on several ranks: each decodes or encodes a strip of every frame, exactly.

Before each convolution neighbours exchange the row (or column) beside their common edge. The one attention takes keys
and values of the whole frame, which all gather, at the coarsest resolution. The strips lie across the longer side
of the video: they are shared more evenly then, and the edges are shorter.
"""

from __future__ import annotations

import itertools
import logging
import queue
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import TypeVar

import torch
import torch.distributed as dist

from ...wanvideo.checkpoint.weight_source import DTYPES
from ...wanvideo.vae.vae_coder import Coder, Decoder, Encoder
from ...wanvideo.vae.vae_layers import Frame, WholeFrame
from ...wanvideo.vae.vae_layout import working_bytes
from ...wanvideo.vae.vae_ops import VAEOps
from ..comm.collectives import gather_rows
from ..plan.degrees import shares
from ..plan.placement import PlacementError
from ..protocol.refs import ArenaRef, TensorRef
from ..protocol.requests import DecodeVAE, EncodeVAE, LoadVAE, VAEOptions
from ..protocol.specs import PoolSettings
from ..shm import signs
from ..shm.arena import ArenaReader
from ..shm.cancel import CancelBarrier
from ..shm.signs import Mark
from ..weights.models import Models

log = logging.getLogger(__name__)

_Coder = TypeVar("_Coder", bound=Coder)
_SMALLEST_PIECE = 2**22
_PIECES_ON_THE_WAY = 2
"""Decoded pieces that may wait for their copy to the host: so far the host runs ahead of its GPU."""


@dataclass(frozen=True)
class FrameStrips:
    """How the latent rows (axis 0) or columns (axis 1) of a frame are shared: those of rank i from start to stop."""

    axis: int
    parts: tuple[tuple[int, int], ...]
    rows: int
    columns: int

    @property
    def most(self) -> tuple[int, int]:
        """Latent rows and columns of the largest strip."""
        longest = max(stop - start for start, stop in self.parts)
        return (longest, self.columns) if self.axis == 0 else (self.rows, longest)

    def of(self, rank: int, scale: int = 1) -> tuple[slice, slice]:
        """Rows and columns of a rank, at `scale` times the latent's resolution."""
        mine = slice(*(scale * edge for edge in self.parts[rank]))
        return (mine, slice(None)) if self.axis == 0 else (slice(None), mine)


def share_frame(rows: int, columns: int, ranks: int, options: VAEOptions) -> FrameStrips:
    """Cut a frame of the latent for as many of `ranks` as there are rows or columns."""
    across = columns > rows if options.axis == "auto" else options.axis == "columns"
    length = columns if across else rows
    used = min(ranks, length)
    ends = itertools.accumulate(shares(length, used, options.speeds[:used]), initial=0)
    return FrameStrips(int(across), tuple(itertools.pairwise(ends)), rows, columns)


class Strip:
    """A `wanvideo.vae.vae_layers.Frame` of which this rank has one strip. The ranks of the strips are the first
    ones."""

    def __init__(self, rank: int, strips: FrameStrips):
        self.rank, self.strips, self.size = rank, strips, strips.most
        self._last = len(strips.parts) - 1

    def fill_border(self, frames: torch.Tensor) -> None:
        """Fill the border of the strip with the neighbours' rows or columns (see `Frame`). Every rank of the strips
        calls this."""
        along, across = (1, 2) if self.strips.axis == 0 else (2, 1)
        frames.select(across, 0).zero_()
        frames.select(across, -1).zero_()
        arriving, operations = [], []
        for neighbour, own, edge in ((self.rank - 1, 1, 0), (self.rank + 1, -2, -1)):
            border = frames.select(along, edge)
            if 0 <= neighbour <= self._last:
                sent = frames.select(along, own).contiguous()
                received = torch.empty_like(sent)
                arriving.append((border, received))
                operations += [dist.P2POp(dist.isend, sent, neighbour), dist.P2POp(dist.irecv, received, neighbour)]
            else:
                border.zero_()
        _run(operations)
        for border, received in arriving:
            border.copy_(received)

    def gather(self, x: torch.Tensor) -> torch.Tensor:
        """The whole frame of which x is this rank's strip (see `Frame`); every rank of the strips calls this."""
        along, unit = (1, 2)[self.strips.axis], x.shape[1 + self.strips.axis]
        scale = unit // (self.strips.parts[self.rank][1] - self.strips.parts[self.rank][0])
        pieces, operations = [], []
        for rank, (start, stop) in enumerate(self.strips.parts):
            if rank == self.rank:
                pieces.append(x)
                continue
            shape = list(x.shape)
            shape[along] = scale * (stop - start)
            pieces.append(x.new_empty(shape))
            operations += [dist.P2POp(dist.isend, x, rank), dist.P2POp(dist.irecv, pieces[-1], rank)]
        _run(operations)
        return torch.cat(pieces, dim=along)


def _run(operations: Sequence[dist.P2POp]) -> None:
    if operations:
        with signs.marked(Mark.WAITING):
            for work in dist.batch_isend_irecv(list(operations)):
                work.wait()


class VAEs:
    """The VAE that a worker has, and what it does with it."""

    def __init__(self, rank: int, settings: PoolSettings, device: torch.device, barrier: CancelBarrier, models: Models):
        self.rank, self.ranks, self.device = rank, settings.plan.num_gpus, device
        self.barrier, self.models = barrier, models
        self.weights: dict[str, dict[str, torch.Tensor]] = {}
        self._vae = ""
        self._coders: dict[tuple[str, str], Coder] = {}
        self._inputs, self._outputs = ArenaReader(), ArenaReader()

    @property
    def keys(self) -> tuple[str, ...]:
        """The decoders and encoders whose weights this worker has."""
        return tuple(self.weights)

    @property
    def nbytes(self) -> int:
        """Bytes of the weights, the layers' own order of them not counted."""
        return sum(tensor.nbytes for tensors in self.weights.values() for tensor in tensors.values())

    def load(self, request: LoadVAE) -> None:
        """Take the weights of a decoder or encoder, in place of those of another VAE."""
        if request.vae != self._vae:
            self.drop()
        self._vae, dtype = request.vae, DTYPES[request.dtype]
        self.weights[request.key] = {
            name: self._taken(request.arena, ref, dtype) for name, ref in request.weights.items()
        }
        self._close()

    def _taken(self, arena: ArenaRef, ref: TensorRef, dtype: torch.dtype) -> torch.Tensor:
        signs.step()
        return self._inputs.view(arena, ref).to(self.device, dtype, copy=True)

    def drop(self) -> None:
        """Forget the VAE."""
        self.weights.clear()
        self._coders.clear()

    def decode(self, request: DecodeVAE) -> None:
        """Decode this rank's strip of each latent, and write its pixels where the client reads them.

        Raises:
            PlacementError: the strip does not fit into this device's memory (a collective decision).
            Cancelled: the client has given up; all ranks leave before the same piece.
        """
        try:
            self._decode(request)
        finally:
            self._close()

    def encode(self, request: EncodeVAE) -> None:
        """Encode this rank's strip of a video, and write its latent where the client reads it. Raises as `decode`."""
        try:
            self._encode(request)
        finally:
            self._close()

    def _decode(self, request: DecodeVAE) -> None:
        latent = self._inputs.view(request.arena, request.latent)
        strips = share_frame(latent.shape[-2], latent.shape[-1], self.ranks, request.options)
        piece_bytes = self._fitting_pieces(request.key, Decoder, strips, request.options)
        if self.rank >= len(strips.parts):
            return
        decoder, frame = self._coder(request.key, Decoder, request.options), self._frame(strips)
        rows, columns = strips.of(self.rank)
        pixel_rows, pixel_columns = strips.of(self.rank, decoder.kind.scale)
        out = self._outputs.view(request.out_arena, request.out)[:, :, pixel_rows, pixel_columns]
        done = self._outputs.view(request.out_arena, request.done)[self.rank : self.rank + 1]
        self.barrier.begin(request.id)
        with FrameWriter(self.device, out.flatten(0, 1), done) as writer:
            for item in latent[..., rows, columns]:
                for piece in decoder.decode(item.to(self.device), frame, piece_bytes, self._check):
                    writer.put(piece)
        self.models.memory.release()

    def _encode(self, request: EncodeVAE) -> None:
        frames = self._inputs.view(request.arena, request.frames)
        out = self._outputs.view(request.out_arena, request.out)
        done = self._outputs.view(request.out_arena, request.done)[self.rank : self.rank + 1]
        strips = share_frame(out.shape[-2], out.shape[-1], self.ranks, request.options)
        piece_bytes = self._fitting_pieces(request.key, Encoder, strips, request.options)
        if self.rank >= len(strips.parts):
            return
        encoder, frame = self._coder(request.key, Encoder, request.options), self._frame(strips)
        rows, columns = strips.of(self.rank)
        pixel_rows, pixel_columns = strips.of(self.rank, encoder.kind.scale)
        first = 0
        self.barrier.begin(request.id)
        for piece in encoder.encode(frames[:, pixel_rows, pixel_columns], frame, piece_bytes, self._check):
            out[:, first : first + len(piece), rows, columns] = piece.permute(3, 0, 1, 2).float().cpu()
            first += len(piece)
            done.fill_(first)
        self.models.memory.release()

    def _close(self) -> None:
        """Let go of the client's memory: a video is as large as that."""
        self._inputs, self._outputs = ArenaReader(), ArenaReader()

    def _check(self) -> None:
        signs.step()
        with signs.marked(Mark.WAITING):
            self.barrier.check(self.rank, 0)

    def _frame(self, strips: FrameStrips) -> Frame:
        return Strip(self.rank, strips) if len(strips.parts) > 1 else WholeFrame(strips.most)

    def _coder(self, key: str, kind: type[_Coder], options: VAEOptions) -> _Coder:
        coder = self._coders.get((key, options.convolution))
        if isinstance(coder, kind):
            return coder
        self._forget_coders(key)
        weights = self.weights[key]
        coder = kind(weights, VAEOps(self.device, next(iter(weights.values())).dtype, options.convolution))
        self._coders[key, options.convolution] = coder
        return coder

    def _forget_coders(self, key: str) -> None:
        """A coder has the weights in an order of its own, which is that of one way to convolve."""
        for name in [name for name in self._coders if name[0] == key]:
            del self._coders[name]

    def _fitting_pieces(self, key: str, kind: type[Coder], strips: FrameStrips, options: VAEOptions) -> int:
        """The largest piece that fits on every rank; models are offloaded where even the smallest does not."""
        weights, wanted = self.weights[key], options.piece_mib * 2**20
        shapes = {name: tuple(tensor.shape) for name, tensor in weights.items()}
        itemsize = next(iter(weights.values())).element_size()

        def needed(piece: int) -> int:
            working = working_bytes(shapes, kind.half, strips.most, itemsize, piece)
            return self.nbytes + working  # the layers have the weights in an order of their own beside them

        room = self._least_room()
        if needed(_SMALLEST_PIECE) > room:
            self.models.evict(needed(min(wanted, 2**26)))
            room = self._least_room()
        while wanted > _SMALLEST_PIECE and needed(wanted) > room:
            wanted //= 2
        if needed(wanted) > room:
            raise PlacementError(
                f"The VAE needs {needed(wanted) / 2**30:.1f} GiB on each GPU, and the fullest has "
                f"{max(0, room) / 2**30:.1f} GiB. Use a smaller size, more GPUs, or ComfyUI's tiled nodes, or raise "
                "gpu_memory_fraction."
            )
        return wanted

    def _least_room(self) -> int:
        """Of all ranks, those without a strip included; a collective call."""
        return min(row[0] for row in gather_rows([self.models.memory.room()], self.device, self.ranks))


class FrameWriter:
    """Puts decoded pieces one behind the other into host memory, which a thread does while the GPU goes on.

    Args:
        out: float32 [frames, rows, columns, 3], in memory of another process.
        done: one int64, set to the number of frames written.
    """

    def __init__(self, device: torch.device, out: torch.Tensor, done: torch.Tensor):
        self.device, self.out, self.done, self._next = device, out, done, 0
        self._queue: queue.Queue[tuple[torch.Tensor, torch.cuda.Event | None, int] | None]
        self._queue = queue.Queue(_PIECES_ON_THE_WAY)
        self._thread = threading.Thread(target=self._copy, name="vae-frames", daemon=True)
        self._failed: BaseException | None = None

    def __enter__(self) -> FrameWriter:
        self._thread.start()
        return self

    def put(self, piece: torch.Tensor) -> None:
        """Take the next frames [t, rows, columns, 3], from -1 to 1."""
        pixels, copied = piece.float().add_(1).div_(2).clamp_(0, 1), None
        if self.device.type == "cuda":
            staged = torch.empty(pixels.shape, dtype=pixels.dtype, pin_memory=True)
            pixels = staged.copy_(pixels, non_blocking=True)
            copied = torch.cuda.Event(blocking=True)
            copied.record()
        self._queue.put((pixels, copied, self._next))
        self._next += len(piece)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._queue.put(None)
        self._thread.join()
        if self._failed is not None and kind is None:
            raise self._failed

    @torch.inference_mode()  # which counts in its own thread alone, and `out` was made under it
    def _copy(self) -> None:
        while (work := self._queue.get()) is not None:
            pixels, copied, first = work
            try:
                if copied is not None:
                    copied.synchronize()
                self.out[first : first + len(pixels)] = pixels
                self.done.fill_(first + len(pixels))
            except RuntimeError as error:  # a failed GPU; `put` must not wait for a thread that has ended
                self._failed = error
