"""Translates the inputs that ComfyUI gives a Wan transformer beside latent, timestep and text for the pool."""

from __future__ import annotations

from collections.abc import Mapping
from types import FunctionType
from typing import Any

from ...wanvideo.base.conditioning import Conditioning
from ...wanvideo.base.config import WanConfig
from ...wanvideo.base.options import PLAIN_ROPE, Options, RopeOptions
from ..common import refusals


def latent_node(config: WanConfig) -> str:
    """The node whose latent and conditioning a model of this variant takes."""
    return config.kind.latent_node(config)


def check_start_image(config: WanConfig, image: object | None) -> str:
    """Refuse a start image (or control video) for which the model has no channels.

    Returns:
        A warning where the model has channels for a start image and there is none; "" otherwise.

    Raises:
        WrongVariant: a text-to-video or VACE model is given a start image.
    """
    takes_image = config.in_dim > config.out_dim and all(variant.start_image for variant in config.variants)
    if image is not None and not takes_image:
        refusals.refuse_variant(
            "a start image or control video (concat_latent_image)", config.variant, "WanImageToVideo"
        )
    if image is not None or not takes_image:
        return ""
    return (  # ComfyUI puts zeros there
        f"This is an {config.variant} model, and the conditioning has no image for it. "
        f"Connect {latent_node(config)} with an image or video."
    )


def from_comfyui(config: WanConfig, transformer_options: Mapping[str, Any], inputs: Mapping[str, Any]) -> Conditioning:
    """Translate the keyword arguments of ComfyUI's `WanModel.forward`.

    Raises:
        NotOnWorkers, WrongVariant: an argument has no meaning to the workers or to this variant.
    """
    taken = {name: inputs.get(name) for name in _taken(config)}
    refusals.refuse_transformer_options(transformer_options)
    refusals.refuse_inputs({name: value for name, value in inputs.items() if name not in taken}, config.variant)
    conditioning = Conditioning(
        Options(skip_blocks=skipped_blocks(transformer_options), rope=_rope(transformer_options)),
        **{given.name: taken[given.key.name] for _, given in config.inputs if given.key is not None},
    )
    for variant in config.variants:
        conditioning = variant.arrange(conditioning, taken)
    return conditioning


def _taken(config: WanConfig) -> set[str]:
    """The keyword arguments that a model of this variant reads, and those that ComfyUI's own model ignores."""
    names = {given.key.name for _, given in config.inputs if given.key is not None}
    for variant in config.variants:
        names |= {key.name for key in variant.settings} | set(variant.ignored)
    return names


def _skip(args: dict[str, Any], extra: dict[str, Any]) -> dict[str, Any]:
    return args


def skipped_blocks(transformer_options: Mapping[str, Any]) -> tuple[int, ...]:
    """The numbers of the blocks that SkipLayerGuidanceDiT skips by replacing them with a function like `_skip`.

    Raises:
        NotOnWorkers: a block is replaced by anything else.
    """
    replaced = transformer_options.get("patches_replace", {}).get("dit", {})
    others = [function for function in replaced.values() if not _only_skips(function)]
    if others:
        refusals.refuse_replacement("dit", others)
    return tuple(sorted(key[1] for key in replaced if key[0] == "double_block"))  # Wan has no others


def _only_skips(function: object) -> bool:
    """Whether a function's code is that of `_skip`, whatever its names."""
    if not isinstance(function, FunctionType):
        return False
    code = function.__code__
    return code.co_code == _skip.__code__.co_code and code.co_argcount == 2


def _rope(transformer_options: Mapping[str, Any]) -> RopeOptions:
    given = transformer_options.get("rope_options")
    if not given:
        return PLAIN_ROPE
    unknown = given.keys() - RopeOptions.__dataclass_fields__.keys()
    if unknown:
        refusals.refuse_rope_options(sorted(unknown))
    return RopeOptions(**{name: float(value) for name, value in given.items()})
