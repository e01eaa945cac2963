"""ComfyUI's own executor, memory manager and nodes without its web server, for graphs that come line by line.

    python3 benchmarks/benchlib/headless.py COMFYUI_DIR SETTINGS [options of ComfyUI's main.py]

Started by prompts.py. Reads one JSON object a line from stdin, {"id": ..., "graph": ...}, and answers each with one on
stdout. What ComfyUI prints goes to stderr. The executor has its classic cache, and a later ComfyUI has
the memory manager that it has without comfy-aimdo.
"""

from __future__ import annotations

import asyncio
import gc
import importlib
import inspect
import json
import logging
import os
import sys
import threading
import time
import types
from pathlib import Path
from typing import Any, TextIO

ROOT = Path(__file__).resolve().parents[2]
LOOK_SECONDS = 0.02


class Listener:
    """What ComfyUI's executor tells a server."""

    client_id = last_node_id = last_prompt_id = None

    def send_sync(self, *_message: object) -> None:
        """Nobody listens."""


class DeviceWatch(threading.Thread):
    """The most bytes of ComfyUI's GPU in use by anybody, looked at many times a second."""

    def __init__(self, device: Any):
        super().__init__(daemon=True)
        self._device, self._most, self._ended = device, 0, threading.Event()

    def run(self) -> None:
        import torch

        while not self._ended.wait(LOOK_SECONDS):
            free, total = torch.cuda.mem_get_info(self._device)
            self._most = max(self._most, total - free)

    def stop(self) -> int:
        self._ended.set()
        self.join()
        return self._most


class Headless:
    """A ComfyUI in this process with this pack.

    Args:
        comfyui: its folder, which becomes the working directory.
        settings: "models" (the folder of model folders), "text" (None, or what differs from UMT5-XXL's configuration).
        options: of main.py.
    """

    def __init__(self, comfyui: str, settings: dict, options: list[str]):
        os.chdir(comfyui)
        sys.path[0] = comfyui
        sys.argv = ["main.py", *options]
        import comfy.options

        comfy.options.enable_args_parsing()
        import comfy.cli_args

        logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="%(message)s")
        if not comfy.cli_args.args.cpu:
            importlib.import_module("cuda_malloc")  # chooses torch's allocator, before torch comes
        importlib.import_module("utils.extra_config")  # as main.py: later ComfyUI puts another `utils` on the path
        import comfy.model_management
        import comfy.sd
        import execution
        import folder_paths

        import nodes

        self.management, self.execution, self.nodes = comfy.model_management, execution, nodes
        for kind in ("diffusion_models", "text_encoders", "vae"):
            folder_paths.add_model_folder_path(kind, str(Path(settings["models"], kind)), is_default=True)
        if settings["text"]:
            _use_text_dims(comfy.sd, settings["text"])
        asyncio.run(self._load_nodes(comfyui))
        self.executor = _executor(execution)
        self.device = comfy.model_management.get_torch_device()

    async def _load_nodes(self, comfyui: str) -> None:
        for extra in ("hunyuan", "model_advanced"):  # empty videos and ModelSamplingSD3
            await self.nodes.load_custom_node(str(Path(comfyui, "comfy_extras", f"nodes_{extra}.py")))
        before = set(sys.modules)
        if not await self.nodes.load_custom_node(str(ROOT)):
            raise SystemExit("ComfyUI could not load the pack's nodes; its words are above.")
        self._pack = next(name for name in set(sys.modules) - before if name.endswith(".distributed.client.pool"))
        self.nodes.NODE_CLASS_MAPPINGS["FramesSeen"] = _frames_node()

    def run(self, prompt_id: str, graph: dict) -> dict:
        """Validate and execute a graph, and let go of what it left, as ComfyUI's main loop does."""
        import torch

        cuda = self.device.type == "cuda"
        if cuda:
            torch.cuda.reset_peak_memory_stats(self.device)
            watch = DeviceWatch(self.device)
            watch.start()
        seen.clear()
        started = time.perf_counter()
        error = self._execute(prompt_id, graph)
        answer = {"s": time.perf_counter() - started, "error": error, **seen, "workers": self._workers()}
        if cuda:
            answer["device_bytes"] = watch.stop()
            answer["device_total"] = torch.cuda.mem_get_info(self.device)[1]
            answer["gpu"] = torch.cuda.get_device_name(self.device)
            answer["peak_allocated"] = torch.cuda.max_memory_allocated(self.device)
            answer["peak_reserved"] = torch.cuda.max_memory_reserved(self.device)
        gc.collect()
        self.management.soft_empty_cache()
        return answer

    def _execute(self, prompt_id: str, graph: dict) -> str | None:
        valid, error, outputs, node_errors = asyncio.run(self.execution.validate_prompt(prompt_id, graph, None))
        if not valid:
            return f"{error} {node_errors}"
        self.executor.execute(graph, prompt_id, {}, outputs)
        for event, data in self.executor.status_messages:
            if event == "execution_error":
                return f"{data['node_type']}: {data['exception_message'].strip()}"
        return None if self.executor.success else "The prompt was interrupted."

    def _workers(self) -> list[dict]:
        pool = sys.modules[self._pack].running()
        return [
            {
                "pid": worker.pid,
                "launcher": pool.launcher_pid,
                "peak_allocated": worker.peak_allocated,
                "peak_reserved": worker.peak_reserved,
                "moved_in": sum(model.moved_in for model in worker.models),
                "moved_out": sum(model.moved_out for model in worker.models),
                "host_bytes": sum(model.host_bytes for model in worker.models),
                "placements": [model.placement for model in worker.models],
            }
            for worker in (pool.status().workers if pool else ())
        ]


