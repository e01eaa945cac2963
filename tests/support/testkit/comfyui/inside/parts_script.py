"""Run by ComfyUI's interpreter in its folder: what nodes find in a RemoteWan that look into the transformer.

Prints one JSON object. Arguments: the pack's folder, checkpoints.
"""

# ruff: noqa: E402  (ComfyUI reads its options when it is imported)

from __future__ import annotations

import copy
import json
import logging
import pickle
import sys
from collections.abc import Callable
from importlib import util
from types import SimpleNamespace
from unittest import mock

sys.path.insert(0, ".")
import comfy.options

comfy.options.enable_args_parsing(False)
from comfy.cli_args import args

args.cpu = True
import comfy.model_detection
import comfy.utils
import torch
import utils.extra_config  # noqa: F401  (as main.py does: later ComfyUI puts another `utils` on the path)

PLAIN = (int, float, str, bool, tuple, type(None))


def load_pack(folder: str) -> None:
    spec = util.spec_from_file_location("pack_bootstrap", f"{folder}/bootstrap.py")
    bootstrap = util.module_from_spec(spec)
    spec.loader.exec_module(bootstrap)
    bootstrap.load_pack()


load_pack(sys.argv[1])
from wan_parallel.distributed.protocol.specs import ModelSpec
from wan_parallel.nodes.common.refusals import NotOnWorkers
from wan_parallel.nodes.model.remote_model import build_model
from wan_parallel.wanvideo.checkpoint.header import read_header


class PlayedPool:
    """A pool that computes nothing."""

    settings = SimpleNamespace(plan=SimpleNamespace(num_gpus=2), device="cpu", pipeline_mode="exact")
    alive, locations = True, ()

    def __init__(self):
        self.models = self

    def keep(self, spec):
        pass

    drop = keep

    def held(self, spec, ranks):
        return 0, 0

    def ensure_ready(self, *_args, **_options):
        pass

    def forward(self, spec, x, *_args, **_options):
        assert not torch.compiler.is_compiling()
        return x * 0.5


def built(path: str):
    spec = ModelSpec(path)
    return build_model(read_header(path), spec, PlayedPool())


def native(path: str):
    header = read_header(path)
    tensors = {name: torch.empty(info.shape, device="meta") for name, info in header.tensors.items()}
    config = comfy.model_detection.model_config_from_unet(tensors, "")
    config.set_inference_dtype(torch.float32, None)
    return config.get_model(tensors, "", device="meta").diffusion_model


def differences(path: str) -> dict:
    """What ComfyUI's own model has, and ours has not or has differently."""
    theirs, ours = native(path), built(path).model.diffusion_model
    missing = object()
    sizes = {name: value for name, value in vars(theirs).items() if isinstance(value, PLAIN) and name[0] != "_"}
    del sizes["training"]  # some versions leave it on
    shapes = {name: list(weight.shape) for name, weight in theirs.named_parameters()}
    own = {name: list(weight.shape) for name, weight in ours.named_parameters()}
    methods = {name for cls in type(theirs).__mro__[:-1] if "comfy" in cls.__module__ for name in vars(cls)}
    return {
        "sizes": {k: [v, repr(getattr(ours, k, missing))] for k, v in sizes.items() if getattr(ours, k, missing) != v},
        "modules": [k for k, v in theirs._modules.items() if (getattr(ours, k, None) is None) != (v is None)],
        "blocks": [len(theirs.blocks), len(ours.blocks)],
        "methods": [name for name in methods if not hasattr(ours, name)],
        "parameters": [name for name in shapes.keys() ^ own.keys() if name in shapes or name in own],
        "shapes": [name for name in shapes.keys() & own.keys() if shapes[name] != own[name]],
        "names": [k for k in dict(ours.named_modules()) if k not in dict(theirs.named_modules()) and k not in own],
        "block": list(ours.blocks[0].self_attn.q.weight.shape),
    }


def told(action: Callable[[], object]) -> str:
    """The refusal that an action ends with, or what else it ends with."""
    try:
        result = action()
    except NotOnWorkers as error:
        return str(error)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return f"returned {result!r}"


def replaced(target: object, **attributes: object) -> None:
    with mock.patch.multiple(target, **attributes):
        raise AssertionError("replaced")


