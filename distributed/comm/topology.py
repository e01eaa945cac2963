"""Finds out how a GPU reaches the others of its pool, for the status. Changes nothing."""

from __future__ import annotations

import os
from collections.abc import Sequence
from importlib import import_module

import torch

CPU, NVLINK, PEER_ACCESS = "CPU", "NVLink", "peer access"


def link_kind(device: torch.device, others: Sequence[int]) -> str:
    """What tensors of `device` travel through to the other GPUs: NVLink, peer access (over PCIe), host memory ...

    Args:
        others: indices of the pool's other GPUs on this host.
    """
    if device.type != "cuda":
        return CPU
    if not others:
        return "no other GPU"
    if os.environ.get("NCCL_P2P_DISABLE") == "1":
        return "host memory (NCCL_P2P_DISABLE is set)"
    if not all(torch.cuda.can_device_access_peer(device.index, other) for other in others):
        return "host memory"
    return NVLINK if _nvlink(device.index, others) else PEER_ACCESS


def _nvlink(index: int, others: Sequence[int]) -> bool:
    """Whether NVML says that all of `others` are reached by NVLink; False where NVML cannot be asked."""
    try:
        nvml = import_module("pynvml")
    except ImportError:
        return False
    try:
        nvml.nvmlInit()
        mine, *theirs = (nvml.nvmlDeviceGetHandleByUUID(_uuid(i)) for i in (index, *others))
        found = [nvml.nvmlDeviceGetP2PStatus(mine, other, nvml.NVML_P2P_CAPS_INDEX_NVLINK) for other in theirs]
    except nvml.NVMLError:
        return False
    return all(status == nvml.NVML_P2P_STATUS_OK for status in found)


def _uuid(index: int) -> bytes:
    """NVML's name for a GPU; its order need not be torch's."""
    return f"GPU-{torch.cuda.get_device_properties(index).uuid}".encode()
