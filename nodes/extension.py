"""The list of nodes that ComfyUI registers."""

from __future__ import annotations

from comfy_api.latest import ComfyExtension, io

from .common.log_lines import name_the_pack
from .distrifusion.distrifusion_loader import OfficialDistriFusionModelLoader
from .distrifusion.distrifusion_sampler import OfficialDistriFusionSampler
from .distrifusion.distrifusion_status import OfficialDistriFusionStatus
from .example.tiny_text_node import TinyWanTextEncode
from .usp.config_node import XDitUSPConfig
from .usp.loader_node import XDitUSPWanVideoModelLoader
from .usp.parallel_vae import WanVideoParallelVAEDecode, WanVideoParallelVAEEncode
from .usp.sparse_node import XDitUSPSparseAttention
from .usp.status import XDitUSPStatus
from .usp.vace_select import XDitUSPVACEModuleSelect


class WanParallelExtension(ComfyExtension):
    """Config -> loader -> any stock node that takes a MODEL; the status node reads a MODEL of ours."""

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        """Return the nodes in the order in which ComfyUI registers them, and let the pack's log lines name the pack."""
        name_the_pack(__package__.rpartition(".")[0])
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
            XDitUSPSparseAttention,
        ]
