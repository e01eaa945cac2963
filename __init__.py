"""WanParallel: runs the Wan 2.1/2.2 video transformer on several GPUs; the rest of the graph stays stock ComfyUI.

ComfyUI imports this folder under its own name; workers, scripts and tests import it as `wan_parallel` (see
bootstrap.py). Importing it costs nothing: no torch, no ComfyUI, no CUDA.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from comfy_api.latest import ComfyExtension

WEB_DIRECTORY = "./web"


async def comfy_entrypoint() -> ComfyExtension:
    """What ComfyUI calls to get the nodes."""
    from .nodes.extension import WanParallelExtension

    return WanParallelExtension()
