"""One line of results, the same for us and for the libraries beside us."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from datetime import date
from importlib import metadata
from pathlib import Path
from statistics import median

import torch

from benchlib.flops import Dimensions, forward_flops, latent_size, tokens_of

PACKAGES = (
    "torch",
    "diffusers",
    "xfuser",
    "yunchang",
    "fa3-fwd",
    "flash-attn",
    "flash-attn-4",
    "sageattention",
    "distrifuser",
    "distvae",
    "comfy-kitchen",
    "triton",
)


@dataclass(frozen=True)
class Line:
    """What is written as one line of results."""

    def json(self) -> str:
        """One line; fields that do not apply are left out."""
        return json.dumps({name: value for name, value in asdict(self).items() if value is not None})


@dataclass(frozen=True)
class Row(Line):
    """One DiT forward, at batch 1 unless `batch` says otherwise.

    s: median wall time in seconds, as the caller sees it. peak_gib: the most device memory in use on any GPU
    after the forwards, the allocator's high-water mark and the CUDA context included. lossy: whether
    something was computed below `precision` on purpose. first_s: the first forward, compiling included.
    hop_s: the part of `s` in which no worker computed. fp8: what ran in fp8, and how. weights: how they are held, if
    not in `precision`. placement: where they live, and why. weights_gib: the most of them on any GPU, host_gib: in host
    memory in all. allocated_gib: the most that torch's allocator gave out on any GPU, of memory_fraction of it.
    overlapped: whether Ulysses' exchanges ran beside the computation. strategy: its short name (see strategies.py),
    expected_s: what the cost model says, link: how the GPUs reach each other, link_gbps: what each sends while all of
    them do, shares: how much each GPU takes, in proportion, unless all take the same, busy: GPUs that had another
    program (busy.py) too (these are ours only). sparse: what sparse self-attention kept, such as keep=0.1 (a share of
    the key blocks) or tau=1.3 (a threshold, whose cost depends on the data); tflops_per_gpu counts dense attention.
    """

    lib: str
    size: str
    res: str
    gpus: int
    s: float
    tflops_per_gpu: float
    peak_gib: float | None
    lossy: bool
    precision: str
    attention: str
    compiled: bool
    first_s: float
    finite: bool
    gpu: str
    versions: dict[str, str]
    date: str
    backend: str | None = None
    ulysses: int | None = None
    ring: int | None = None
    overlapped: bool | None = None
    tensor: int | None = None
    pipeline: int | None = None
    batch: int | None = None
    hop_s: float | None = None
    fp8: str | None = None
    weights: str | None = None
    placement: str | None = None
    weights_gib: float | None = None
    host_gib: float | None = None
    allocated_gib: float | None = None
    memory_fraction: float | None = None
    data: int | None = None
    strategy: str | None = None
    expected_s: float | None = None
    link: str | None = None
    link_gbps: float | None = None
    shares: str | None = None
    busy: str | None = None
    sparse: str | None = None


@dataclass(frozen=True)
class VAERow(Line):
    """One decode of a video by Wan's VAE, at batch 1, from a latent to frames in host memory (peers: on the GPU).

    s: median wall time in seconds, as the caller sees it. hop_s: the part of it in which no worker computed.
    allocated_gib: the most that torch's allocator gave out on any GPU. error: distance of a small video's frames from
    those in float32 on one GPU, relative; error_1gpu: the same of one GPU in `precision` by torch's convolutions.
    """

    lib: str
    res: str
    gpus: int
    s: float
    tflops_per_gpu: float
    precision: str
    first_s: float
    gpu: str
    versions: dict[str, str]
    date: str
    finite: bool
    what: str = "vae decode"
    vae: str = "2.1"
    convolution: str | None = None
    piece_mib: int | None = None
    axis: str | None = None
    hop_s: float | None = None
    allocated_gib: float | None = None
    error: float | None = None
    error_1gpu: float | None = None


@dataclass(frozen=True)
class VideoRow(Line):
    """One video at batch 1 and CFG 1, from noise and text on the caller's device to frames in host memory.

    s: median wall time in seconds of videos after the first, `first_s`. sampling_s: of all steps, step_s: of one,
    decode_s: of the decoding, medians too. forward_s: of a step, the slowest worker's forward without its latents.
    own_s: what a step takes of the caller beside that: the request, latent and text to the workers' devices, the result
    back, the sampler's arithmetic; own_share: of step_s. latents_s: the part of own_s in which workers copy.
    trim_s: the end of sampling, when the workers give back what only steps need. vae_hop_s: the part of decode_s in
    which no worker decodes. Where peers share a forward among GPUs, one of them decodes. The rest is as in `Row`.
    """

    lib: str
    size: str
    res: str
    gpus: int
    steps: int
    shift: float
    s: float
    sampling_s: float
    step_s: float
    decode_s: float
    first_s: float
    lossy: bool
    precision: str
    vae_precision: str
    attention: str
    compiled: bool
    finite: bool
    frames: tuple[int, ...]
    gpu: str
    versions: dict[str, str]
    date: str
    what: str = "video"
    videos: int | None = None
    forward_s: float | None = None
    own_s: float | None = None
    own_share: float | None = None
    latents_s: float | None = None
    trim_s: float | None = None
    vae_hop_s: float | None = None
    fp8: str | None = None
    weights: str | None = None
    placement: str | None = None
    backend: str | None = None
    ulysses: int | None = None
    ring: int | None = None
    overlapped: bool | None = None
    tensor: int | None = None
    pipeline: int | None = None
    allocated_gib: float | None = None


@dataclass(frozen=True)
class FirstRow(Line):
    """The first forward at a resolution, and the second beside it.

    cold: it was the first one of its processes; else they had run another resolution. caches: of compiled kernels on
    the disk, "empty" for the whole run or "kept" from runs before. start_s: until the processes are up, load_s: until
    the weights are there; both are over when `s` begins (None where they had been).
    """

    lib: str
    size: str
    res: str
    gpus: int
    cold: bool
    caches: str
    s: float
    second_s: float
    precision: str
    attention: str
    compiled: bool
    gpu: str
    versions: dict[str, str]
    date: str
    what: str = "first forward"
    start_s: float | None = None
    load_s: float | None = None
    fp8: str | None = None
    overlapped: bool | None = None


@dataclass(frozen=True)
class Timing:
    """Wall times of the forwards in seconds, the first one apart."""

    first: float
    rest: tuple[float, ...]

    @property
    def median(self) -> float:
        return median(self.rest)


def make_row(
    *,
    lib: str,
    size: str,
    res: str,
    gpus: int,
    timing: Timing,
    config: Dimensions,
    peak_bytes: int | None,
    precision: str,
    attention: str,
    finite: bool,
    compiled: bool = False,
    lossy: bool = False,
    batch: int = 1,
    **ours: object,
) -> Row:
    """Fill in what follows from the measurement: the rate, the machine, the versions and the date."""
    flops = batch * forward_flops(config, tokens_of(latent_size(res, size)))
    return Row(
        lib=lib,
        size=size,
        res=res,
        gpus=gpus,
        s=round(timing.median, 4),
        tflops_per_gpu=round(flops / timing.median / gpus / 1e12, 1),
        peak_gib=None if peak_bytes is None else round(peak_bytes / 2**30, 1),
        lossy=lossy,
        precision=precision,
        attention=attention,
        compiled=compiled,
        first_s=round(timing.first, 2),
        finite=finite,
        gpu=torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU",
        versions=installed_versions(),
        date=date.today().isoformat(),
        batch=batch if batch > 1 else None,
        **ours,
    )


def make_vae_row(
    *, lib: str, res: str, gpus: int, timing: Timing, flops: int, precision: str, finite: bool, **more: object
) -> VAERow:
    """Fill in what follows from the measurement."""
    return VAERow(
        lib=lib,
        res=res,
        gpus=gpus,
        s=round(timing.median, 4),
        tflops_per_gpu=round(flops / timing.median / gpus / 1e12, 1),
        precision=precision,
        first_s=round(timing.first, 2),
        gpu=torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU",
        versions=installed_versions(),
        date=date.today().isoformat(),
        finite=finite,
        **more,
    )


def machine_fields() -> dict[str, object]:
    """What every row says about where and when it was measured."""
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    return {"gpu": name, "versions": installed_versions(), "date": date.today().isoformat()}


def installed_versions() -> dict[str, str]:
    """Versions of the packages that a speed may depend on, of those that are there."""
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    if torch.version.cuda:
        versions["cuda"] = torch.version.cuda
        versions["cudnn"] = str(torch.backends.cudnn.version())
    return versions


def publish(row: Line, out: Path | None) -> None:
    """Write a row to stdout and, if asked for, to the end of a file."""
    print(row.json(), flush=True)
    if out is not None:
        with out.open("a", encoding="utf-8") as file:
            file.write(row.json() + "\n")
