"""What a file is that holds no Wan DiT, and what the modules are that no variant here has, from the tensors' names."""

from __future__ import annotations

import re
from collections.abc import Iterable

_WAN = "Choose a Wan 2.1 or 2.2 file here"
_OTHER_NODE = "Choose a Wan 2.1 or 2.2 file here, and load this file with {}."

_LORA = re.compile(
    r"lora_|\.lora\.|\.(lokr_w[12](_[ab])?|lokr_t2|hada_w[12]_[ab]|oft_(blocks|diag)|dora_scale|diff|diff_b|set_weight"
    r"|[wb]_norm|[ab][12]\.weight|reshape_weight)$",
    re.MULTILINE,
)
_KINDS: tuple[tuple[str, str, str], ...] = (
    (
        r"^(.*\.)?(shared\.weight|encoder\.block\.0\.layer\.0\.SelfAttention\.q\.weight|enc\.blk\.0\.attn_q\.weight"
        r"|token_embedding\.weight)$",
        "a text encoder (T5 or umT5)",
        _OTHER_NODE.format("CLIPLoader (type wan)"),
    ),
    (
        r"^(.*\.)?(decoder\.middle\.0\.residual\.0\.gamma|decoder\.conv_in\.(conv\.)?weight|decoder\.mid_block\..*"
        r"|decoder\.mid\.block_1\..*)$",
        "a VAE",
        _OTHER_NODE.format("VAELoader"),
    ),
    (
        r"^(.*\.)?(vision_model\.encoder\.layers\.0|visual\.(transformer\.resblocks|blocks)\.0)\.",
        "a CLIP vision model",
        _OTHER_NODE.format("CLIPVisionLoader"),
    ),
    (
        r"^(.*\.)?(text_model\.encoder\.layers\.0|transformer\.resblocks\.0)\.",
        "a CLIP text encoder",
        _OTHER_NODE.format("CLIPLoader"),
    ),
    (
        r"^(wav2vec2\.)?(encoder\.layers\.0\.attention\.k_proj|model\.encoder\.conv1|encoder\.conv1)\.",
        "an audio encoder",
        _OTHER_NODE.format("AudioEncoderLoader"),
    ),
    (r"^(token_embd|blk\.0\.attn_q)\.", "a language model", f"{_WAN}."),
    (r"^(.*\.)?txt_in\.individual_token_refiner\.", "a HunyuanVideo model", f"{_WAN}."),
    (r"^(.*\.)?double_blocks\.0\.img_attn\.", "a Flux model", f"{_WAN}."),
    (r"^(.*\.)?(patchify_proj|adaln_single\.emb\.timestep_embedder\.linear_1)\.", "an LTX-Video model", f"{_WAN}."),
    (r"^(.*\.)?transformer_blocks\.0\.(img_mod|attn\.add_q_proj)\b", "a model such as Qwen-Image or Flux", f"{_WAN}."),
    (r"^(.*\.)?joint_blocks\.0\.", "a Stable Diffusion 3 model", f"{_WAN}."),
    (r"^(.*\.)?(input_blocks\.0\.0|down_blocks\.0\.resnets\.0\.conv1)\.", "a Stable Diffusion model", f"{_WAN}."),
    (r"^(.*\.)?cap_embedder\.", "a Lumina or Z-Image model", f"{_WAN}."),
    (r"^(.*\.)?x_embedder\.proj\.1\.", "a Cosmos model", f"{_WAN}."),
    (r"^(.*\.)?(t5_yproj|t5_y_embedder)\.", "a Mochi model", f"{_WAN}."),
    (
        r"^blocks\.0\.audio_cross_attn\.proj\.",
        "the layers of InfiniteTalk or MultiTalk alone",
        _OTHER_NODE.format("ModelPatchLoader"),
    ),
    (r"^(.*\.)?controlnet_patch_embedding\.", "Uni3C's control network", f"{_WAN}; this pack does not run Uni3C."),
)
"""A pattern of names, what a file with such a name is, and what to do."""

_MODULES: tuple[tuple[str, str], ...] = (
    (r"\.(ip_adapter|ref_adapter)\.", "Lynx"),
    (r"^condition_embedding_align\.", "SteadyDancer"),
    (r"^image_to_cond\.", "One-to-All"),
    (r"\.control_blocks_(dense|sparse)\.", "LongVie 2"),
    (r"^LQ_proj_in\.", "FlashVSR"),
    (r"^dwpose_embedding\.", "UniAnimate"),
    (r"^fps_embedding\.", "SkyReels"),
    (r"^text_projection\.", "BindWeave"),
    (r"\.audio_cross_attn\.", "InfiniteTalk or MultiTalk"),
    (r"^controlnet_|^control_blocks\.", "a control network"),
    (r"(^|\.)motion_attn\.|^motion_modules?\.", "a motion module"),
    (r"^add_conv_in\.|^add_proj\.", "a module for further reference frames"),
)
"""A pattern of names, and what has tensors of such names beside those of a Wan model."""


def is_lora(names: Iterable[str]) -> bool:
    """Whether a file with tensors of these `names` is a LoRA of any kind."""
    return _LORA.search("\n".join(names)) is not None


def other_kind(names: Iterable[str]) -> tuple[str, str] | None:
    """What a file with tensors of these `names` is, and a sentence on what to do; None for a file nobody knows."""
    text = "\n".join(names)
    for pattern, what, advice in _KINDS:
        if re.search(pattern, text, re.MULTILINE):
            return what, advice
    return None


def module_name(names: Iterable[str]) -> str | None:
    """Whose module the tensors with these `names` are, beside a Wan DiT; None for a module nobody knows."""
    text = "\n".join(names)
    return next((what for pattern, what in _MODULES if re.search(pattern, text, re.MULTILINE)), None)
