"""InfiniteTalk: the inputs that WanInfiniteTalkToVideo has left in a MODEL's options, and the file of its layers.

ComfyUI loads the layers into its own process (ModelPatchLoader) and patches each block with the layers. The workers
read the layers from the same file. As a MODEL_PATCH does not know its file, this module searches the files that ComfyUI
lists and compares every number. It needs no ComfyUI.
"""

from __future__ import annotations

import logging
import os
import weakref
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from ...wanvideo.base.conditioning import Conditioning
from ...wanvideo.base.regular_file import FileIdentity, open_regular
from ...wanvideo.base.tensor_info import CheckpointError, FileHeader
from ...wanvideo.checkpoint.file_header import read_file_header
from ...wanvideo.checkpoint.mapped_file import MappedFile
from ..common import refusals

log = logging.getLogger(__name__)

_LAYERS, _PLACES = "MultiTalkCrossAttnPatch", "MultiTalkGetAttnMapPatch"  # ComfyUI's classes


@dataclass(frozen=True)
class PatchFile:
    """The file that holds the numbers of a model patch, with the stamp of its header."""

    path: str
    stamp: str


_files: weakref.WeakKeyDictionary[torch.nn.Module, tuple[PatchFile, FileIdentity]] = weakref.WeakKeyDictionary()
"""The file of each model patch, and what tells this file from a changed one."""


@dataclass(frozen=True)
class InfiniteTalkInputs:
    """The inputs of InfiniteTalk that a MODEL's options carry.

    Args:
        model_patch: ComfyUI's ModelPatcher of the layers.
        scale: factor of the attention to speech.
        audio: audio tokens [1, latent frames, tokens, width]; the tokens of a second speaker follow the first's.
        masks: masks of two speakers over the tokens of a frame, [2, rows * columns]; None for one speaker.
    """

    model_patch: Any
    scale: float
    audio: torch.Tensor
    masks: torch.Tensor | None

    def joined(self, conditioning: Conditioning, batch: int) -> Conditioning:
        """The conditioning with the speech and the masks added for each of `batch` items."""
        audio, masks = self.audio.expand(batch, *self.audio.shape[1:]), self.masks
        if masks is not None:
            masks = masks.float().expand(batch, *masks.shape)
        options = replace(conditioning.options, audio_scale=self.scale)
        return conditioning.having(options, audio=audio, speakers=masks)


def infinitetalk_inputs(options: Mapping[str, Any]) -> InfiniteTalkInputs | None:
    """The inputs of InfiniteTalk in the transformer options of a forward; None where the options have none.

    Raises:
        NotOnWorkers: several WanInfiniteTalkToVideo nodes have patched the model.
    """
    layers, places = _of(options, _LAYERS), _of(options, _PLACES)
    if not layers:
        return None
    if len(layers) > 1 or len(places) > 1:
        refusals.refuse(
            "Several WanInfiniteTalkToVideo nodes have patched the same model",
            "Connect each of them to the model loader (or to the last LoRA loader) and not to one another.",
        )
    masks = places[0].ref_target_masks if places else None
    return InfiniteTalkInputs(layers[0].model_patch, float(layers[0].audio_scale), options["audio_embeds"], masks)


def without_infinitetalk(options: Mapping[str, Any]) -> Mapping[str, Any]:
    """The transformer options without the patches that `infinitetalk_inputs` reads."""
    kinds = (_LAYERS, _PLACES)
    patches = options.get("patches", {})
    rest = {name: [p for p in found if type(p).__name__ not in kinds] for name, found in patches.items()}
    return {**options, "patches": rest}


def has_two_speakers(options: Mapping[str, Any]) -> bool:
    """Whether the transformer options have masks of two speakers."""
    return bool(_of(options, _PLACES))


def loaded_elsewhere(options: Mapping[str, Any], models: Iterable[Any]) -> list[Any]:
    """The `models` that ComfyUI must load beside a MODEL: all but InfiniteTalk's layers, which the workers load."""
    layers = [patch.model_patch for patch in _of(options, _LAYERS)]
    return [model for model in models if not any(model is mine for mine in layers)]


def file_of(model_patch: Any, files: Iterable[str]) -> PatchFile:
    """The file, out of the paths `files`, with exactly the numbers of a MODEL_PATCH; searched for once a patch.

    Raises:
        NotOnWorkers: no file has these numbers, or a node has changed the numbers.
    """
    module = model_patch.model
    if module in _files:
        known, identity = _files[module]
        if identity == _identity_of(known.path):
            return known
    weights = module.state_dict()
    held = None if model_patch.patches else next(filter(None, (_holding(path, weights) for path in files)), None)
    if held is None:
        refusals.refuse(
            "The numbers of InfiniteTalk's MODEL_PATCH are those of no safetensors file in models/model_patches, from "
            "where the workers would read them",
            "Load an unchanged file with ModelPatchLoader, and restart ComfyUI if you have replaced it.",
        )
    ((path, identity),) = held.identities.items()
    log.info("The layers of InfiniteTalk are those of %s.", os.path.basename(path))
    file = PatchFile(path, held.stamp)
    _files[module] = file, identity
    return file


def _of(options: Mapping[str, Any], kind: str) -> list[Any]:
    return [patch for found in options.get("patches", {}).values() for patch in found if type(patch).__name__ == kind]


def _identity_of(path: str) -> FileIdentity | None:
    try:
        with open_regular(path) as file:
            return FileIdentity.of(file)
    except CheckpointError:
        return None


def _holding(path: str, weights: Mapping[str, torch.Tensor]) -> FileHeader | None:
    """The header of a file with exactly these weights; None for any other file. Small weights are compared first, as
    they soon tell files apart."""
    shapes = {name: tuple(weight.shape) for name, weight in weights.items()}
    if not path.endswith(".safetensors"):
        return None
    try:
        header = read_file_header(path)
        tensors = header.tensors
        if len(header.identities) != 1 or {name: info.shape for name, info in tensors.items()} != shapes:
            return None
        file = MappedFile(path, False, header.identities[path])
        small_first = sorted(weights.items(), key=lambda item: item[1].numel())
        same = all(
            torch.equal(file.tensor(tensors[name]).to(weight.dtype), weight.cpu()) for name, weight in small_first
        )
    except CheckpointError:
        return None
    return header if same else None
