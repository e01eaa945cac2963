"""The MODEL as ComfyUI handles it: LoRA patches on their way to the workers, and ComfyUI's view of the workers' memory.

Its transformer is in remote_model.py, and what it refuses in weightless_patcher.py.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from comfy.model_patcher import ModelPatcher
from comfy_execution.utils import get_executing_context

from ...distributed.client.displaced_runs import DisplacedRuns
from ...distributed.weights.lora_transfer import LoraSet
from . import infinitetalk_patch
from .shared_device import EVERYTHING, SharedDevice
from .weight_patches import check_fit, for_workers, refuse_foreign
from .weightless_patcher import WeightlessPatcher

if TYPE_CHECKING:
    from .remote_model import RemoteWan


def displaced_runs(model: object) -> DisplacedRuns | None:
    """The sampling runs of a MODEL of the DistriFusion loader; None for any other MODEL."""
    runs = model.remote.runs if isinstance(model, RemoteModelPatcher) else None
    return runs if isinstance(runs, DisplacedRuns) else None


class RemoteModelPatcher(WeightlessPatcher):
    """The MODEL. Keeps LoRA patches for the workers, and shows the workers' memory to ComfyUI's memory manager."""

    @property
    def remote(self) -> RemoteWan:
        """The transformer, which asks the workers."""
        return self.model.diffusion_model

    @property
    def shared_device(self) -> SharedDevice:
        """The weights of this model on ComfyUI's own device, which the workers hold."""
        return SharedDevice(self.remote.pool, self.remote.spec)

    # Where ComfyUI would write patches into weights, note them down for the workers instead.

    def load(self, *args: Any, **options: Any) -> None:
        """Load as ComfyUI does, with the patches left to the workers."""
        super().load(*args, **options)
        self._hand_over_patches()

    def pre_run(self) -> None:
        """Begin to sample: hand the patches over, and begin a new run."""
        self._hand_over_patches()
        if self.remote.runs is not None:
            self.remote.runs.begin()
        super().pre_run()

    def cleanup(self) -> None:
        """End sampling, however it ended: workers free the memory that they hold beyond weights, for the VAE."""
        super().cleanup()
        self.shared_device.trim()

    # ComfyUI's memory manager sees the weights that the workers hold on ComfyUI's own device. When the manager wants
    # room for another model, weights move to host memory; the next forward brings the weights back.

    def model_size(self) -> int:
        """Bytes of the weights on ComfyUI's device once all are there; 1 while the workers have none (0 is unset)."""
        return max(1, self.shared_device.held()[1])

    def loaded_size(self) -> int:
        """Bytes of the weights on ComfyUI's device now."""
        return self.shared_device.held()[0]

    def partially_load(self, device_to: Any, extra_memory: float = 0, **options: Any) -> int:
        """Load as a whole, however little memory ComfyUI has left: there is nothing to split in this process."""
        return super().partially_load(device_to, EVERYTHING, **options)

    def partially_unload(self, device_to: Any, memory_to_free: float = 0, **_options: Any) -> int:
        """Let weights of `memory_to_free` bytes, or all, leave ComfyUI's device; returns the bytes that did."""
        return self.shared_device.offload(memory_to_free)

    def detach(self, unpatch_all: bool = True) -> torch.nn.Module:
        """Let go of this model, for good with `unpatch_all`, as ComfyUI drops it.

        While a node runs, ComfyUI wants room on its device, and the weights there move to host memory. Otherwise the
        user wants all memory back (Unload models), and the workers forget the model.
        """
        model = super().detach(unpatch_all)
        if unpatch_all:
            if get_executing_context() is not None:
                self.shared_device.offload(EVERYTHING)
            else:
                self.shared_device.unload()
        return model

    def model_patches_models(self) -> list[ModelPatcher]:
        """The models that ComfyUI loads beside this one."""
        options = self.model_options["transformer_options"]
        return infinitetalk_patch.loaded_elsewhere(options, super().model_patches_models())

    def _hand_over_patches(self) -> None:
        if not self.patches:
            self.remote.loras = None
            return
        spec = self.remote.spec
        build = functools.partial(for_workers, dict(self.patches), spec)
        self.remote.loras = LoraSet(str(self.patches_uuid), build)

    def add_patches(
        self, patches: Mapping[Any, Any], strength_patch: float = 1.0, strength_model: float = 1.0
    ) -> list[Any]:
        """Add LoRA patches as ComfyUI does.

        Raises:
            NotOnWorkers: the patches bring the weights of another model, or fit no weight of this model.
        """
        for patch in patches.values():
            refuse_foreign(patch)
        if strength_patch:
            check_fit(patches, self.remote.header.tensors)
        return super().add_patches(patches, strength_patch, strength_model)
