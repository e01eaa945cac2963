"""fp8 mode: the products of the blocks, and on request their self-attention, in eight bits. Faster, and lossy.

Only the blocks compute in fp8. The embeddings, the modulation and the head, which are 2 % of the work and whose errors
would reach every token, stay in the compute dtype, and so does the kernel of cross-attention.
"""

from __future__ import annotations

import torch

from ..attention.kernels import get_fp8_kernel
from ..checkpoint.header import Header
from ..quant import fp8_linear
from ..quant.formats.registry import format_name
from .layers import Block
from .model import WanModel

DISABLED, LINEAR, ATTENTION = MODES = ("disabled", "linear", "linear+attention")
WEIGHTS = "fp8_e4m3fn"


def weights_for(header: Header | None, mode: str, weight_dtype: str) -> str:
    """The `weight_dtype` of a model in the fp8 mode `mode`.

    In an fp8 mode the float matrices of a file are rounded while loading, with a scale for each output channel. A file
    that is fp8 itself keeps the given `weight_dtype` for its float matrices, as does every file in the mode disabled.

    Raises:
        Fp8Error: the file is quantised in a format that cannot be multiplied in fp8. Random weights have no header.
    """
    if mode == DISABLED:
        return weight_dtype
    tensors = header.tensors.items() if header else ()
    quantized = {name: info for name, info in tensors if info.is_quantized and "blocks." in name}
    others = {name: info for name, info in quantized.items() if not info.format.fp8_products}
    if others:
        raise fp8_linear.Fp8Error(
            f"The file has {format_name(others)} weights, which fp8_mode {mode} cannot multiply. "
            "Use the fp8 e4m3 (fp8_scaled), bf16 or fp16 version of the model, or set fp8_mode to disabled."
        )
    return weight_dtype if quantized else WEIGHTS


def use_fp8(model: WanModel, mode: str, device: torch.device) -> None:
    """Put a model into the fp8 mode `mode`.

    Raises:
        Fp8Error: the device has no fp8 products.
        AttentionError: the device has no fp8 attention.
    """
    if mode == DISABLED:
        return
    fp8_linear.check_device(device, model.compute_dtype)
    for module in model.modules():
        if isinstance(module, Block):
            module.use_fp8()
    if mode == ATTENTION:
        model.self_kernel = get_fp8_kernel(device, model.compute_dtype)


def describe(model: WanModel, mode: str, device: torch.device) -> str:
    """Words for a user about the parts of the model that run in fp8; empty for a model without fp8 products."""
    if mode == DISABLED:
        return ""
    attention = f", self-attention {model.self_kernel.name}" if mode == ATTENTION else ""
    return f"products {fp8_linear.check_device(device, model.compute_dtype)}{attention}"
