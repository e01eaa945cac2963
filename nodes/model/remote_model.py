"""A ComfyUI MODEL without weights: samplers, LoRA loaders and patches of ComfyUI see an ordinary Wan model, while a
pool of workers computes each forward of its transformer.

ComfyUI's own classes supply everything but the transformer (latent format, sigmas, conditioning). To these classes the
model needs next to no memory, as its weights and activations lie in the workers.
"""

from __future__ import annotations

import logging
import types
import weakref
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

import comfy.model_detection
import comfy.model_management
import comfy.patcher_extension
import torch

from ...distributed.client.failures import OutOfMemory
from ...distributed.client.pipefusion_runs import PipeFusionRuns
from ...distributed.client.pool import Pool
from ...distributed.client.sampling_runs import SampledForward, SamplingRuns
from ...distributed.protocol.requests import Displaced
from ...distributed.protocol.specs import ModelSpec
from ...distributed.weights.lora_transfer import LoraSet
from ...wanvideo.base.conditioning import Conditioning, check, extended
from ...wanvideo.base.grid import sequence_of
from ...wanvideo.base.tensor_info import CheckpointError
from ...wanvideo.checkpoint.header import FLOW_RVS, Header
from ...wanvideo.checkpoint.vace_module import read_model
from ..common import refusals
from ..common.model_files import patch_files
from ..common.progress import LoadingText, WorkersPoll
from . import infinitetalk_patch
from .conditioning_inputs import from_comfyui
from .model_patcher import RemoteModelPatcher
from .sampled_forward import sampled_forward
from .shared_device import EVERYTHING, free_shared_gpu
from .weightless_model import weightless

log = logging.getLogger(__name__)

# ComfyUI sees the logical weights: a quantised one is a float matrix to it, of its logical shape.
_FILE_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
# Modules of the transformer that other nodes look for. These modules are in the workers, so the answer is a refusal.
_MODULES = frozenset({"blocks", "head", "text_embedding", "time_embedding", "time_projection", "rope_embedder"})


def build_model(header: Header, spec: ModelSpec, pool: Pool, runs: SamplingRuns | None = None) -> RemoteModelPatcher:
    """Build the MODEL of a checkpoint. Reads no weights and starts no workers.

    Args:
        runs: the sampling runs of a MODEL that is not exact. None makes every forward exact, unless the pool streams
            patches through pipeline stages (PipeFusion).

    Raises:
        CheckpointError: this ComfyUI takes the file for another kind of model, or for a Wan model of other sampling.
    """
    tensors = {
        name: torch.empty(info.shape, dtype=_FILE_DTYPES.get(info.dtype, torch.bfloat16), device="meta")
        for name, info in header.tensors.items()
    }
    # Tensors identify all other models; a VACE module may have added tensors of which the note knows nothing.
    metadata = header.metadata if header.is_flow_rvs else None
    model_config = comfy.model_detection.model_config_from_unet(tensors, "", metadata=metadata)
    if model_config is None or not model_config.unet_config.get("image_model") == "wan2.1":
        raise CheckpointError(
            f"This ComfyUI does not take {header.path} for a Wan model. Update ComfyUI, or choose another file."
        )
    if header.is_flow_rvs and model_config.unet_config.get("model_type") != FLOW_RVS:
        raise CheckpointError(
            f"{header.path} is a FlowRVS model, which this ComfyUI cannot sample. "
            "Update ComfyUI, or choose another file."
        )
    # float32 in this process: the sampler's latents and the text reach the workers unrounded
    model_config.set_inference_dtype(torch.float32, None)
    model_config.unet_config["disable_unet_model_creation"] = True
    model = model_config.get_model(tensors, "")
    del model_config.unet_config["disable_unet_model_creation"]
    if runs is None and pool.settings.pipeline_mode == "pipefusion":
        runs = PipeFusionRuns(header.config, spec, pool, header)
    model.diffusion_model = RemoteWan(header, spec, pool, tensors, runs)
    kind: type = type(model)
    model.__class__ = weightless(kind)
    return RemoteModelPatcher(
        model,
        load_device=comfy.model_management.get_torch_device(),
        offload_device=comfy.model_management.unet_offload_device(),
        size=1,  # bytes; the workers hold the weights, see RemoteModelPatcher.model_size
    )


