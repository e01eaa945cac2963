"""XDit+USP Status: what the workers of a MODEL are doing, as text and as a picture."""

from __future__ import annotations

from collections.abc import Iterator

from comfy_api.latest import io, ui

from ...distributed.client.pool import PoolStatus
from ...distributed.protocol.reports import ModelStatus, WorkerStatus
from ...distributed.protocol.specs import ModelSpec
from ...wanvideo.checkpoint.weight_source import storage_format
from ..common import shared_inputs
from ..common.progress import WorkersPoll
from ..common.sockets import CATEGORY
from ..common.validation import new_fingerprint
from ..model.model_patcher import RemoteModelPatcher
from .status_figures import draw_status, forward_line, shares_lines, worker_lines


class XDitUSPStatus(io.ComfyNode):
    """Asks the pool behind a MODEL; starts nothing."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Describe the node to ComfyUI."""
        return io.Schema(
            node_id="XDitUSPStatus",
            display_name="XDit+USP Status",
            category=CATEGORY,
            description=(
                "What runs behind a MODEL of XDit+USP WanVideo Model Loader: plan, memory of each GPU, "
                "precision, attention kernel, and where the time of the last step went: computing, exchanging "
                "with other GPUs, waiting for them. Runs with every prompt. To see the state after "
                "sampling, connect the latent of the sampler too."
            ),
            inputs=[
                io.Model.Input("model", tooltip="From XDit+USP WanVideo Model Loader or any node behind it."),
                shared_inputs.after(),
            ],
            outputs=[
                io.String.Output(display_name="status"),
                io.Image.Output(
                    display_name="picture",
                    tooltip="For each GPU, where the time of the last step and the memory went, as stacked bars.",
                ),
            ],
            is_output_node=True,
        )

    @classmethod
    def fingerprint_inputs(cls, **_inputs: object) -> float:
        """Let the node run with every prompt."""
        return new_fingerprint()

    @classmethod
    def execute(cls, model: object, after: object = None) -> io.NodeOutput:
        """Return the status as text and as a picture.

        Raises:
            ValueError: the MODEL is from another loader.
        """
        if not isinstance(model, RemoteModelPatcher):
            raise ValueError(
                "This MODEL does not run in workers, so there is no status. "
                "Connect the output of XDit+USP WanVideo Model Loader, or of a node behind it."
            )
        remote = model.remote
        status = remote.pool.status(WorkersPoll(remote.pool))
        text = report(status, remote.spec, storage_format(remote.header, remote.spec.weight_dtype))
        return io.NodeOutput(text, draw_status(status, _plan(status)), ui=ui.PreviewText(text))


def report(status: PoolStatus, spec: ModelSpec, weights: str) -> str:
    """Return the text of the status node; `weights` says in which format the workers hold the weights of `spec`."""
    plan, device = status.settings.plan, status.settings.device
    if status.state != "ready":
        return (
            f"{status.state}: {plan.num_gpus} workers on {device}. They start with the next sampling step.\n"
            f"Weights will be {weights}, activations {spec.compute_dtype}."
        )
    lines = [
        f"{len(status.workers)} workers are ready on {device}, data parallel {plan.data_parallel}",
        f"sizes: {f'chosen: {status.plan_reason}' if status.plan_reason else 'as set'}",
        forward_line(status),
        *shares_lines(status),
        *(line for index in range(len(status.workers[0].models)) for line in _model_lines(status, index)),
        *(line for worker in status.workers for line in (_worker(worker), *worker_lines(status, worker))),
        f"torch {status.torch}, xfuser {status.xfuser or 'not installed'}, launcher pid {status.launcher_pid}",
    ]
    return "\n".join(lines)


def _kernels(status: PoolStatus, index: int) -> str:
    """The attention kernel of a model; by rank where unlike GPUs have different kernels."""
    kernels = [worker.models[index].kernel for worker in status.workers if index < len(worker.models)]
    if len(set(kernels)) == 1:
        return kernels[0]
    return " and ".join(f"{kernel} on rank {rank}" for rank, kernel in enumerate(kernels))


def _model_lines(status: PoolStatus, index: int) -> Iterator[str]:
    model = status.workers[0].models[index]
    lora = "with LoRA" if model.lora_uuid else "no LoRA"
    exchange = ", exchange beside computation" if model.overlapped else ""
    yield (
        f"{model.name}: weights {model.weight_dtype}, activations {model.compute_dtype}, attention "
        f"{_kernels(status, index)}, {_degrees(model, status.settings.pipeline_mode)} ({model.backend}{exchange}), "
        f"{lora}{f', fp8 mode (lossy): {model.fp8}' if model.fp8 else ''}"
    )
    yield f"  weights: {model.placement}"


def _degrees(model: ModelStatus, mode: str) -> str:
    divided = f"pipeline {model.pipeline} ({mode}) x " if model.pipeline > 1 else ""
    divided += f"tensor {model.tensor} x " if model.tensor > 1 else ""
    return f"{divided}Ulysses {model.ulysses} x ring {model.ring}"


def _plan(status: PoolStatus) -> str:
    """The parallel degrees of the model that was used last, in words."""
    models = status.workers[0].models if status.workers else ()
    data = f"data parallel {status.settings.plan.data_parallel}"
    return ", ".join([data, *(_degrees(model, status.settings.pipeline_mode) for model in models[-1:])])


def _worker(worker: WorkerStatus) -> str:
    here, host = (sum(getattr(model, name) for model in worker.models) for name in ("device_bytes", "host_bytes"))
    return (
        f"rank {worker.rank}: {worker.device}, {_gib(worker.used)} of {_gib(worker.total)} in use, "
        f"weights {_size(here)} there and {_size(host)} in host memory, "
        f"{f'VAE {_size(worker.vae_bytes)}, ' if worker.vae_bytes else ''}"
        f"peak host memory while loading {_gib(worker.peak_private)}, pid {worker.pid}"
    )


def _gib(nbytes: int) -> str:
    return f"{nbytes / 2**30:.2f} GiB"


def _size(nbytes: int) -> str:
    return _gib(nbytes) if nbytes >= 2**27 else f"{nbytes / 2**20:.1f} MiB"
