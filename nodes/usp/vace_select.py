"""XDit+USP VACE Module Select: the file of a VACE module, for the `vace_model` input of the loader.

The value has the form that kijai's select nodes give to a VACEPATH, so that these plug into our loader as well.
"""

from __future__ import annotations

from collections.abc import Mapping

from comfy_api.latest import io

from ...wanvideo.checkpoint.vace_module import read_module
from ..common import shared_inputs
from ..common.model_files import listed_model, model_path
from ..common.sockets import CATEGORY
from ..common.validation import check_file, file_fingerprint

VACEPATH = io.Custom("VACEPATH")


class XDitUSPVACEModuleSelect(io.ComfyNode):
    """Names a file; the loader reads it."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Describe the node to ComfyUI."""
        return io.Schema(
            node_id="XDitUSPVACEModuleSelect",
            display_name="XDit+USP VACE Module Select",
            category=CATEGORY,
            description=(
                "A VACE module (the VACE blocks alone, such as Wan2_1-VACE_module_14B_bf16.safetensors), which makes a "
                "VACE model of the text-to-video model in XDit+USP WanVideo Model Loader."
            ),
            inputs=[
                shared_inputs.model_file(
                    "vace_model",
                    "A VACE module from models/diffusion_models or models/unet, of the size of its model (14B or "
                    "1.3B). Each of the two files may be in any format.",
                )
            ],
            outputs=[VACEPATH.Output(display_name="vace_model", tooltip="Plugs into vace_model of the loader.")],
        )

    @classmethod
    async def validate_inputs(cls, vace_model: str | None = None) -> bool | str:
        """Check that the file can be read, before anything runs."""
        return await check_file(read_module, vace_model)

    @classmethod
    def fingerprint_inputs(cls, vace_model: str | None = None) -> str:
        """Return another value for another file, even under the same name."""
        return file_fingerprint(vace_model)

    @classmethod
    def execute(cls, vace_model: str) -> io.NodeOutput:
        """Return the path of the file."""
        return io.NodeOutput([{"path": model_path(vace_model)}])


def module_path(vace_model: object) -> str:
    """Return the file that a VACEPATH (a mapping with `path`, or a list of one such mapping) names; "" for no VACEPATH.

    Raises:
        ValueError: the VACEPATH names several files, or none.
        CheckpointError: the file is not one of ComfyUI's models.
    """
    if vace_model is None or vace_model == []:
        return ""
    entries = vace_model if isinstance(vace_model, list) else [vace_model]
    paths = [entry.get("path") for entry in entries if isinstance(entry, Mapping)]
    if len(paths) == 1 and isinstance(paths[0], str):
        return listed_model(paths[0])
    raise ValueError(
        "vace_model does not name one VACE module. Connect XDit+USP VACE Module Select to it, or a node like it."
    )
