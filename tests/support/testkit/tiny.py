"""Random Wan checkpoints of a few megabytes, inputs for them, and how results are compared."""

from __future__ import annotations

import json
import math
import re
import struct
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import load_file, save_file
from wan_parallel.wanvideo.base.conditioning import Conditioning
from wan_parallel.wanvideo.base.config import WanConfig
from wan_parallel.wanvideo.base.options import ContextGrid, Options, RopeOptions
from wan_parallel.wanvideo.variants.animate import Animate
from wan_parallel.wanvideo.variants.fun_camera import FunCamera
from wan_parallel.wanvideo.variants.fun_control import Reference
from wan_parallel.wanvideo.variants.humo import Humo
from wan_parallel.wanvideo.variants.infinitetalk import InfiniteTalk
from wan_parallel.wanvideo.variants.s2v import S2V as S2VLayers
from wan_parallel.wanvideo.variants.scail import Scail, Scail2
from wan_parallel.wanvideo.variants.vace import Vace
from wan_parallel.wanvideo.variants.wandancer import WanDancer

import testkit  # noqa: F401 (registers wan_parallel)

ITEM_BYTES = {"F32": 4, "F16": 2, "BF16": 2, "F4": 0.5}
TINY = WanConfig(dim=256, ffn_dim=512, num_heads=2, num_layers=2, text_dim=64)


I2V = replace(TINY, in_dim=36)  # an expert of Wan 2.2 I2V A14B
I2V_CLIP = replace(I2V, image_dim=96)  # Wan 2.1 I2V
FIRST_LAST = replace(I2V_CLIP, image_positions=10)
FUN_CONTROL = I2V_CLIP.having(Reference(16), in_dim=48)
FUN_CONTROL_22 = TINY.having(Reference(16), in_dim=52)
FUN_CAMERA = I2V_CLIP.having(FunCamera(24), in_dim=32)
FUN_CAMERA_22 = TINY.having(FunCamera(24), in_dim=36)
VACE = TINY.having(Vace(blocks=2, channels=96), num_layers=4)
FACE = Animate(channels=(4, 8, 6), style=12, directions=5, motion=10, hidden=16, heads=2)  # of 16 x 16 pixels
ANIMATE = I2V_CLIP.having(FACE, num_layers=10)
S2V = TINY.having(S2VLayers(features=24, encoder_layers=3, heads=2), num_layers=5)
MUSIC = WanDancer(features=35, width=256, hidden=1024, encoder_layers=2, injectors=8, image_dim=1280)
WANDANCER = I2V_CLIP.having(replace(MUSIC, image_dim=96, hidden=64, injectors=2))
HUMO = TINY.having(Humo(features=8 * 5 * 12, hidden=16, width=48, tokens=4))
HUMO_17B = replace(HUMO, in_dim=36)
SCAIL = I2V_CLIP.having(Scail(20), in_dim=20)
SCAIL_2 = I2V_CLIP.having(Scail2(20, mask_dim=28), in_dim=20)
# InfiniteTalk has 40 heads whatever the width, and tensor-parallel ranks want an even number of the model's own.
INFINITETALK = I2V_CLIP.having(InfiniteTalk(width=48), dim=1280, num_heads=10, ffn_dim=128, freq_dim=64)
VARIANTS = {
    "i2v-2.2": I2V,
    "i2v-2.1": I2V_CLIP,
    "flf2v": FIRST_LAST,
    "fun-control": FUN_CONTROL,
    "fun-control-2.2": FUN_CONTROL_22,
    "fun-camera": FUN_CAMERA,
    "fun-camera-2.2": FUN_CAMERA_22,
    "vace": VACE,
    "animate": ANIMATE,
    "s2v": S2V,
    "humo": HUMO,
    "humo-17b": HUMO_17B,
    "dancer": WANDANCER,
    "scail": SCAIL,
    "scail-2": SCAIL_2,
}


class Inputs(NamedTuple):
    """What one forward is given."""

    x: torch.Tensor
    timestep: torch.Tensor
    context: torch.Tensor


def inputs(
    config: WanConfig = TINY,
    size: tuple[int, int, int] = (3, 6, 8),
    batch: int = 1,
    seed: int = 0,
    timestep: float = 700.0,
    text_tokens: int = 32,
) -> Inputs:
    """Normal latent [batch, C, *size] and text; each batch item has a timestep of its own."""
    generator = torch.Generator().manual_seed(seed)
    return Inputs(
        torch.randn(batch, config.in_dim, *size, generator=generator),
        timestep / torch.arange(1, batch + 1),
        torch.randn(batch, text_tokens, config.text_dim, generator=generator),
    )


