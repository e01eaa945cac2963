"""What a forward is given beside latent, timestep and text: the inputs of the Wan variants and of model patches."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass

import torch

from .config import WanConfig
from .options import PLAIN, Options

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
        reference: reference latent [B, reference_dim, H, W].
        extra_frames: frames behind the latent that are not part of the result, [B, in_dim, frames, H, W].
        pose: latent of Animate's pose video, [B, pose_dim, frames, H, W], whose first frame is of the video's second.
        face: Animate's face video in -1..1, [B, 3, frames, pixels, pixels], four frames for each of the latent.
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
    options: Options = PLAIN
    kept: dict | None = None

    @property
    def empty(self) -> bool:
        """Whether the transformer has nothing to read here."""
        return not self.tensors() and self.options == PLAIN

    def tensors(self) -> dict[str, torch.Tensor]:
        """What is there for the transformer, by name."""
        named = {name: getattr(self, name) for name in _FOR_TRANSFORMER}
        return {name: tensor for name, tensor in named.items() if tensor is not None}

    def items(self, s: slice) -> Conditioning:
        """That of the batch items `s`."""
        kept = None if self.kept is None else self.kept.setdefault((s.start, s.stop), {})
        return dataclasses.replace(self, kept=kept, **{name: tensor[s] for name, tensor in self.tensors().items()})

    def once(self, name: str, compute: Callable[[], torch.Tensor]) -> torch.Tensor:
        """What `compute` gives, which depends on the weights and on the tensors here alone."""
        if self.kept is None:
            return compute()
        if name not in self.kept:
            self.kept[name] = compute()
        return self.kept[name]


_FOR_TRANSFORMER = ("image", "camera", "vace", "pose", "face")
NOTHING = Conditioning()


def extended(x: torch.Tensor, conditioning: Conditioning) -> tuple[torch.Tensor, Conditioning]:
    """Put the reference in front of a latent x [B, in_dim, T, H, W], in the first channels, and extra frames behind.

    They are tokens like all others from then on; `core` takes the frames of x out of the result.

    Returns:
        The longer latent, and the conditioning with what is left of it.
    """
    frames = [x]
    if conditioning.reference is not None:
        front = x.new_zeros(x.shape[0], x.shape[1], 1, *x.shape[-2:])
        front[:, : conditioning.reference.shape[1], 0] = conditioning.reference
        frames.insert(0, front)
    if conditioning.extra_frames is not None:
        frames.append(conditioning.extra_frames.to(x))
    if len(frames) == 1:
        return x, conditioning
    options = dataclasses.replace(conditioning.options, reference_frames=int(conditioning.reference is not None))
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
    contexts = len(conditioning.options.vace_strengths)
    led, pixels = config.face, config.face.pixels if config.face else 0
    expected = {
        "image": (config.image_dim, (batch, None, config.image_dim)),
        "camera": (
            config.camera_dim,
            (batch, config.camera_dim, frames, CAMERA_PIXELS * height, CAMERA_PIXELS * width),
        ),
        "vace": (config.vace_layers, (batch, contexts, config.vace_dim, frames, height, width)),
        "reference": (config.reference_dim, (batch, config.reference_dim, height, width)),
        "extra_frames": (1, (batch, config.in_dim, None, height, width)),
        "pose": (led, (batch, led.pose_dim if led else 0, None, height, width)),
        "face": (led, (batch, 3, None, pixels, pixels)),
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
    if conditioning.extra_frames is not None and (conditioning.camera is not None or conditioning.vace is not None):
        raise ValueError(
            "Subject images (WanPhantomSubjectToVideo) cannot be joined with VACE or a camera path. Remove one of them."
        )
