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
from ..quant.formats.registry import MAX_NOTE, format_name, logical_tensors
from .diffusers_names import has_diffusers_names, original_name
from .file_header import read_file_header

HEAD_DIM = 128  # every released Wan; ComfyUI derives the number of heads from it as well
PREFIXES = ("model.diffusion_model.", "diffusion_model.", "")
_LATER = "Use a file of a variant and format that the README lists; this kind comes in a later version."

FLOW_RVS = "flow_rvs"
"""ComfyUI's name of FlowRVS, a text-to-video model with a sampling of its own; only the note in the file shows it."""


@dataclass(frozen=True)
class Header:
    """The header of a checkpoint: its DiT's configuration, the DiT's `tensors` by original names, and the metadata.

    `identities` tells each of the files from a changed one, by its path; `stamp` changes with any of the files.
    """

    path: str
    prefix: str
    config: WanConfig
    tensors: Mapping[str, LogicalTensor]
    metadata: Mapping[str, str] = field(default_factory=dict)
    identities: Mapping[str, FileIdentity] = field(default_factory=dict)
    stamp: str = ""

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
    file_header = read_file_header(path)
    prefix = _find_prefix(path, file_header.tensors)
    renamed = has_diffusers_names(file_header.tensors, prefix)
    tensors = {
        original_name(name.removeprefix(prefix)) if renamed else name.removeprefix(prefix): info
        for name, info in logical_tensors(path, file_header, prefix).items()
    }
    _refuse_other_kinds(path, file_header.metadata)
    config = _config_from(path, tensors)
    _check_complete(path, tensors, config)
    header = Header(path, prefix, config, tensors, file_header.metadata, file_header.identities, file_header.stamp)
    if header.is_flow_rvs and config.variant != "text-to-video":
        raise CheckpointError(
            f"{Path(path).name} is noted to be FlowRVS, but has the tensors of a Wan {config.variant} model. {_LATER}"
        )
    return header


def _find_prefix(path: str, raw: Mapping[str, object]) -> str:
    for prefix in PREFIXES:
        if f"{prefix}head.modulation" in raw and f"{prefix}blocks.0.self_attn.q.weight" in raw:
            return prefix
        if has_diffusers_names(raw, prefix):
            return prefix
    name = Path(path).name
    if any("lora_" in key or key.endswith((".diff", ".diff_b")) for key in raw):
        raise CheckpointError(f"{name} is a LoRA. Load it with LoraLoaderModelOnly behind the model loader.")
    if any(key.endswith("vace_blocks.0.after_proj.weight") for key in raw):
        raise CheckpointError(
            f"{name} is a VACE module without its Wan model. Choose a text-to-video model of the same size here, and "
            "the module in XDit+USP VACE Module Select, which plugs into vace_model."
        )
    raise CheckpointError(
        f"{name} is not a Wan video model: it has no head.modulation and self-attention blocks. "
        "Choose a Wan 2.1 or 2.2 file."
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
        raise CheckpointError(
            f"{name} has {len(unknown)} tensors of an unknown Wan variant: {listed(unknown)}. {_LATER}"
        )
    if config.in_dim < config.out_dim or not all(variant.divides(config) for variant in config.variants):
        raise CheckpointError(
            f"{name} is an unknown Wan variant: {config.in_dim} channels in, {config.out_dim} out, "
            f"{config.num_layers} layers, {TensorShapes(name, tensors).blocks('vace_blocks')} of VACE. {_LATER}"
        )
