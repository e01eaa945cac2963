"""XDit+USP Config: how many GPUs work on the model, how they share it, and in which precision."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from ...distributed.plan.placement import CHOICES
from ...distributed.protocol.specs import PIPELINE_MODES
from ..common import shared_inputs
from ..common.settings import PLANS, SHARES, USPConfig
from ..common.sockets import CATEGORY, XDITUSPCONFIG
from ..common.validation import check_widgets, checks_inputs


class XDitUSPConfig(io.ComfyNode):
    """Collects the settings of a pool of workers; starts nothing."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Describe the node to ComfyUI."""
        return io.Schema(
            node_id="XDitUSPConfig",
            display_name="XDit+USP Config",
            category=CATEGORY,
            description=(
                "How many GPUs work on one Wan video together, and how. Connect it to XDit+USP WanVideo "
                "Model Loader. With parallel_plan auto, sizes left at 1 are chosen for the model, the video and the "
                "GPUs; what the sizes leave over shares the token sequence of the video. All of it is exact (the "
                "result is that of one GPU within rounding), save pipeline_mode pipefusion."
            ),
            # Inputs that later versions have added stand at the end: saved workflows keep widget values by position.
            inputs=[
                *_workers(),
                *_degrees(),
                *_precision(),
                *_memory(),
                *_communication(),
                *_sequence_degrees(),
                *_device_and_backend(),
                *_pipeline_mode(),
                *_placement(),
                *_plan(),
                shared_inputs.gpus(),
            ],
            outputs=[
                XDITUSPCONFIG.Output(
                    display_name="xdit_usp_config",
                    tooltip="Settings for XDit+USP WanVideo Model Loader. Nothing runs yet.",
                )
            ],
        )

    @classmethod
    def validate_inputs(
        cls,
        num_gpus: int | None = 2,
        pipeline_parallel_size: int | None = 1,
        tensor_parallel_size: int | None = 1,
        data_parallel_size: int | None = 1,
        use_fp16: bool | None = True,
        use_bf16: bool | None = False,
        ulysses_degree: int | None = 0,
        ring_degree: int | None = 0,
        device: str | None = "auto",
        parallel_plan: str | None = PLANS[0],
        gpu_shares: str | None = SHARES[0],
        gpus: str | None = "",
    ) -> bool | str:
        """Check the inputs that can contradict another input or this machine, before anything runs.

        ComfyUI leaves out its own check (minimum, maximum, choice) of every input that is named here.
        """
        named = {
            "num_gpus": num_gpus,
            "pipeline_parallel_size": pipeline_parallel_size,
            "tensor_parallel_size": tensor_parallel_size,
            "data_parallel_size": data_parallel_size,
            "use_fp16": use_fp16,
            "use_bf16": use_bf16,
            "ulysses_degree": ulysses_degree,
            "ring_degree": ring_degree,
            "device": device,
            "parallel_plan": parallel_plan,
            "gpu_shares": gpu_shares,
            "gpus": gpus,
        }
        return check_widgets(cls.define_schema().inputs, USPConfig, named)

    @classmethod
    @checks_inputs
    def execute(cls, **widgets: Any) -> io.NodeOutput:
        """Return the settings, once they are checked."""
        config = USPConfig(**widgets)
        config.validate()
        return io.NodeOutput(config)


def _workers() -> list[io.Input]:
    return [
        shared_inputs.num_gpus(
            "GPUs that work on the model together, one worker process each. With device cpu: CPU processes."
        ),
        shared_inputs.gpu_memory_fraction(
            "Cap on the share of its GPU's memory that torch gives to each worker; beyond it the worker "
            "stops with an out-of-memory message. Lower it to keep room on the GPU for the text encoder "
            "and the VAE. No effect on the CPU."
        ),
    ]


