"""Names and shapes of the tensors of layers that several parts of a Wan DiT have, as a state dict lists them."""

from __future__ import annotations

Shapes = dict[str, tuple[int, ...]]
"""Shapes of tensors by their names."""


def linear(name: str, columns: int, rows: int) -> Shapes:
    """The tensors of a linear layer from `columns` to `rows` numbers."""
    return {f"{name}.weight": (rows, columns), f"{name}.bias": (rows,)}


def norm(name: str, width: int) -> Shapes:
    """The tensors of a LayerNorm over `width` numbers."""
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}


def convolution(name: str, columns: int, rows: int, *size: int) -> Shapes:
    """The tensors of a convolution from `columns` to `rows` channels whose kernel has this size."""
    return {f"{name}.weight": (rows, columns, *size), f"{name}.bias": (rows,)}


def patch_embedding(name: str, channels: int, dim: int) -> Shapes:
    """The tensors of the embedding of a latent of `channels`, 1 x 2 x 2 numbers of each channel in a token."""
    return convolution(name, channels, dim, 1, 2, 2)


def attention(name: str, dim: int, width: int) -> Shapes:
    """The tensors of an attention of tokens of `dim` numbers to others of `width` numbers."""
    found: Shapes = {}
    for projection in "qkvo":
        found |= linear(f"{name}.{projection}", width if projection in "kv" else dim, dim)
    return found | {f"{name}.norm_q.weight": (dim,), f"{name}.norm_k.weight": (dim,)}


def block(name: str, dim: int, ffn_dim: int, image: bool = False) -> Shapes:
    """The tensors of a transformer block, with those for an attention to CLIP tokens where `image` is set."""
    found: Shapes = {f"{name}.modulation": (1, 6, dim)}
    found |= attention(f"{name}.self_attn", dim, dim) | attention(f"{name}.cross_attn", dim, dim)
    if image:
        found |= linear(f"{name}.cross_attn.k_img", dim, dim) | linear(f"{name}.cross_attn.v_img", dim, dim)
        found[f"{name}.cross_attn.norm_k_img.weight"] = (dim,)
    found |= norm(f"{name}.norm3", dim)
    return found | linear(f"{name}.ffn.0", dim, ffn_dim) | linear(f"{name}.ffn.2", ffn_dim, dim)


def image_embedding(name: str, width: int, dim: int) -> Shapes:
    """The tensors of the embedding of CLIP tokens of `width` numbers."""
    found = norm(f"{name}.proj.0", width) | norm(f"{name}.proj.4", dim)
    return found | linear(f"{name}.proj.1", width, width) | linear(f"{name}.proj.3", width, dim)
