"""Wan files as ComfyUI, kijai, llama.cpp's tools and others write them, each with what it stands for.

A maker takes float32 weights to the tensors of a file and to the float32 weights that these mean.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import gguf
import numpy
import torch
from wan_parallel.wanvideo.base.config import WanConfig
from wan_parallel.wanvideo.quant.formats.gguf_blocks import BLOCKS

from testkit import tiny

Tensors = dict[str, torch.Tensor]


def block_matrices(weights: Mapping[str, torch.Tensor]) -> list[str]:
    blocks = ("blocks.", "vace_blocks.")
    return [name for name, weight in weights.items() if weight.ndim == 2 and name.startswith(blocks)]


def note(**fields: object) -> torch.Tensor:
    """A comfy_quant tensor."""
    return torch.tensor(list(json.dumps(fields).encode()), dtype=torch.uint8)


def plain_fp8(weights: Tensors, dtype: torch.dtype) -> tuple[Tensors, Tensors]:
    """Everything cast, as scripts do it that know no better."""
    stored = {name: weight.to(dtype) for name, weight in weights.items()}
    return stored, {name: weight.float() for name, weight in stored.items()}


def scaled(
    weights: Tensors, scale_name: str, dtype=torch.float8_e4m3fn, rows: bool = False, names: list[str] | None = None
) -> tuple[Tensors, Tensors]:
    """The matrices `names` (of the blocks) in fp8 with scales, the other matrices in fp16."""
    stored = {name: weight.half() if weight.ndim == 2 else weight for name, weight in weights.items()}
    meant = {name: weight.float() for name, weight in stored.items()}
    for name in names or block_matrices(weights):
        weight = weights[name]
        scale = weight.abs().amax(dim=1, keepdim=True) if rows else weight.abs().max()
        scale = scale / torch.finfo(dtype).max
        stored[name] = (weight / scale).to(dtype)
        stored[name.removesuffix("weight") + scale_name] = scale
        meant[name] = stored[name].float() * scale
    return stored, meant


def old_comfy(weights: Tensors) -> tuple[Tensors, Tensors]:
    """Every Linear is fp8. An older ComfyUI casts their biases to fp8 as well, so these are chosen to survive that."""
    of_linear = {name: name.removesuffix("weight") for name, weight in weights.items() if weight.ndim == 2}
    for layer in of_linear.values():
        weights[f"{layer}bias"] = weights[f"{layer}bias"].to(torch.float8_e4m3fn).float()
    stored, meant = scaled(weights, "scale_weight", names=list(of_linear))
    stored["scaled_fp8"] = torch.zeros(2, dtype=torch.float8_e4m3fn)
    for layer in of_linear.values():
        stored[f"{layer}scale_input"] = torch.ones(())
    return stored, meant


def kijai(weights: Tensors) -> tuple[Tensors, Tensors]:
    stored, meant = scaled(weights, "scale_weight", torch.float8_e5m2)
    stored["scaled_fp8"] = torch.zeros(0, dtype=torch.float8_e5m2)
    return stored, meant


def new_comfy(weights: Tensors) -> tuple[Tensors, Tensors]:
    stored, meant = scaled(weights, "weight_scale", rows=True)
    for name in block_matrices(weights):
        layer = name.removesuffix("weight")
        stored[f"{layer}comfy_quant"] = note(format="float8_e4m3fn", full_precision_matrix_mult=True)
        stored[f"{layer}input_scale"] = torch.tensor(0.3)
    return stored, meant


def in_metadata(weights: Tensors) -> tuple[Tensors, Tensors]:
    return scaled(weights, "weight_scale")


def convrot(weights: Tensors) -> tuple[Tensors, Tensors]:
    four = torch.ones(4, 4) - 2 * torch.eye(4).flip(0)
    matrix = torch.kron(torch.kron(four, four), torch.kron(four, four)) / 16
    stored, meant = dict(weights), dict(weights)
    for name in block_matrices(weights):
        if weights[name].shape[1] % 256:
            continue  # as published: only what divides into its groups is turned
        turned = (weights[name].unflatten(1, (-1, 256)) @ matrix.T).flatten(1)
        scale = turned.abs().amax(dim=1, keepdim=True) / 127
        stored[name] = (turned / scale).round().to(torch.int8)
        layer = name.removesuffix("weight")
        stored[f"{layer}weight_scale"] = scale
        stored[f"{layer}comfy_quant"] = note(format="int8_tensorwise", convrot=True, convrot_groupsize=256)
        meant[name] = ((stored[name].float() * scale).unflatten(1, (-1, 256)) @ matrix).flatten(1)
    return stored, meant


def plain_int8(weights: Tensors) -> tuple[Tensors, Tensors]:
    stored, meant = dict(weights), dict(weights)
    for name in block_matrices(weights):
        scale = weights[name].abs().max() / 127
        stored[name] = (weights[name] / scale).round().to(torch.int8)
        layer = name.removesuffix("weight")
        stored |= {f"{layer}weight_scale": scale, f"{layer}comfy_quant": note(format="int8_tensorwise")}
        meant[name] = stored[name].float() * scale
    return stored, meant


def nvfp4(weights: Tensors) -> tuple[Tensors, Tensors]:
    values = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
    stored, meant = dict(weights), dict(weights)
    for name in block_matrices(weights):
        groups, layer = weights[name].unflatten(1, (-1, 16)), name.removesuffix("weight")
        largest = groups.abs().amax(dim=2)
        whole = largest.max() / (448 * 6)
        scales = (largest / (6 * whole)).to(torch.float8_e4m3fn)
        factors = (scales.float() * whole)[:, :, None]
        codes = (groups.abs() / factors).unsqueeze(-1).sub(values).abs().argmin(-1)
        meant[name] = (values[codes] * groups.sign() * factors).flatten(1)
        codes = (codes + 8 * (groups < 0)).flatten(1).to(torch.uint8)
        stored[name] = codes[:, ::2] << 4 | codes[:, 1::2]
        stored |= {f"{layer}weight_scale": in_tiles(scales), f"{layer}weight_scale_2": whole}
        stored |= {f"{layer}input_scale": torch.tensor(0.3), f"{layer}comfy_quant": note(format="nvfp4")}
    return stored, meant


def mxfp8(weights: Tensors) -> tuple[Tensors, Tensors]:
    stored, meant = dict(weights), dict(weights)
    for name in block_matrices(weights):
        groups, layer = weights[name].unflatten(1, (-1, 32)), name.removesuffix("weight")
        exponents = (groups.abs().amax(dim=2) / 448).log2().ceil()
        factors = exponents.exp2()[:, :, None]
        numbers = (groups / factors).to(torch.float8_e4m3fn)
        meant[name], stored[name] = (numbers.float() * factors).flatten(1), numbers.flatten(1)
        stored[f"{layer}weight_scale"] = in_tiles((exponents + 127).to(torch.uint8))
        stored[f"{layer}comfy_quant"] = note(format="mxfp8")
    return stored, meant


def in_tiles(scales: torch.Tensor) -> torch.Tensor:
    """Scales [rows, groups] in the order of the tensor cores, after cuBLAS' formula for where each of them is."""
    rows, groups = scales.shape
    across = -(-groups // 4)
    row, group = torch.meshgrid(torch.arange(rows), torch.arange(groups), indexing="ij")
    place = (row // 128 * across + group // 4) * 512 + row % 32 * 16 + row % 128 // 32 * 4 + group % 4
    tiles = torch.zeros(-(-rows // 128) * across * 512, dtype=torch.uint8)
    tiles[place.flatten()] = scales.contiguous().view(torch.uint8).flatten()
    return tiles.view(scales.dtype).view(-(-rows // 128) * 128, across * 4)


def write_shards(folder: Path, config: WanConfig) -> None:
    """A folder as diffusers' save_pretrained leaves it for a large model: its names, shards and an index."""
    folder.mkdir(parents=True)
    tensors = {tiny.diffusers_name(name): weight for name, weight in tiny.random_weights(config).items()}
    names, places = sorted(tensors), {}
    for part in range(2):
        file = f"diffusion_pytorch_model-{part + 1:05d}-of-00002.safetensors"
        places |= dict.fromkeys(names[part::2], file)
        tiny.write_weights(folder / file, {name: tensors[name] for name in names[part::2]}, {"format": "pt"})
    index = {"metadata": {}, "weight_map": places}
    (folder / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))


E4M3 = "float8_e4m3fn"
LAYERS = {name.removesuffix(".weight") for name in block_matrices(tiny.random_weights(tiny.TINY))}
STORED: dict[str, tuple[Callable[[Tensors], tuple[Tensors, Tensors]], str, dict]] = {
    "plain e4m3": (lambda weights: plain_fp8(weights, torch.float8_e4m3fn), "fp8 e4m3", {}),
    "plain e5m2": (lambda weights: plain_fp8(weights, torch.float8_e5m2), "fp8 e5m2", {}),
    "ComfyUI's older scaled": (old_comfy, "scaled fp8 e4m3", {}),
    "ComfyUI's newer scaled": (new_comfy, "scaled fp8 e4m3", {}),
    "described in the metadata": (in_metadata, "scaled fp8 e4m3", {"layers": dict.fromkeys(LAYERS, E4M3)}),
    "described at length": (
        in_metadata,
        "scaled fp8 e4m3",
        {"layers": {k: {"format": "float8_e4m3fn"} for k in LAYERS}},
    ),
    "kijai's": (kijai, "scaled fp8 e5m2", {}),
    "int8": (plain_int8, "int8", {}),
    "int8 convrot": (convrot, "int8 convrot", {}),
    "nvfp4": (nvfp4, "nvfp4", {}),
    "mxfp8": (mxfp8, "mxfp8", {}),
}


def written(folder: Path, kind: str, prefix: str = "", config: WanConfig = tiny.TINY) -> tuple[str, str]:
    """The file of a format, and one of what it stands for in float32."""
    make, _, description = STORED[kind]
    stored, meant = make(tiny.random_weights(config))
    metadata = {"_quantization_metadata": json.dumps(description)} if description else None
    path = tiny.write_weights(folder / "quantised.safetensors", {prefix + k: v for k, v in stored.items()}, metadata)
    return path, tiny.write_weights(folder / "meant.safetensors", meant)


def random_blocks(name: str, shape: tuple[int, int], seed: int) -> numpy.ndarray:
    """Sensible blocks of a format that the gguf package cannot write: small scales, random digits."""
    block, rng = BLOCKS[name], numpy.random.default_rng(seed)
    raw = rng.integers(0, 256, (shape[0] * shape[1] // block.numbers, block.nbytes), dtype=numpy.uint8)
    places = {"Q2_K": (80, 82), "Q3_K": (108,), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,)}[name]
    for place in places:
        raw[:, place : place + 2] = numpy.full((len(raw), 1), 2e-4, numpy.float16).view(numpy.uint8)
    return raw.reshape(shape[0], -1)


def write_gguf(
    path: Path, kind: str, config: WanConfig = tiny.TINY, weights: Tensors | None = None
) -> tuple[str, Tensors]:
    """A file as ComfyUI-GGUF's converter makes it, and the float32 weights that it stands for."""
    writer = gguf.GGUFWriter(None, "wan")
    quantised, meant = gguf.GGMLQuantizationType[kind], {}
    for seed, (name, weight) in enumerate((weights or tiny.random_weights(config)).items()):
        data = weight.numpy()
        fits = weight.shape[-1] % gguf.GGML_QUANT_SIZES[quantised][0] == 0  # a row is whole blocks, or stays in 16 bit
        if not fits or name not in block_matrices({name: weight}):
            half = weight.ndim == 2
            writer.add_tensor(name, data.astype(numpy.float16 if half else numpy.float32))
            meant[name] = weight.half().float() if half else weight
            continue
        raw = random_blocks(kind, data.shape, seed) if kind.endswith("_K") else gguf.quants.quantize(data, quantised)
        writer.add_tensor(name, raw, raw_dtype=quantised)
        meant[name] = torch.from_numpy(gguf.quants.dequantize(raw, quantised))
    writer.write_header_to_file(path)
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return str(path), meant
