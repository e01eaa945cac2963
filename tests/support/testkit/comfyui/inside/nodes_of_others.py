"""Nodes that do to a MODEL what nodes of other packs do; linked into ComfyUI's custom_nodes for a run."""

from unittest import mock

import comfy.utils
import torch
from comfy.patcher_extension import WrappersMP
from comfy.weight_adapter import LoRAAdapter


class PatchParts:
    """Weight patches of parts of weights, with and without a function; `start` is where a part of 64 rows begins."""

    RETURN_TYPES = ("MODEL",)
    FUNCTION = "patch"
    CATEGORY = "tests"

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"model": ("MODEL",), "start": ("INT", {"default": 64})}}

    def patch(self, model, start):
        generator = torch.Generator().manual_seed(1)

        def normal(*shape):
            return torch.randn(shape, generator=generator) * 0.1

        def name(rest):
            return f"diffusion_model.blocks.{rest}.weight"

        pair = normal(256, 4), normal(4, 128), 2.0, None, None, None
        patched = model.clone()
        patches = {
            (name("0.self_attn.q"), (0, start, 64)): ("diff", (normal(64, 256),)),
            (name("0.self_attn.q"), (0, 0, 32)): ("set", (normal(32, 256),)),
            (name("1.ffn.0"), (1, 100, 128)): LoRAAdapter(set(), (normal(512, 4), *pair[1:])),
            (name("1.cross_attn.k"), (1, 0, 128), lambda change: -change): LoRAAdapter(set(), pair),
            (name("1.cross_attn.o"), None, lambda change: change * 2): ("diff", (normal(256, 256),)),
            (name("1.ffn.2"), (0, 0, 10)): ("diff", (normal(11, 512),)),  # fits nowhere
            name("0.self_attn.v"): ("diff", (normal(256, 256),)),
        }
        patched.add_patches(patches, 0.8)
        return (patched,)


class CompileParts:
    """torch.compile on the whole transformer or on each block, as an object patch or while the model runs."""

    RETURN_TYPES = ("MODEL",)
    FUNCTION = "patch"
    CATEGORY = "tests"

    @classmethod
    def INPUT_TYPES(cls):
        choice = {"blocks": ("BOOLEAN", {"default": True}), "patched": ("BOOLEAN", {"default": True})}
        return {"required": {"model": ("MODEL",), **choice}}

    def patch(self, model, blocks, patched):
        compiling = model.clone()
        count = len(compiling.get_model_object("diffusion_model").blocks)
        names = [f"diffusion_model.blocks.{i}" for i in range(count)] if blocks else ["diffusion_model"]
        compiled = {name: torch.compile(compiling.get_model_object(name), fullgraph=True) for name in names}

        def wrapper(executor, *args, **kwargs):
            kept = {name: comfy.utils.get_attr(executor.class_obj, name) for name in names}
            try:
                for name in names:
                    comfy.utils.set_attr(executor.class_obj, name, compiled[name])
                return executor(*args, **kwargs)
            finally:
                for name in names:
                    comfy.utils.set_attr(executor.class_obj, name, kept[name])

        if patched:
            for name in names:
                compiling.add_object_patch(name, compiled[name])
        else:
            compiling.add_wrapper_with_key(WrappersMP.APPLY_MODEL, "compile", wrapper)
        return (compiling,)


class CacheInside:
    """Replaces the inner forward while the model runs, as caches do that decide by the first block."""

    RETURN_TYPES = ("MODEL",)
    FUNCTION = "patch"
    CATEGORY = "tests"

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"model": ("MODEL",)}}

    def patch(self, model):
        cached = model.clone()
        transformer = cached.get_model_object("diffusion_model")

        def forward(self, x, t, context, **_options):
            return self.unpatchify(self.head(self.patch_embedding(x), self.time_embedding(t)), x.shape[2:])

        def wrapper(function, given):
            with mock.patch.multiple(transformer, forward_orig=forward.__get__(transformer)):
                return function(given["input"], given["timestep"], **given["c"])

        cached.set_model_unet_function_wrapper(wrapper)
        return (cached,)


NODE_CLASS_MAPPINGS = {"PatchParts": PatchParts, "CompileParts": CompileParts, "CacheInside": CacheInside}
