"""XDit+USP Sparse Attention: self-attention to a part of the keys, in the workers of a MODEL. Lossy."""

from __future__ import annotations

from comfy_api.latest import io

from ...wanvideo.base.attention_choice import AttentionChoice, SparseError, SparseSettings, blocks_in
from ...wanvideo.base.user_error import InputError
from ..common.input_values import checked_values
from ..common.sockets import CATEGORY
from ..common.validation import checks_inputs
from ..model.attention_override import SPARSE, SparseWindow, refuse_attention
from ..model.model_patcher import RemoteModelPatcher

THRESHOLD, SHARE = METHODS = ("sol-attn", "sla")


class XDitUSPSparseAttention(io.ComfyNode):
    """Leaves settings in a MODEL, which travel to the workers with each sampling step."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Describe the node to ComfyUI."""
        return io.Schema(
            node_id="XDitUSPSparseAttention",
            display_name="XDit+USP Sparse Attention",
            category=CATEGORY,
            description=(
                "Lossy, and faster the longer the video is: self-attention computes the most important blocks of keys "
                "exactly and all others by their averages. It runs on any number of GPUs, with the same picture, and "
                "changing it loads nothing anew. Needs comfy-kitchen 0.2.33 or newer and GPUs of sm_80 or newer. Has "
                "the settings of ComfyUI's own Model Sparse Attention, which works too. XDit+USP Status says what ran."
            ),
            inputs=[io.Model.Input("model", tooltip="From XDit+USP WanVideo Model Loader."), *_amounts(), *_places()],
            outputs=[io.Model.Output(display_name="model", tooltip="The same model with sparse attention.")],
        )

    @classmethod
    def validate_inputs(cls, dense_blocks: str | None = None) -> bool | str:
        """Check the list of blocks, before anything runs."""
        if dense_blocks is None:
            return True
        try:
            checked_values(cls.define_schema().inputs, {"dense_blocks": dense_blocks})
            blocks_in(dense_blocks)
        except (InputError, SparseError) as error:
            return str(error)
        return True

    @classmethod
    @checks_inputs
    def execute(
        cls,
        model: object,
        method: str = THRESHOLD,
        tau: float = 1.3,
        keep_percent: float = 10.0,
        start_percent: float = 0.2,
        end_percent: float = 1.0,
        dense_blocks: str = "",
        min_tokens: int = 12288,
        extra_tokens: int = 256,
    ) -> io.NodeOutput:
        """Return the MODEL with the settings.

        Raises:
            InputError: the MODEL is from another loader, or the percents leave no step.
            NotOnWorkers: the MODEL takes approximate forwards.
            SparseError: a setting is out of its range, or names blocks that the model lacks.
        """
        if not isinstance(model, RemoteModelPatcher):
            raise InputError(
                "This MODEL does not run in workers, where this node's sparse attention is computed. "
                "Connect XDit+USP WanVideo Model Loader, or use ComfyUI's Model Sparse Attention."
            )
        if not 0 <= start_percent <= end_percent <= 1:
            raise InputError(
                f"start_percent is {start_percent:g} and end_percent {end_percent:g}, and no step lies between. "
                "Use a start_percent below the end_percent, both from 0 to 1."
            )
        settings = SparseSettings(
            tau=tau,
            keep=_share(keep_percent) if method == SHARE else 0.0,
            extra_tokens=extra_tokens,
            dense_blocks=blocks_in(dense_blocks),
            min_tokens=min_tokens,
        )
        settings.validate(model.remote.header.config.num_layers)
        refuse_attention(AttentionChoice(settings), model.remote.spec, exact=model.remote.runs is None)
        patched = model.clone()
        patched.model_options["transformer_options"][SPARSE] = SparseWindow(settings, start_percent, end_percent)
        return io.NodeOutput(patched)


def _share(keep_percent: float) -> float:
    """The share that is kept, from 0 to 1.

    Raises:
        SparseError: nothing would be kept, or everything.
    """
    if not 0 < keep_percent < 100:
        raise SparseError(
            f"keep_percent is {keep_percent:g}, which leaves nothing to be sparse about. Use 0.5 to 95, or leave this "
            "node out for dense attention."
        )
    return keep_percent / 100


def _amounts() -> list[io.Input]:
    """How much of attention is exact."""
    return [
        io.Combo.Input(
            "method",
            options=list(METHODS),
            default=THRESHOLD,
            tooltip=(
                "How key blocks are chosen. sol-attn: by a threshold, in each head and block of queries as many as "
                "score high; needs no training. sla: a fixed share of them, as LoRAs for sparse-linear attention are "
                "trained with; its time does not depend on the video."
            ),
        ),
        io.Float.Input(
            "tau",
            default=1.3,
            min=0.0,
            max=4.0,
            step=0.05,
            tooltip=(
                "For sol-attn: how many standard deviations above the mean a block must score. Higher is faster and "
                "further from dense attention: 1.0 keeps about 16 % of the blocks, 1.5 about 7 %, 2.0 about 2 %."
            ),
        ),
        io.Float.Input(
            "keep_percent",
            default=10.0,
            min=0.5,
            max=95.0,
            step=0.5,
            tooltip=(
                "For sla: the percentage of the key blocks that each block of queries attends to exactly, its "
                "neighbours not counted. Higher is closer to dense attention. On Hopper 45 and more is slower than it."
            ),
        ),
    ]


def _places() -> list[io.Input]:
    """Where attention is sparse."""
    return [
        io.Float.Input(
            "start_percent",
            default=0.2,
            min=0.0,
            max=1.0,
            step=0.01,
            tooltip="From which part of the steps on attention is sparse; steps before it are dense.",
        ),
        io.Float.Input(
            "end_percent",
            default=1.0,
            min=0.0,
            max=1.0,
            step=0.01,
            tooltip="Up to which part of the steps attention is sparse; steps behind it are dense.",
        ),
        io.String.Input(
            "dense_blocks", default="", tooltip="Transformer blocks that are always dense, such as 0, 1, 38-39."
        ),
        io.Int.Input(
            "min_tokens",
            default=12288,
            min=0,
            max=1 << 20,
            step=512,
            tooltip="Videos of fewer tokens stay dense. 81 frames of 480p have 32,760, of 720p 75,600.",
        ),
        io.Int.Input(
            "extra_tokens",
            default=256,
            min=0,
            max=256,
            step=64,
            tooltip=(
                "So many single tokens of other blocks, those that score highest, are attended to exactly too. Closer "
                "to dense attention and a little slower; 0 is none."
            ),
        ),
    ]