def reached(path: str) -> dict[str, str]:
    """What a node is told that reaches for a part of the transformer."""
    patcher = built(path)
    model = patcher.model.diffusion_model
    x, block = torch.zeros(1, 4, 8), model.blocks[0]
    actions = {
        "forward_orig": lambda: replaced(model, forward_orig=print),
        "forward_orig.call": lambda: model.forward_orig(x, x, x),
        "rope_encode": lambda: model.rope_encode(3, 8, 8),
        "rope_embedder": lambda: model.rope_embedder(x),
        "rope_embedder.set": lambda: setattr(model, "rope_embedder", torch.nn.Identity()),
        "patch_embedding": lambda: model.patch_embedding(x),
        "time_embedding": lambda: model.time_embedding(x),
        "time_projection": lambda: model.time_projection(x),
        "text_embedding": lambda: model.text_embedding.to("cpu")(x),
        "img_emb": lambda: model.img_emb(x),
        "head": lambda: model.head(x, x),
        "unpatchify": lambda: model.unpatchify(x, (1, 2, 2)),
        "freqs": lambda: model.freqs,
        "dim": lambda: setattr(model, "dim", 3),
        "blocks.0": lambda: block(x),
        "blocks.0.forward": lambda: setattr(block, "forward", print),
        "blocks.0.class": lambda: setattr(block, "__class__", torch.nn.Identity),
        "blocks.0.hook": lambda: block.register_forward_hook(print),
        "blocks.1": lambda: comfy.utils.set_attr(patcher.model, "diffusion_model.blocks.1", torch.nn.Identity()),
        "blocks.0.self_attn.window": lambda: block.self_attn.window,
        "blocks.0.self_attn.q.weight": lambda: setattr(block.self_attn.q, "weight", torch.zeros(1)),
        "blocks": lambda: setattr(model, "blocks", [block]),
        "object patch": lambda: patcher.add_object_patch("diffusion_model.blocks.0.cross_attn.forward", print),
        "transformer": lambda: setattr(patcher.model, "diffusion_model", torch.nn.Identity()),
        "load_state_dict": lambda: model.load_state_dict(model.state_dict()),
        "pickle": lambda: pickle.dumps(model),
    }
    return {name: told(action) for name, action in actions.items()}


def probed(path: str) -> dict:
    """What works as it does on any module."""
    patcher = built(path)
    model = patcher.model.diffusion_model
    model.teacache_state = {"cached": None}
    copied = copy.deepcopy({"model": model})["model"]
    results = {
        "hasattr": [hasattr(model, "blocks"), hasattr(model, "double_blocks"), hasattr(model.blocks[0], "window")],
        "getattr": getattr(model, "double_blocks", "default"),
        "state": [hasattr(model, "teacache_state"), delattr(model, "teacache_state"), hasattr(model, "teacache_state")],
        "repr": repr(model),
        "dtype": str(next(model.parameters()).dtype),
        "count": sum(weight.numel() for weight in model.parameters()),
        "object": patcher.get_model_object("diffusion_model.blocks.1") is model.blocks[-1],
        "iterated": [block is model.blocks[i] for i, block in enumerate(model.blocks)],
        "copied": [copied is not model, copied.pool is model.pool],
        "copy": copy.copy(model).spec == model.spec,
        "moved": model.to("cpu").eval().requires_grad_(False) is model,
    }
    seen = []
    handle = model.register_forward_hook(lambda module, given, out: seen.append(tuple(out.shape)))
    inputs = torch.zeros(1, model.in_dim, 1, 8, 8), torch.zeros(1), torch.zeros(1, 512, 4096)
    model(*inputs)
    handle.remove()
    return {**results, "hooked": seen}


def compiled(path: str) -> dict:
    """What becomes of a transformer that nodes compile in different ways."""
    patcher = built(path)
    base, model = patcher.model, patcher.model.diffusion_model
    lines = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())
    logging.getLogger().addHandler(handler)
    options = {"backend": "eager", "fullgraph": True}
    inputs = torch.ones(1, model.in_dim, 1, 8, 8), torch.zeros(1), torch.zeros(1, 512, 4096)
    results = [torch.compile(model, backend="eager")(*inputs)]
    results.append(torch.compile(lambda *given: base.diffusion_model(*given), backend="eager")(*inputs))
    patcher.add_object_patch("diffusion_model", torch.compile(model, **options))
    for i, block in enumerate(model.blocks):
        patcher.add_object_patch(f"diffusion_model.blocks.{i}", torch.compile(block, **options))
    patcher.add_object_patch("diffusion_model.blocks.0.forward", torch.compile(model.blocks[0].forward, **options))
    held = comfy.utils.get_attr(base, "diffusion_model.blocks.0")
    comfy.utils.set_attr(base, "diffusion_model.blocks.0", torch.compile(held, **options))
    comfy.utils.set_attr(base, "diffusion_model.blocks.0", held)
    comfy.utils.set_attr(base, "diffusion_model", torch.compile(model, **options))
    results.append(base.diffusion_model(*inputs))
    model.compile(**options)
    results.append(base.diffusion_model(*inputs))
    return {
        "results": [bool((result == 0.5).all()) for result in results],
        "untouched": base.diffusion_model is model and model.blocks[0] is held and not patcher.object_patches,
        "lines": [line for line in lines if "torch.compile" in line],
    }


files = sys.argv[2:]
print(
    json.dumps(
        {
            "differences": {path.rpartition("/")[2].partition(".")[0]: differences(path) for path in files},
            "reached": reached(files[0]),
            "probed": probed(files[0]),
            "compiled": compiled(files[0]),
        }
    )
)