def conditioning(
    config: WanConfig, x: torch.Tensor, seed: int = 1, image_tokens: int = 5, contexts: int = 1, strength: float = 0.8
) -> Conditioning:
    """Normal numbers for every input that a variant has, for a latent x."""
    generator = torch.Generator().manual_seed(seed)

    def normal(there: object, *shape: int) -> torch.Tensor | None:
        return torch.randn(len(x), *shape, generator=generator) if there else None

    frames, height, width = x.shape[-3:]
    camera, face, humo, wandancer, reference, scail, scail2, s2v, infinitetalk, vace = (
        config.get(variant)
        for variant in (FunCamera, Animate, Humo, WanDancer, Reference, Scail, Scail2, S2VLayers, InfiniteTalk, Vace)
    )
    strengths = (strength,) * contexts if vace else ()
    beside = RopeOptions(shift_x=120.0)
    context_grid = ContextGrid(frames, math.ceil(height / 4), math.ceil(width / 4), beside, stretched=True)
    pixels, mask_dim = face.pixels if face else 0, scail2.mask_dim if scail2 else 0
    pose_dim = (scail or scail2).pose_dim if scail or scail2 else 0
    if s2v:
        audio = s2v.encoder_layers, s2v.features, 4 * frames + 3
    elif infinitetalk:
        audio = frames, 6, infinitetalk.width
    else:
        audio = (frames, humo.features) if humo else (20, wandancer.features if wandancer else 0)
    camera_dim, reference_dim = (dims.channels if dims else 0 for dims in (camera, reference))
    return Conditioning(
        context_videos=normal(pose_dim, context_grid.tokens, 4 * (pose_dim + mask_dim)),
        mask=normal(mask_dim, mask_dim, frames, height, width),
        audio=normal(humo or wandancer or infinitetalk or s2v, *audio),
        speakers=_speakers(config, x, generator) if infinitetalk else None,
        image_ref=normal(wandancer, image_tokens, config.image_dim),
        image=normal(config.image_dim, config.image_positions or image_tokens, config.image_dim),
        camera=normal(camera_dim, camera_dim, frames, 8 * height, 8 * width),
        vace=normal(vace, contexts, vace.channels if vace else 0, frames, height, width),
        reference=normal(reference_dim, reference_dim, height, width),
        pose=normal(frames > 1 and face, face.pose_dim if face else 0, frames - 1, height, width),
        face=normal(face, 3, 4 * frames - 7 if frames > 1 else 1, pixels, pixels),
        control=normal(s2v, s2v.control_dim if s2v else 0, frames, height, width),
        subject=normal(s2v, config.in_dim, 1, height, width),
        motion_frames=normal(s2v and min(height, width) >= 8, config.in_dim, 6, height, width),
        options=Options(vace_strengths=strengths, context_grids=(context_grid,) if pose_dim else ()),
    )


