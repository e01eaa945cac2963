"""Which GPUs of this machine the ranks of a pool live on, as a user names them."""

from __future__ import annotations

import os
from collections.abc import Sequence

import torch

from ..plan.degrees import PlanError

_UUID_KINDS = ("GPU-", "MIG-")


def chosen_gpus(names: Sequence[str], num_gpus: int) -> tuple[int, ...]:
    """The indices, by rank, of the first `num_gpus` GPUs that are named, or of all that there are.

    Indices count as torch does: among the GPUs that CUDA_VISIBLE_DEVICES shows, in the order of CUDA_DEVICE_ORDER.
    Asks for names and UUIDs of GPUs only where some are named by UUID, or must be refused.

    Args:
        names: indices, or UUIDs as nvidia-smi lists them, or their beginnings; empty for the first GPUs.

    Raises:
        PlanError: a GPU is named that is not there, or twice, or too few are.
    """
    present = torch.cuda.device_count()
    if not present:
        raise PlanError(
            "device is cuda, but torch finds no CUDA GPU. Check nvidia-smi, CUDA_VISIBLE_DEVICES and that torch is a "
            "CUDA build, or set device to cpu."
        )
    if not names:
        if num_gpus > present:
            raise PlanError(
                f"num_gpus is {num_gpus}, but ComfyUI sees {_gpus(present)}. Set num_gpus to {present} or less, or "
                "check nvidia-smi, CUDA_VISIBLE_DEVICES and ComfyUI's --cuda-device."
            )
        return tuple(range(num_gpus))
    chosen: dict[int, str] = {}
    for name in names:
        index = _index_of(name, present)
        if index in chosen:
            twice = f"{_short(chosen[index])}, {_short(name)}"
            raise PlanError(f"gpus names GPU {index} twice ({twice}). Name each GPU once.")
        chosen[index] = name
    if len(chosen) < num_gpus:
        raise PlanError(
            f"gpus names {_gpus(len(chosen))}, and num_gpus is {num_gpus}. Name {num_gpus}, or set num_gpus to "
            f"{len(chosen)}. {_there_are(present)}"
        )
    return tuple(chosen)[:num_gpus]


def check_no_gpus(names: Sequence[str]) -> None:
    """Check that nobody has named GPUs for workers that will run on the CPU.

    Raises:
        PlanError: somebody has.
    """
    if names:
        raise PlanError(
            f"gpus is {_short(','.join(names))}, but the workers run on the CPU here, as device is cpu or torch finds "
            "no GPU. Leave gpus empty, or set device to cuda and check nvidia-smi."
        )


def _index_of(name: str, present: int) -> int:
    if name.upper().startswith(_UUID_KINDS):
        fitting = [index for index in range(present) if _uuid(index).startswith(name[4:].lower())]
        if len(fitting) > 1:
            several = " and ".join(map(str, fitting))
            raise PlanError(
                f"gpus names {_short(name)}, which the UUIDs of GPUs {several} begin with. Write more of it."
            )
    else:
        index = name.lower().removeprefix("cuda:")
        if not (index.isascii() and index.isdecimal()):
            raise PlanError(
                f"gpus has {_short(name)}, which is neither an index nor a UUID. Write indices such as 0,2,3, or UUIDs "
                "as nvidia-smi -L lists them (their beginnings are enough), or leave gpus empty for the first GPUs."
            )
        fitting = [int(index)] if len(index) < 4 and int(index) < present else []
    if not fitting:
        raise PlanError(f"gpus names {_short(name)}, which is no GPU that ComfyUI sees. {_there_are(present)}")
    return fitting[0]


def _short(text: str) -> str:
    return text if len(text) <= 60 else f"{text[:57]}..."


def _there_are(present: int) -> str:
    """What GPUs there are, as a sentence."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    shown = "" if visible is None else f" (CUDA_VISIBLE_DEVICES, which ComfyUI's --cuda-device sets, is {visible})"
    found = (f"{index} ({torch.cuda.get_device_name(index)}, GPU-{_uuid(index)[:8]})" for index in range(present))
    return f"Choose among {', '.join(found)}{shown}."


def _uuid(index: int) -> str:
    """The UUID of a GPU without the word before it."""
    return str(torch.cuda.get_device_properties(index).uuid).lower()


def _gpus(count: int) -> str:
    return "1 GPU" if count == 1 else f"{count} GPUs"
