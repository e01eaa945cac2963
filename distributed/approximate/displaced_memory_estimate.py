"""How much of each GPU's memory displaced patches need, computed before anything is allocated.

The price of the method is the keys and values of all layers for the whole video: 25 GiB for the 14B at 480p and 81
frames, 58 GiB at 720p, and twice that with both branches of cfg. The exchange through host memory keeps all keys and
values in host memory, once for all GPUs that share a video, and those of a few layers on each GPU. With gathers every
GPU keeps all keys and values, however many GPUs there are.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ...wanvideo.base.config import WanConfig
from ...wanvideo.checkpoint.header import Header
from ...wanvideo.checkpoint.weight_source import DTYPES, WEIGHT_DTYPES, storage_bytes, storage_format
from ..comm.host_kv import FETCHED_AHEAD
from ..plan.degrees import PlanError
from .patch_layout import PatchLayout

_HOST_SHARE = 0.9
"""The share of the host's memory that may be pinned; the rest is for the system and ComfyUI."""
_LAYER_COPIES = 3
"""Full keys and values of one layer that exist at once: the assembled sequence, what arrived, a padded copy."""
_ATTENTION_TENSORS = 8
"""Tensors of a rank's tokens around self-attention, in the compute dtype: input, q, k, v, keys and values to be sent,
two outputs."""


class TooLarge(PlanError):
    """Something does not fit into the memory that is there. The text has the figures and the ways out."""


@dataclass(frozen=True)
class PatchMemory:
    """Bytes on each GPU: the model's weights, the buffers of stale keys and values, and the tensors of a forward.

    `host` is the bytes of the buffers in host memory, for all GPUs together.
    """

    weights: int
    buffers: int
    working: int
    host: int = 0

    @property
    def total(self) -> int:
        """Bytes on each GPU."""
        return self.weights + self.buffers + self.working

    def __str__(self) -> str:
        return (
            f"{gib(self.total)} (weights {gib(self.weights)}, K/V buffers {gib(self.buffers)}, "
            f"working memory about {gib(self.working)}) on each GPU"
            + (f" and {gib(self.host)} of pinned host memory for all" if self.host else "")
        )


def weight_bytes(config: WanConfig, weight_dtype: str, header: Header | None = None) -> int:
    """Bytes of a model's weights in a worker. A file's `header` says which weights are quantised (see
    `storage_bytes`)."""
    return sum(storage_bytes(config, header, WEIGHT_DTYPES[weight_dtype]).values())


def layer_bytes(config: WanConfig, layout: PatchLayout, compute_dtype: str, fp8: bool = False) -> int:
    """Bytes of one layer's keys and values of every rank's patch, for one batch item.

    Patches are padded to the longest (see kv_buffers.Codec). fp8 has a float32 scale for each token and head.
    """
    token = config.dim + 4 * config.num_heads if fp8 else config.dim * DTYPES[compute_dtype].itemsize
    return len(layout.patches) * max(layout.counts) * 2 * token


def working_bytes(config: WanConfig, layout: PatchLayout, compute_dtype: str, slice_tokens: int = 0) -> int:
    """Bytes that the forward of one batch item takes beside weights and buffers; an estimate.

    Counted are one layer's keys and values of the whole video up to three times and, for the rank's tokens, the float32
    residual stream with two temporaries, and the tensors of self-attention or of the feed-forward, whichever are
    larger.
    """
    itemsize, tokens = DTYPES[compute_dtype].itemsize, max(layout.counts)
    layer = 2 * layout.grid.tokens * config.dim * itemsize
    sliced = min(tokens, slice_tokens or tokens)
    attention = _ATTENTION_TENSORS * tokens * config.dim * itemsize
    feed_forward = 2 * sliced * (config.ffn_dim + config.dim) * itemsize
    return _LAYER_COPIES * layer + 3 * 4 * tokens * config.dim + max(attention, feed_forward)


def patch_memory(
    config: WanConfig,
    layout: PatchLayout,
    weight_dtype: str,
    compute_dtype: str,
    items: int = 1,
    at_once: int = 1,
    fp8_buffers: bool = False,
    slice_tokens: int = 0,
    manager: str = "native",
    groups: int = 1,
    header: Header | None = None,
) -> PatchMemory:
    """How much memory a sampling run needs on each GPU.

    Args:
        items: batch items whose buffers a GPU keeps: the branches of cfg times the videos, over the groups of GPUs.
        at_once: how many of these batch items a forward takes together.
        slice_tokens: see `ModelSpec`.
        manager: who exchanges (see `kv_buffers.manager_name`); "host" keeps the buffers in host memory.
        groups: groups of GPUs, which keep buffers of their own.
        header: the header of the model's file.
    """
    layer = items * layer_bytes(config, layout, compute_dtype, fp8_buffers)
    on_host = manager == "host"
    held = FETCHED_AHEAD if on_host else config.num_layers
    if manager.startswith(("official", "distrifuser")):
        held *= 2  # a gather into a list keeps a flat copy until it is waited for: measured with NCCL
    return PatchMemory(
        weights=weight_bytes(config, weight_dtype, header),
        buffers=layer * held,
        working=at_once * working_bytes(config, layout, compute_dtype, slice_tokens),
        host=groups * layer * config.num_layers if on_host else 0,
    )


def capacity(device: str, gpus: Sequence[int], fraction: float) -> int:
    """Bytes that each worker may take: `fraction` of the smallest of the workers' GPUs or, on the CPU, of an equal part
    of the host's memory.

    Args:
        gpus: the indices of the workers' GPUs.
    """
    if device == "cuda":
        return int(fraction * min(torch.cuda.get_device_properties(i).total_memory for i in gpus))
    return int(fraction * host_memory() / len(gpus))


def host_memory() -> int:
    """Bytes of memory that the host has."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def check_weights(config: WanConfig, weight_dtype: str, available: int, header: Header | None = None) -> None:
    """Refuse a model that does not fit even without a video.

    Raises:
        TooLarge: with the figures.
    """
    weights = weight_bytes(config, weight_dtype, header)
    if weights > available:
        raise TooLarge(
            f"The weights in {storage_format(header, weight_dtype)} are {gib(weights)}, and a worker may take "
            f"{gib(available)}: every GPU holds the whole model. Choose a smaller model, a precision or quantization "
            "with fewer bytes, or raise gpu_memory_fraction."
        )


def check_run(need: PatchMemory, available: int, ways_out: list[str]) -> None:
    """Refuse a run whose buffers do not fit.

    Args:
        ways_out: what this user can still change, as parts of a sentence.

    Raises:
        TooLarge: with the figures.
    """
    pinnable = int(_HOST_SHARE * host_memory())
    if need.total <= available and need.host <= pinnable:
        return
    there = f"a worker may take {gib(available)}"
    if need.host:
        there += f" of its GPU and all together {gib(pinnable)} of the host"
    raise TooLarge(
        f"DistriFusion needs {need} for this video, and {there}. "
        f"Use fewer frames or a smaller size, {', '.join(ways_out)}, or run exactly, which needs no buffers: "
        "sync_frequency 1, or XDit+USP WanVideo Model Loader."
    )


def gib(nbytes: int) -> str:
    """Bytes as words, such as `1.5 GiB`."""
    return f"{nbytes / 2**30:.1f} GiB"
