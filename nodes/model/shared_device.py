"""The device that ComfyUI and the workers share; each can ask the other to make room there."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import comfy.model_management
import torch

from ...distributed.client.pool import Pool
from ...distributed.plan.placement import PlacementError
from ...distributed.protocol.specs import ModelSpec
from ...wanvideo.base.user_error import UserError
from .weightless_patcher import WeightlessPatcher

log = logging.getLogger(__name__)

EVERYTHING = 1e30
"""The bytes to free for all memory: the number that ComfyUI's own unload_all_models asks for."""


def free_shared_gpu(nbytes: float) -> bool:
    """Let ComfyUI's own models leave the GPU that it shares with a worker, as far as `nbytes` need it.

    Returns whether any model left.
    """
    management = comfy.model_management
    device = management.get_torch_device()
    if device.type != "cuda":  # ComfyUI runs with --cpu and shares no GPU with the workers
        return False
    # dropping one of our own MODELs would unload the pool that is asking
    ours = [m for m in management.current_loaded_models if isinstance(m.model, WeightlessPatcher)]
    freed = management.free_memory(nbytes, device, keep_loaded=ours)
    management.soft_empty_cache()
    return bool(freed)


class WaitGivenUp(UserError):
    """Cancel was pressed, or a worker shows no sign of life, while ComfyUI's memory manager waited for the workers."""


@dataclass(frozen=True)
class SharedDevice:
    """The weights of one model that the workers hold on ComfyUI's own device.

    ComfyUI's memory manager is in the middle of freeing when it asks for room here, and would lose count of its models
    by an exception. So a pool that fails is logged and not passed on, and Cancel ends the wait, but is left to the
    sampling to obey. What the workers were asked they do as soon as they can.
    """

    pool: Pool
    spec: ModelSpec

    def held(self) -> tuple[int, int]:
        """Return the bytes of the weights on the device: now, and with the weights back that are in host memory."""
        return self.pool.models.held(self.spec, self._ranks())

    def offload(self, nbytes: float) -> int:
        """Move weights of `nbytes` bytes, or all, to host memory; returns the bytes that left the device.

        Where host memory has no room for the weights, the workers forget the model instead.
        """
        ranks = self._ranks()
        if not ranks:
            return 0
        try:
            freed = self.pool.offload(self.spec, ranks, nbytes, self._poll)
        except PlacementError as error:
            log.warning("%s The model is read again with the next sampling.", error)
            freed = self.held()[0]
            self.unload()
        except UserError as error:
            log.warning("%s", error)
            return 0
        if freed:
            log.info("Weights of %.1f GiB have left ComfyUI's device to make room.", freed / 2**30)
        return freed

    def unload(self) -> None:
        """Let the workers forget the model."""
        try:
            self.pool.unload(self.spec, self._poll)
        except UserError as error:
            log.warning("%s", error)

    def trim(self) -> None:
        """Let the workers give back the memory that only a sampling run needs."""
        try:
            self.pool.trim(self._poll)
        except UserError as error:  # must not take the place of the error that ended the sampling
            log.warning("%s", error)

    def _poll(self) -> None:
        """Give the wait up where it may take long.

        Raises:
            WaitGivenUp: it may.
        """
        if comfy.model_management.processing_interrupted():
            raise WaitGivenUp("Cancel was pressed while workers freed memory. They go on with it by themselves.")
        if self.pool.silence.at_rest:
            raise WaitGivenUp(f"Workers were asked to free memory, and ComfyUI goes on. {self.pool.silence.text}")

    def _ranks(self) -> Sequence[int]:
        """The workers on ComfyUI's own device: one on a GPU, all of them without any."""
        device = comfy.model_management.get_torch_device()
        if device.type != self.pool.settings.device:
            return ()
        here = [(rank, at.device) for rank, at in enumerate(self.pool.locations) if at.is_here]
        if device.type == "cpu":
            return [rank for rank, _ in here]
        index = torch.cuda.current_device() if device.index is None else device.index
        return [rank for rank, own in here if own == index]
