"""The names that diffusers gives to the tensors of a Wan DiT, and the names of Wan's authors, which this pack uses.

After diffusers' scripts/convert_wan_to_diffusers.py. Note that the two norms of a block swap their numbers.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

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


def original_name(name: str) -> str:
    """The original name of a tensor that diffusers calls `name`; a name that both share is returned as it is."""
    block = _IN_BLOCK.fullmatch(name)
    return block[1] + _renamed(block[2], _BLOCK) if block else _renamed(name, _MODEL)


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
