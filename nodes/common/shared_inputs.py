"""Inputs that several nodes have, with the same limits and defaults. Their ids are the names of the functions."""

from __future__ import annotations

from comfy_api.latest import io

from .model_files import model_names
from .settings import ATTENTION_MODES, DEVICES


def model_file(input_id: str, tooltip: str) -> io.Input:
    """A file or folder among ComfyUI's diffusion models; its id is `input_id`."""
    return io.Combo.Input(input_id, options=model_names(), tooltip=tooltip)


def num_gpus(tooltip: str) -> io.Input:
    """The number of workers."""
    return io.Int.Input("num_gpus", default=2, min=1, max=8, tooltip=tooltip)


def gpu_memory_fraction(tooltip: str, optional: bool = False) -> io.Input:
    """The share of its GPU that each worker may take."""
    return io.Float.Input(
        "gpu_memory_fraction", default=0.9, min=0.1, max=1.0, step=0.05, optional=optional, tooltip=tooltip
    )


def attention_mode(tooltip: str) -> io.Input:
    """The attention kernel."""
    return io.Combo.Input(
        "attention_mode", options=list(ATTENTION_MODES), default="auto", optional=True, tooltip=tooltip
    )


def device() -> io.Input:
    """The kind of device that the workers run on."""
    return io.Combo.Input(
        "device",
        options=list(DEVICES),
        default="auto",
        optional=True,
        tooltip="auto: the GPUs where there are any, else the CPU. cpu is meant for tests: it is slow.",
    )


def gpus() -> io.Input:
    """The GPUs that the workers run on."""
    return io.String.Input(
        "gpus",
        default="",
        optional=True,
        tooltip=(
            "Which GPUs the workers run on, one for each, in this order. Empty: the first ones. Else indices, such as "
            "1,2,3, which leaves the first GPU to ComfyUI, its text encoder and VAE; or UUIDs as nvidia-smi -L lists "
            "them (their beginnings are enough, such as GPU-1234abcd). Indices count as ComfyUI does (cuda:0 ...): "
            "among the GPUs that CUDA_VISIBLE_DEVICES shows, in the order of CUDA_DEVICE_ORDER; PCI_BUS_ID is that of "
            "nvidia-smi. Of more than num_gpus the first are taken."
        ),
    )


def after() -> io.Input:
    """An input of the status nodes that makes them wait."""
    return io.AnyType.Input("after", optional=True, tooltip="Any output. The status is taken once it is there.")
