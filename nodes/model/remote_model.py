"""A ComfyUI MODEL without weights: samplers, LoRA loaders and patches of ComfyUI see an ordinary Wan model, while a
pool of workers computes each forward of its transformer.

ComfyUI's own classes supply everything but the transformer (latent format, sigmas, conditioning). To these classes the
model needs next to no memory, as its weights and activations lie in the workers.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Mapping
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
from ...wanvideo.base.attention_choice import AttentionChoice
from ...wanvideo.base.conditioning import Conditioning, check, extended
from ...wanvideo.base.config import WanConfig
from ...wanvideo.base.grid import sequence_of
from ...wanvideo.base.tensor_info import CheckpointError
from ...wanvideo.checkpoint.header import FLOW_RVS, Header
from ...wanvideo.checkpoint.patch_shapes import PATCH_EMBEDDING
from ...wanvideo.checkpoint.vace_module import read_model
from ..common import refusals
from ..common.file_notes import tell_ignored
from ..common.model_files import patch_files
from ..common.progress import LoadingText, WorkersPoll
from . import infinitetalk_patch
from .attention_override import attention_choice, refuse_attention
from .conditioning_inputs import from_comfyui
from .model_patcher import RemoteModelPatcher
from .nonfinite import explain, refuse_explained
from .remote_parts import RemotePart
from .sampled_forward import sampled_forward
from .shared_device import EVERYTHING, free_shared_gpu
from .weightless_model import weightless

log = logging.getLogger(__name__)

# ComfyUI sees the logical weights: a quantised one is a float matrix to it, of its logical shape.
_FILE_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
# The methods of ComfyUI's WanModel that nodes replace or call, and its module without weights.
_METHODS = frozenset({"forward_orig", "rope_encode", "unpatchify", "rope_embedder"})
_SIZES = (
    *("dim", "ffn_dim", "freq_dim", "in_dim", "out_dim", "num_heads", "num_layers", "patch_size", "eps"),
    *("window_size", "qk_norm", "cross_attn_norm", "vace_layers", "vace_in_dim"),
)
_OPTIONAL_MODULES = ("img_emb", "ref_conv")  # None in a WanModel that has no such module


def build_model(header: Header, spec: ModelSpec, pool: Pool, runs: SamplingRuns | None = None) -> RemoteModelPatcher:
    """Build the MODEL of a checkpoint. Reads no weights and starts no workers.

    Args:
        runs: the sampling runs of a MODEL that is not exact. None makes every forward exact, unless the pool streams
            patches through pipeline stages (PipeFusion).

    Raises:
        CheckpointError: this ComfyUI takes the file for another kind of model, or for a Wan model of other sampling.
    """
    tell_ignored(header)
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
    sizes = _native_sizes(model_config.unet_config, header.config)
    model.diffusion_model = RemoteWan(header, spec, pool, tensors, sizes, runs)
    model.diffusion_model.percent_to_sigma = model.model_sampling.percent_to_sigma
    kind: type = type(model)
    model.__class__ = weightless(kind)
    return RemoteModelPatcher(
        model,
        load_device=comfy.model_management.get_torch_device(),
        offload_device=comfy.model_management.unet_offload_device(),
        size=1,  # bytes; the workers hold the weights, see RemoteModelPatcher.model_size
    )


class RemoteWan(RemotePart):
    """Stands in for ComfyUI's WanModel: its sizes, and a forward that asks the pool. Its modules are `RemotePart`s.

    `loras` are the LoRAs of the loaded MODEL, which the workers get with the next forward. `runs` are the MODEL's
    sampling runs; None where every forward is exact. `percent_to_sigma` is that of the sampling of the MODEL that is
    sampled. `header` and `spec` describe the model as the workers have it, with InfiniteTalk's layers once a forward
    has needed these layers. `sizes` are the plain attributes of WanModel.
    """

    dtype = torch.float32

    def __init__(
        self,
        header: Header,
        spec: ModelSpec,
        pool: Pool,
        tensors: Mapping[str, torch.Tensor],
        sizes: Mapping[str, Any],
        runs: SamplingRuns | None = None,
    ):
        super().__init__("", dict(tensors))
        self._sizes = dict(sizes)
        vars(self).update(self._sizes, **{name: None for name in _OPTIONAL_MODULES if self.part(name) is None})
        self.eval()
        self.header, self.spec, self.pool, self.runs, self._plain = header, spec, pool, runs, spec
        self.loras: LoraSet | None = None
        self.percent_to_sigma: Callable[[float], float] = float
        _pools.add(pool)
        self._let_go = self._keep(spec)

    def part(self, name: str) -> RemotePart | None:
        """The module `name` of the transformer, or a stand-in for the method `name`; None where there is neither."""
        if name in _METHODS and name not in self._made:
            self._made[name] = RemotePart(name, {})
        return super().part(name)

    def _must_stay(self, name: str, value: object) -> bool:
        return name in {"__class__", *self._tensors, *self._below, *_METHODS, *self.__dict__.get("_sizes", ())}

    def __deepcopy__(self, memo: dict[int, Any]) -> RemoteWan:
        """Another model of the same workers, as the weights of one model are never changed for another."""
        copied = RemoteWan(self.header, self.spec, self.pool, self._tensors, self._sizes, self.runs)
        copied._plain, copied.loras, copied.percent_to_sigma = self._plain, self.loras, self.percent_to_sigma
        memo[id(self)] = copied
        return copied

    def __copy__(self) -> RemoteWan:
        return self.__deepcopy__({})

    def __reduce_ex__(self, protocol: Any) -> Any:
        refusals.refuse_pickling()

    @torch.compiler.disable  # dynamo must never look into the pool
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
        self._become(replace(self.spec, module=file.path, stamp=f"{plain.stamp}+{file.stamp}"))

    def widen(self, in_dim: int) -> None:
        """Run with an input of `in_dim` channels from now on, for a control LoRA; 0 is the number in the file."""
        if in_dim != self.spec.in_dim:
            self._become(replace(self.spec, in_dim=in_dim))

    def _become(self, spec: ModelSpec) -> None:
        """Run as the model `spec` from now on, in place of the model that this object ran as before."""
        if spec == self.spec:
            return
        self.header, self.spec = read_model(spec.path, spec.module, in_dim=spec.in_dim), spec
        part, _, weight = PATCH_EMBEDDING.partition(".")
        self._below[part][weight] = torch.empty(self.header.tensors[PATCH_EMBEDDING].shape, device="meta")
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
        refuse_explained(x, self.spec, self.loras)
        check(self.header.config, x, conditioning)  # before any worker starts; the pool checks again
        attention = attention_choice(options, self.percent_to_sigma)
        refuse_attention(attention, self.spec, exact=self.runs is None)
        whole, rest = extended(x, conditioning)  # as the workers will divide it
        forward = sampled_forward(
            options,
            len(whole),
            vace_contexts=len(rest.options.vace_strengths),
            context_tokens=rest.options.context_tokens,
        )
        if self.runs is not None:
            self.runs.check(tuple(whole.shape), forward)
        self._ensure_ready(sequence_of(whole, rest.options).tokens, len(whole), attention)
        with self._step(whole, timestep, forward) as displaced:
            result = self.pool.forward(
                self.spec,
                x,
                timestep,
                context,
                loras=self.loras,
                poll=WorkersPoll(self.pool),
                make_room=self._make_room,
                displaced=displaced,
                conditioning=conditioning,
                attention=attention,
            )
        inputs = {"latent": x, "timestep": timestep, "text": context}
        poll = comfy.model_management.throw_exception_if_processing_interrupted
        explain(result, inputs, conditioning, self.spec, self.loras, poll)
        return result

    def _ensure_ready(self, tokens: int, items: int, attention: AttentionChoice) -> None:
        """Start the workers and load the model, while a text under the running node says so."""
        workers_poll = WorkersPoll(self.pool)
        with LoadingText(self.spec, self.pool) as text:

            def poll() -> None:
                text.show()
                workers_poll()

            self.pool.ensure_ready(self.spec, poll, self._make_room, tokens=tokens, items=items, attention=attention)

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


def _native_sizes(unet_config: Mapping[str, Any], config: WanConfig) -> dict[str, Any]:
    """The plain attributes of ComfyUI's WanModel that ComfyUI makes by `unet_config`."""
    sizes = {name: unet_config[name] for name in _SIZES if name in unet_config}
    return {**sizes, "model_type": "i2v" if config.image_dim else "t2v", "text_dim": config.text_dim, "text_len": 512}


_pools: weakref.WeakSet[Pool] = weakref.WeakSet()
"""The pools of all MODELs that this process has built."""
