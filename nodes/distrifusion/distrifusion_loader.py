"""Official DistriFusion Model Loader: a MODEL that several GPUs run by displaced patches."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

from comfy_api.latest import io

from ...distributed.approximate.displaced_memory_estimate import TooLarge, check_run, check_weights, gib
from ...distributed.approximate.kv_buffers import INSTALL_LINE, MANAGERS, official_version
from ...distributed.approximate.patch_layout import token_pixels
from ...distributed.client.displaced_runs import DisplacedRuns
from ...distributed.client.pool import acquire
from ...distributed.plan.degrees import SPLIT_MODES, PlanError
from ...wanvideo.base.grid import Grid
from ...wanvideo.checkpoint.header import read_header
from ...wanvideo.checkpoint.weight_source import storage_format
from ..common import shared_inputs
from ..common.model_files import model_path
from ..common.sockets import DISTRIFUSION_CATEGORY, DISTRIFUSION_MODEL
from ..common.validation import check_file, check_widgets, file_fingerprint
from ..model.remote_model import build_model
from .distrifusion_settings import KV_BUFFERS, PRECISIONS, QUANTIZATIONS, DistriFusionConfig

log = logging.getLogger(__name__)

_SIZES = ((832, 480), (1280, 720))
_FRAMES = 21  # latent frames of a video of 81


class OfficialDistriFusionModelLoader(io.ComfyNode):
    """Reads the header of a checkpoint; weights and workers come with the first sampling step."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Describe the node to ComfyUI."""
        return io.Schema(
            node_id="OfficialDistriFusionModelLoader",
            display_name="🎯 Official DistriFusion Model Loader",
            category=DISTRIFUSION_CATEGORY,
            description=(
                "A Wan 2.1/2.2 model whose video is cut into patches, one for each GPU. A GPU sees the "
                "other patches as they were one step before (DistriFusion, CVPR 2024), so that the GPUs need not wait "
                "for each other. Not exact, and it needs much host memory: XDit+USP WanVideo Model Loader is exact and "
                "needs less. Meant for four GPUs or more without NVLink: try both."
            ),
            inputs=[*_model(), *_patches(), *_hosts(), *_quality(), *_exchange(), shared_inputs.device()],
            outputs=[
                DISTRIFUSION_MODEL.Output(
                    display_name="model", tooltip="For Official DistriFusion Sampler, or any other MODEL input."
                ),
                io.String.Output(
                    display_name="status", tooltip="What runs, and the memory that videos of two sizes need."
                ),
            ],
        )

    @classmethod
    async def validate_inputs(
        cls,
        model: str | None = None,
        num_gpus: int | None = 2,
        world_size: int | None = 2,
        rank: int | None = 0,
        split_cfg: bool | None = False,
        device: str | None = "auto",
    ) -> bool | str:
        """Check the file, and the inputs that can contradict another input or this machine, before anything runs.

        ComfyUI leaves out its own check (minimum, maximum, choice) of every input that is named here.
        """
        named = {
            "num_gpus": num_gpus,
            "world_size": world_size,
            "rank": rank,
            "split_cfg": split_cfg,
            "device": device,
        }
        found = check_widgets(DistriFusionConfig, named)
        return await check_file(read_header, model) if found is True else found

    @classmethod
    def fingerprint_inputs(cls, model: str | None = None, **_inputs: object) -> str:
        """Return another value for another file, even under the same name."""
        return file_fingerprint(model)

    @classmethod
    def execute(cls, model: str, **widgets: Any) -> io.NodeOutput:
        """Return a MODEL whose weights are read with its first sampling step, and what it needs of each GPU."""
        config = DistriFusionConfig(**widgets)
        config.validate()
        header = read_header(model_path(model))
        spec, pool = config.model_spec(header.path, header.stamp), acquire(config.pool_settings())
        runs = DisplacedRuns(config.patch_settings(), header.config, spec, pool, header)
        patcher = build_model(header, spec, pool, runs)
        text = "\n".join(_status(runs))
        log.info("DistriFusion: %s\n%s", model, text)
        return io.NodeOutput(patcher, text)


def _status(runs: DisplacedRuns) -> Iterator[str]:
    """The lines of the node's text: the workers, the patches, and the memory that the MODEL needs of each GPU.

    Raises:
        TooLarge: the weights alone are more than a worker may take.
    """
    pool, spec, split = runs.pool.settings, runs.spec, runs.settings.split
    check_weights(runs.config, spec.weight_dtype, runs.available, runs.header)
    halves = ", half of them for each branch of cfg" if pool.plan.data_parallel > 1 else ""
    yield f"{pool.plan.num_gpus} workers on {pool.device}{halves}; patches are exchanged by manager {runs.manager}"
    yield availability()
    yield (
        f"{split.mode} patches, patch_size {split.size}, patch_overlap {split.overlap}; {runs.settings.warmup_steps} "
        "synchronous steps at the start of a run"
    )
    weights = storage_format(runs.header, spec.weight_dtype)
    yield f"weights {weights}, activations {spec.compute_dtype}; a worker may take {gib(runs.available)}"
    for width, height in _SIZES:
        yield f"81 frames of {width}x{height} with cfg above 1: {_need(runs, width, height)}"