def _degrees() -> list[io.Input]:
    return [
        io.Int.Input(
            "pipeline_parallel_size",
            default=1,
            min=1,
            max=4,
            tooltip=(
                "Stages: each has a part of the model's blocks, and so needs that part of the memory for weights. "
                "Exact: whole branches and batch items pass from stage to stage. Two branches (cfg above 1) keep 2 "
                "stages busy for 2/3 of the time; a single item saves memory, not time. Sizes multiply: "
                "pipeline x tensor x data must divide num_gpus."
            ),
        ),
        io.Int.Input(
            "tensor_parallel_size",
            default=1,
            min=1,
            max=4,
            tooltip=(
                "GPUs that share each matrix: each has some attention heads and feed-forward columns, and so needs "
                "that part of the memory for weights. Exact. It must divide the heads of the model (1.3B: 12, "
                "5B: 24, 14B: 40). It exchanges far more data than sharing the token sequence does: without NVLink "
                "it costs time, and is for GPUs that the weights do not fit into."
            ),
        ),
        io.Int.Input(
            "data_parallel_size",
            default=1,
            min=1,
            max=4,
            tooltip=(
                "Groups of GPUs that take different items: with cfg above 1 the conditional and the "
                "unconditional branch, and the items of a batch. 2 with cfg above 1 saves communication. It "
                "must divide num_gpus; the GPUs of a group share the token sequence. Where a step has fewer "
                "items than groups, all groups work on one item."
            ),
        ),
    ]


def _precision() -> list[io.Input]:
    return [
        io.Boolean.Input(
            "use_fp16",
            default=True,
            tooltip=(
                "Activations (matrix products and attention) in fp16, whatever precision the weights have. "
                "The residual stream and the modulation stay in fp32. With use_fp16 and use_bf16 both off "
                "the activations have the precision of the weights. Not together with use_bf16."
            ),
        ),
        io.Boolean.Input(
            "use_bf16",
            default=False,
            tooltip=(
                "Activations (matrix products and attention) in bf16, whatever precision the weights have. "
                "Fewer digits than fp16, no overflow. The same speed, but faster on Hopper GPUs with the fa3-fwd "
                "package, whose FlashAttention-3 takes bf16 alone. Not together with use_fp16."
            ),
        ),
    ]


def _memory() -> list[io.Input]:
    return [
        io.Boolean.Input(
            "enable_activation_checkpointing",
            default=True,
            tooltip=(
                "Bounds activation memory: feed-forward and cross-attention work through the tokens of a "
                "GPU in slices of max_sequence_length. The result is the same. Off: all tokens at once."
            ),
        ),
        io.Boolean.Input(
            "enable_gradient_checkpointing",
            default=False,
            tooltip="Does nothing: gradients exist in training only, and this pack does inference.",
        ),
        io.Int.Input(
            "max_batch_size",
            default=1,
            min=1,
            max=8,
            tooltip=(
                "How many batch items a group of GPUs puts through the model at once; more are done one "
                "after another. 1 needs the least memory and is as fast, as one video fills a GPU."
            ),
        ),
        io.Int.Input(
            "max_sequence_length",
            default=8192,
            min=512,
            max=8192,
            step=512,
            tooltip=(
                "Tokens of a slice (see enable_activation_checkpointing); no limit on the length of a video. "
                "The default was 2048 in older guides; slices that small make the matrix products slower."
            ),
        ),
    ]


def _communication() -> list[io.Input]:
    return [
        io.Boolean.Input(
            "overlap_p2p_comm",
            default=True,
            tooltip=(
                "What GPUs send each other travels while they compute: queries, keys and values of Ulysses by the "
                "copy engines, through host memory where there is no peer access; the next keys and values of a ring; "
                "with tensor_parallel_size above 1 the sums of one slice of tokens while the next one is computed. "
                "Same result. Off: it waits for them first, for comparison."
            ),
        ),
        io.Boolean.Input(
            "use_flash_attention",
            default=True,
            tooltip=(
                "Allows the FlashAttention 2, 3 and 4 kernels where they are installed. With attention_mode "
                "auto the loader takes the fastest exact kernel that is allowed."
            ),
        ),
        io.Boolean.Input(
            "use_sdpa",
            default=True,
            tooltip=(
                "Allows torch's own attention kernels, which are always there. With use_flash_attention and "
                "use_sdpa both off only sageattn is left, and the loader must name it."
            ),
        ),
    ]


