"""The names of LoRA files for the loader's own `lora` input, and whether a LoRA belongs to the model at all.

LoraLoaderModelOnly knows ComfyUI's names, kohya's and VideoX-Fun's. Training scripts write other names as well:
diffusers' (`transformer.blocks.0.attn1.to_q`), peft's (`base_model.model.`), DiffSynth's (`pipe.dit.`), LyCORIS'
(`lycoris_`), or names without a prefix. A file may hold a LoRA for each expert of Wan 2.2; a model takes its own.
The ending behind the name of the module (`lora_A.weight`, `alpha`, `diff_b`, ...) is passed on as it is, for ComfyUI to
interpret.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TypeVar

from ....wanvideo.base.tensor_info import listed
from ....wanvideo.base.user_error import InputError
from ....wanvideo.checkpoint.diffusers_names import diffusers_name

log = logging.getLogger(__name__)

_PREFIXES = ("base_model.model.", "model.diffusion_model.", "diffusion_model.", "transformer.", "pipe.dit.", "unet.")
_FLAT_PREFIXES = ("lora_unet__", "lora_unet_", "lora_transformer_", "lycoris_")
NATIVE = "diffusion_model."
Value = TypeVar("Value")

_OF_EXPERT = re.compile(
    r"(?P<before>(?:base_model\.model\.|diffusion_model\.|transformer\.)*)(?:pipe\.)?"
    r"(?:(?P<low>transformer_2|low_noise(?:_model)?|dit2)|(?P<high>transformer_1|high_noise(?:_model)?))\.(?P<rest>.*)"
)
"""Names of tensors for one expert of Wan 2.2. diffusers calls the high-noise expert `transformer`, as other models."""
_PLAIN_HIGH = re.compile(r"(base_model\.model\.)?(transformer|pipe\.dit)\.")
_WORDS = {
    "high": re.compile(r"(?<![a-z])high(?![a-z])|high_?noise"),
    "low": re.compile(r"(?<![a-z])low(?![a-z])|low_?noise"),
}


def expert_of(path: str) -> str | None:
    """Which expert of Wan 2.2 a model is after the name of its file or folder: high, low, or None if it tells neither.

    diffusers' folders are `transformer` and `transformer_2`; files have the word high or low in their names.
    """
    own = Path(path)
    if own.name == "transformer_2" or (own.name == "transformer" and (own.parent / "transformer_2").is_dir()):
        return "low" if own.name == "transformer_2" else "high"
    for name in (own.name.lower(), own.parent.name.lower()):
        found = [expert for expert, word in _WORDS.items() if word.search(name)]
        if found:
            return found[0] if len(found) == 1 else None
    return None


def of_expert(name: str, lora: Mapping[str, Value], model: str) -> Mapping[str, Value]:
    """The tensors of the LoRA file `name` for the expert in the file `model`; all tensors of a file that has none for
    one expert alone.

    Raises:
        InputError: the LoRA has tensors for both experts, and the name of the model's file tells neither.
    """
    split = {key: match for key in lora if (match := _OF_EXPERT.fullmatch(key))}
    if not split:
        return lora
    halves: dict[str, dict[str, Value]] = {"high": {}, "low": {}}
    for key, value in lora.items():
        if match := split.get(key):
            halves["low" if match["low"] else "high"][match["before"] + match["rest"]] = value
        else:
            halves["high"][key] = value
            if not _PLAIN_HIGH.match(key):
                halves["low"][key] = value
    only = [expert for expert, half in halves.items() if half]
    expert = only[0] if len(only) == 1 else expert_of(model)
    if expert is None:
        raise InputError(
            f"LoRA {name} has one half for the high-noise and one for the low-noise model, and the name of "
            f"{Path(model).name} does not tell which of them it is. Give that file a name with the word high or low."
        )
    log.info("LoRA %s: the half for the %s-noise model is taken for %s.", name, expert, Path(model).name)
    return halves[expert]


def with_native_names(
    name: str, lora: Mapping[str, Value], weights: Iterable[str], model: str = ""
) -> dict[str, Value]:
    """Return the tensors of the LoRA file `name` that belong to a model with these `weights`, under ComfyUI's names.

    Args:
        model: the path of the model, whose name tells which expert of Wan 2.2 it is.

    Raises:
        InputError: no tensor belongs to the model, or see `of_expert`.
    """
    lora, modules = of_expert(name, lora, model), _modules(weights)
    found = {key: native for key in lora if (native := _native(key, modules)) is not None}
    strangers = [key for key in lora if key not in found]
    if not found:
        raise InputError(
            f"LoRA {name} is for another model: none of its {len(lora)} tensors belongs to this one "
            f"({listed(strangers)}). Choose a LoRA that was made for Wan."
        )
    if strangers:
        log.warning(
            "LoRA %s: %d of %d tensors belong to this model. Left out: %s.",
            name,
            len(found),
            len(lora),
            listed(strangers),
        )
    return {native: lora[key] for key, native in found.items()}


def _modules(weights: Iterable[str]) -> dict[str, str]:
    """The original name of every module, by all names that LoRA files have for it."""
    modules: dict[str, str] = {}
    for weight in weights:
        original = weight.removesuffix(".weight").removesuffix(".bias")
        theirs = diffusers_name(weight).removesuffix(".weight").removesuffix(".bias")
        for alias in (theirs, original):
            modules[alias.replace(".", "_")] = modules[alias] = original
    return modules


def _native(key: str, modules: Mapping[str, str]) -> str | None:
    """ComfyUI's name of a LoRA's tensor; None where the tensor is for no module of the model."""
    flat = next((prefix for prefix in _FLAT_PREFIXES if key.startswith(prefix)), "")
    rest = key.removeprefix(flat)
    while not flat and (prefix := next((p for p in _PREFIXES if rest.startswith(p)), "")):
        rest = rest.removeprefix(prefix)
    dots = [i for i, letter in enumerate(rest) if letter == "."]
    for dot in reversed(dots):  # the longest name, as one may begin with another
        module = modules.get(rest[:dot])
        if module is not None:
            return f"{NATIVE}{module}{rest[dot:]}"
    return None
