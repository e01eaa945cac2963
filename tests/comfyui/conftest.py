"""Tests in a real ComfyUI. `COMFYUI_DIR` names its folder, `COMFYUI_PYTHON` its interpreter (default: this one)."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from testkit import format_files, tiny
from testkit.comfyui import loras
from testkit.comfyui.comfy_server import ComfyServer
from wan_parallel.wanvideo.base.config import WanConfig
from wan_parallel.wanvideo.variants.fun_control import Reference
from wan_parallel.wanvideo.variants.humo import Humo
from wan_parallel.wanvideo.variants.wandancer import WanDancer

TINY = WanConfig(dim=256, ffn_dim=512, num_heads=2, num_layers=2)
FOUR_HEADS = WanConfig(dim=512, ffn_dim=1024, num_heads=4, num_layers=2)
VARIANTS = {  # with the text and image widths that ComfyUI takes for granted
    name: config.having(
        *((tiny.MUSIC,) if config.get(WanDancer) else ()),
        text_dim=4096,
        image_dim=1280 if config.image_dim else 0,
        image_positions=514 if config.image_positions else 0,
    )
    for name, config in tiny.VARIANTS.items()
    if name not in ("animate", "s2v") and not config.get(Humo)  # large, or with tests of their own that write them
}
VARIANTS |= {
    "fun-control-5b": tiny.TINY.having(Reference(48), text_dim=4096, in_dim=148, out_dim=48),
    "fun-inp-5b": replace(tiny.TINY, text_dim=4096, in_dim=100, out_dim=48),
}
FIVE_B = WanConfig(dim=256, ffn_dim=512, num_heads=2, num_layers=2, in_dim=48, out_dim=48)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    for item in items:
        if here in item.path.parents:
            item.add_marker(pytest.mark.comfyui)


@pytest.fixture(scope="session")
def comfyui_dir() -> Path:
    folder = os.environ.get("COMFYUI_DIR")
    if not folder:
        pytest.skip("COMFYUI_DIR is not set: it names the folder of a ComfyUI to test in")
    if not (Path(folder) / "main.py").is_file():
        pytest.fail(f"COMFYUI_DIR is {folder}, which holds no main.py. Set it to a ComfyUI folder.")
    return Path(folder)


@pytest.fixture(scope="session")
def start_comfyui(comfyui_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., ComfyServer]]:
    """Starts a ComfyUI with the tiny models; whatever was started is ended with the session."""
    started = []

    def start(*options: str) -> ComfyServer:
        base = tmp_path_factory.mktemp("comfyui")
        _write_models(base / "models")
        server = ComfyServer(comfyui_dir, os.environ.get("COMFYUI_PYTHON", sys.executable), base, options)
        started.append(server)
        server.start()
        return server

    yield start
    for server in started:
        server.stop()


@pytest.fixture(scope="session")
def server(start_comfyui: Callable[..., ComfyServer]) -> ComfyServer:
    """The ComfyUI that most tests share."""
    return start_comfyui()


def _write_models(folder: Path) -> None:
    models, lora_files = folder / "diffusion_models", folder / "loras"
    models.mkdir(parents=True)
    lora_files.mkdir()
    tiny.write_checkpoint(models / "tiny.safetensors", TINY)
    tiny.write_checkpoint(models / "tiny-low.safetensors", TINY, seed=5)
    tiny.write_checkpoint(models / "four-heads.safetensors", FOUR_HEADS)
    tiny.write_checkpoint(models / "wan22-5b.safetensors", FIVE_B)
    for name, config in VARIANTS.items():
        tiny.write_checkpoint(models / f"{name}.safetensors", config)
    _write_vace_modules(models)
    note = {"config": json.dumps({"transformer": {"model_type": "flow_rvs"}})}
    tiny.write_weights(models / "flow-rvs.safetensors", tiny.random_weights(TINY), note)
    loras.write_lora(lora_files / "plain.safetensors", TINY)
    loras.write_lora(lora_files / "i2v.safetensors", VARIANTS["i2v-2.1"])
    loras.write_lora(lora_files / "vace.safetensors", VARIANTS["vace"])
    loras.write_odd_lora(lora_files / "odd.safetensors", TINY)
    for names in loras.STOCK_NAMES | loras.OTHER_NAMES:
        loras.write_named(lora_files / f"{names}.safetensors", TINY, names)
    for kind in loras.ADAPTERS:
        loras.write_adapter(lora_files / f"{kind}.safetensors", TINY, kind)
    loras.write_distilled(lora_files / "distilled.safetensors", TINY)
    loras.write_lora(lora_files / "four-heads.safetensors", FOUR_HEADS)
    loras.write_lora(lora_files / "deeper.safetensors", replace(TINY, num_layers=3), seed=6)
    tiny.write_weights(lora_files / "other-model.safetensors", {"lora_unet_down_0.lora_up.weight": torch.ones(4, 2)})
    _write_formats(models)
    _write_wrong_files(models)


def _write_vace_modules(models: Path) -> None:
    """The VACE model in two files, and a module for another size."""
    weights = tiny.random_weights(VARIANTS["vace"])
    parts: dict[bool, dict] = {False: {}, True: {}}
    for name, weight in weights.items():
        parts[name.startswith("vace_")][name] = weight
    tiny.write_weights(models / "vace-base.safetensors", parts[False])
    tiny.write_weights(models / "vace-module.safetensors", parts[True])
    wide = tiny.layout(replace(VARIANTS["vace"], dim=512, num_heads=4))
    tiny.write_layout(models / "wide-module.safetensors", {k: v for k, v in wide.items() if k.startswith("vace_")})


def _write_formats(models: Path) -> None:
    kinds = {"fp8-older": "ComfyUI's older scaled", "fp8-newer": "ComfyUI's newer scaled"}
    for name, kind in (*kinds.items(), ("nvfp4", "nvfp4"), ("mxfp8", "mxfp8")):
        folder = models / name
        folder.mkdir()
        format_files.written(folder, kind, config=TINY)  # quantised.safetensors and meant.safetensors
    _, meant = format_files.write_gguf(models / "tiny-Q4_K.gguf", "Q4_K", TINY)
    tiny.write_weights(models / "tiny-Q4_K-meant.safetensors", meant)
    format_files.write_shards(models / "Tiny-Diffusers" / "transformer", TINY)
    (models / "cut-short.gguf").write_bytes((models / "tiny-Q4_K.gguf").read_bytes()[:200_000])


def _write_wrong_files(models: Path) -> None:
    whole = (models / "tiny.safetensors").read_bytes()
    (models / "cut-short.safetensors").write_bytes(whole[: len(whole) // 2])
    (models / "corrupt.safetensors").write_bytes(whole[:8] + b"\xff" * 64 + whole[72:])
    (models / "pickle.pt").write_bytes(b"PK\x03\x04 not opened by anybody")
    (models / "lora.safetensors").write_bytes((models.parent / "loras" / "plain.safetensors").read_bytes())
