"""The MODEL as ComfyUI handles it: what it does with patches, with memory and with what cannot be honoured.

Its transformer is in remote_model.py. ComfyUI's memory manager sees here what the workers hold on its own device.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import comfy.model_management
import torch
from comfy.model_patcher import ModelPatcher
from comfy_execution.utils import get_executing_context

from ...distributed.plan.placement import PlacementError
from ...distributed.weights.lora_transfer import PatchSet
from ...wanvideo.base.errors import UserError
from ..common import refusals
from . import infinitetalk_patch
from .weight_patches import check_fit, for_workers, refuse_foreign

if TYPE_CHECKING:
    from .remote_model import RemoteWan

log = logging.getLogger(__name__)

EVERYTHING = 1e30
"""Bytes, as ComfyUI's own unload_all_models asks for."""


def free_shared_gpu(nbytes: float) -> bool:
    """Let ComfyUI's own models leave the GPU that it shares with a worker, as far as `nbytes` need it.

    Returns whether any did.
    """
    management = comfy.model_management
    device = management.get_torch_device()
    if device.type != "cuda":  # ComfyUI runs with --cpu and shares no GPU with the workers
        return False
    # dropping one of our own MODELs would unload the pool that is asking
    ours = [m for m in management.current_loaded_models if isinstance(m.model, RemoteModelPatcher)]
    freed = management.free_memory(nbytes, device, keep_loaded=ours)
    management.soft_empty_cache()
    return bool(freed)


