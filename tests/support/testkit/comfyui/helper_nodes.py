"""Nodes that only the tests use; linked into ComfyUI's custom_nodes for a run.

They make conditioning without a text encoder and save a latent bit by bit.
"""

import copy
import os
from unittest import mock

import comfy.clip_vision
import comfy.ldm.modules.attention
import comfy.ldm.wan.vae2_2
import comfy.model_management as management
import comfy.sd
import comfy.utils
import folder_paths
import torch
from safetensors.torch import save_file


class RandomConditioning:
    """CONDITIONING of normal numbers, [1, tokens, width]."""

    RETURN_TYPES = ("CONDITIONING",)
    FUNCTION = "make"
    CATEGORY = "tests"

    @classmethod
    def INPUT_TYPES(cls):
        return {
            "required": {
                "seed": ("INT", {"default": 0}),
                "tokens": ("INT", {"default": 512}),
                "width": ("INT", {"default": 4096}),
            },
            "optional": {"reference_latent": ("LATENT",)},
        }

    def make(self, seed, tokens, width, reference_latent=None):
        generator = torch.Generator().manual_seed(seed)
        extras = {} if reference_latent is None else {"reference_latents": [reference_latent["samples"]]}
        return ([[torch.randn(1, tokens, width, generator=generator), extras]],)


class RandomLatent:
    """LATENT of normal numbers, for latents that ComfyUI must not take for empty."""

    RETURN_TYPES = ("LATENT",)
    FUNCTION = "make"
    CATEGORY = "tests"

    @classmethod
    def INPUT_TYPES(cls):
        size = {"frames": ("INT", {"default": 2}), "rows": ("INT", {"default": 4}), "columns": ("INT", {"default": 4})}
        return {
            "required": {"seed": ("INT", {"default": 0}), "channels": ("INT", {"default": 16})},
            "optional": {**size, "batch": ("INT", {"default": 1})},
        }

    def make(self, seed, channels, frames=2, rows=4, columns=4, batch=1):
        generator = torch.Generator().manual_seed(seed)
        return ({"samples": torch.randn(batch, channels, frames, rows, columns, generator=generator)},)


class SaveImageTensor:
    """Write an IMAGE to `<output>/<name>.safetensors`, and where it lies."""

    RETURN_TYPES = ()
    FUNCTION = "save"
    OUTPUT_NODE = True
    CATEGORY = "tests"

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"images": ("IMAGE",), "name": ("STRING", {"default": "images"})}}

    def save(self, images, name):
        path = os.path.join(folder_paths.get_output_directory(), f"{name}.safetensors")
        save_file({"images": images.contiguous()}, path, {"device": str(images.device)})
        return {}


class SaveLatentTensor:
    """Write the samples of a LATENT to `<output>/<name>.safetensors`."""

    RETURN_TYPES = ()
    FUNCTION = "save"
    OUTPUT_NODE = True
    CATEGORY = "tests"

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"samples": ("LATENT",), "name": ("STRING", {"default": "latent"})}}

    def save(self, samples, name):
        path = os.path.join(folder_paths.get_output_directory(), f"{name}.safetensors")
        save_file({"samples": samples["samples"].contiguous()}, path)
        return {}


class PassedOn:
    """The same LATENT; another `number` makes what follows run anew."""

    RETURN_TYPES = ("LATENT",)
    FUNCTION = "pass_on"
    CATEGORY = "tests"

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"samples": ("LATENT",), "number": ("INT", {"default": 0})}}

    def pass_on(self, samples, number):
        return (samples,)


class WanVideoLoraList:
    """A WANVIDLORA as the select nodes of other packs make it."""

    RETURN_TYPES = ("WANVIDLORA",)
    FUNCTION = "make"
    CATEGORY = "tests"

    @classmethod
    def INPUT_TYPES(cls):
        return {
            "required": {
                "name": ("STRING", {"default": ""}),
                "strength": ("FLOAT", {"default": 1.0}),
                "blocks": ("STRING", {"default": ""}),
            }
        }

    def make(self, name, strength, blocks):
        path = folder_paths.get_full_path("loras", name)
        selected = {blocks: True} if blocks else {}
        return ([{"path": path, "strength": strength, "name": name, "blocks": selected, "layer_filter": ""}],)


