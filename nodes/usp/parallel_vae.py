"""WanVideo Parallel VAE Decode and Encode: each worker of a pool decodes or encodes a strip of every frame."""

from __future__ import annotations

import hashlib
import logging
import weakref
from collections.abc import Callable, Mapping
from typing import Any, TypedDict

import comfy.model_management
import comfy.utils
import torch
from comfy_api.latest import io

from ...distributed.client.pool import Pool, acquire, running
from ...distributed.client.vae_client import VAEWeights, decode, encode
from ...wanvideo.vae.vae_layout import HALVES, Half, frames_of, kind_of, latent_frames, weights_of
from ...wanvideo.vae.vae_ops import VAEError
from ..common.progress import WorkersPoll
from ..common.settings import USPConfig
from ..common.sockets import CATEGORY
from ..model.model_patcher import RemoteModelPatcher
from ..model.shared_device import free_shared_gpu

log = logging.getLogger(__name__)

PRECISIONS = ("auto", "bf16", "fp16", "fp32")
_DTYPES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
WORKERS = io.Custom("MODEL,XDITUSPCONFIG")


class WanVideoParallelVAEDecode(io.ComfyNode):
    """VAE Decode on the workers that sampled."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Describe the node to ComfyUI."""
        return io.Schema(
            node_id="WanVideoParallelVAEDecode",
            display_name="WanVideo Parallel VAE Decode",
            category=CATEGORY,
            description=(
                "VAE Decode for Wan's VAEs (2.1, which Wan 2.2 A14B uses too, and 2.2 of the 5B) on all GPUs of "
                "XDit+USP Config: each decodes a strip of every frame and asks its neighbours for the row beside it, "
                "so the result is that of one GPU within rounding, without seams. Frames arrive piece by piece; no GPU "
                "ever holds the whole video."
            ),
            inputs=[
                io.Latent.Input("samples", tooltip="The latent of a Wan video, from any sampler."),
                *_common_inputs(),
            ],
            outputs=[io.Image.Output(display_name="images", tooltip="The frames, as VAE Decode gives them.")],
        )

    @classmethod
    def execute(
        cls, samples: Mapping[str, Any], vae: Any, precision: str = "auto", workers: object = None
    ) -> io.NodeOutput:
        """Return the frames, on the device and in the dtype that VAE Decode gives them."""
        weights, latent = vae_weights(vae, "decoder"), samples["samples"]
        pool, total = find_pool(workers), len(latent) * frames_of(latent.shape[2])
        decoded = decode(pool, weights, latent, _dtype(vae, precision), **_callbacks(pool, total))
        log.info("Decoded %s in %.2f s on the workers.", tuple(decoded.frames.shape), decoded.seconds)
        return io.NodeOutput(_as_comfyui_has_it(decoded.frames.flatten(0, 1), vae))


class WanVideoParallelVAEEncode(io.ComfyNode):
    """VAE Encode on the workers."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Describe the node to ComfyUI."""
        return io.Schema(
            node_id="WanVideoParallelVAEEncode",
            display_name="WanVideo Parallel VAE Encode",
            category=CATEGORY,
            description=(
                "VAE Encode for Wan's VAEs (2.1, which Wan 2.2 A14B uses too, and 2.2 of the 5B) on all GPUs of "
                "XDit+USP Config: each encodes a strip of every frame, with the result of one GPU within rounding. For "
                "video to video."
            ),
            inputs=[
                io.Image.Input("pixels", tooltip="The frames. Edges beyond a multiple of 8 (5B: 16) are cropped."),
                *_common_inputs(),
            ],
            outputs=[io.Latent.Output(display_name="latent", tooltip="The latent, as VAE Encode gives it.")],
        )

    @classmethod
    def execute(cls, pixels: torch.Tensor, vae: Any, precision: str = "auto", workers: object = None) -> io.NodeOutput:
        """Return the latent, on the device and in the dtype that VAE Encode gives it."""
        weights, frames = vae_weights(vae, "encoder"), vae.vae_encode_crop_pixels(pixels)[..., :3]
        pool, total = find_pool(workers), latent_frames(len(frames))
        latent = encode(pool, weights, frames, _dtype(vae, precision), **_callbacks(pool, total))
        return io.NodeOutput({"samples": _as_comfyui_has_it(latent, vae)})


