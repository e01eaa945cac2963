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
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

import comfy.model_base
import comfy.model_detection
import comfy.model_management
import comfy.patcher_extension
import torch
from comfy.model_patcher import ModelPatcher
from comfy_execution.utils import get_executing_context

from ..distributed.errors import OutOfMemory, PoolError
from ..distributed.lora import PatchSet
from ..distributed.memory import PlacementError
from ..distributed.pool import Pool
from ..distributed.requests import Displaced
from ..distributed.schedule import PatchSettings
from ..distributed.specs import ModelSpec
from ..wanvideo.checkpoint import file_stamp
from ..wanvideo.conditioning import Conditioning, check, extended
from ..wanvideo.config import FLOW_RVS, CheckpointError, Header
from ..wanvideo.grid import sequence_of
from ..wanvideo.vace_module import read_model
from . import refusals, talk
from .conditioning import check_start_image, from_comfyui, latent_node
from .model_files import patch_files
from .patch_runs import PatchRuns
from .progress import LoadingText
from .stream_runs import BESIDE, Beside, StreamRuns
from .weight_patches import check_fit, for_workers, refuse_foreign

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
        heard = talk.talk_in(transformer_options)
        if heard is not None:
            self._take_in(talk.file_of(heard.model_patch, patch_files()))
        conditioning = from_comfyui(self.header.config, talk.without_talk(transformer_options), given)
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
        self.pool.keep(spec)
        finalizer = weakref.finalize(self, self.pool.drop, spec)
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
            pool.close()
        management = comfy.model_management
        device = management.get_torch_device()
        if device.type != "cuda":  # ComfyUI runs with --cpu and shares no GPU with the workers
            return bool(others)
        # dropping one of our own MODELs would unload the pool that is asking
        ours = [m for m in management.current_loaded_models if isinstance(m.model, RemoteModelPatcher)]
        freed = management.free_memory(nbytes, device, keep_loaded=ours)
        management.soft_empty_cache()
        return bool(others or freed)

    def _make_more_room(self) -> bool:
        """After the workers ran out of memory: free all that is not this model; whether there was any."""
        freed = self._make_room(_EVERYTHING)
        poll = comfy.model_management.throw_exception_if_processing_interrupted
        freed = bool(self.pool.step_aside(self.spec, poll)) or freed  # such as the other expert of Wan 2.2
        return freed or self.spec.offload == "auto"  # then fewer blocks stay on the GPU the next time


_EVERYTHING = 1e30  # bytes, as ComfyUI's own unload_all_models asks for
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