class WantRoom:
    """Passes a LATENT on after ComfyUI was asked for this many bytes more than are free, as a VAE decode asks."""

    RETURN_TYPES = ("LATENT",)
    FUNCTION = "want"
    CATEGORY = "tests"

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"samples": ("LATENT",), "nbytes": ("FLOAT", {"default": 0.0, "max": 1e30})}}

    def want(self, samples, nbytes):
        device = management.get_torch_device()
        management.free_memory(management.get_free_memory(device) + nbytes, device)
        return (samples,)


ODD_VALUES = {
    "object": object(),
    "nan": float("nan"),
    "huge": 10**400,
    "text": "garbage",
    "list": [1, [2]],
    "none": None,
    "two": 2,
    "no samples": {"samples": None},
    "no frames": {"samples": torch.zeros(1, 16, 0, 4, 4)},
    "no videos": {"samples": torch.zeros(0, 16, 2, 4, 4)},
    "complex latent": {"samples": torch.ones(1, 16, 2, 4, 4, dtype=torch.complex64)},
    "latent of NaN": {"samples": torch.full((1, 16, 2, 4, 4), float("nan"))},
    "latent": {"samples": torch.ones(1, 16, 2, 5, 3)},
    "grey images": torch.ones(5, 8, 8, 1),
    "images of NaN": torch.full((5, 16, 16, 3), float("nan")),
    "text of NaN": [[torch.full((1, 512, 4096), float("nan")), {}]],
}


class AnyThing:
    """Something that is of every type, and mostly of no use."""

    RETURN_TYPES = ("*",)
    FUNCTION = "make"
    CATEGORY = "tests"

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {}, "optional": {"kind": ("STRING", {"default": "object"})}}

    def make(self, kind="object"):
        return (copy.copy(ODD_VALUES[kind]),)


class OddLatent(AnyThing):
    """One of `ODD_VALUES` as a LATENT: stock samplers take no output of every type in older versions."""

    RETURN_TYPES = ("LATENT",)


class NoCLIP:
    """A CLIP that is none: LoraLoader then changes the model alone."""

    RETURN_TYPES = ("CLIP",)
    FUNCTION = "make"
    CATEGORY = "tests"

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {}}

    def make(self):
        return (None,)


class PoolingVAE:
    """VAE whose encoder averages pixels and mixes colours: enough for nodes that condition on images."""

    RETURN_TYPES = ("VAE",)
    FUNCTION = "make"
    CATEGORY = "tests"

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"channels": ("INT", {"default": 16}), "scale": ("INT", {"default": 8})}}

    def make(self, channels, scale):
        self.latent_channels, self.scale = channels, scale
        self.mix = torch.randn(channels, 3, 1, 1, 1, generator=torch.Generator().manual_seed(11))
        return (self,)

    def spacial_compression_encode(self):
        return self.scale

    def encode(self, pixels):
        video = pixels[::4].movedim(-1, 0)[None].float() * 2 - 1  # one latent frame for each four of the video
        pooled = torch.nn.functional.avg_pool3d(video, (1, self.scale, self.scale))
        return torch.nn.functional.conv3d(pooled, self.mix)

    def decode(self, latent):
        """Images of a latent for graphs that go on with them: [batch, frames, height, width, 3]."""
        colours = torch.nn.functional.conv_transpose3d(latent.float(), self.mix)
        frames = torch.cat([colours[:, :, :1], colours[:, :, 1:].repeat_interleave(4, dim=2)], dim=2)
        pixels = torch.nn.functional.interpolate(frames, scale_factor=(1, self.scale, self.scale))
        return torch.sigmoid(pixels / 4).movedim(1, -1)


class NarrowWan22VAE:
    """VAE of ComfyUI's own for Wan 2.2's VAE, with fewer channels than the only size that its loader makes."""

    RETURN_TYPES = ("VAE",)
    FUNCTION = "make"
    CATEGORY = "tests"

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"vae_name": ("STRING", {"default": ""}), "dim": ("INT", {"default": 4})}}

    def make(self, vae_name, dim):
        def narrow(**config):
            return of_any_width(**{**config, "dim": dim, "dec_dim": dim})

        of_any_width = comfy.ldm.wan.vae2_2.WanVAE
        with mock.patch.object(comfy.ldm.wan.vae2_2, "WanVAE", narrow):
            return (comfy.sd.VAE(sd=comfy.utils.load_torch_file(folder_paths.get_full_path("vae", vae_name))),)


