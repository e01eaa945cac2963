"""Reads from the header of a checkpoint the configuration and the tensors of its Wan DiT, and whether the DiT can run.

About 100 kB of JSON at its start describe a 28 GB checkpoint. This header is enough to know the model's dimensions, to
refuse a model that cannot run, and to build a model without weights.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from ..base.config import WanConfig
from ..base.regular_file import FileIdentity
from ..base.tensor_info import CheckpointError, FileHeader, TensorInfo, listed, shortened
from ..base.variant import TensorShapes, read_variants, registered
from ..quant.format import LogicalTensor
from ..quant.formats.foreign import foreign_format
from ..quant.formats.registry import MAX_NOTE, format_name, logical_tensors
from .diffusers_names import has_diffusers_names, with_original_names
from .dit_names import HEAD, find_prefix, own_names, without_strays, without_wrappers
from .file_header import is_gguf, read_file_header
from .other_files import is_lora, module_name, other_kind
from .patch_shapes import PATCH_EMBEDDING, with_patch_shapes, with_shapes

HEAD_DIM = 128  # every released Wan; ComfyUI derives the number of heads from it as well
_LATER = "Use a file of a variant and format that the README lists; this kind comes in a later version."

FLOW_RVS = "flow_rvs"
"""ComfyUI's name of FlowRVS, a text-to-video model with a sampling of its own; only the note in the file shows it."""


@dataclass(frozen=True)
class Header:
    """The header of a checkpoint: its DiT's configuration, the DiT's `tensors` by original names, and the metadata.

    `identities` tells each of the files from a changed one, by its path; `stamp` changes with any of the files.
    `ignored` are the names of tensors in the file that no Wan model reads (see `without_strays`).
    """

    path: str
    prefix: str
    config: WanConfig
    tensors: Mapping[str, LogicalTensor]
    metadata: Mapping[str, str] = field(default_factory=dict)
    identities: Mapping[str, FileIdentity] = field(default_factory=dict)
    stamp: str = ""
    ignored: tuple[str, ...] = ()

    @property
    def is_flow_rvs(self) -> bool:
        """Whether ComfyUI's note in the file says FlowRVS, a model that ComfyUI samples in a way of its own."""
        return _note(self.metadata).get("model_type") == FLOW_RVS

    def joined(self, config: WanConfig, tensors: Mapping[str, LogicalTensor], module: FileHeader) -> Header:
        """The header of the model that this one is with the `tensors` of another file, whose header is `module`."""
        return replace(
            self,
            config=config,
            tensors={**self.tensors, **tensors},
            identities={**self.identities, **module.identities},
            stamp=f"{self.stamp}+{module.stamp}",
        )

    @property
    def format(self) -> str:
        """The user's name for the format of most of the weights, such as bf16, scaled fp8 e4m3 or GGUF Q4_K."""
        return format_name(self.tensors)

    @property
    def nbytes(self) -> int:
        """Bytes of the DiT's tensors on disk."""
        return sum(info.nbytes for info in self.tensors.values())


def read_header(path: str | os.PathLike[str]) -> Header:
    """Read the configuration of the Wan DiT in a safetensors or GGUF file, or in a folder of shards, without touching
    its weights.

    Raises:
        CheckpointError: the file is missing, cut short, corrupt, a pickle, not a Wan DiT, or a Wan variant
            or format that is not there yet.
    """
    path = os.fspath(path)
    file_header = without_wrappers(read_file_header(path))
    prefix = _prefix_of(path, file_header.tensors)
    file_header, ignored = without_strays(file_header, prefix)
    tensors = {name.removeprefix(prefix): info for name, info in logical_tensors(path, file_header, prefix).items()}
    if has_diffusers_names(tensors, ""):
        tensors = with_original_names(tensors)
    _refuse_other_kinds(path, file_header.metadata)
    tensors = with_patch_shapes(tensors, HEAD)
    config = _config_from(path, tensors)
    tensors = with_shapes(tensors, config.shapes())
    _check_complete(path, tensors, config)
    identities, stamp = file_header.identities, file_header.stamp
    header = Header(path, prefix, config, tensors, file_header.metadata, identities, stamp, ignored)
    if header.is_flow_rvs and config.variant != "text-to-video":
        raise CheckpointError(
            f"{Path(path).name} is noted to be FlowRVS, but has the tensors of a Wan {config.variant} model. {_LATER}"
        )
    return header


def _prefix_of(path: str, raw: Mapping[str, object]) -> str:
    """The prefix of the DiT's names (see `find_prefix`).

    Raises:
        CheckpointError: the file is another program's quantised format, holds no Wan DiT, or several.
    """
    name = Path(path).name
    prefix = find_prefix(path, raw)
    foreign = foreign_format(own_names(raw, prefix or ""))
    if foreign is not None:
        raise CheckpointError(
            f"{name} is quantised in the format {foreign}, which neither ComfyUI itself nor this version reads. "
            "Use the fp8_scaled, GGUF or bf16 version of the model."
        )
    if prefix is not None:
        return prefix
    if any(key.endswith("vace_blocks.0.after_proj.weight") for key in raw):
        raise CheckpointError(
            f"{name} is a VACE module without its Wan model. Choose a text-to-video model of the same size here, and "
            "the module in XDit+USP VACE Module Select, which plugs into vace_model."
        )
    if is_lora(raw):
        raise CheckpointError(f"{name} is a LoRA. Load it with LoraLoaderModelOnly behind the model loader.")
    what, advice = other_kind(raw) or ("", "")
    if what:
        raise CheckpointError(f"{name} is {what}, not a Wan video model. {advice}")
    raise CheckpointError(
        f"{name} is not a Wan video model: it has no {HEAD} and self-attention blocks. Choose a Wan 2.1 or 2.2 file."
    )


