"""The dimensions of a Wan DiT: of a released size, or of a file (see header.py, which reads them)."""

from __future__ import annotations

import re
from dataclasses import dataclass

from .audio_shapes import DancerMusic, HumoAudio, TalkAudio
from .tensor_info import elements
from .variant_shapes import FACE_STRIDE, SOUND_LAYERS, FaceDims, Hearing, SoundDims, acts_behind

BLOCK_NAME = re.compile(r"(vace_)?blocks\.(\d+)\.(?!before_proj)")
"""What the weights of a block are called; `before_proj` makes the control streams before any block runs."""


@dataclass(frozen=True)
class WanConfig:
    """Dimensions of a Wan DiT, named as in Wan 2.1's `wan/modules/model.py`.

    What only some variants have is 0 in the others (see variant_model.py).

    Args:
        in_dim: channels of the latent and of what is concatenated to it (a start image, its mask, a control video).
        out_dim: channels of the latent.
        image_dim: width of the CLIP tokens of the start image.
        image_positions: CLIP tokens with a learned position, where there is a last image too.
        reference_dim: channels of the reference latent, whose tokens go in front of the video.
        camera_dim: channels of the camera path, one set for each pixel.
        vace_layers: number of VACE blocks, spread evenly over the layers.
        vace_dim: channels of a VACE control video.
        face: what Animate has for its pose and face videos; None in the others.
        sound: what S2V has for sound; None in the others.
        pose_dim: channels of a pose video, whose tokens go behind the video (SCAIL).
        mask_dim: channels of the masks that tell the persons of a video and its pose apart (SCAIL-2).
        humo: HuMo's audio path.
        music: WanDancer's music path.
        talk: InfiniteTalk's layers, which come in a file of their own (see infinitetalk_module.py).
    """

    dim: int
    ffn_dim: int
    num_heads: int
    num_layers: int
    in_dim: int = 16
    out_dim: int = 16
    text_dim: int = 4096
    freq_dim: int = 256
    eps: float = 1e-6
    image_dim: int = 0
    image_positions: int = 0
    reference_dim: int = 0
    camera_dim: int = 0
    vace_layers: int = 0
    vace_dim: int = 0
    face: FaceDims | None = None
    sound: SoundDims | None = None
    pose_dim: int = 0
    mask_dim: int = 0
    humo: HumoAudio | None = None
    music: DancerMusic | None = None
    talk: TalkAudio | None = None

    @property
    def head_dim(self) -> int:
        return self.dim // self.num_heads

    @property
    def variant(self) -> str:
        """What a user calls it, such as image-to-video."""
        if self.vace_layers:
            return "VACE"
        if self.face:
            return "Animate"
        if self.sound:
            return "S2V"
        if self.camera_dim:
            return "Fun-Camera"
        if self.pose_dim:
            return "SCAIL-2" if self.mask_dim else "SCAIL"
        if self.humo or self.music:
            return "HuMo" if self.humo else "WanDancer"
        if self.in_dim >= 3 * self.out_dim:  # a control video and an image
            return "Fun-Control"
        return "text-to-video" if self.in_dim == self.out_dim else "image-to-video"

    @property
    def tail_channels(self) -> tuple[int, ...]:
        """Channels that videos in the tail of the sequence may have, with those of what is embedded beside them."""
        if self.pose_dim:
            return (self.pose_dim, self.pose_dim + self.mask_dim)
        return (self.in_dim,) if self.variant in ("text-to-video", "image-to-video", "Fun-Control") else ()

    @property
    def vace_stride(self) -> int:
        """Layers from one VACE block to the next."""
        return self.num_layers // self.vace_layers

    def vace_behind(self, blocks: range) -> range:
        """The VACE blocks that run behind these blocks of the video."""
        if not self.vace_layers:
            return range(0)
        return range(*(-(-block // self.vace_stride) for block in (blocks.start, blocks.stop)))

    def in_turn(self, blocks: range) -> list[int]:
        """The numbers of these blocks of the video and of the VACE blocks behind them, in the order in which they run.

        VACE blocks are numbered from `num_layers` on.
        """
        turns: list[int] = []
        for block in blocks:
            turns += [block, *(self.num_layers + i for i in self.vace_behind(range(block, block + 1)))]
        return turns

    def block_number(self, name: str) -> int | None:
        """The number, as `in_turn` has it, of the block that a tensor belongs to, or acts behind before another block
        comes; None for one of no block."""
        match = BLOCK_NAME.match(name)
        return int(match[2]) + (self.num_layers if match[1] else 0) if match else acts_behind(name)

    def place_of(self, name: str) -> int | None:
        """The block of the video that a tensor belongs to or acts at alone; None for one of no block."""
        number = self.block_number(name)
        if name.startswith("vace_blocks."):
            return 0 if number is None else (number - self.num_layers) * self.vace_stride  # before_proj has no number
        return number

    @property
    def hearing(self) -> Hearing:
        """What tokens attend to of their frame: speech, sound, a face."""
        if self.talk:
            return Hearing(1.0, TalkAudio.TOKENS, self.talk.width)
        if self.humo:
            return Hearing(1.0, self.humo.tokens, self.humo.width)
        dims = self.face or self.sound
        if not dims:
            return Hearing()
        places = range(0, self.num_layers, FACE_STRIDE) if self.face else SOUND_LAYERS
        share = sum(place < self.num_layers for place in places) / self.num_layers
        return Hearing(share, dims.heads + 1, self.dim)

    @property
    def parameters(self) -> int:
        """Number of parameters."""
        return sum(elements(shape) for shape in self.shapes().values())

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The name and shape of every tensor of the state dict, in the original key names."""
        d, f = self.dim, self.ffn_dim
        shapes: dict[str, tuple[int, ...]] = {
            "patch_embedding.weight": (d, self.in_dim, 1, 2, 2),
            "patch_embedding.bias": (d,),
            "head.modulation": (1, 2, d),
        }

        def linear(name: str, columns: int, rows: int) -> None:
            shapes[f"{name}.weight"] = (rows, columns)
            shapes[f"{name}.bias"] = (rows,)

        linear("text_embedding.0", self.text_dim, d)
        linear("text_embedding.2", d, d)
        linear("time_embedding.0", self.freq_dim, d)
        linear("time_embedding.2", d, d)
        linear("time_projection.1", d, 6 * d)

        def block(name: str, image: bool = False) -> None:
            shapes[f"{name}.modulation"] = (1, 6, d)
            for attention in ("self_attn", "cross_attn"):
                for projection in "qkvo":
                    linear(f"{name}.{attention}.{projection}", d, d)
                shapes[f"{name}.{attention}.norm_q.weight"] = (d,)
                shapes[f"{name}.{attention}.norm_k.weight"] = (d,)
            if image:
                linear(f"{name}.cross_attn.k_img", d, d)
                linear(f"{name}.cross_attn.v_img", d, d)
                shapes[f"{name}.cross_attn.norm_k_img.weight"] = (d,)
            shapes[f"{name}.norm3.weight"] = (d,)
            shapes[f"{name}.norm3.bias"] = (d,)
            linear(f"{name}.ffn.0", d, f)
            linear(f"{name}.ffn.2", f, d)

        def convolution(name: str, columns: int, size: int) -> None:
            shapes[f"{name}.weight"] = (d, columns, size, size)
            shapes[f"{name}.bias"] = (d,)

        for i in range(self.num_layers):
            block(f"blocks.{i}", image=bool(self.image_dim))
        linear("head.head", d, 4 * self.out_dim)

        if self.image_dim:
            width = self.image_dim
            for norm, size in ((0, width), (4, d)):
                shapes[f"img_emb.proj.{norm}.weight"] = shapes[f"img_emb.proj.{norm}.bias"] = (size,)
            linear("img_emb.proj.1", width, width)
            linear("img_emb.proj.3", width, d)
        if self.image_positions:
            shapes["img_emb.emb_pos"] = (1, self.image_positions, self.image_dim)
        if self.reference_dim:
            convolution("ref_conv", self.reference_dim, 2)
        if self.camera_dim:
            convolution("control_adapter.conv", self.camera_dim * 64, 2)
            for i in (1, 2):
                convolution(f"control_adapter.residual_blocks.0.conv{i}", d, 3)
        for stream, channels in (("pose", self.pose_dim), ("mask", self.mask_dim)):
            if channels:
                shapes[f"patch_embedding_{stream}.weight"] = (d, channels, 1, 2, 2)
                shapes[f"patch_embedding_{stream}.bias"] = (d,)
        if self.humo:
            shapes |= self.humo.shapes(d, self.num_layers)
        if self.music:
            shapes |= self.music.shapes(d, self.in_dim, self.out_dim)
        if self.talk:
            shapes |= self.talk.shapes(d, self.num_layers)
        if self.vace_layers:
            shapes["vace_patch_embedding.weight"] = (d, self.vace_dim, 1, 2, 2)
            shapes["vace_patch_embedding.bias"] = (d,)
            linear("vace_blocks.0.before_proj", d, d)
            for i in range(self.vace_layers):
                block(f"vace_blocks.{i}")
                linear(f"vace_blocks.{i}.after_proj", d, d)
        if self.face:
            shapes |= self.face.shapes(d, self.num_layers)
        if self.sound:
            shapes |= self.sound.shapes(d, self.in_dim)
        return shapes


PRESETS = {
    "1.3b": WanConfig(dim=1536, ffn_dim=8960, num_heads=12, num_layers=30),
    "5b": WanConfig(dim=3072, ffn_dim=14336, num_heads=24, num_layers=30, in_dim=48, out_dim=48),
    "14b": WanConfig(dim=5120, ffn_dim=13824, num_heads=40, num_layers=40),
}