class RandomImages:
    """IMAGE of random pixels, [count, height, width, 3]."""

    RETURN_TYPES = ("IMAGE",)
    FUNCTION = "make"
    CATEGORY = "tests"

    @classmethod
    def INPUT_TYPES(cls):
        sizes = {"count": 1, "width": 64, "height": 48, "seed": 0}
        return {"required": {name: ("INT", {"default": value}) for name, value in sizes.items()}}

    def make(self, count, width, height, seed):
        return (torch.rand(count, height, width, 3, generator=torch.Generator().manual_seed(seed)),)


class RandomClipVision:
    """CLIP_VISION_OUTPUT of normal tokens."""

    RETURN_TYPES = ("CLIP_VISION_OUTPUT",)
    FUNCTION = "make"
    CATEGORY = "tests"

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"seed": ("INT", {"default": 0})}}

    def make(self, seed):
        output = comfy.clip_vision.Output()
        output.penultimate_hidden_states = torch.randn(1, 257, 1280, generator=torch.Generator().manual_seed(seed))
        return (output,)


class RandomAudio:
    """AUDIO: noise whose loudness beats twice a second."""

    RETURN_TYPES = ("AUDIO",)
    FUNCTION = "make"
    CATEGORY = "tests"

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"seed": ("INT", {"default": 0}), "seconds": ("FLOAT", {"default": 1.0})}}

    def make(self, seed, seconds):
        rate = 16000
        times = torch.arange(int(rate * seconds)) / rate
        noise = torch.randn(1, 1, len(times), generator=torch.Generator().manual_seed(seed))
        return ({"waveform": noise * (1 + torch.sin(times * 4 * torch.pi)) / 4, "sample_rate": rate},)


class RandomAudioFeatures:
    """AUDIO_ENCODER_OUTPUT of normal features, 50 a second."""

    RETURN_TYPES = ("AUDIO_ENCODER_OUTPUT",)
    FUNCTION = "make"
    CATEGORY = "tests"

    @classmethod
    def INPUT_TYPES(cls):
        sizes = {"seed": 0, "layers": 25, "width": 1024, "count": 50}
        return {"required": {name: ("INT", {"default": value}) for name, value in sizes.items()}}

    def make(self, seed, layers, width, count):
        generator = torch.Generator().manual_seed(seed)
        features = [torch.randn(1, count, width, generator=generator) for _ in range(layers)]
        output = {"encoded_audio": features[-1], "encoded_audio_all_layers": features}
        return ({**output, "audio_samples": count * 16000 // 50},)


class RandomMusic:
    """AUDIO_ENCODER_OUTPUT of WanDancerEncodeAudio, which needs torchaudio."""

    RETURN_TYPES = ("AUDIO_ENCODER_OUTPUT",)
    FUNCTION = "make"
    CATEGORY = "tests"

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"seed": ("INT", {"default": 0}), "fps": ("FLOAT", {"default": 30.0})}}

    def make(self, seed, fps):
        features = torch.randn(1, 20, 35, generator=torch.Generator().manual_seed(seed))
        return ({"audio_feature": features, "fps": fps, "audio_inject_scale": 0.9},)


class RandomMask:
    """MASK of random zeros and ones, each of 16 x 16 pixels."""

    RETURN_TYPES = ("MASK",)
    FUNCTION = "make"
    CATEGORY = "tests"

    @classmethod
    def INPUT_TYPES(cls):
        sizes = {"width": 64, "height": 48, "seed": 0}
        return {"required": {name: ("INT", {"default": value}) for name, value in sizes.items()}}

    def make(self, width, height, seed):
        generator = torch.Generator().manual_seed(seed)
        bits = torch.randint(0, 2, (1, height // 16, width // 16), generator=generator).float()
        return (bits.repeat_interleave(16, 1).repeat_interleave(16, 2),)


class ChangedPatch:
    """A MODEL_PATCH with one of its numbers changed."""

    RETURN_TYPES = ("MODEL_PATCH",)
    FUNCTION = "change"
    CATEGORY = "tests"

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"model_patch": ("MODEL_PATCH",)}}

    def change(self, model_patch):
        changed = copy.copy(model_patch)
        changed.model = copy.deepcopy(model_patch.model)
        changed.model.blocks[0].norm_x.bias.data[0] += 1
        return (changed,)


