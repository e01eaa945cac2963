"""The files of a two-expert Wan 2.2 graph, in the formats in which they are released, filled with random numbers.

Two text-to-video experts, the UMT5-XXL text encoder with a sentencepiece model of its own, and Wan 2.1's VAE.
"""

from __future__ import annotations

import io
import json
import math
import os
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from wan_parallel.wanvideo.base.config import PRESETS, WanConfig
from wan_parallel.wanvideo.example.vae_random import vae_shapes

EXPERTS = ("high_noise", "low_noise")
DTYPES = ("fp8_scaled", "bf16")
SCALE = 0.02  # of all numbers, which keeps activations small through any number of blocks
_CHUNK = 2**26  # numbers that a file repeats
_TORCH = {"F8_E4M3": torch.float8_e4m3fn, "BF16": torch.bfloat16, "F32": torch.float32, "U8": torch.uint8}
_TEXT_DIM, _HEAD = 4096, 64

Layout = dict[str, tuple[str, tuple[int, ...]]]
"""Name to safetensors' dtype and shape."""


@dataclass(frozen=True)
class TextDims:
    """Dimensions of a UMT5 encoder of width 4096, under the names of its configuration; by default those of XXL."""

    num_layers: int = 24
    num_heads: int = 64
    d_ff: int = 10240
    vocab_size: int = 256384


@dataclass(frozen=True)
class ModelFiles:
    """Names of the files below ComfyUI's model folders."""

    experts: tuple[Path, Path]
    text: Path
    vae: Path

    @property
    def all(self) -> tuple[Path, ...]:
        return (*self.experts, self.text, self.vae)


def write_files(folder: Path, config: WanConfig, text: TextDims, dtype: str, text_dtype: str) -> ModelFiles:
    """Write what is not there yet, into ComfyUI's model folders below `folder`."""
    suffix = "fp8_e4m3fn_scaled" if text_dtype == "fp8_scaled" else text_dtype
    size = f"14B-{config.num_layers}" if config.dim == PRESETS["14b"].dim else f"{config.dim}x{config.num_layers}"
    files = ModelFiles(
        tuple(folder / "diffusion_models" / f"wan2.2_t2v_{name}_{size}_{dtype}.safetensors" for name in EXPERTS),
        folder / "text_encoders" / f"umt5_xxl_{text.num_layers}_{suffix}.safetensors",
        folder / "vae" / "wan_2.1_vae.safetensors",
    )
    expert, scales = expert_layout(config, dtype)
    for seed, path in enumerate(files.experts):
        write_once(path, expert, scales, seed)
    encoder, values = text_layout(text, text_dtype)
    tokenizer = sentencepiece_model()
    encoder["spiece_model"] = "U8", (len(tokenizer),)
    write_once(files.text, encoder, {**values, "spiece_model": tokenizer}, 2)
    vae = {**vae_shapes("2.1", "encoder"), **vae_shapes("2.1", "decoder")}
    write_once(files.vae, {name: ("BF16", shape) for name, shape in vae.items()}, {}, 3)
    return files


def expert_layout(config: WanConfig, dtype: str) -> tuple[Layout, dict[str, bytes]]:
    """A text-to-video model as ComfyUI's repackaged files have it, and the values that are not random."""
    layers = {name.removesuffix("weight") for name, shape in config.shapes().items() if len(shape) == 2}
    layers = {name for name in layers if name.endswith(".")}
    plain = "F32" if dtype == "fp8_scaled" else "BF16"
    layout: Layout = {name: (plain, shape) for name, shape in config.shapes().items()}
    return _scaled(layout, layers, (2,)) if dtype == "fp8_scaled" else (layout, {})


