"""A ComfyUI MODEL without weights: samplers, LoRA loaders and patches of ComfyUI see an ordinary Wan model, and each
forward of its transformer is done by a pool of workers.

ComfyUI's own classes supply everything but the transformer (latent format, sigmas, conditioning); they are
told that the model needs next to no memory, as its weights and activations lie elsewhere.
"""

from __future__ import annotations

import functools
import logging
import types
import weakref
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

import comfy.model_base
import comfy.model_detection
import comfy.model_management
import comfy.patcher_extension
import torch

from ...distributed.approximate.schedule import PatchSettings
from ...distributed.client.errors import OutOfMemory
from ...distributed.client.pool import Pool
from ...distributed.protocol.requests import Displaced
from ...distributed.protocol.specs import ModelSpec
from ...distributed.weights.lora_transfer import PatchSet
from ...wanvideo.base.conditioning import Conditioning, check, extended
from ...wanvideo.base.grid import sequence_of
from ...wanvideo.base.tensor_info import CheckpointError
from ...wanvideo.checkpoint.header import FLOW_RVS, Header
from ...wanvideo.checkpoint.vace_module import read_model
from ...wanvideo.checkpoint.weight_source import file_stamp
from ..common import refusals
from ..common.model_files import patch_files
from ..common.progress import LoadingText
from . import infinitetalk_patch
from .conditioning_inputs import check_start_image, from_comfyui, latent_node
from .model_patcher import EVERYTHING, RemoteModelPatcher, free_shared_gpu
from .patch_runs import PatchRuns
from .stream_runs import BESIDE, Beside, StreamRuns

log = logging.getLogger(__name__)

# ComfyUI sees the logical weights: a quantised one is a float matrix to it, of its logical shape.
_FILE_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
# Modules of the transformer that other nodes look for. They are in the workers, so the answer is a refusal.
_MODULES = frozenset({"blocks", "head", "text_embedding", "time_embedding", "time_projection", "rope_embedder"})


def build_model(
    header: Header, spec: ModelSpec, pool: Pool, patch_settings: PatchSettings | None = None
) -> RemoteModelPatcher:
    """The MODEL of a checkpoint. Reads no weights and starts no workers.

    Args:
        patch_settings: run it by displaced patches (DistriFusion); exactly without.

    Raises:
        CheckpointError: this ComfyUI takes the file for something else than a Wan model, or samples it otherwise.
    """
    tensors = {
        name: torch.empty(info.shape, dtype=_FILE_DTYPES.get(info.dtype, torch.bfloat16), device="meta")
        for name, info in header.tensors.items()
    }
    # Others are told by their tensors, to which a VACE module may have been added that the note knows nothing of.
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
    model.diffusion_model = RemoteWan(header, spec, pool, tensors)
    if patch_settings is not None:
        model.diffusion_model.patch_runs = PatchRuns(patch_settings, header.config, spec, pool, header)
    model.__class__ = _weightless(type(model))
    return RemoteModelPatcher(
        model,
        load_device=comfy.model_management.get_torch_device(),
        offload_device=comfy.model_management.unet_offload_device(),
        size=1,  # bytes: what it holds beside that is in the workers, see RemoteModelPatcher.model_size
    )