def _sequence_degrees() -> list[io.Input]:
    return [
        io.Int.Input(
            "ulysses_degree",
            default=0,
            min=0,
            max=8,
            optional=True,
            tooltip=(
                "GPUs that exchange attention heads for tokens (Ulysses). 0: automatic, from the number of "
                "heads. ulysses_degree x ring_degree must be what the other sizes leave over: num_gpus / "
                "(data_parallel_size x pipeline_parallel_size x tensor_parallel_size)."
            ),
        ),
        io.Int.Input(
            "ring_degree",
            default=0,
            min=0,
            max=8,
            optional=True,
            tooltip="GPUs that pass keys and values round in a ring. 0: automatic.",
        ),
    ]


def _device_and_backend() -> list[io.Input]:
    return [
        shared_inputs.device(),
        io.Combo.Input(
            "usp_backend",
            options=["auto", "native", "xfuser"],
            default="auto",
            optional=True,
            tooltip=(
                "Who does the sequence-parallel attention on GPUs: this pack's own code (native), or xDiT's "
                "xfuser where it is installed. auto takes the faster of those that are exact; XDit+USP "
                "Status says which one runs. The CPU always uses native."
            ),
        ),
    ]


def _pipeline_mode() -> list[io.Input]:
    return [
        io.Combo.Input(
            "pipeline_mode",
            options=list(PIPELINE_MODES),
            default="exact",
            optional=True,
            tooltip=(
                "What passes through the stages of pipeline_parallel_size. exact: whole branches and batch items. "
                "pipefusion: parts of the video, which keeps all stages busy with a single item too, and is "
                "approximate: to some of the tokens the keys and values of others are one step old. The first 4 "
                "steps, and every tenth after them, are exact. It keeps keys and values of all tokens on the GPUs, "
                "which XDIT_USP_README.md has figures for."
            ),
        ),
    ]


def _placement() -> list[io.Input]:
    return [
        io.Combo.Input(
            "shard_weights",
            options=list(CHOICES),
            default="auto",
            optional=True,
            tooltip=(
                "Each GPU keeps an equal share of every block, and gathers the next block while the current one "
                "computes: less memory on each GPU, the same result, more traffic between them. auto: where the whole "
                "model does not fit on each GPU. XDit+USP Status says what was chosen and why."
            ),
        ),
        io.Combo.Input(
            "offload",
            options=list(CHOICES),
            default="auto",
            optional=True,
            tooltip=(
                "Blocks (or shares of them) lie in host memory and are copied to the GPU while the one before "
                "computes: the same result, slower over a slow bus. auto: as many as do not fit on the GPU. on: all "
                "of them, for the smallest use of GPU memory. off: none."
            ),
        ),
    ]


def _plan() -> list[io.Input]:
    return [
        io.Combo.Input(
            "parallel_plan",
            options=list(PLANS),
            default=PLANS[0],
            optional=True,
            tooltip=(
                "auto: sizes that are left at 1 (pipeline, tensor and data parallel) or 0 (Ulysses, ring) are chosen "
                "with the first sampling step, so that the model fits and a step is expected to take the least time on "
                "these GPUs and the links between them; a size that you set is kept. All of it is exact. The console "
                "and XDit+USP Status say what was chosen and why. as_set: the sizes as they stand here."
            ),
        ),
        io.String.Input(
            "gpu_shares",
            default=SHARES[0],
            optional=True,
            tooltip=(
                "How much of a video's tokens and attention heads each GPU takes. auto: the same, or where GPUs are of "
                "different kinds after their speed, which is measured when the workers start. even: the same. Or a "
                "number for each GPU, such as 2, 1 where the first one is twice as fast or the second one has other "
                "work too. The result is exact either way. Tensor and pipeline parallelism divide evenly."
            ),
        ),
    ]