def _executor(execution: types.ModuleType) -> Any:
    """With the classic cache, which keeps what a loader has made while graphs use it."""
    options = {"cache_type": execution.CacheType.CLASSIC}
    if "cache_args" in inspect.signature(execution.PromptExecutor).parameters:  # later ComfyUI
        options["cache_args"] = {"lru": 0, "ram": 0.0, "ram_inactive": 0.0}
    return execution.PromptExecutor(Listener(), **options)


seen: dict[str, object] = {}
"""Of the frames of the prompt that runs."""


def _frames_node() -> type:
    class FramesSeen:
        """The end of a graph: notes whether its frames are numbers."""

        RETURN_TYPES, FUNCTION, OUTPUT_NODE, CATEGORY = (), "look", True, "benchmarks"

        @classmethod
        def INPUT_TYPES(cls) -> dict:
            return {"required": {"images": ("IMAGE",)}}

        def look(self, images: Any) -> dict:
            seen.update(shape=list(images.shape), finite=bool(images.isfinite().all()))
            return {}

    return FramesSeen


def _use_text_dims(sd: types.ModuleType, dims: dict) -> None:
    """Let ComfyUI build a smaller text encoder than UMT5-XXL, for a run on a CPU."""
    load = sd.load_clip

    def load_clip(*files: Any, model_options: dict | None = None, **options: Any) -> Any:
        return load(*files, model_options={**(model_options or {}), "umt5xxl_model_config": dims}, **options)

    sd.load_clip = load_clip


def serve(headless: Headless, answers: TextIO) -> None:
    for line in sys.stdin:
        request = json.loads(line)
        answers.write(json.dumps(headless.run(request["id"], request["graph"])) + "\n")
        answers.flush()


def main() -> int:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # ComfyUI prints, too
    comfyui, settings, *options = sys.argv[1:]
    headless = Headless(comfyui, json.loads(settings), options)
    answers.write(json.dumps({"pid": os.getpid()}) + "\n")
    answers.flush()
    serve(headless, answers)
    return 0


if __name__ == "__main__":
    sys.exit(main())