def _speakers(config: WanConfig, x: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Random masks of two speakers."""
    tokens = math.ceil(x.shape[-2] / 2) * math.ceil(x.shape[-1] / 2)
    return torch.randint(0, 2, (1, 2, tokens), generator=generator).float().expand(len(x), -1, -1)


def relative_error(got: torch.Tensor, expected: torch.Tensor) -> float:
    """Norm of the difference over the norm of `expected`."""
    return float((got.double() - expected.double()).norm() / expected.double().norm())


def sentences(text: str) -> int:
    """How many sentences a message has; one without an end counts as none."""
    return len(re.findall(r"[.?!](?=\s+[A-Z]|$)", text)) if text.endswith(".") else 0


_NORMS = (
    *(f"norm_{part}.weight" for part in ("q", "k", "k_img")),
    *("q_norm.weight", "k_norm.weight", "norm3.weight", "proj.0.weight", "proj.4.weight"),
    *("norm1.weight", "norm2.weight", "norm_x.weight", "norm1_audio.weight", "audio_proj_glob_norm.layer.weight"),
)


def random_weights(config: WanConfig, seed: int = 0) -> dict[str, torch.Tensor]:
    """Float32 weights by name, large enough that every part of the model shows in the output."""
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for name, shape in config.shapes().items():
        noise = torch.randn(shape, generator=generator)
        if name.endswith(_NORMS):
            weights[name] = 1 + 0.1 * noise
        elif name.startswith("motion_encoder."):
            weights[name] = noise  # which the model scales itself
        elif "modulation" in name:
            weights[name] = 0.3 * noise
        elif name.endswith("bias"):
            weights[name] = 0.02 * noise
        else:
            weights[name] = noise / noise[0].numel() ** 0.5
    return weights


def write_checkpoint(
    path: Path, config: WanConfig = TINY, seed: int = 0, dtype: torch.dtype = torch.float32, prefix: str = ""
) -> str:
    """A checkpoint of random weights; returns its path."""
    weights = random_weights(config, seed) | (blur_kernels(config) if config.get(Animate) else {})
    return write_weights(path, {prefix + k: v.to(dtype) for k, v in weights.items()})


def write_weights(path: Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str] | None = None) -> str:
    """A safetensors file of these tensors; returns its path."""
    save_file(dict(tensors), path, dict(metadata) if metadata else None)
    return str(path)


def write_layout(
    path: Path, tensors: Mapping[str, tuple[str, tuple[int, ...]]], metadata: Mapping[str, str] | None = None
) -> Path:
    """A file with the real header of `tensors` (name to dtype and shape) and a hole of the right size for data."""
    header: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for name, (dtype, shape) in tensors.items():
        nbytes = int(math.prod(shape) * ITEM_BYTES.get(dtype, 1))
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [end, end + nbytes]}
        end += nbytes
    return write_header(path, json.dumps(header).encode(), end)


def write_header(path: Path, header: bytes, data_bytes: int = 0) -> Path:
    """A safetensors file with this text for its header and a hole of `data_bytes` behind it."""
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(header)) + header)
        file.truncate(8 + len(header) + data_bytes)
    return path


def layout(config: WanConfig = TINY, dtype: str = "BF16", prefix: str = "") -> dict[str, tuple]:
    """What `write_layout` takes, for a whole model."""
    return {prefix + name: (dtype, shape) for name, shape in config.shapes().items()}


_FACE = r"motion_encoder\.enc\.net_app\.convs"
_DIFFUSERS_NAMES = (
    (r"^time_embedding\.0\.", "condition_embedder.time_embedder.linear_1."),
    (r"^time_embedding\.2\.", "condition_embedder.time_embedder.linear_2."),
    (r"^text_embedding\.0\.", "condition_embedder.text_embedder.linear_1."),
    (r"^text_embedding\.2\.", "condition_embedder.text_embedder.linear_2."),
    (r"^time_projection\.1\.", "condition_embedder.time_proj."),
    (r"^head\.modulation$", "scale_shift_table"),
    (r"^head\.head\.", "proj_out."),
    (r"^((?:vace_)?blocks\.\d+)\.modulation$", r"\1.scale_shift_table"),
    (r"\.ffn\.0\.", ".ffn.net.0.proj."),
    (r"\.ffn\.2\.", ".ffn.net.2."),
    (r"\.norm3\.", ".norm2."),  # the norm before cross-attention; the others have no weights
    (r"\.self_attn\.", ".attn1."),
    (r"\.cross_attn\.", ".attn2."),
    (r"(attn[12])\.([qkv])\.", r"\1.to_\2."),
    (r"(attn[12])\.o\.", r"\1.to_out.0."),
    (r"attn2\.([kv])_img\.", r"attn2.add_\1_proj."),
    (r"norm_k_img", "norm_added_k"),
    (r"\.before_proj\.", ".proj_in."),
    (r"\.after_proj\.", ".proj_out."),
    (r"^img_emb\.proj\.0\.", "condition_embedder.image_embedder.norm1."),
    (r"^img_emb\.proj\.1\.", "condition_embedder.image_embedder.ff.net.0.proj."),
    (r"^img_emb\.proj\.3\.", "condition_embedder.image_embedder.ff.net.2."),
    (r"^img_emb\.proj\.4\.", "condition_embedder.image_embedder.norm2."),
    (r"^face_adapter\.fuser_blocks\.", "face_adapter."),
    (r"\.linear1_q\.", ".to_q."),
    (r"\.linear2\.", ".to_out."),
    (r"^(face_adapter\.\d+)\.([qk])_norm\.", r"\1.norm_\2."),
    (r"^(face_encoder\.conv\w+)\.conv\.", r"\1."),
    (r"^motion_encoder\.dec\.direction\.weight$", "motion_encoder.motion_synthesis_weight"),
    (r"^motion_encoder\.enc\.fc\.", "motion_encoder.motion_network."),
    (rf"^{_FACE}\.(\d+)\.weight$", "motion_encoder.conv_out.weight"),
    (rf"^{_FACE}\.0\.0\.", "motion_encoder.conv_in."),
    (rf"^{_FACE}\.0\.1\.", "motion_encoder.conv_in.act_fn."),
    (rf"^{_FACE}\.(\d+)\.skip\.1\.", r"motion_encoder.res_blocks.\1.conv_skip."),
    (rf"^{_FACE}\.(\d+)\.(conv[12])\.[01]\.weight", r"motion_encoder.res_blocks.\1.\2.weight"),
    (rf"^{_FACE}\.(\d+)\.(conv[12])\.[12]\.bias", r"motion_encoder.res_blocks.\1.\2.act_fn.bias"),
    (r"^img_emb\.emb_pos$", "condition_embedder.image_embedder.pos_embed"),
)


def diffusers_name(name: str) -> str:
    """The name that diffusers has for a tensor of the original model."""
    for pattern, replacement in _DIFFUSERS_NAMES:
        name = re.sub(pattern, replacement, name)
    return re.sub(r"res_blocks\.(\d+)", lambda block: f"res_blocks.{int(block[1]) - 1}", name)


def diffusers_weights(weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The weights of the original model in diffusers' layout."""
    theirs = {}
    for name, weight in weights.items():
        if name.endswith(".kernel"):  # a constant
            continue
        if ".linear1_kv." in name:  # two matrices there
            for projection, part in zip(("to_k", "to_v"), weight.chunk(2), strict=True):
                theirs[diffusers_name(name).replace("linear1_kv", projection)] = part.contiguous()
        elif name.startswith("motion_encoder.") and name.endswith(".bias") and ".convs." in name:
            theirs[diffusers_name(name)] = weight.flatten()
        else:
            theirs[diffusers_name(name)] = weight
    return theirs


def diffusers_model(path: str, config: WanConfig = TINY) -> torch.nn.Module:
    """diffusers' class for the variant in float32 with the weights of a checkpoint without prefix."""
    import diffusers

    cls, options = diffusers.WanTransformer3DModel, {}
    if vace := config.get(Vace):
        cls = diffusers.WanVACETransformer3DModel
        layers = list(range(0, config.num_layers, vace.stride(config)))
        options = {"vace_layers": layers, "vace_in_channels": vace.channels}
    if config.image_dim:
        options = {"image_dim": config.image_dim, "added_kv_proj_dim": config.dim}
        options["pos_embed_seq_len"] = config.image_positions or None
    if face := config.get(Animate):
        cls = diffusers.WanAnimateTransformer3DModel
        sizes = {str(face.pixels // 2**i): channels for i, channels in enumerate(face.channels)}
        options |= {
            "latent_channels": face.pose_dim,
            "motion_encoder_channel_sizes": sizes,
            "motion_encoder_size": face.pixels,
            "motion_style_dim": face.style,
            "motion_dim": face.directions,
            "motion_encoder_dim": face.motion,
            "face_encoder_hidden_dim": face.hidden,
            "face_encoder_num_heads": face.heads,
        }
    model = cls(
        num_attention_heads=config.num_heads,
        attention_head_dim=config.head_dim,
        in_channels=config.in_dim,
        out_channels=config.out_dim,
        text_dim=config.text_dim,
        freq_dim=config.freq_dim,
        ffn_dim=config.ffn_dim,
        num_layers=config.num_layers,
        **options,
    )
    weights = diffusers_weights({name: weight.float() for name, weight in load_file(path).items()})
    model.load_state_dict(weights, strict=True)
    return model.eval().requires_grad_(False)


def blur_kernels(config: WanConfig) -> dict[str, torch.Tensor]:
    """The constants that a file of Animate has beside its weights."""
    line = torch.tensor([1.0, 3.0, 3.0, 1.0]) / 8
    places = [f"{i}.{part}.0.kernel" for i in range(1, len(config[Animate].channels)) for part in ("conv2", "skip")]
    return {f"motion_encoder.enc.net_app.convs.{place}": torch.outer(line, line) for place in places}