class RemoteWan(torch.nn.Module):
    """Stands in for ComfyUI's WanModel: the attributes that ComfyUI reads, and a forward that asks the pool.

    `patches` is what the loaded MODEL adds to the weights; the workers get it with the next forward. `patch_runs` is
    there where it runs by displaced patches. `header` and `spec` are of the model as the workers have it, which may
    have taken in InfiniteTalk's layers.
    """

    dtype = torch.float32
    patch_size = (1, 2, 2)

    def __init__(self, header: Header, spec: ModelSpec, pool: Pool, tensors: Mapping[str, torch.Tensor]):
        super().__init__()
        self.header, self.spec, self.pool, self._plain = header, spec, pool, spec
        self.in_dim, self.out_dim = header.config.in_dim, header.config.out_dim
        self.patches: PatchSet | None = None
        self.patch_runs: PatchRuns | None = None
        self.stream_runs: StreamRuns | None = None
        if pool.settings.pipeline_mode == "pipefusion":
            self.stream_runs = StreamRuns(header.config, spec, pool, header)
        _pools.add(pool)
        self._let_go = self._keep(spec)
        self._tensors = dict(tensors)
        # no module: ComfyUI would try to move its weight to a device
        self.patch_embedding = types.SimpleNamespace(weight=tensors["patch_embedding.weight"])

    @property
    def runs(self) -> PatchRuns | StreamRuns | None:
        """What is known of the sampling runs of a MODEL that is not exact."""
        return self.patch_runs or self.stream_runs

    def __getattr__(self, name: str) -> Any:
        if name in _MODULES:
            refusals.refuse_module(name)
        return super().__getattr__(name)

    def state_dict(
        self, *_args: Any, destination: dict | None = None, prefix: str = "", **_options: Any
    ) -> dict[str, torch.Tensor]:
        """The real names and shapes on the meta device: LoRA loaders look them up."""
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
        """As ComfyUI's WanModel.forward: x [B, C, T, H, W], timestep [B] or [B, T], context [B, L, text_dim].

        Wrappers (EasyCache and the like) run here, in this process, around the remote call.
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
        heard = infinitetalk_patch.talk_in(transformer_options)
        if heard is not None:
            self._take_in(infinitetalk_patch.file_of(heard.model_patch, patch_files()))
        conditioning = from_comfyui(self.header.config, infinitetalk_patch.without_talk(transformer_options), given)
        if heard is not None:
            conditioning = heard.joined(conditioning, len(x))
        return self._on_workers(transformer_options, conditioning, x, timestep, context)

    def _take_in(self, module: str) -> None:
        """Run with the layers of InfiniteTalk in the file `module` from now on; what hears nothing passes them by.

        Raises:
            CheckpointError: they are for another model.
        """
        plain = self._plain
        if plain.module:
            refusals.refuse("InfiniteTalk and a VACE module belong to one model", "Disconnect vace_model.")
        spec = replace(plain, module=module, stamp=f"{plain.stamp}+{file_stamp(module)}")
        if spec == self.spec:
            return
        self.header, self.spec = read_model(plain.path, module), spec
        if self.runs is not None:
            self.runs.header, self.runs.config, self.runs.spec = self.header, self.header.config, spec
        let_go, self._let_go = self._let_go, self._keep(spec)
        let_go()

    def _keep(self, spec: ModelSpec) -> weakref.finalize:
        """Hold a model on the workers; lets it go with this object, or when what is returned is called."""
        self.pool.models.keep(spec)
        finalizer = weakref.finalize(self, self.pool.models.drop, spec)
        finalizer.atexit = False
        return finalizer

    def _on_workers(
        self, options: Mapping[str, Any], conditioning: Conditioning, *inputs: torch.Tensor
    ) -> torch.Tensor:
        try:
            return self._run(options, conditioning, *inputs)
        except OutOfMemory as error:
            if not self._make_more_room():
                raise
            log.warning("%s Trying once more with more room on the GPUs.", error)
        return self._run(options, conditioning, *inputs)

    def _run(self, options: Mapping[str, Any], conditioning: Conditioning, *inputs: torch.Tensor) -> torch.Tensor:
        x, timestep = inputs[:2]
        poll = comfy.model_management.throw_exception_if_processing_interrupted
        check(self.header.config, x, conditioning)
        whole, left = extended(x, conditioning)  # as the workers will cut it
        options = {**options, BESIDE: Beside(len(left.options.vace_strengths), left.options.tail_tokens)}
        if self.runs is not None:
            x = whole
            self.runs.check(x.shape, options)
        with LoadingText(self.spec, self.pool) as text:
            tokens = sequence_of(whole, left.options).tokens
            self.pool.ensure_ready(
                self.spec, lambda: (text.show(), poll()), self._make_room, tokens=tokens, items=len(x)
            )
        with self._patch_step(options, x, timestep) as displaced:
            return self.pool.forward(
                self.spec,
                *inputs,
                patches=self.patches,
                poll=poll,
                make_room=self._make_room,
                displaced=displaced,
                conditioning=conditioning,
            )

    def _patch_step(
        self, options: Mapping[str, Any], x: torch.Tensor, timestep: torch.Tensor
    ) -> AbstractContextManager[Displaced | None]:
        uuid = self.patches.uuid if self.patches else ""
        return nullcontext() if self.runs is None else self.runs.step(x, timestep, options, uuid, self._make_room)

    def _make_room(self, nbytes: float) -> bool:
        """Free `nbytes` on the GPUs: other pools end, and ComfyUI's own models leave the GPU that we share.

        Returns whether there was anything to free.
        """
        others = [pool for pool in _pools if pool is not self.pool and pool.alive]
        for pool in others:
            log.info("Ending the workers of another XDit+USP Config to make room.")
            pool.close(comfy.model_management.throw_exception_if_processing_interrupted)
        freed = free_shared_gpu(nbytes)
        return bool(others) or freed

    def _make_more_room(self) -> bool:
        """After the workers ran out of memory: free all that is not this model; whether there was any."""
        freed = self._make_room(EVERYTHING)
        poll = comfy.model_management.throw_exception_if_processing_interrupted
        freed = bool(self.pool.step_aside(self.spec, poll)) or freed  # such as the other expert of Wan 2.2
        return freed or self.spec.offload == "auto"  # then fewer blocks stay on the GPU the next time


_pools: weakref.WeakSet[Pool] = weakref.WeakSet()
"""Pools that a MODEL has been made for."""


class _Weightless:
    """Mixed into ComfyUI's model class: what it must say differently when the transformer is elsewhere."""

    def memory_required(self, *_args: Any, **_options: Any) -> float:
        """Nothing: activations are in the workers. So both branches of cfg come in one batch, always."""
        return 0.0

    def process_latent_in(self, latent: torch.Tensor) -> torch.Tensor:
        self._check_channels(latent)
        return super().process_latent_in(latent)

    def concat_cond(self, **inputs: Any) -> torch.Tensor | None:
        self._check_channels(inputs["noise"])
        check_start_image(self.diffusion_model.header.config, inputs.get("concat_latent_image"))
        return super().concat_cond(**inputs)

    def state_dict_for_saving(self, *_args: Any, **_options: Any) -> None:
        refusals.refuse_saving()

    def _check_channels(self, latent: torch.Tensor) -> None:
        config = self.diffusion_model.header.config
        wanted = self.diffusion_model.out_dim
        if latent.ndim != 5 or latent.shape[1] != wanted:
            raise ValueError(
                f"The latent has the shape {list(latent.shape)}, but this {config.variant} model takes videos of "
                f"{wanted} channels ([batch, {wanted}, frames, height, width]). Connect {latent_node(config)}, or a "
                "video encoded with this model's own VAE."
            )


@functools.cache
def _weightless(cls: type[comfy.model_base.BaseModel]) -> type[comfy.model_base.BaseModel]:
    return type(f"Remote{cls.__name__}", (_Weightless, cls), {})