class RemoteModelPatcher(ModelPatcher):
    """The MODEL. Keeps LoRA patches for the workers, and refuses what needs the weights in this process."""

    @property
    def remote(self) -> RemoteWan:
        return self.model.diffusion_model

    # Where ComfyUI would write patches into weights, note them down for the workers instead.

    def load(self, *args: Any, **options: Any) -> None:
        super().load(*args, **options)
        self._hand_over_patches()

    def pre_run(self) -> None:
        self._hand_over_patches()
        if self.remote.runs is not None:
            self.remote.runs.begin()
        super().pre_run()

    def cleanup(self) -> None:
        """Sampling has ended, in whatever way: what the workers hold beyond weights makes room for the VAE."""
        super().cleanup()
        try:
            self.remote.pool.trim()
        except PoolError as error:  # must not take the place of the error that ended the sampling
            log.warning("%s", error)

    # One GPU, two users: what the workers hold on ComfyUI's own device is shown to its memory manager. Where that
    # wants some of it for another model, weights step out to host memory; the next forward brings them back. Cancel
    # has to wait for that: an interrupt in the middle of its freeing would make it lose count of its models.

    def model_size(self) -> int:
        """Bytes of the weights on ComfyUI's device once all are there; 1 while the workers have none (0 is unset)."""
        return max(1, self._held()[1])

    def loaded_size(self) -> int:
        """Bytes of the weights on ComfyUI's device now."""
        return self._held()[0]

    def partially_load(self, device_to: Any, extra_memory: float = 0, **options: Any) -> int:
        """There is nothing to split in this process, however little ComfyUI has left."""
        return super().partially_load(device_to, _EVERYTHING, **options)

    def partially_unload(self, device_to: Any, memory_to_free: float = 0, **_options: Any) -> int:
        """Weights of `memory_to_free` bytes, or all, leave ComfyUI's device; returns how many did."""
        return self._step_out(memory_to_free)

    def detach(self, unpatch_all: bool = True) -> torch.nn.Module:
        """ComfyUI drops this model, for good with `unpatch_all`.

        While a node runs that is to make room on its device, where the weights step out. Otherwise the user wants all
        memory back (Unload models), and the workers forget the model.
        """
        model = super().detach(unpatch_all)
        if unpatch_all:
            if get_executing_context() is not None:
                self._step_out(_EVERYTHING)
            else:
                self._unload_workers()
        return model

    def model_patches_models(self) -> list[ModelPatcher]:
        """What ComfyUI loads beside this model."""
        return talk.loaded_elsewhere(self.model_options["transformer_options"], super().model_patches_models())

    def _held(self) -> tuple[int, int]:
        return self.remote.pool.held(self.remote.spec, self._shared_ranks())

    def _shared_ranks(self) -> Sequence[int]:
        """The workers on ComfyUI's own device: one on a GPU, all of them without any."""
        pool, device = self.remote.pool, comfy.model_management.get_torch_device()
        workers = pool.settings.plan.num_gpus
        if device.type != pool.settings.device:
            return ()
        if device.type == "cpu":
            return range(workers)
        index = torch.cuda.current_device() if device.index is None else device.index
        return (index,) if index < workers else ()

    def _step_out(self, nbytes: float) -> int:
        ranks = self._shared_ranks()
        if not ranks:
            return 0
        try:
            freed = self.remote.pool.step_out(self.remote.spec, ranks, nbytes)
        except PlacementError as error:
            log.warning("%s The model is read again with the next sampling.", error)
            freed = self.loaded_size()
            self._unload_workers()
        except PoolError as error:  # nothing is left to free, and ComfyUI is in the middle of freeing
            log.warning("%s", error)
            return 0
        if freed:
            log.info("Weights of %.1f GiB have left ComfyUI's device to make room.", freed / 2**30)
        return freed

    def _unload_workers(self) -> None:
        try:
            self.remote.pool.unload(self.remote.spec)
        except PoolError as error:  # nothing is left to free, and ComfyUI is in the middle of freeing
            log.warning("%s", error)

    def _hand_over_patches(self) -> None:
        if not self.patches:
            self.remote.patches = None
            return
        spec = self.remote.spec
        build = functools.partial(for_workers, dict(self.patches), spec)
        self.remote.patches = PatchSet(str(self.patches_uuid), build)

    def add_patches(
        self, patches: Mapping[Any, Any], strength_patch: float = 1.0, strength_model: float = 1.0
    ) -> list[Any]:
        for patch in patches.values():
            refuse_foreign(patch)
        if strength_patch:
            check_fit(patches, self.remote.header.tensors)
        return super().add_patches(patches, strength_patch, strength_model)

    # What cannot be honoured.

    def add_hook_patches(self, *_args: Any, **_options: Any) -> None:
        refusals.refuse_weight_hooks()

    def get_key_patches(self, *_args: Any, **_options: Any) -> None:
        refusals.refuse_merging()

    def model_state_dict(self, filter_prefix: str | None = None) -> dict[str, torch.Tensor]:
        if filter_prefix is not None:  # Extract and Save Lora, which wants the values and not the names
            refusals.refuse_saving()
        return super().model_state_dict()

    def model_state_dict_for_saving(self, *_args: Any, **_options: Any) -> None:
        refusals.refuse_saving()

    def state_dict_for_saving(self, *_args: Any, **_options: Any) -> None:
        refusals.refuse_saving()

    def set_injections(self, key: str, injections: Sequence[Any]) -> None:
        if injections:
            refusals.refuse_injection(key)

    def add_object_patch(self, name: str, obj: Any) -> None:
        if name.startswith("diffusion_model."):
            refusals.refuse_object_patch(name)
        super().add_object_patch(name, obj)

    def set_model_compute_dtype(self, dtype: torch.dtype | None) -> None:
        if dtype not in (None, RemoteWan.dtype):
            refusals.refuse_compute_dtype(dtype)

    def add_weight_wrapper(self, name: str, *_args: Any, **_options: Any) -> None:
        refusals.refuse_weight_wrapper(name)

    def deepclone_multigpu(self, *_args: Any, **_options: Any) -> None:
        refusals.refuse_multigpu_clone()
