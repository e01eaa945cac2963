"""ComfyUI's model around the transformer (BaseModel), changed for a transformer that runs in other processes."""

from __future__ import annotations

import functools
import logging
from typing import Any

import comfy.model_base
import torch

from ...wanvideo.base.inputs import OVERFLOW, check_numbers
from ...wanvideo.base.user_error import InputError
from ..common import refusals
from .conditioning_inputs import check_start_image, latent_node
from .remote_parts import RemotePart, is_compiled, say_that_nothing_is_compiled

log = logging.getLogger(__name__)


class _Weightless(comfy.model_base.BaseModel):
    """The methods of ComfyUI's Wan model that differ without weights. ComfyUI's class follows in the bases."""

    warned = ""
    """The warning that the run under way has had: each conditioning would give it again."""

    def __setattr__(self, name: str, value: Any) -> None:
        """Set an attribute; refuse another transformer, and leave out a compiled one, which would run no faster."""
        if name != "diffusion_model" or isinstance(value, RemotePart):
            super().__setattr__(name, value)
        elif is_compiled(value):
            say_that_nothing_is_compiled()
        else:
            refusals.refuse_object_patch(name)

    def memory_required(self, *_args: Any, **_options: Any) -> float:
        """Return 0, as activations lie in the workers. ComfyUI then puts both branches of cfg into one batch."""
        return 0.0

    def process_latent_in(self, latent: torch.Tensor) -> torch.Tensor:
        """Normalise a latent as ComfyUI does; refuse a latent of another model."""
        self._check_channels(latent)
        if latent.is_floating_point() or latent.is_complex():  # ComfyUI makes floating-point numbers of whole ones
            check_numbers("The latent", latent, OVERFLOW)
        return super().process_latent_in(latent)

    def concat_cond(self, **inputs: Any) -> torch.Tensor | None:
        """Return the channels of a start image as ComfyUI does; refuse an image without channels in the model."""
        self._check_channels(inputs["noise"])
        warning = check_start_image(self.diffusion_model.header.config, inputs.get("concat_latent_image"))
        if warning and warning != self.warned:
            self.warned = warning
            log.warning("%s", warning)
        return super().concat_cond(**inputs)

    def state_dict_for_saving(self, *_args: Any, **_options: Any) -> None:
        """Refuse to save."""
        refusals.refuse_saving()

    def _check_channels(self, latent: torch.Tensor) -> None:
        config = self.diffusion_model.header.config
        wanted = self.diffusion_model.out_dim
        if latent.ndim != 5 or latent.shape[1] != wanted:
            raise InputError(
                f"The latent has the shape {list(latent.shape)}, but this {config.variant} model takes videos of "
                f"{wanted} channels ([batch, {wanted}, frames, height, width]). Connect {latent_node(config)}, or a "
                "video encoded with this model's own VAE."
            )


@functools.cache
def weightless(cls: type) -> type:
    """Return a subclass of ComfyUI's class `cls` of a Wan model, for a transformer that is a `RemoteWan`."""
    return type(f"Remote{cls.__name__}", (_Weightless, cls), {})
