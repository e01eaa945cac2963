"""The list of nodes that ComfyUI registers."""

from __future__ import annotations

from comfy_api.latest import ComfyExtension, io

from .config import XDitUSPConfig
from .distrifusion_loader import OfficialDistriFusionModelLoader
from .distrifusion_sampler import OfficialDistriFusionSampler
from .distrifusion_status import OfficialDistriFusionStatus
from .loader import XDitUSPWanVideoModelLoader
from .parallel_vae import WanVideoParallelVAEDecode, WanVideoParallelVAEEncode
from .status import XDitUSPStatus
from .tiny_text import TinyWanTextEncode
from .vace_select import XDitUSPVACEModuleSelect


class WanParallelExtension(ComfyExtension):
    """Config -> loader -> any stock node that takes a MODEL; the status node reads a MODEL of ours."""

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return [
            XDitUSPConfig,
            XDitUSPWanVideoModelLoader,
            XDitUSPStatus,
            OfficialDistriFusionModelLoader,
            OfficialDistriFusionSampler,
            OfficialDistriFusionStatus,
            TinyWanTextEncode,
            WanVideoParallelVAEDecode,
            WanVideoParallelVAEEncode,
            XDitUSPVACEModuleSelect,
        ]
