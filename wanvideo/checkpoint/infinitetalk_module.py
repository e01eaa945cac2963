"""InfiniteTalk and MultiTalk as a model patch: a file of the layers alone, which an image-to-video model takes in.

Published for ComfyUI's ModelPatchLoader (`wan2.1_infiniteTalk_single_fp16.safetensors` and others). The projection of
the audio (`audio_proj.*`) is no part of the transformer: ComfyUI computes it once for a video.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from ..base.tensor_info import CheckpointError, FileHeader, listed
from ..base.variant import TensorShapes, read_variants
from ..quant.format import LogicalTensor
from ..quant.formats.registry import logical_tensors
from .header import Header

MARKERS = ("audio_proj.proj1.weight", "blocks.0.audio_cross_attn.proj.weight")
_BLOCKS = "blocks."
_VARIANTS = ("text-to-video", "image-to-video")


def is_infinitetalk(file_header: FileHeader) -> bool:
    """Whether a file holds the layers of InfiniteTalk or MultiTalk."""
    return all(marker in file_header.tensors for marker in MARKERS)


def with_infinitetalk(base: Header, path: str, file_header: FileHeader) -> Header:
    """Join the model `base` and the model patch in the file `path`, which has this header, to one model.

    The released patches have layers for 40 blocks; a model with fewer blocks takes the layers of its own blocks.

    Raises:
        CheckpointError: the patch is damaged or made for another size, or the base is of another variant.
    """
    name, base_name, config = Path(path).name, Path(base.path).name, base.config
    if config.variant not in _VARIANTS or config.additions:
        raise CheckpointError(
            f"{base_name} is a {config.variant} model, and {name} (InfiniteTalk) belongs to an image-to-video model. "
            "Choose a Wan 2.1 image-to-video file, or remove WanInfiniteTalkToVideo."
        )
    module = _blocks(path, file_header, config.num_layers)
    width = module[MARKERS[1]].shape[0] if MARKERS[1] in module else 0
    if width != config.dim:
        raise CheckpointError(
            f"{name} (InfiniteTalk) is made for a model of width {width}, but {base_name} has width {config.dim}. "
            "Use the 14B image-to-video model, which has width 5120."
        )
    (infinitetalk,) = read_variants(TensorShapes(name, module), module=True)
    config, expected = config.having(infinitetalk), infinitetalk.shapes(config)
    wrong = [key for key, shape in expected.items() if key not in module or module[key].shape != shape]
    wrong += [key for key in module if key not in expected]
    if wrong or not infinitetalk.divides(config):
        raise CheckpointError(
            f"{name} (InfiniteTalk) does not fit {base_name}: {len(wrong)} tensors are missing, unknown or of another "
            f"shape: {listed(wrong)}. Download it again, or use the patch made for this model."
        )
    return base.joined(config, module, file_header)


def _blocks(path: str, file_header: FileHeader, layers: int) -> Mapping[str, LogicalTensor]:
    """The tensors of the first `layers` blocks."""
    tensors = logical_tensors(path, file_header)
    blocks = {f"{_BLOCKS}{i}." for i in range(layers)}
    return {key: info for key, info in tensors.items() if key[: key.find(".", len(_BLOCKS)) + 1] in blocks}
