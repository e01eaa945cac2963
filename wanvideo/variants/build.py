"""Which class runs a configuration."""

from __future__ import annotations

from ..base.config import WanConfig
from .animate import AnimateModel
from .s2v import SoundModel
from .variant_model import VariantModel


def model_class(config: WanConfig) -> type[VariantModel]:
    """The class of the DiT that a configuration describes."""
    if config.face:
        return AnimateModel
    return SoundModel if config.sound else VariantModel