class RemoteModelPatcher(ModelPatcher):
    """The MODEL. Keeps LoRA patches for the workers, and refuses what needs the weights in this process."""

    @property
    def remote(self) -> RemoteWan:
        return self.model.diffusion_model

    # Where ComfyUI would write patches into weights, note them down for the workers instead.

    def load(self, *args: Any, **options: Any) -> None:
        super().load(*args, **options)
        self._hand_over_patches()

    def pre_run(self) -> None:
        self._hand_over_patches()
        if self.remote.runs is not None:
            self.remote.runs.begin()
        super().pre_run()

    def cleanup(self) -> None:
        """Sampling has ended, in whatever way: what the workers hold beyond weights makes room for the VAE."""
        super().cleanup()
        try:
            self.remote.pool.trim()
        except UserError as error:  # must not take the place of the error that ended the sampling
            log.warning("%s", error)

    # One GPU, two users: what the workers hold on ComfyUI's own device is shown to its memory manager. Where that
    # wants some of it for another model, weights step out to host memory; the next forward brings them back. Cancel
    # has to wait for that: an interrupt in the middle of its freeing would make it lose count of its models.

    def model_size(self) -> int:
        """Bytes of the weights on ComfyUI's device once all are there; 1 while the workers have none (0 is unset)."""
        return max(1, self._held()[1])

    def loaded_size(self) -> int:
        """Bytes of the weights on ComfyUI's device now."""
        return self._held()[0]

    def partially_load(self, device_to: Any, extra_memory: float = 0, **options: Any) -> int:
        """There is nothing to split in this process, however little ComfyUI has left."""
        return super().partially_load(device_to, EVERYTHING, **options)

    def partially_unload(self, device_to: Any, memory_to_free: float = 0, **_options: Any) -> int:
        """Weights of `memory_to_free` bytes, or all, leave ComfyUI's device; returns how many did."""
        return self._step_out(memory_to_free)

    def detach(self, unpatch_all: bool = True) -> torch.nn.Module:
        """ComfyUI drops this model, for good with `unpatch_all`.

        While a node runs that is to make room on its device, where the weights step out. Otherwise the user wants all
        memory back (Unload models), and the workers forget the model.
        """
        model = super().detach(unpatch_all)
        if unpatch_all:
            if get_executing_context() is not None:
                self._step_out(EVERYTHING)
            else:
                self._unload_workers()
        return model

    def model_patches_models(self) -> list[ModelPatcher]:
        """What ComfyUI loads beside this model."""
        options = self.model_options["transformer_options"]
        return infinitetalk_patch.loaded_elsewhere(options, super().model_patches_models())

    def _held(self) -> tuple[int, int]:
        return self.remote.pool.models.held(self.remote.spec, self._shared_ranks())

    def _shared_ranks(self) -> Sequence[int]:
        """The workers on ComfyUI's own device: one on a GPU, all of them without any."""
        pool, device = self.remote.pool, comfy.model_management.get_torch_device()
        if device.type != pool.settings.device:
            return ()
        here = [(rank, at.device) for rank, at in enumerate(pool.locations) if at.is_here]
        if device.type == "cpu":
            return [rank for rank, _ in here]
        index = torch.cuda.current_device() if device.index is None else device.index
        return [rank for rank, own in here if own == index]

    def _step_out(self, nbytes: float) -> int:
        ranks = self._shared_ranks()
        if not ranks:
            return 0
        try:
            freed = self.remote.pool.step_out(self.remote.spec, ranks, nbytes)
        except PlacementError as error:
            log.warning("%s The model is read again with the next sampling.", error)
            freed = self.loaded_size()
            self._unload_workers()
        except UserError as error:  # nothing is left to free, and ComfyUI is in the middle of freeing
            log.warning("%s", error)
            return 0
        if freed:
            log.info("Weights of %.1f GiB have left ComfyUI's device to make room.", freed / 2**30)
        return freed

    def _unload_workers(self) -> None:
        try:
            self.remote.pool.unload(self.remote.spec)
        except UserError as error:  # nothing is left to free, and ComfyUI is in the middle of freeing
            log.warning("%s", error)

    def _hand_over_patches(self) -> None:
        if not self.patches:
            self.remote.patches = None
            return
        spec = self.remote.spec
        build = functools.partial(for_workers, dict(self.patches), spec)
        self.remote.patches = PatchSet(str(self.patches_uuid), build)

    def add_patches(
        self, patches: Mapping[Any, Any], strength_patch: float = 1.0, strength_model: float = 1.0
    ) -> list[Any]:
        for patch in patches.values():
            refuse_foreign(patch)
        if strength_patch:
            check_fit(patches, self.remote.header.tensors)
        return super().add_patches(patches, strength_patch, strength_model)

    # What cannot be honoured.

    def add_hook_patches(self, *_args: Any, **_options: Any) -> None:
        refusals.refuse_weight_hooks()

    def get_key_patches(self, *_args: Any, **_options: Any) -> None:
        refusals.refuse_merging()

    def model_state_dict(self, filter_prefix: str | None = None) -> dict[str, torch.Tensor]:
        if filter_prefix is not None:  # Extract and Save Lora, which wants the values and not the names
            refusals.refuse_saving()
        return super().model_state_dict()

    def model_state_dict_for_saving(self, *_args: Any, **_options: Any) -> None:
        refusals.refuse_saving()

    def state_dict_for_saving(self, *_args: Any, **_options: Any) -> None:
        refusals.refuse_saving()

    def set_injections(self, key: str, injections: Sequence[Any]) -> None:
        if injections:
            refusals.refuse_injection(key)

    def add_object_patch(self, name: str, obj: Any) -> None:
        if name.startswith("diffusion_model."):
            refusals.refuse_object_patch(name)
        super().add_object_patch(name, obj)

    def set_model_compute_dtype(self, dtype: torch.dtype | None) -> None:
        if dtype not in (None, self.remote.dtype):
            refusals.refuse_compute_dtype(dtype)

    def add_weight_wrapper(self, name: str, *_args: Any, **_options: Any) -> None:
        refusals.refuse_weight_wrapper(name)

    def deepclone_multigpu(self, *_args: Any, **_options: Any) -> None:
        refusals.refuse_multigpu_clone()