def _note(metadata: Mapping[str, str]) -> Mapping[str, object]:
    """ComfyUI's note about the model in the metadata of a file; empty without a note or with another program's."""
    text = metadata.get("config", "{}")
    try:
        note = json.loads(text)["transformer"] if len(text) <= MAX_NOTE else {}
    except (ValueError, KeyError, TypeError, RecursionError):
        return {}
    return note if isinstance(note, dict) else {}


def _refuse_other_kinds(path: str, metadata: Mapping[str, str]) -> None:
    """Refuse variants without code here that have the tensors of another variant, recognised by ComfyUI's note."""
    note = _note(metadata)
    kind = shortened(str(note.get("model_type", "t2v")))
    name = "Wan Animate-2" if kind == "animate2" else f"Wan {kind}"
    if note.get("causal_ar"):
        raise CheckpointError(f"{Path(path).name} is a causal, autoregressive Wan model. {_LATER}")
    known = {kind for variant in registered() for kind in variant.comfyui_names}
    if kind not in known and kind != FLOW_RVS:
        raise CheckpointError(f"{Path(path).name} is a {name} model. {_LATER}")


def _config_from(path: str, tensors: Mapping[str, TensorInfo]) -> WanConfig:
    name = Path(path).name
    shapes = TensorShapes(name, tensors)
    if is_gguf(path) and PATCH_EMBEDDING not in tensors:
        raise CheckpointError(
            f"{name} lacks {PATCH_EMBEDDING}, the one weight of five dimensions, as its conversion to GGUF ended "
            "before the step that adds such weights (fix_5d_tensors). Use a GGUF file with this tensor: those of "
            "city96 and QuantStack have it."
        )
    dim = shapes.needed("head.modulation", 3)[-1]
    if dim % HEAD_DIM:
        raise CheckpointError(
            f"{name} has width {dim}, which is no multiple of the head size {HEAD_DIM} of Wan. "
            "Choose a Wan 2.1 or 2.2 file."
        )
    base = WanConfig(
        dim=dim,
        ffn_dim=shapes.needed("blocks.0.ffn.0.weight", 2)[0],
        num_heads=dim // HEAD_DIM,
        num_layers=shapes.blocks("blocks"),
        in_dim=shapes.needed("patch_embedding.weight", 5)[1],
        out_dim=shapes.needed("head.head.weight", 2)[0] // 4,
        text_dim=shapes.needed("text_embedding.0.weight", 2)[1],
        freq_dim=shapes.needed("time_embedding.0.weight", 2)[1],
        image_dim=shapes.size("img_emb.proj.1.weight", 1),
        image_positions=shapes.size("img_emb.emb_pos", 1),
    )
    return base.having(*read_variants(shapes))


def _check_complete(path: str, tensors: Mapping[str, TensorInfo], config: WanConfig) -> None:
    name, expected = Path(path).name, config.shapes()
    missing = [k for k, s in expected.items() if k not in tensors or tensors[k].shape != s]
    if missing:
        raise CheckpointError(
            f"{name} lacks {len(missing)} tensors of a Wan model or has them in another shape: "
            f"{listed(missing)}. Download the file again, or choose another."
        )
    constants = [key for key in tensors if any(variant.is_constant(key) for variant in config.variants)]
    unknown = [key for key in tensors if key not in expected and key not in constants]
    if unknown:
        what, advice = _what_are(unknown)
        raise CheckpointError(f"{name} has {len(unknown)} tensors {what}: {listed(unknown)}. {advice}")
    if config.in_dim < config.out_dim or not all(variant.divides(config) for variant in config.variants):
        raise CheckpointError(
            f"{name} is an unknown Wan variant: {config.in_dim} channels in, {config.out_dim} out, "
            f"{config.num_layers} layers, {TensorShapes(name, tensors).blocks('vace_blocks')} of VACE. {_LATER}"
        )


def _what_are(unknown: list[str]) -> tuple[str, str]:
    """What the tensors `unknown` are that a Wan model has beside its own, in words for a refusal, and what to do."""
    if all("scale" in name.rpartition(".")[2] for name in unknown):
        return (
            "that scale quantised weights in a way that neither ComfyUI nor this version knows",
            "Use the fp8_scaled, GGUF or bf16 version of the model.",
        )
    if is_lora(unknown):
        return "of a LoRA that is not merged into the weights", "Use the model and the LoRA as two files."
    module = module_name(unknown)
    return (f"of {module}, which this version does not run" if module else "of an unknown Wan variant"), _LATER