class RemoteWan(torch.nn.Module):
    """Stands in for ComfyUI's WanModel: the attributes that ComfyUI reads, and a forward that asks the pool.

    `loras` are the LoRAs of the loaded MODEL, which the workers get with the next forward. `runs` are the MODEL's
    sampling runs; None where every forward is exact. `header` and `spec` describe the model as the workers have it,
    with InfiniteTalk's layers once a forward has needed these layers.
    """

    dtype = torch.float32
    patch_size = (1, 2, 2)

    def __init__(
        self,
        header: Header,
        spec: ModelSpec,
        pool: Pool,
        tensors: Mapping[str, torch.Tensor],
        runs: SamplingRuns | None = None,
    ):
        super().__init__()
        self.header, self.spec, self.pool, self.runs, self._plain = header, spec, pool, runs, spec
        self.in_dim, self.out_dim = header.config.in_dim, header.config.out_dim
        self.loras: LoraSet | None = None
        _pools.add(pool)
        self._let_go = self._keep(spec)
        self._tensors = dict(tensors)
        # no module: ComfyUI would try to move its weight to a device
        self.patch_embedding = types.SimpleNamespace(weight=tensors["patch_embedding.weight"])

    def __getattr__(self, name: str) -> Any:
        if name in _MODULES:
            refusals.refuse_module(name)
        return super().__getattr__(name)

    def state_dict(
        self, *_args: Any, destination: Any = None, prefix: str = "", **_options: Any
    ) -> Any:  # as torch's own overloads have it
        """The names and shapes of the weights as tensors on the meta device, which LoRA loaders look up."""
        destination = {} if destination is None else destination
        destination.update((prefix + name, tensor) for name, tensor in self._tensors.items())
        return destination

    def forward(
        self,
        x: torch.Tensor,
        timestep: torch.Tensor,
        context: torch.Tensor,
        clip_fea: torch.Tensor | None = None,
        time_dim_concat: torch.Tensor | None = None,
        transformer_options: Mapping[str, Any] | None = None,
        **inputs: Any,
    ) -> torch.Tensor:
        """Run one forward on the workers, with the arguments of ComfyUI's WanModel.forward.

        Wrappers (EasyCache and the like) run here, in this process, around the remote call.

        Args:
            x: latent [B, C, T, H, W].
            timestep: [B] or [B, T].
            context: [B, L, text_dim].
            inputs: further inputs of some variants, under ComfyUI's names.
        """
        options = {} if transformer_options is None else transformer_options
        wrappers = comfy.patcher_extension.get_all_wrappers(comfy.patcher_extension.WrappersMP.DIFFUSION_MODEL, options)
        executor = comfy.patcher_extension.WrapperExecutor.new_class_executor(self._forward, self, wrappers)
        return executor.execute(x, timestep, context, clip_fea, time_dim_concat, options, **inputs)

    def _forward(
        self,
        x: torch.Tensor,
        timestep: torch.Tensor,
        context: torch.Tensor,
        clip_fea: torch.Tensor | None,
        time_dim_concat: torch.Tensor | None,
        transformer_options: Mapping[str, Any],
        **inputs: Any,
    ) -> torch.Tensor:
        given = {"clip_fea": clip_fea, "time_dim_concat": time_dim_concat, **inputs}
        infinitetalk = infinitetalk_patch.infinitetalk_inputs(transformer_options)
        if infinitetalk is not None:
            self._take_in(infinitetalk_patch.file_of(infinitetalk.model_patch, patch_files()))
        options = infinitetalk_patch.without_infinitetalk(transformer_options)
        conditioning = from_comfyui(self.header.config, options, given)
        if infinitetalk is not None:
            conditioning = infinitetalk.joined(conditioning, len(x))
        return self._on_workers(transformer_options, conditioning, x, timestep, context)

    def _take_in(self, file: infinitetalk_patch.PatchFile) -> None:
        """Run with the layers of InfiniteTalk in a file from now on; a forward without audio skips them.

        Raises:
            CheckpointError: the layers are for another model.
            NotOnWorkers: the model has a VACE module too.
        """
        plain = self._plain
        if plain.module:
            refusals.refuse("InfiniteTalk and a VACE module belong to one model", "Disconnect vace_model.")
        spec = replace(plain, module=file.path, stamp=f"{plain.stamp}+{file.stamp}")
        if spec == self.spec:
            return
        self.header, self.spec = read_model(plain.path, file.path), spec
        if self.runs is not None:
            self.runs.change_model(self.header, spec)
        let_go, self._let_go = self._let_go, self._keep(spec)
        let_go()

    def _keep(self, spec: ModelSpec) -> weakref.finalize:
        """Hold a model on the workers until this object is gone, or until the returned finalizer is called."""
        self.pool.models.keep(spec)
        finalizer = weakref.finalize(self, self.pool.models.drop, spec)
        finalizer.atexit = False
        return finalizer

    def _on_workers(
        self,
        options: Mapping[str, Any],
        conditioning: Conditioning,
        x: torch.Tensor,
        timestep: torch.Tensor,
        context: torch.Tensor,
    ) -> torch.Tensor:
        try:
            return self._run(options, conditioning, x, timestep, context)
        except OutOfMemory as error:
            if not self._free_more():
                raise
            log.warning("%s Trying once more with more room on the GPUs.", error)
        return self._run(options, conditioning, x, timestep, context)

    def _run(
        self,
        options: Mapping[str, Any],
        conditioning: Conditioning,
        x: torch.Tensor,
        timestep: torch.Tensor,
        context: torch.Tensor,
    ) -> torch.Tensor:
        check(self.header.config, x, conditioning)  # before any worker starts; the pool checks again
        whole, rest = extended(x, conditioning)  # as the workers will divide it
        forward = sampled_forward(
            options,
            len(whole),
            vace_contexts=len(rest.options.vace_strengths),
            context_tokens=rest.options.context_tokens,
        )
        if self.runs is not None:
            self.runs.check(tuple(whole.shape), forward)
        self._ensure_ready(sequence_of(whole, rest.options).tokens, len(whole))
        with self._step(whole, timestep, forward) as displaced:
            return self.pool.forward(
                self.spec,
                x,
                timestep,
                context,
                loras=self.loras,
                poll=WorkersPoll(self.pool),
                make_room=self._make_room,
                displaced=displaced,
                conditioning=conditioning,
            )

    def _ensure_ready(self, tokens: int, items: int) -> None:
        """Start the workers and load the model, while a text under the running node says so."""
        workers_poll = WorkersPoll(self.pool)
        with LoadingText(self.spec, self.pool) as text:

            def poll() -> None:
                text.show()
                workers_poll()

            self.pool.ensure_ready(self.spec, poll, self._make_room, tokens=tokens, items=items)

    def _step(
        self, x: torch.Tensor, timestep: torch.Tensor, forward: SampledForward
    ) -> AbstractContextManager[Displaced | None]:
        if self.runs is None:
            return nullcontext()
        uuid = self.loras.uuid if self.loras else ""
        return self.runs.step(x, timestep, forward, uuid, self._make_room)

    def _make_room(self, nbytes: int) -> None:
        self._free(nbytes)

    def _free(self, nbytes: float) -> bool:
        """Free `nbytes` on the GPUs: end all other pools, and let ComfyUI's own models leave the GPU that is shared.

        Returns whether anything was freed.
        """
        others = [pool for pool in _pools if pool is not self.pool and pool.alive]
        for pool in others:
            log.info("Ending the workers of another XDit+USP Config to make room.")
            pool.close(WorkersPoll(pool))
        freed = free_shared_gpu(nbytes)
        return bool(others) or freed

    def _free_more(self) -> bool:
        """Free GPU memory from everything but this model, after the workers ran out of memory; whether a second try
        has more room."""
        freed = self._free(EVERYTHING)
        others = self.pool.offload_others(self.spec, WorkersPoll(self.pool))  # such as the other expert of Wan 2.2
        freed = bool(others) or freed
        return freed or self.spec.offload == "auto"  # then fewer blocks stay on the GPU the next time


_pools: weakref.WeakSet[Pool] = weakref.WeakSet()
"""The pools of all MODELs that this process has built."""
