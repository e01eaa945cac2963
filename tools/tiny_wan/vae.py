"""The Wan 2.1 VAE, in the original key names and with a width to choose, written for training.

The released VAE works through a video frame by frame and keeps the last two inputs of every convolution. Here all
frames of a clip go through at once: a convolution with zeros before the first frame gives the same numbers. Two
places treat the first frame apart, as streaming does: halving the frame rate keeps frame 0 and convolves windows
of three frames after it; doubling it passes frame 0 through once and does not show it to the others.

Source: Wan 2.1 `wan/modules/vae.py` for the architecture, its names and the latent statistics.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional as F

LATENT_CHANNELS = 16
WIDTHS = (1, 2, 4, 4)
ENCODER_BLOCKS = 2  # residual blocks a stage; the decoder has one more
HALVES_TIME = (False, True, True)  # after the first, second and third stage of the encoder

# Per channel, of the released VAE. ComfyUI and diffusers normalise the latents of any Wan 2.1 VAE with them.
LATENT_MEAN = (
    *(-0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508),
    *(0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921),
)
LATENT_STD = (
    *(2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743),
    *(3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160),
)

BRANCH_START = 0.2

SMALLEST_MEASURED_STD = 0.25
"""A channel that the encoder hardly uses is not blown up to deviation 1: its content would be noise."""


def statistics(like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """LATENT_MEAN and LATENT_STD as [1, 16, 1, 1, 1], on the device of `like`; float32."""
    mean, std = (torch.tensor(v, device=like.device).view(1, -1, 1, 1, 1) for v in (LATENT_MEAN, LATENT_STD))
    return mean, std


def normalise(latent: torch.Tensor) -> torch.Tensor:
    """What the VAE gives, [B, 16, T, H, W], to what the DiT works on; float32."""
    mean, std = statistics(latent)
    return (latent.float() - mean) / std


def denormalise(latent: torch.Tensor) -> torch.Tensor:
    """The inverse of `normalise`."""
    mean, std = statistics(latent)
    return latent.float() * std + mean


class Norm(nn.Module):
    """Root-mean-square norm over the channels of each pixel."""

    def __init__(self, channels: int, trailing: int):
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(channels, *[1] * trailing))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gamma = self.gamma.flatten().to(x.dtype)
        return F.rms_norm(x.movedim(1, -1), gamma.shape, gamma, eps=1e-12).movedim(-1, 1)


class CausalConv(nn.Conv3d):
    """A convolution over (time, height, width) that sees no later frame; stride 1 and 'same' size."""

    def __init__(self, channels: int, out: int, kernel: tuple[int, int, int]):
        super().__init__(channels, out, kernel, padding=(0, kernel[1] // 2, kernel[2] // 2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        before = self.kernel_size[0] - 1
        x = F.pad(x, (0, 0, 0, 0, before, 0)) if before else x
        return F.conv3d(x, self.weight.to(x.dtype), self.bias.to(x.dtype), padding=self.padding)


class FrameConv(nn.Conv2d):
    """A convolution over the pixels of single frames."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.conv2d(x, self.weight.to(x.dtype), self.bias.to(x.dtype), self.stride, self.padding)


class Residual(nn.Module):
    def __init__(self, channels: int, out: int):
        super().__init__()
        self.residual = nn.Sequential(
            Norm(channels, 3),
            nn.SiLU(),
            CausalConv(channels, out, (3, 3, 3)),
            Norm(out, 3),
            nn.SiLU(),
            nn.Identity(),  # dropout in the original, whose place counts in the names
            CausalConv(out, out, (3, 3, 3)),
        )
        self.shortcut = CausalConv(channels, out, (1, 1, 1)) if channels != out else nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.shortcut(x) + self.residual(x)


