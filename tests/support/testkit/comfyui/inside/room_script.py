"""Run by ComfyUI's interpreter in its folder: how RemoteWan makes room on a GPU, with everything else played.

Prints one JSON object. Arguments: the pack's folder, a checkpoint.
"""

# ruff: noqa: E402  (ComfyUI reads its options when it is imported)

from __future__ import annotations

import json
import math
import sys
from contextlib import nullcontext
from types import SimpleNamespace

sys.path.insert(0, ".")
import comfy.options

comfy.options.enable_args_parsing(False)
from comfy.cli_args import args

args.cpu = True
import comfy.model_management as management
import torch
import utils.extra_config  # noqa: F401  (as main.py does: later ComfyUI puts another `utils` on the path)
from comfy_execution.utils import CurrentNodeContext


class PlayedPool:
    """A pool whose workers run out of memory as often as it is told."""

    def __init__(self, failures: int = 0, models: int = 1):
        self.failures, self.loaded, self.calls, self.alive = failures, models, [], True
        self.models = self  # what the workers have loaded
        self.locations = tuple(SimpleNamespace(device=index, is_here=True) for index in range(2))
        self.settings = SimpleNamespace(plan=SimpleNamespace(num_gpus=2), device="cpu", pipeline_mode="exact")
        self.now = self.whole = 0  # bytes on each worker

    def keep(self, spec):
        self.calls.append("keep")

    def drop(self, spec):
        self.calls.append("drop")

    def ensure_ready(self, spec, poll, make_room, tokens, items):
        make_room(1000)

    def forward(self, spec, x, *inputs, **options):
        if self.failures:
            self.failures -= 1
            raise OutOfMemory("cuda:0 ran out of memory. Use fewer frames.")
        return torch.zeros_like(x)

    def offload_others(self, spec, poll):
        self.calls.append("aside")
        return self.loaded - 1

    def held(self, spec, ranks):
        return self.now * len(ranks), self.whole * len(ranks)

    def offload(self, spec, ranks, nbytes, poll):
        self.calls.append(["out", list(ranks), nbytes])
        before, self.now = self.now, max(100, self.now - 100 * math.ceil(nbytes / 200))
        return (before - self.now) * len(ranks)

    def trim(self, poll):
        self.calls.append("trim")

    def unload(self, spec, poll):
        self.calls.append("unload")

    def close(self, poll=None):
        self.calls.append("close")
        self.alive = False


def load_pack(folder: str):
    from importlib import util

    spec = util.spec_from_file_location("pack_bootstrap", f"{folder}/bootstrap.py")
    bootstrap = util.module_from_spec(spec)
    spec.loader.exec_module(bootstrap)
    bootstrap.load_pack()


load_pack(sys.argv[1])
from wan_parallel.distributed.client.failures import OutOfMemory
from wan_parallel.distributed.protocol.specs import ModelSpec
from wan_parallel.nodes.model.remote_model import build_model
from wan_parallel.wanvideo.checkpoint.header import read_header


def run(pool: PlayedPool, evictable: bool) -> str:
    """One forward on a GPU that ComfyUI shares; "ok" or the class of the error."""
    freed.clear()
    model = build_model(read_header(sys.argv[2]), ModelSpec(sys.argv[2]), pool)
    management.load_models_gpu([model])
    ours.append(model)
    management.get_torch_device = lambda: torch.device("cuda", 0)

    def free_memory(nbytes, device, keep_loaded=()):
        freed.append([nbytes, str(device), len(keep_loaded)])
        return ["a text encoder"] if evictable else []

    management.free_memory, original = free_memory, management.free_memory
    try:
        model.remote(torch.zeros(1, 16, 1, 4, 4), torch.zeros(1), torch.zeros(1, 512, 4096))
    except OutOfMemory as error:
        return type(error).__name__
    finally:
        management.free_memory, management.get_torch_device = original, cpu
    return "ok"


cpu = management.get_torch_device
freed: list = []
ours: list = []  # keeps the MODELs alive, as ComfyUI's cache does
result = {}
first = PlayedPool()
result["first"] = [run(first, evictable=True), freed.copy(), first.calls.copy()]
second = PlayedPool()
result["second"] = [run(second, evictable=True), second.calls.copy(), first.calls.copy()]
retried = PlayedPool(failures=1, models=2)
result["retried"] = [run(retried, evictable=False), retried.calls.copy()]
hopeless = PlayedPool(failures=9)
result["hopeless"] = [run(hopeless, evictable=False), 9 - hopeless.failures]
management.unload_all_models()
result["freed"] = hopeless.calls.copy()
ours.clear()


def played_free_memory(device, torch_free_too=False):
    return (50, 0) if torch_free_too else 50


def asked_for(nbytes: float, in_a_node: bool) -> list:
    """What ComfyUI's own code does to our MODEL when it wants `nbytes` more than there are."""
    pool = PlayedPool()
    model = build_model(read_header(sys.argv[2]), ModelSpec(sys.argv[2]), pool)
    sizes = [model.model_size(), model.loaded_size()]
    management.load_models_gpu([model])
    pool.now = pool.whole = 1000
    sizes += [model.model_size(), model.loaded_size()]
    pool.calls.clear()
    free, management.get_free_memory = management.get_free_memory, played_free_memory
    try:
        with CurrentNodeContext("prompt", "node") if in_a_node else nullcontext():
            management.free_memory(nbytes + 50, cpu())
    finally:
        management.get_free_memory = free
    sizes += [model.model_size(), model.loaded_size()]
    still_there = any(loaded.model is model for loaded in management.current_loaded_models)
    model.cleanup()
    management.load_models_gpu([model])  # comes back without asking for anything
    return [sizes, pool.calls.copy(), still_there]


result["little"] = asked_for(300, in_a_node=True)
result["all"] = asked_for(9000, in_a_node=True)
result["unload"] = asked_for(1e30, in_a_node=False)
print(json.dumps(result))