def availability() -> str:
    """Say whether the official package is installed, or how to install it."""
    version = official_version()
    if version:
        return f"the official package distrifuser {version} is installed"
    return f"the official package is not installed, and this pack's own code does the same (for it: {INSTALL_LINE})"


def _need(runs: DisplacedRuns, width: int, height: int) -> str:
    plan, pixels = runs.pool.settings.plan, token_pixels(runs.config)
    if plan.sequence_ranks == 1:
        return "one GPU has each video to itself, which is exact and needs no buffers"
    try:
        layout = runs.layout(Grid(_FRAMES, height // pixels, width // pixels), plan.sequence_ranks)
    except PlanError as error:
        return str(error)
    need = runs.need(layout, items=2 // plan.data_parallel)
    try:
        check_run(need, runs.available, [])
    except TooLarge:
        return f"{need}, does not fit"
    return f"{need}, fits"


def _model() -> list[io.Input]:
    return [
        shared_inputs.model_file("model", "A Wan model: what XDit+USP WanVideo Model Loader reads."),
        io.Combo.Input(
            "precision",
            options=list(PRECISIONS),
            default="bf16",
            tooltip="Of activations, of the stale keys and values, and of the weights unless they are quantised.",
        ),
        io.Combo.Input(
            "quantization",
            options=list(QUANTIZATIONS),
            default="disabled",
            tooltip=(
                "Weights in 8 bits, with scales for each channel: half the memory of bf16, not exact. Activations "
                "keep their precision, and what the file itself has quantised keeps its format."
            ),
        ),
    ]


def _patches() -> list[io.Input]:
    return [
        shared_inputs.num_gpus(
            "GPUs that share the video, one worker process and one patch each. With device cpu: CPU processes."
        ),
        io.Int.Input(
            "patch_size",
            default=64,
            min=32,
            max=128,
            step=8,
            tooltip=(
                "Pixels: borders between patches lie at multiples of it. A smaller one shares the rows more evenly. "
                "How many patches there are is num_gpus, whatever this is."
            ),
        ),
        io.Int.Input(
            "patch_overlap",
            default=DistriFusionConfig.patch_overlap,
            min=0,
            max=32,
            step=8,
            tooltip=(
                "Pixels on either side of a border that are exchanged fresh in every step, rounded up to tokens of 16 "
                "pixels; in time as many latent frames. 8 comes much closer to exact, for a third of the gain in speed."
            ),
        ),
        io.Combo.Input(
            "split_mode",
            options=list(SPLIT_MODES),
            default=DistriFusionConfig.split_mode,
            tooltip="spatial: bands of rows. temporal: runs of latent frames. spatiotemporal: both.",
        ),
    ]


def _hosts() -> list[io.Input]:
    return [
        io.Int.Input(
            "world_size",
            default=DistriFusionConfig.world_size,
            min=0,
            max=64,
            tooltip="For several hosts, which are not supported yet: must be num_gpus, or 0 for automatic.",
        ),
        io.Int.Input(
            "rank",
            default=0,
            min=0,
            max=63,
            tooltip="For several hosts, which are not supported yet: must be 0. The loader starts all ranks itself.",
        ),
    ]


def _quality() -> list[io.Input]:
    return [
        shared_inputs.attention_mode(
            "As in XDit+USP WanVideo Model Loader: auto is the fastest exact kernel that is installed."
        ),
        io.Int.Input(
            "warmup_steps",
            default=DistriFusionConfig.warmup_steps,
            min=1,
            max=100,
            optional=True,
            tooltip=(
                "Synchronous, exact steps at the start of every run, where stale activations cost "
                "most. 8 come much closer to exact than 4; as many as the sampler has steps are exact."
            ),
        ),
        io.Combo.Input(
            "kv_buffers",
            options=list(KV_BUFFERS),
            default=KV_BUFFERS[0],
            optional=True,
            tooltip=(
                "How the other patches' keys and values are held and sent. fp8 halves memory and traffic; the error it "
                "adds is far smaller than that of their being a step old."
            ),
        ),
    ]


def _exchange() -> list[io.Input]:
    return [
        io.Boolean.Input(
            "split_cfg",
            default=False,
            optional=True,
            tooltip=(
                "The two branches of cfg on different halves of the GPUs, which halves the buffers on each. For cfg "
                "above 1 and an even num_gpus."
            ),
        ),
        io.Combo.Input(
            "manager",
            options=list(MANAGERS),
            default="auto",
            optional=True,
            tooltip=(
                "Who exchanges keys and values, with the same result. official: MIT's distrifuser. native: this "
                "pack's own gathers. Both keep the buffers on every GPU. host: the GPUs' copy engines by way of "
                "pinned host memory, where the buffers then are. auto: host on GPUs, official or native on the CPU."
            ),
        ),
        shared_inputs.gpu_memory_fraction(
            "The share of its GPU that a worker may take. What does not fit is refused before it starts. On the "
            "CPU: of the host's memory, all workers together.",
            optional=True,
        ),
    ]
