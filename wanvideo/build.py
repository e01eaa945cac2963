"""Which class runs a configuration."""

from __future__ import annotations

from .animate import AnimateModel
from .config import WanConfig
from .variants import VariantModel


def model_class(config: WanConfig) -> type[VariantModel]:
    """The class of the DiT that a configuration describes."""
    return AnimateModel if config.face else VariantModel
