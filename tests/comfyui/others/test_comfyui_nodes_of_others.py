"""Nodes of ComfyUI and of other packs on our MODEL: the same result, none, or a refusal that says what was found."""

from __future__ import annotations

import pytest
import torch
from testkit.comfyui.graphs import ksampler, link, node, pool_model, stock_model
from testkit.comfyui.refusals import error_text
from testkit.comfyui.results import assert_same, plain, sampled
from testkit.tiny import relative_error


def behind(loader, kind: str, **inputs) -> dict:
    return {**plain(loader), "tried": node(kind, model=link("model"), **inputs), **ksampler(model="tried")}


@pytest.mark.parametrize(
    "kind, inputs",
    [
        ("TorchCompileModel", {"backend": "inductor"}),
        *(("CompileParts", {"blocks": blocks, "patched": patched}) for blocks in (0, 1) for patched in (0, 1)),
    ],
    ids=str,
)
def test_a_node_that_compiles_changes_nothing(server, kind, inputs):
    compiled = sampled(server, behind(pool_model, kind, **inputs))
    assert torch.equal(compiled, sampled(server, plain(pool_model)))
    said = "torch.compile does nothing for this model"
    assert server.log.count(said) == 1, "once in a process, whatever compiles"


@pytest.mark.parametrize(
    "kind, inputs",
    [("RescaleCFG", {"multiplier": 0.7}), ("CFGZeroStar", {}), ("Mahiro", {})],
    ids=str,
)
def test_nodes_around_the_transformer_work(server, kind, inputs):
    native = assert_same(server, lambda loader: behind(loader, kind, **inputs))
    assert relative_error(sampled(server, plain(stock_model)), native) > 1e-4


def test_differential_diffusion_works(server):
    def graph(loader):
        mask = node("SolidMask", value=0.4, width=8, height=6)
        masked = node("SetLatentNoiseMask", samples=link("video"), mask=link("mask"))
        video = node("RandomLatent", seed=3, channels=16)
        nodes = {**behind(loader, "DifferentialDiffusion"), "mask": mask, "masked": masked, "video": video}
        return {**nodes, **ksampler(model="tried", latent_image=link("masked"))}

    assert_same(server, graph)


@pytest.mark.parametrize(
    "kind, inputs, place",
    [
        ("SelfAttentionGuidance", {"scale": 0.5, "blur_sigma": 2.0}, "patches_replace: attn1"),
        ("PerturbedAttentionGuidance", {"scale": 3.0}, "patches_replace: attn1"),
        ("HyperTile", {"tile_size": 64, "swap_size": 2, "max_depth": 0, "scale_depth": False}, "patches: attn1_"),
        ("TomePatchModel", {"ratio": 0.3}, "patches: attn1_"),
        (
            "PatchModelAddDownscale",
            {
                **{"block_number": 3, "downscale_factor": 2.0, "start_percent": 0.0, "end_percent": 0.35},
                **{"downscale_method": "bicubic", "upscale_method": "bicubic", "downscale_after_skip": True},
            },
            "patches: input_block_patch_after_skip",
        ),
    ],
    ids=str,
)
def test_what_is_refused_is_named_by_where_it_is_and_who_left_it(server, kind, inputs, place):
    message = error_text(server, behind(pool_model, kind, **inputs))
    assert f"{place}" in message and f" by {kind}." in message and " in comfy_extras.nodes_" in message
    assert "Uni3C" not in message and "NAGuidance" not in message


def test_a_reference_latent_for_a_text_to_video_model(server):
    graph = behind(pool_model, "ModelSamplingSD3", shift=5.0)
    graph["reference"] = node("RandomLatent", seed=3, channels=16)
    graph["referring"] = node("ReferenceLatent", conditioning=link("positive"), latent=link("reference"))
    graph |= ksampler(positive=link("referring"))
    message = error_text(server, graph)
    assert "(reference_latent), but this is a text-to-video model" in message
    assert "Remove the node that adds it" in message


def test_a_cache_that_replaces_the_inner_forward_is_pointed_to_easycache(server):
    message = error_text(server, behind(pool_model, "CacheInside"))
    assert "replaces a part of the transformer (diffusion_model.forward_orig)" in message and "EasyCache" in message
