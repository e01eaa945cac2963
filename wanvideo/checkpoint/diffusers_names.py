"""The names that diffusers gives to the tensors of a Wan DiT, and the names of Wan's authors, which this pack uses.

After diffusers' scripts/convert_wan_to_diffusers.py. Note that the two norms of a block swap their numbers.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from ..quant.format import JoinedTensor, LogicalTensor

MARKER = "condition_embedder.time_embedder.linear_1.weight"
"""The name of a tensor that only diffusers' layout has."""

_EMBEDDER = "condition_embedder."
_MODEL = {
    f"{_EMBEDDER}time_embedder.linear_1.": "time_embedding.0.",
    f"{_EMBEDDER}time_embedder.linear_2.": "time_embedding.2.",
    f"{_EMBEDDER}time_proj.": "time_projection.1.",
    f"{_EMBEDDER}text_embedder.linear_1.": "text_embedding.0.",
    f"{_EMBEDDER}text_embedder.linear_2.": "text_embedding.2.",
    f"{_EMBEDDER}image_embedder.norm1.": "img_emb.proj.0.",
    f"{_EMBEDDER}image_embedder.ff.net.0.proj.": "img_emb.proj.1.",
    f"{_EMBEDDER}image_embedder.ff.net.2.": "img_emb.proj.3.",
    f"{_EMBEDDER}image_embedder.norm2.": "img_emb.proj.4.",
    f"{_EMBEDDER}image_embedder.pos_embed": "img_emb.emb_pos",
    "scale_shift_table": "head.modulation",
    "proj_out.": "head.head.",
}
_ATTENTION = {"attn1": "self_attn", "attn2": "cross_attn"}
_PROJECTION = {
    "to_q": "q",
    "to_k": "k",
    "to_v": "v",
    "to_out.0": "o",
    "add_k_proj": "k_img",
    "add_v_proj": "v_img",
    "norm_added_k": "norm_k_img",
    "norm_q": "norm_q",
    "norm_k": "norm_k",
}
_BLOCK = {
    "scale_shift_table": "modulation",
    "norm2.": "norm3.",
    "ffn.net.0.proj.": "ffn.0.",
    "ffn.net.2.": "ffn.2.",
    "proj_in.": "before_proj.",  # of VACE, as is the next
    "proj_out.": "after_proj.",
}
_BLOCK |= {
    f"{theirs}.{projection}.": f"{ours}.{short}."
    for theirs, ours in _ATTENTION.items()
    for projection, short in _PROJECTION.items()
}
_TO_MODEL = {ours: theirs for theirs, ours in _MODEL.items()}
_TO_BLOCK = {ours: theirs for theirs, ours in _BLOCK.items()}
_IN_BLOCK = re.compile(r"((?:vace_)?blocks\.\d+\.)(.*)")

_CONVOLUTIONS = "motion_encoder.enc.net_app.convs"
_ANIMATE = tuple(
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"face_adapter\.(\d+)\.to_q\.", r"face_adapter.fuser_blocks.\1.linear1_q."),
        (r"face_adapter\.(\d+)\.to_out\.", r"face_adapter.fuser_blocks.\1.linear2."),
        (r"face_adapter\.(\d+)\.norm_([qk])\.", r"face_adapter.fuser_blocks.\1.\2_norm."),
        (r"face_encoder\.(conv\w+)\.(?!conv\.)", r"face_encoder.\1.conv."),
        (r"motion_encoder\.motion_synthesis_weight$", "motion_encoder.dec.direction.weight"),
        (r"motion_encoder\.motion_network\.", "motion_encoder.enc.fc."),
        (r"motion_encoder\.conv_in\.act_fn\.", f"{_CONVOLUTIONS}.0.1."),
        (r"motion_encoder\.conv_in\.", f"{_CONVOLUTIONS}.0.0."),
    )
)
"""Starts of diffusers' names of Animate's tensors, and of the original names."""
_HALVING = re.compile(r"motion_encoder\.res_blocks\.(\d+)\.(conv1|conv2|conv_skip)\.(weight|act_fn\.bias)")
_HALVING_PARTS = {
    ("conv1", "weight"): "conv1.0.weight",
    ("conv1", "act_fn.bias"): "conv1.1.bias",
    ("conv2", "weight"): "conv2.1.weight",  # a blur comes before it
    ("conv2", "act_fn.bias"): "conv2.2.bias",
    ("conv_skip", "weight"): "skip.1.weight",
}
_LAST_CONVOLUTION = "motion_encoder.conv_out."
_KEYS = re.compile(r"face_adapter\.(\d+)\.to_k\.(weight|bias)")


def with_original_names(tensors: Mapping[str, LogicalTensor]) -> dict[str, LogicalTensor]:
    """The tensors of a model in diffusers' layout by their original names.

    Keys and values of Animate's face adapters are two tensors there, which are joined to the original one.
    """
    last = 1 + len({match[1] for name in tensors if (match := _HALVING.fullmatch(name))})
    renamed: dict[str, LogicalTensor] = {}
    joined: set[str] = set()
    for name, info in tensors.items():
        keys = _KEYS.fullmatch(name)
        values = name.replace("to_k", "to_v")
        if keys is not None and values in tensors and tensors[values].shape[1:] == info.shape[1:]:
            original = f"face_adapter.fuser_blocks.{keys[1]}.linear1_kv.{keys[2]}"
            renamed[original] = JoinedTensor.of([info, tensors[values]])
            joined.add(values)
        elif name not in joined:
            renamed[original_name(name).replace(_LAST_CONVOLUTION, f"{_CONVOLUTIONS}.{last}.")] = info
    for name in joined:
        renamed.pop(name, None)  # values that the file has in front of the keys
    return renamed


def original_name(name: str) -> str:
    """The original name of a tensor that diffusers calls `name`; a name that both share is returned as it is."""
    if block := _IN_BLOCK.fullmatch(name):
        return block[1] + _renamed(block[2], _BLOCK)
    if halving := _HALVING.fullmatch(name):
        return f"{_CONVOLUTIONS}.{int(halving[1]) + 1}.{_HALVING_PARTS.get((halving[2], halving[3]), halving[3])}"
    for pattern, replacement in _ANIMATE:
        if pattern.match(name):
            return pattern.sub(replacement, name, count=1)
    return _renamed(name, _MODEL)


def diffusers_name(name: str) -> str:
    """The name that diffusers gives to the tensor with the original `name`."""
    block = _IN_BLOCK.fullmatch(name)
    return block[1] + _renamed(block[2], _TO_BLOCK) if block else _renamed(name, _TO_MODEL)


def has_diffusers_names(names: Iterable[str], prefix: str) -> bool:
    """Whether the tensors whose names begin with `prefix` have diffusers' names."""
    return prefix + MARKER in names


def _renamed(name: str, table: Mapping[str, str]) -> str:
    for theirs, ours in table.items():
        if name.startswith(theirs):
            return ours + name.removeprefix(theirs)
    return name