def text_layout(text: TextDims, dtype: str) -> tuple[Layout, dict[str, bytes]]:
    """UMT5's encoder as ComfyUI's files have it, without its tokenizer."""
    inner = text.num_heads * _HEAD
    shapes: dict[str, tuple[int, ...]] = {"shared.weight": (text.vocab_size, _TEXT_DIM)}
    layers = set()
    for index in range(text.num_layers):
        attention, forward = f"encoder.block.{index}.layer.0.", f"encoder.block.{index}.layer.1."
        matrices = {f"{attention}SelfAttention.{part}.": (inner, _TEXT_DIM) for part in "qkv"}
        matrices[f"{attention}SelfAttention.o."] = _TEXT_DIM, inner
        matrices |= {f"{forward}DenseReluDense.{part}.": (text.d_ff, _TEXT_DIM) for part in ("wi_0", "wi_1")}
        matrices[f"{forward}DenseReluDense.wo."] = _TEXT_DIM, text.d_ff
        layers |= matrices.keys()
        shapes |= {f"{name}weight": shape for name, shape in matrices.items()}
        shapes[f"{attention}SelfAttention.relative_attention_bias.weight"] = 32, text.num_heads
        shapes |= {f"{part}layer_norm.weight": (_TEXT_DIM,) for part in (attention, forward)}
    shapes["encoder.final_layer_norm.weight"] = (_TEXT_DIM,)
    layout: Layout = {name: ("BF16", shape) for name, shape in shapes.items()}
    # by which ComfyUI knows the encoder: in a smaller one it belongs to no layer
    layout.setdefault("encoder.block.23.layer.1.DenseReluDense.wi_1.weight", ("F8_E4M3", (10240, _TEXT_DIM)))
    return _scaled(layout, layers, (0,)) if dtype == "fp8_scaled" else (layout, {})


def _scaled(layout: Layout, layers: Iterable[str], marker: tuple[int]) -> tuple[Layout, dict[str, bytes]]:
    """ComfyUI's fp8_scaled: the matrices of `layers` in fp8, one scale for each, and a tensor that says so."""
    values = {}
    for layer in sorted(layers):
        layout[f"{layer}weight"] = "F8_E4M3", layout[f"{layer}weight"][1]
        layout[f"{layer}scale_weight"] = "F32", ()
        values[f"{layer}scale_weight"] = struct.pack("<f", SCALE)
    layout["scaled_fp8"] = "F8_E4M3", marker
    return layout, values


def sentencepiece_model() -> bytes:
    """A small tokenizer with UMT5's special tokens: 0 pads, 1 ends, 2 is unknown."""
    import sentencepiece

    written = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["a red fox runs over fresh snow", "the camera moves slowly", "bright colours, 4k"]),
        model_writer=written,
        model_type="char",
        vocab_size=40,
        hard_vocab_limit=False,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        minloglevel=2,
    )
    return written.getvalue()


def write_once(path: Path, layout: Layout, values: Mapping[str, bytes], seed: int) -> None:
    """A safetensors file; `values` has the bytes of tensors that are not random."""
    if path.exists():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    header, end = {}, 0
    for name, (dtype, shape) in layout.items():
        start, end = end, end + _TORCH[dtype].itemsize * math.prod(shape)
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    part = path.with_suffix(".part")  # so that a file under its name is whole
    numbers = {}
    with part.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name, (dtype, shape) in layout.items():
            if name in values:
                file.write(values[name])
                continue
            if dtype not in numbers:
                numbers[dtype] = memoryview(_numbers(dtype, seed))
            _repeat(file, numbers[dtype], _TORCH[dtype].itemsize * math.prod(shape))
        file.flush()
        os.fsync(file.fileno())  # what is on the disk can leave the page cache
    part.rename(path)


def _repeat(file: io.BufferedWriter, numbers: memoryview, nbytes: int) -> None:
    for start in range(0, nbytes, len(numbers)):
        file.write(numbers[: nbytes - start])


def _numbers(dtype: str, seed: int) -> bytes:
    scale = 1.0 if dtype == "F8_E4M3" else SCALE  # those have one of their own
    numbers = torch.randn(_CHUNK, generator=torch.Generator().manual_seed(seed)).mul_(scale).to(_TORCH[dtype])
    return numbers.view(torch.uint8).numpy().tobytes()
