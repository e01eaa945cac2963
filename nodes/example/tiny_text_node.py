"""Tiny Wan Text Encode: a prompt for the small Wan model that ships with this pack."""

from __future__ import annotations

from comfy_api.latest import io

from ...wanvideo.base.user_error import InputError
from ...wanvideo.example.tiny_text import EXAMPLE, VOCABULARY, encode, tokenize
from ..common.input_values import checked_values
from ..common.sockets import CATEGORY
from ..common.validation import checks_inputs


class TinyWanTextEncode(io.ComfyNode):
    """A fixed mapping from a few words to vectors; no text encoder is loaded."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Describe the node to ComfyUI."""
        return io.Schema(
            node_id="TinyWanTextEncode",
            display_name="Tiny Wan Text Encode",
            category=f"{CATEGORY}/examples",
            description=(
                "Turns a prompt into conditioning for tiny_wan_t2v.safetensors, the small model of the example. It "
                "is a fixed mapping from a few words to vectors, not a text encoder: no file is loaded, and "
                "no other Wan model understands the result."
            ),
            inputs=[
                io.String.Input(
                    "prompt",
                    multiline=True,
                    default=EXAMPLE,
                    tooltip=(
                        f"A sentence such as '{EXAMPLE}', or nothing for the negative prompt. "
                        f"The words known: {', '.join(VOCABULARY)}."
                    ),
                )
            ],
            outputs=[io.Conditioning.Output(tooltip="512 vectors of 4096 numbers, for the tiny Wan model alone.")],
        )

    @classmethod
    def validate_inputs(cls, prompt: str | None = None) -> bool | str:
        """Check that all words of the prompt are known; returns True, or words about what is wrong."""
        if prompt is None:  # linked: known in execute only
            return True
        try:
            tokenize(checked_values(cls.define_schema().inputs, {"prompt": prompt})["prompt"])
        except InputError as error:
            return str(error)
        return True

    @classmethod
    @checks_inputs
    def execute(cls, prompt: str) -> io.NodeOutput:
        """Return the conditioning of a prompt."""
        return io.NodeOutput([[encode(prompt).unsqueeze(0), {}]])
