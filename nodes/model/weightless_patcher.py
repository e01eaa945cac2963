"""A ModelPatcher that refuses, in plain words, operations that need the weights or the blocks in this process."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from comfy.model_patcher import ModelPatcher

from ..common import refusals
from .remote_parts import is_compiled, say_that_nothing_is_compiled


class WeightlessPatcher(ModelPatcher):
    """Refuses operations on weights, which are in other processes; each method raises NotOnWorkers."""

    def add_hook_patches(self, *_args: Any, **_options: Any) -> None:
        """Refuse weights that a hook gives to some of the conditioning."""
        refusals.refuse_weight_hooks()

    def get_key_patches(self, *_args: Any, **_options: Any) -> None:
        """Refuse to hand out weights for a merge."""
        refusals.refuse_merging()

    def model_state_dict(self, filter_prefix: str | None = None) -> dict[str, torch.Tensor]:
        """Return names and shapes of the weights; refuse a prefix, by which Extract and Save Lora asks for values."""
        if filter_prefix is not None:
            refusals.refuse_saving()
        return super().model_state_dict()

    def model_state_dict_for_saving(self, *_args: Any, **_options: Any) -> None:
        """Refuse to save."""
        refusals.refuse_saving()

    def state_dict_for_saving(self, *_args: Any, **_options: Any) -> None:
        """Refuse to save."""
        refusals.refuse_saving()

    def set_injections(self, key: str, injections: Sequence[Any]) -> None:
        """Refuse code that is injected into the layers."""
        if injections:
            refusals.refuse_injection(key)

    def add_object_patch(self, name: str, obj: Any) -> None:
        """Replace a part of the model in this process, such as its sampling; refuse a part of the transformer.

        What torch.compile makes of the transformer or of a part is left out, as nothing of it runs here.
        """
        if name.partition(".")[0] == "diffusion_model":
            if is_compiled(obj):
                say_that_nothing_is_compiled()
                return
            refusals.refuse_object_patch(name)
        super().add_object_patch(name, obj)

    def set_model_compute_dtype(self, dtype: torch.dtype | None) -> None:
        """Refuse a precision other than the transformer's precision as ComfyUI sees it."""
        if dtype not in (None, self.model.diffusion_model.dtype):
            refusals.refuse_compute_dtype(dtype)

    def add_weight_wrapper(self, name: str, *_args: Any, **_options: Any) -> None:
        """Refuse a function around a weight."""
        refusals.refuse_weight_wrapper(name)

    def deepclone_multigpu(self, *_args: Any, **_options: Any) -> None:
        """Refuse a copy of the model on another GPU."""
        refusals.refuse_multigpu_clone()