class FrameAttention(nn.Module):
    """Self-attention with one head among the pixels of each frame."""

    def __init__(self, channels: int):
        super().__init__()
        self.norm = Norm(channels, 2)
        self.to_qkv = FrameConv(channels, 3 * channels, 1)
        self.proj = FrameConv(channels, channels, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        pictures = to_pictures(x)
        qkv = self.to_qkv(self.norm(pictures)).flatten(2).transpose(1, 2).unsqueeze(1)  # [BT, 1, HW, 3C]
        attended = F.scaled_dot_product_attention(*qkv.chunk(3, dim=-1)).squeeze(1)
        attended = attended.transpose(1, 2).unflatten(2, pictures.shape[2:])
        return x + to_clips(self.proj(attended), x.shape[2])


class Downsample(nn.Module):
    """Half the height and width; with `halve_time` also half the frames after the first."""

    def __init__(self, channels: int, halve_time: bool):
        super().__init__()
        self.resample = nn.Sequential(nn.ZeroPad2d((0, 1, 0, 1)), FrameConv(channels, channels, 3, stride=2))
        if halve_time:
            self.time_conv = nn.Conv3d(channels, channels, (3, 1, 1), stride=(2, 1, 1))
        self.halve_time = halve_time

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = to_clips(self.resample(to_pictures(x)), x.shape[2])
        if not self.halve_time or x.shape[2] == 1:
            return x
        weight, bias = self.time_conv.weight.to(x.dtype), self.time_conv.bias.to(x.dtype)
        return torch.cat([x[:, :, :1], F.conv3d(x, weight, bias, self.time_conv.stride)], dim=2)


class Upsample(nn.Module):
    """Twice the height and width, half the channels; with `double_time` twice the frames after the first."""

    def __init__(self, channels: int, double_time: bool):
        super().__init__()
        self.resample = nn.Sequential(
            nn.Upsample(scale_factor=2, mode="nearest-exact"),
            FrameConv(channels, channels // 2, 3, padding=1),
        )
        if double_time:
            self.time_conv = CausalConv(channels, 2 * channels, (3, 1, 1))
        self.double_time = double_time

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.double_time and x.shape[2] > 1:
            pairs = self.time_conv(x[:, :, 1:]).unflatten(1, (2, -1))  # [B, 2, C, T-1, H, W]
            x = torch.cat([x[:, :, :1], pairs.movedim(1, 3).flatten(2, 3)], dim=2)
        return to_clips(self.resample(to_pictures(x)), x.shape[2])


def to_pictures(x: torch.Tensor) -> torch.Tensor:
    """[B, C, T, H, W] to [B*T, C, H, W]; no copy where the channels are innermost in memory."""
    return x.transpose(1, 2).flatten(0, 1)


def to_clips(x: torch.Tensor, frames: int) -> torch.Tensor:
    return x.unflatten(0, (-1, frames)).transpose(1, 2)


class Encoder(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        channels = [width * factor for factor in WIDTHS]
        self.conv1 = CausalConv(3, width, (3, 3, 3))
        layers: list[nn.Module] = []
        before = width
        for stage, out in enumerate(channels):
            for _ in range(ENCODER_BLOCKS):
                layers.append(Residual(before, out))
                before = out
            if stage < len(HALVES_TIME):
                layers.append(Downsample(out, HALVES_TIME[stage]))
        self.downsamples = nn.Sequential(*layers)
        self.middle = _middle(before)
        self.head = nn.Sequential(Norm(before, 3), nn.SiLU(), CausalConv(before, 2 * LATENT_CHANNELS, (3, 3, 3)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.middle(self.downsamples(self.conv1(x))))


class Decoder(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        channels = [width * factor for factor in reversed(WIDTHS)]
        doubles_time = tuple(reversed(HALVES_TIME))
        before = channels[0]
        self.conv1 = CausalConv(LATENT_CHANNELS, before, (3, 3, 3))
        self.middle = _middle(before)
        layers: list[nn.Module] = []
        for stage, out in enumerate(channels):
            for _ in range(ENCODER_BLOCKS + 1):
                layers.append(Residual(before, out))
                before = out
            if stage < len(doubles_time):
                layers.append(Upsample(out, doubles_time[stage]))
                before = out // 2
        self.upsamples = nn.Sequential(*layers)
        self.head = nn.Sequential(Norm(before, 3), nn.SiLU(), CausalConv(before, 3, (3, 3, 3)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.upsamples(self.middle(self.conv1(x))))


def _middle(channels: int) -> nn.Sequential:
    return nn.Sequential(Residual(channels, channels), FrameAttention(channels), Residual(channels, channels))


@dataclass(frozen=True)
class Posterior:
    """The encoder's normal distribution, both [B, 16, T, H, W] float32 and not normalised."""

    mean: torch.Tensor
    log_variance: torch.Tensor

    def sample(self) -> torch.Tensor:
        return self.mean + torch.randn_like(self.mean) * (0.5 * self.log_variance).exp()

    def divergence(self) -> torch.Tensor:
        """KL divergence from Wan's latent statistics, nats a latent value."""
        mean, std = statistics(self.mean)
        log_variance = self.log_variance - 2 * std.log()
        return 0.5 * (((self.mean - mean) / std).square() + log_variance.exp() - 1 - log_variance).mean()


class WanVAE(nn.Module):
    """Videos [B, 3, 4k+1, 8h, 8w] from -1 to 1, to and from latents [B, 16, k+1, h, w].

    Args:
        width: channels at full resolution; 96 in the released VAE.
    """

    def __init__(self, width: int):
        super().__init__()
        self.width = width
        self.encoder = Encoder(width)
        self.conv1 = CausalConv(2 * LATENT_CHANNELS, 2 * LATENT_CHANNELS, (1, 1, 1))
        self.conv2 = CausalConv(LATENT_CHANNELS, LATENT_CHANNELS, (1, 1, 1))
        self.decoder = Decoder(width)

    def posterior(self, video: torch.Tensor) -> Posterior:
        """Encode in the dtype of `video`."""
        out = self.conv1(self.encoder(video)).float()
        mean, log_variance = out.chunk(2, dim=1)
        return Posterior(mean, log_variance.clamp(-20, 10))

    def encode(self, video: torch.Tensor) -> torch.Tensor:
        """The latent as ComfyUI's VAEEncode has it inside: the mean, not normalised; float32."""
        return self.posterior(video).mean

    def decode(self, latent: torch.Tensor) -> torch.Tensor:
        """The inverse of `encode`, in the dtype of `latent`."""
        return self.decoder(self.conv2(latent))

    @torch.no_grad()
    def initialise(self) -> None:
        """Random weights that a picture gets through: torch's own leave a tenth of it in the latent's noise.

        Convolutions keep the deviation, residual branches start small, and latents start with about Wan's
        statistics and little noise.
        """
        for module in self.modules():
            if isinstance(module, (nn.Conv2d, nn.Conv3d)):
                nn.init.normal_(module.weight, std=module.weight[0].numel() ** -0.5)
                nn.init.zeros_(module.bias)
        for module in self.modules():
            if isinstance(module, Residual):
                module.residual[-1].weight *= BRANCH_START
            elif isinstance(module, FrameAttention):
                module.proj.weight *= BRANCH_START
        self.encoder.head[-1].weight[:LATENT_CHANNELS] *= 3.0
        self.encoder.head[-1].weight[LATENT_CHANNELS:] *= 0.1
        self._start_at_wan_statistics()

    def _start_at_wan_statistics(self) -> None:
        mean, std = torch.tensor(LATENT_MEAN), torch.tensor(LATENT_STD)
        n = LATENT_CHANNELS
        self.conv1.weight.zero_()
        self.conv1.weight[:n, :n, 0, 0, 0] = std.diag()
        self.conv1.weight[n:, n:, 0, 0, 0] = torch.eye(n)
        self.conv1.bias.copy_(torch.cat([mean, 2 * std.log() - 5]))
        self.conv2.weight.zero_()
        self.conv2.weight[:, :, 0, 0, 0] = (1 / std).diag()
        self.conv2.bias.copy_(-mean / std)

    @torch.no_grad()
    def fold_statistics(self, mean: torch.Tensor, std: torch.Tensor) -> None:
        """Move latents with this mean and deviation [16] to Wan's, without changing any reconstruction.

        The pointwise convolutions behind the encoder and before the decoder take the scaling and its inverse.
        """
        wanted_mean = torch.tensor(LATENT_MEAN, device=mean.device)
        wanted_std = torch.tensor(LATENT_STD, device=mean.device)
        scale = wanted_std / torch.maximum(std, SMALLEST_MEASURED_STD * wanted_std)
        n = LATENT_CHANNELS
        self.conv1.weight[:n] *= scale.view(-1, 1, 1, 1, 1)
        self.conv1.bias[:n] = (self.conv1.bias[:n] - mean) * scale + wanted_mean
        self.conv1.bias[n:] += 2 * scale.log()
        # conv2(z) with z = (z' - wanted_mean) / scale + mean
        weight = self.conv2.weight[:, :, 0, 0, 0].clone()
        self.conv2.bias += weight @ (mean - wanted_mean / scale)
        self.conv2.weight[:, :, 0, 0, 0] = weight / scale


def load_vae(path: str, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> WanVAE:
    """A WanVAE from a safetensors file in the original key names; its width follows from the file."""
    tensors = load_file(path, device=str(device))
    vae = WanVAE(tensors["decoder.head.0.gamma"].shape[0]).to(device)
    vae.load_state_dict(tensors)
    return vae.to(dtype).eval().requires_grad_(False)


def psnr(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Peak signal-to-noise ratio in dB of each of B videos with values from -1 to 1; [B]."""
    error = (a.float() - b.float()).square().flatten(1).mean(1)
    return 10 * torch.log10(4 / error.clamp(min=1e-12))


def parameters(width: int) -> int:
    """Number of parameters of a VAE of that width."""
    with torch.device("meta"):
        return sum(math.prod(p.shape) for p in WanVAE(width).parameters())