class RandomTracks:
    """SAM3_TRACK_DATA of two objects: random bits for their masks."""

    RETURN_TYPES = ("SAM3_TRACK_DATA",)
    FUNCTION = "make"
    CATEGORY = "tests"

    @classmethod
    def INPUT_TYPES(cls):
        sizes = {"count": 1, "width": 64, "height": 48, "seed": 0}
        return {"required": {name: ("INT", {"default": value}) for name, value in sizes.items()}}

    def make(self, count, width, height, seed):
        generator = torch.Generator().manual_seed(seed)
        masks = torch.randint(0, 256, (count, 2, height, width // 8), dtype=torch.uint8, generator=generator)
        return ({"packed_masks": masks, "orig_size": (height, width), "n_frames": count, "scores": [1.0, 1.0]},)


class SparseAttnPatch:
    """The settings of ComfyUI's Model Sparse Attention, under its names."""

    def __init__(self, **settings):
        self.sink_conditioning, self.verbose, self.vsa, self.extra_tokens = "exact_kv_and_rows", False, False, 0
        vars(self).update(settings)


def make_attention_override(patch, previous):
    """Sparse attention in the steps and blocks of `patch`, by comfy-kitchen's reference, which a CPU can run."""

    def override(func, q, k, v, heads, **more):
        options = more.get("transformer_options") or {}
        sigma = float(options["sigmas"][0])
        inside = patch.sigma_end <= sigma <= patch.sigma_start and options.get("block_index") not in patch.dense_blocks
        if q.shape != k.shape or not inside:
            return func(q, k, v, heads, **more) if previous is None else previous(func, q, k, v, heads, **more)
        import comfy_kitchen

        apart = ([x.unflatten(-1, (heads, -1))[:, :, i : i + 1] for x in (q, k, v)] for i in range(heads))
        by_head = [comfy_kitchen.sol_attn(*one, tau=patch.tau, topk_ratio=patch.topk_ratio) for one in apart]
        return torch.cat(by_head, dim=2).flatten(2)

    return override


class StockSparseAttention:
    """Sets what ComfyUI's Model Sparse Attention sets, on ComfyUIs that have it and on others."""

    RETURN_TYPES = ("MODEL",)
    FUNCTION = "patch"
    CATEGORY = "tests"

    @classmethod
    def INPUT_TYPES(cls):
        numbers = {"tau": 1.0, "keep": 0.0, "start_percent": 0.0, "end_percent": 1.0}
        return {
            "required": {"model": ("MODEL",)},
            "optional": {
                **{name: ("FLOAT", {"default": value}) for name, value in numbers.items()},
                "min_tokens": ("INT", {"default": 0}),
                "vsa": ("BOOLEAN", {"default": False}),
            },
        }

    def patch(self, model, tau=1.0, keep=0.0, start_percent=0.0, end_percent=1.0, min_tokens=0, vsa=False):
        sampling, patched = model.get_model_object("model_sampling"), model.clone()
        start, end = (float(sampling.percent_to_sigma(percent)) for percent in (start_percent, end_percent))
        settings = {"tau": tau, "topk_ratio": keep, "sigma_start": start, "sigma_end": end, "vsa": vsa}
        patch = SparseAttnPatch(**settings, min_tokens=min_tokens, dense_blocks=set())
        options = patched.model_options["transformer_options"]
        previous = options.get("optimized_attention_override")
        options["optimized_attention_override"] = make_attention_override(patch, previous)
        return (patched,)


class StockAttentionBackend:
    """Sets what ComfyUI's Model Attention Backend sets for pytorch attention."""

    RETURN_TYPES = ("MODEL",)
    FUNCTION = "patch"
    CATEGORY = "tests"

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"model": ("MODEL",)}}

    def patch(self, model):
        patched, optimized_attention = model.clone(), comfy.ldm.modules.attention.attention_pytorch

        def optimized_attention_override(_, *args, **kwargs):
            return optimized_attention(*args, **kwargs)

        patched.model_options["transformer_options"]["optimized_attention_override"] = optimized_attention_override
        return (patched,)


NODE_CLASS_MAPPINGS = {
    cls.__name__: cls
    for cls in (
        RandomConditioning,
        RandomLatent,
        SaveImageTensor,
        SaveLatentTensor,
        PassedOn,
        WanVideoLoraList,
        WantRoom,
        AnyThing,
        OddLatent,
        NoCLIP,
        PoolingVAE,
        NarrowWan22VAE,
        RandomImages,
        RandomClipVision,
        RandomAudio,
        RandomAudioFeatures,
        RandomMusic,
        RandomTracks,
        RandomMask,
        ChangedPatch,
        StockSparseAttention,
        StockAttentionBackend,
    )
}