def _common_inputs() -> list[io.Input]:
    """The inputs behind the video or its latent."""
    return [
        io.Vae.Input("vae", tooltip="The model's VAE, from Load VAE. Its weights go to the workers once."),
        io.Combo.Input(
            "precision",
            options=list(PRECISIONS),
            default="auto",
            optional=True,
            tooltip="Of weights and activations. auto: the one that ComfyUI has chosen for this VAE.",
        ),
        WORKERS.Input(
            "workers",
            optional=True,
            tooltip=(
                "Whose workers do it: a MODEL of XDit+USP WanVideo Model Loader, or an XDit+USP Config, which starts "
                "them where they don't run. Left open: those that run, such as those that have sampled."
            ),
        ),
    ]


def _dtype(vae: Any, precision: str) -> str:
    """The precision of weights and activations, for "auto" the one that ComfyUI has chosen for this VAE."""
    return _DTYPES[vae.vae_dtype] if precision == "auto" else precision


class _Callbacks(TypedDict):
    """The functions that the client of the workers calls while it waits: for Cancel, for room on the shared GPU, and
    with the number of frames done."""

    poll: Callable[[], None]
    make_room: Callable[[int], object]
    progress: Callable[[int], object]


def _callbacks(pool: Pool, total: int) -> _Callbacks:
    """The callbacks of a result of `total` frames of a pool."""
    return {
        "poll": WorkersPoll(pool),
        "make_room": free_shared_gpu,
        "progress": _progress_bar(total),
    }


def _as_comfyui_has_it(result: torch.Tensor, vae: Any) -> torch.Tensor:
    """Move a result to the device and the dtype of this VAE's own results."""
    device = getattr(vae, "output_device", comfy.model_management.intermediate_device())
    dtype = vae.vae_output_dtype() if hasattr(vae, "vae_output_dtype") else torch.float32
    return result.to(device, dtype)


def find_pool(workers: object) -> Pool:
    """Return the pool of a MODEL or of a config of this pack; without either, a pool that runs.

    Raises:
        ValueError: the MODEL is from another loader, or no pool runs.
    """
    if isinstance(workers, RemoteModelPatcher):
        return workers.remote.pool
    if isinstance(workers, USPConfig):
        workers.validate()
        return acquire(workers.pool_settings())
    if workers is not None:
        raise ValueError(
            "The MODEL at workers does not run in workers of ours. Connect that of XDit+USP WanVideo Model Loader, an "
            "XDit+USP Config, or nothing."
        )
    pool = running()
    if pool is None:
        raise ValueError(
            "No workers run that could decode this video. Connect the MODEL of XDit+USP WanVideo Model Loader or an "
            "XDit+USP Config to workers, which starts them."
        )
    return pool


def vae_weights(vae: Any, half: Half) -> VAEWeights:
    """The weights of a VAE of ComfyUI's in the form that workers take; the workers will use one half of the weights.

    Raises:
        VAEError: the VAE is none of Wan's VAEs, or another node has patched the VAE.
    """
    model = getattr(vae, "first_stage_model", None)
    if model is None:
        raise VAEError("This VAE holds no weights. Choose Wan 2.1's or Wan 2.2's VAE in Load VAE.")
    if getattr(vae.patcher, "patches", None):
        raise VAEError("A node has patched the weights of this VAE, which workers cannot follow. Use VAE Decode.")
    state = model.state_dict()
    shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
    kind_of(shapes, half)
    if model not in _keys:
        _keys[model] = _content_key(state)
    return VAEWeights(_keys[model], shapes, model.state_dict)


_keys: weakref.WeakKeyDictionary[torch.nn.Module, str] = weakref.WeakKeyDictionary()
"""The keys of VAEs seen before: the same file loaded twice is one VAE to the workers."""


def _content_key(state: Mapping[str, torch.Tensor]) -> str:
    content = hashlib.blake2b(digest_size=16)
    for name in sorted(name for half in HALVES for name in weights_of(half, state)):
        content.update(name.encode())
        content.update(state[name].detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return content.hexdigest()


def _progress_bar(total: int) -> Callable[[int], None]:
    """Show how many of `total` frames are there."""
    bar, shown = comfy.utils.ProgressBar(total), 0

    def show(frames: int) -> None:
        nonlocal shown
        if frames > shown:
            shown = frames
            bar.update_absolute(frames)

    return show
