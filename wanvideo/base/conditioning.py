"""What a forward is given beside latent, timestep and text: the inputs of the Wan variants and of model patches."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import torch

from .config import WanConfig
from .options import PLAIN, Options
from .s2v_tail import segments_behind

Computed = TypeVar("Computed")

READ = (
    *("image", "camera", "vace", "tail", "mask", "audio", "image_ref"),
    *("pose", "face", "control", "subject", "so_far", "speakers"),
)
"""Inputs that the transformer reads, on every rank."""

CAMERA_PIXELS = 8  # of a camera path, along each side of one latent pixel


@dataclass(frozen=True, eq=False)
class Conditioning:
    """Inputs of one forward, for every batch item.

    `reference` and `extra_frames` are consumed by `extended`; the transformer reads the rest, which may lie on
    another device: each rank fetches what belongs to its tokens.

    Args:
        image: CLIP tokens of the start image, and of the last one behind it, [B, tokens, image_dim].
        camera: camera path [B, camera_dim, T, 8*H, 8*W].
        vace: VACE control videos [B, contexts, vace_dim, T, H, W].
        reference: reference latent [B, reference_dim, H, W]; frames of it [B, in_dim, frames, H, W] for a model that
            embeds them as it does the video.
        tail: tokens of further grids behind those of the video (see `tail_of`), [B, tokens, channels*4].
        mask: what is embedded beside the reference frames and the video, [B, mask_dim, frames + T, H, W].
        audio: features of what is heard: audio around each latent frame [B, frames, ...] (HuMo), of each layer, four
            frames for a latent one [B, layers, features, frames] (S2V), of music [B, moments, features] (WanDancer), or
            of the speech in each latent frame [B, frames, tokens, width] (InfiniteTalk).
        image_ref: CLIP tokens of a reference image beside the start image (WanDancer).
        extra_frames: frames behind the latent that are not part of the result, [B, in_dim, frames, H, W].
        pose: latent of Animate's pose video, [B, pose_dim, frames, H, W], whose first frame is of the video's second.
        face: Animate's face video in -1..1, [B, 3, frames, pixels, pixels], four frames for each of the latent.
        control: latent of S2V's control video, [B, control_dim, T, H, W].
        subject: latent of S2V's reference image, whose tokens lie behind the video, [B, in_dim, frames, H, W].
        so_far: latent of the video that S2V goes on with, [B, in_dim, frames, H, W]; its tokens lie behind the subject.
        speakers: masks of two speakers, and perhaps of nobody, over the tokens of the first frame (InfiniteTalk),
            [B, 2 or 3, rows * columns]; None where one alone speaks.
        options: plain data.
        kept: what `once` has computed, for whoever gives the same conditioning again; without, it computes anew.
    """

    image: torch.Tensor | None = None
    camera: torch.Tensor | None = None
    vace: torch.Tensor | None = None
    reference: torch.Tensor | None = None
    extra_frames: torch.Tensor | None = None
    pose: torch.Tensor | None = None
    face: torch.Tensor | None = None
    control: torch.Tensor | None = None
    subject: torch.Tensor | None = None
    so_far: torch.Tensor | None = None
    speakers: torch.Tensor | None = None
    tail: torch.Tensor | None = None
    mask: torch.Tensor | None = None
    audio: torch.Tensor | None = None
    image_ref: torch.Tensor | None = None
    options: Options = PLAIN
    kept: dict | None = None

    @property
    def empty(self) -> bool:
        """Whether the transformer has nothing to read here."""
        return not self.tensors() and self.options == PLAIN

    def tensors(self) -> dict[str, torch.Tensor]:
        """What is there of the inputs that the transformer reads, by name."""
        named = {name: getattr(self, name) for name in READ}
        return {name: tensor for name, tensor in named.items() if tensor is not None}

    def items(self, s: slice) -> Conditioning:
        """That of the batch items `s`."""
        kept = None if self.kept is None else self.kept.setdefault((s.start, s.stop), {})
        return dataclasses.replace(self, kept=kept, **{name: tensor[s] for name, tensor in self.tensors().items()})

    def once(self, name: str, compute: Callable[[], Computed]) -> Computed:
        """What `compute` gives, which depends on the weights and on the tensors here alone."""
        if self.kept is None:
            return compute()
        if name not in self.kept:
            self.kept[name] = compute()
        return self.kept[name]


NOTHING = Conditioning()


def placed(x: torch.Tensor, conditioning: Conditioning) -> Conditioning:
    """The conditioning for a latent x, with the places of what lies behind its video."""
    if conditioning.subject is None and conditioning.so_far is None:
        return conditioning
    subject, so_far = (None if y is None else y.shape[-3:] for y in (conditioning.subject, conditioning.so_far))
    options = dataclasses.replace(conditioning.options, tail=segments_behind(x.shape[-3:], subject, so_far))
    return dataclasses.replace(conditioning, options=options)


def extended(x: torch.Tensor, conditioning: Conditioning) -> tuple[torch.Tensor, Conditioning]:
    """Put the reference in front of a latent x [B, in_dim, T, H, W], in the first channels, and extra frames behind.

    They are tokens like all others from then on; `core` takes the frames of x out of the result. What lies behind the
    video gets its places.

    Returns:
        The longer latent, and the conditioning with what is left of it.
    """
    conditioning = placed(x, conditioning)
    frames, reference = [x], conditioning.reference
    if reference is not None:
        reference = reference if reference.ndim == 5 else reference.unsqueeze(2)
        front = x.new_zeros(x.shape[0], x.shape[1], reference.shape[2], *x.shape[-2:])
        front[:, : reference.shape[1]] = reference
        frames.insert(0, front)
    if conditioning.extra_frames is not None:
        frames.append(conditioning.extra_frames.to(x))
    if len(frames) == 1:
        return x, conditioning
    options = dataclasses.replace(
        conditioning.options, reference_frames=0 if reference is None else reference.shape[2]
    )
    return torch.cat(frames, dim=2), dataclasses.replace(
        conditioning, reference=None, extra_frames=None, options=options
    )


def core(result: torch.Tensor, frames: int, options: Options) -> torch.Tensor:
    """The `frames` frames of the latent itself in a result for an `extended` one."""
    return result[:, :, options.reference_frames : options.reference_frames + frames]


def check(config: WanConfig, x: torch.Tensor, conditioning: Conditioning) -> None:
    """Check that a conditioning fits the model and the latent x [B, in_dim, T, H, W].

    Raises:
        ValueError: the model has no such input, or it has another shape than the latent asks for.
    """
    batch, _, frames, height, width = x.shape
    led, pixels = config.face, config.face.pixels if config.face else 0
    hears = config.sound
    audio = (batch, None, config.music.features) if config.music else (batch, *_humo_audio(conditioning))
    if hears:
        audio = (batch, hears.layers, hears.features, None)
    if config.talk:
        audio = (batch, frames, None, config.talk.width)
    frame_tokens = -(-height // 2) * -(-width // 2)
    contexts = len(conditioning.options.vace_strengths)
    reference = (batch, config.reference_dim, height, width)
    if config.pose_dim:
        reference = (batch, config.in_dim, None, height, width)
    expected = {
        "image": (config.image_dim, (batch, None, config.image_dim)),
        "camera": (
            config.camera_dim,
            (batch, config.camera_dim, frames, CAMERA_PIXELS * height, CAMERA_PIXELS * width),
        ),
        "vace": (config.vace_layers, (batch, contexts, config.vace_dim, frames, height, width)),
        "reference": (config.reference_dim or config.pose_dim, reference),
        "tail": (config.tail_channels, (batch, conditioning.options.tail_tokens, None)),
        "audio": (config.music or config.humo or hears or config.talk, audio),
        "image_ref": (config.music, (batch, None, config.music.image_dim if config.music else None)),
        "mask": (config.mask_dim, (batch, config.mask_dim, None, height, width)),
        "extra_frames": (1, (batch, config.in_dim, None, height, width)),
        "pose": (led, (batch, led.pose_dim if led else 0, None, height, width)),
        "face": (led, (batch, 3, None, pixels, pixels)),
        "control": (hears, (batch, hears.control_dim if hears else 0, frames, height, width)),
        "subject": (hears, (batch, config.in_dim, None, height, width)),
        "so_far": (hears, (batch, config.in_dim, None, height, width)),
        "speakers": (config.talk, (batch, None, frame_tokens)),
    }
    for name, (there, shape) in expected.items():
        tensor = getattr(conditioning, name)
        if tensor is None:
            continue
        if not there:
            raise ValueError(
                f"The conditioning has the input {name}, which this {config.variant} model does not take. "
                "Use a model of the variant that the conditioning is made for."
            )
        fits = tensor.ndim == len(shape) and all(
            want in (None, got) for got, want in zip(tensor.shape, shape, strict=True)
        )
        if not fits:
            wanted = ", ".join("any" if size is None else str(size) for size in shape)
            raise ValueError(
                f"The conditioning's {name} has shape {tuple(tensor.shape)}, but a latent of shape {tuple(x.shape)} "
                f"needs [{wanted}]. Give the conditioning node and the latent the same width, height and length."
            )
    if conditioning.mask is not None:
        _check_mask(conditioning, frames)
    if config.humo and conditioning.audio is not None and conditioning.audio[0, 0].numel() != config.humo.features:
        raise ValueError(
            f"The audio embedding has {conditioning.audio[0, 0].numel()} numbers for each latent frame, but this HuMo "
            f"model takes {config.humo.features}. Use the audio encoder that WanHuMoImageToVideo is made for."
        )
    tail = conditioning.tail
    if tail is not None and tail.shape[2] not in {4 * channels for channels in config.tail_channels}:
        raise ValueError(
            f"The conditioning's further videos have {tail.shape[2] // 4} channels, but this "
            f"{config.variant} model takes {' or '.join(map(str, config.tail_channels))}. Encode them with the model's "
            "own VAE."
        )
    if conditioning.extra_frames is not None and (config.sound or {"camera", "vace"} & conditioning.tensors().keys()):
        raise ValueError(
            "Subject images (WanPhantomSubjectToVideo) cannot be joined with VACE, a camera path or S2V. "
            "Remove one of them."
        )
    if config.sound:
        _check_sound(x, conditioning)
    if config.talk and conditioning.audio is not None:
        _check_talk(conditioning)


def _check_talk(conditioning: Conditioning) -> None:
    if conditioning.extra_frames is not None or conditioning.tail is not None:
        raise ValueError(
            "InfiniteTalk cannot be joined with subject images or further videos (WanPhantomSubjectToVideo, "
            "BerniniConditioning). Remove one of them."
        )
    masks = 2 if conditioning.speakers is None else conditioning.speakers.shape[1]
    if masks not in (2, 3):
        raise ValueError(
            f"WanInfiniteTalkToVideo was given {masks} masks, but two speakers need 2, or 3 with one of nobody. "
            "Connect one mask to mask_1 and one to mask_2."
        )


def _check_sound(x: torch.Tensor, conditioning: Conditioning) -> None:
    frames, height, width = x.shape[-3:]
    if placed(x, conditioning).options.tail and (height % 2 or width % 2):
        raise ValueError(
            f"The latent is {width} x {height}, but beside a reference S2V takes even sizes alone. "
            "Use a width and a height that are multiples of 16 pixels."
        )
    if conditioning.so_far is not None and min(height, width) < 8:
        raise ValueError(
            f"The latent is {width} x {height}, but to go on with a video S2V needs 8 x 8 at least. "
            "Use a width and a height of at least 64 pixels."
        )
    if conditioning.audio is not None:
        heard = -(-min(4 * frames, conditioning.audio.shape[-1]) // 4)
        if not heard or frames * -(-height // 2) * -(-width // 2) % heard:
            raise ValueError(
                f"The sound lasts for {heard} of {frames} latent frames, which do not divide the video evenly. "
                "Use a shorter length, or a longer sound."
            )


def _humo_audio(conditioning: Conditioning) -> tuple[None, ...]:
    return (None,) * (conditioning.audio.ndim - 1 if conditioning.audio is not None else 1)


def _check_mask(conditioning: Conditioning, frames: int) -> None:
    around = (conditioning.reference, conditioning.extra_frames)
    wanted = frames + sum(tensor.shape[2] for tensor in around if tensor is not None)
    if conditioning.mask.shape[2] != wanted:
        raise ValueError(
            f"The conditioning's mask has {conditioning.mask.shape[2]} latent frames, but the reference images and the "
            f"video have {wanted}. Give the conditioning node the length of the latent."
        )
