"""What cannot be honoured ends in a plain sentence: at queue time where it can be known then, else in the prompt."""

from __future__ import annotations

import pytest
from testkit.comfyui.graphs import ksampler, link, lora, node, pool_model
from testkit.comfyui.refusals import PLAIN, error_text, refused_text


@pytest.mark.parametrize(
    "file, text",
    [
        ("cut-short.safetensors", "is cut short"),
        ("corrupt.safetensors", "is corrupt"),
        ("pickle.pt", "is a pickle file"),
        ("lora.safetensors", "is a LoRA"),
        ("wide-module.safetensors", "is a VACE module without its Wan model"),
        ("absent.safetensors", "is not in the list of models/diffusion_models"),
    ],
)
def test_wrong_files_are_refused_when_queued(server, file, text):
    message = refused_text(server, pool_model(file=file))
    assert file in message and text in message


@pytest.mark.parametrize(
    "config, text",
    [
        ({"num_gpus": 2, "pipeline_parallel_size": 4}, "pipeline_parallel_size 4 does not divide num_gpus 2"),
        ({"num_gpus": 4, "tensor_parallel_size": 3}, "tensor_parallel_size 3 does not divide num_gpus 4"),
        (
            {"num_gpus": 4, "pipeline_parallel_size": 2, "tensor_parallel_size": 4},
            "is 8, which does not divide num_gpus 4",
        ),
        ({"num_gpus": 9}, "Choose 1 to 8"),
        ({"num_gpus": 3, "data_parallel_size": 2}, "does not divide num_gpus 3"),
        ({"num_gpus": 4, "ulysses_degree": 3}, "ulysses_degree 3 does not divide"),
        ({"num_gpus": 4, "ulysses_degree": 2, "ring_degree": 4}, "Make their product 4"),
        ({"use_fp16": True, "use_bf16": True}, "use_fp16 and use_bf16 are both on"),
        ({"device": "cuda"}, "Set num_gpus to"),
        ({"device": "tpu"}, "device is tpu"),
        ({"max_batch_size": 9}, "max_batch_size"),
    ],
    ids=str,
)
def test_configs_that_cannot_work_are_refused_when_queued(server, config, text):
    if config.get("device") == "cuda":
        config = {**config, "num_gpus": 8}
        text = "cuda" if "cpu" in server.get("/system_stats")["devices"][0]["type"] else text
    assert text in refused_text(server, pool_model(**config))


@pytest.mark.parametrize(
    "loader, config, text",
    [
        ({"vace_model": link("anything")}, {}, "vace_model does not name one VACE module"),
        ({"vace_model": link("wide")}, {}, "wide-module.safetensors is made for a model of width 512"),
        ({"model": "vace.safetensors", "vace_model": link("wide")}, {}, "vace.safetensors has VACE blocks already"),
        ({"attention_mode": "sdpa"}, {"use_sdpa": False}, "use_sdpa is off"),
        ({"attention_mode": "flash_attn_3"}, {"use_flash_attention": False}, "use_flash_attention is off"),
        ({}, {"use_sdpa": False, "use_flash_attention": False}, "leaves no attention kernel"),
        ({"lora": link("limited")}, {}, "limited to some blocks"),
        ({"lora": link("missing")}, {}, "is not there"),
        ({"xdit_usp_config": link("anything")}, {}, "Connect that node to it"),
    ],
    ids=str,
)
def test_loader_inputs_that_cannot_be_honoured(server, loader, config, text):
    extra = {
        "anything": node("AnyThing"),
        "wide": node("XDitUSPVACEModuleSelect", vace_model="wide-module.safetensors"),
        "limited": node("WanVideoLoraList", name="plain.safetensors", strength=1.0, blocks="blocks.0."),
        "missing": node("WanVideoLoraList", name="absent.safetensors", strength=1.0, blocks=""),
    }
    assert text in error_text(server, {**extra, **pool_model(loader=loader, **config)})


@pytest.mark.parametrize(
    "file, text",
    [
        ("tiny.safetensors", "tiny.safetensors is no VACE module"),
        ("vace.safetensors", "vace.safetensors is a whole VACE model"),
        ("lora.safetensors", "lora.safetensors is no VACE module"),
    ],
)
def test_a_file_that_is_no_vace_module_is_refused_when_queued(server, file, text):
    select = {"module": node("XDitUSPVACEModuleSelect", vace_model=file)}
    assert text in refused_text(server, {**select, **pool_model(loader={"vace_model": link("module")})})


