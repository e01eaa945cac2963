"""Nodes that do to a MODEL what nodes of other packs do; linked into ComfyUI's custom_nodes for a run."""

import torch
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


NODE_CLASS_MAPPINGS = {"PatchParts": PatchParts}