def test_an_attention_kernel_that_is_not_there(server):
    message = error_text(server, pool_model(loader={"attention_mode": "sageattn"}))
    assert "sageattn" in message and "auto or sdpa" in message


def test_model_merge(server):
    merge = node("ModelMergeSimple", model1=link("model"), model2=link("other"), ratio=0.5)
    stock = node("UNETLoader", unet_name="tiny-low.safetensors", weight_dtype="default")
    ours = pool_model("other", file="tiny-low.safetensors")
    for other in ({"other": stock}, ours):
        message = error_text(server, {"merge": merge, **other, **ksampler(model="merge")})
        assert "merge" in message and "Merge with stock loaders first" in message


def test_model_save(server):
    save = node("ModelSave", model=link("model"), filename_prefix="merged")
    assert "Saving needs the weights" in error_text(server, {"save": save})


def test_lora_hook_on_one_conditioning(server):
    hooks = {
        "hook": node("CreateHookLora", lora_name="plain.safetensors", strength_model=1.0, strength_clip=1.0),
        "hooked": node(
            "ConditioningSetProperties",
            cond_NEW=link("positive"),
            hooks=link("hook"),
            strength=1.0,
            set_cond_area="default",
        ),
    }
    message = error_text(server, {**hooks, **ksampler(positive=link("hooked"))})
    assert "Create Hook LoRA" in message and "LoraLoaderModelOnly" in message


def test_normalized_attention_guidance(server):
    if not server.get("/object_info/NAGuidance"):
        pytest.skip("This ComfyUI has no NAGuidance")
    guided = node("NAGuidance", model=link("model"), nag_scale=5.0, nag_alpha=0.5, nag_tau=1.5)
    message = error_text(server, {"nag": guided, **ksampler(model="nag")})
    assert "attn1_output_patch" in message and "NAGuidance" in message


def test_compute_dtype_node(server):
    dtype = node("ModelComputeDtype", model=link("model"), dtype="bf16")
    message = error_text(server, {"dtype": dtype, **ksampler(model="dtype")})
    assert "ModelComputeDtype" in message and "XDit+USP Config" in message


def test_conditioning_of_another_variant(server):
    reference = node("RandomLatent", seed=3, channels=16)
    positive = node("RandomConditioning", seed=1, tokens=512, width=4096, reference_latent=link("reference"))
    message = error_text(server, {"reference": reference, "positive": positive})
    assert "reference_latent" in message and "this is a text-to-video model" in message


def test_a_start_image_for_a_text_to_video_model(server):
    image = node(
        "WanImageToVideo",
        positive=link("text"),
        negative=link("negative"),
        vae=link("vae"),
        start_image=link("start"),
        width=64,
        height=48,
        length=9,
        batch_size=1,
    )
    nodes = {"vae": node("PoolingVAE", channels=16, scale=8), "text": PLAIN["positive"], "image": image}
    nodes["start"] = node("RandomImages", count=1, width=64, height=48, seed=4)
    nodes |= ksampler(positive=link("image"), negative=link("image", 1), latent_image=link("image", 2))
    message = error_text(server, nodes)
    assert "a start image" in message and "this is a text-to-video model" in message


def test_a_latent_of_another_family_for_an_image_to_video_model(server):
    graph = {**pool_model(file="i2v-2.2.safetensors"), "latent": node("RandomLatent", seed=3, channels=48)}
    message = error_text(server, graph)
    assert "this image-to-video model takes videos of 16 channels" in message and "WanImageToVideo" in message


def test_latent_of_the_wrong_channel_count(server):
    message = error_text(server, {"latent": node("RandomLatent", seed=3, channels=48)})
    assert "takes videos of 16 channels" in message and "EmptyHunyuanLatentVideo" in message


def test_text_of_the_wrong_width(server):
    message = error_text(
        server,
        {
            "positive": node("RandomConditioning", seed=1, tokens=77, width=768),
            "negative": node("RandomConditioning", seed=2, tokens=77, width=768),
        },
    )
    assert "CLIPLoader with type wan" in message


def test_status_of_a_stock_model(server):
    stock = node("UNETLoader", unet_name="tiny.safetensors", weight_dtype="default")
    message = error_text(server, {"stock": stock, "status": node("XDitUSPStatus", model=link("stock"))})
    assert "does not run in workers" in message


def test_after_all_refusals_the_pool_is_as_usable_as_before(server):
    before = server.sample(PLAIN, link("sampler"))
    error_text(server, {"latent": node("RandomLatent", seed=3, channels=48)})
    after = server.sample({**PLAIN, **lora("model", "plain.safetensors", 0.0)}, link("sampler"))
    assert (before == after).all()
