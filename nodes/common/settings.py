"""The settings that the XDit+USP Config node hands to the loader, and their meaning to a pool. Imports no ComfyUI."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

import torch

from ...distributed.executors.local import check_num_gpus
from ...distributed.plan.degrees import ParallelPlan, PlanError
from ...distributed.protocol.specs import ModelSpec, PoolSettings

TORCH_KERNELS = ("sdpa", "sdpa_cudnn", "sdpa_flash")
FLASH_KERNELS = ("flash_attn_2", "flash_attn_3", "flash_attn_4")
WEIGHT_PRECISIONS = ("fp32", "bf16", "fp16", "fp8_e4m3fn", "fp8_e5m2")
DEVICES = ("auto", "cuda", "cpu")
PLANS = ("auto", "as_set")
SHARES = ("auto", "even")
ATTENTION_MODES = ("auto", *TORCH_KERNELS, *FLASH_KERNELS, "sageattn")


class SettingsError(ValueError):
    """Widget values contradict each other or this machine. The text says which widgets, and what to do."""


@dataclass(frozen=True)
class USPConfig:
    """The widgets of the XDit+USP Config node, under their names there (its tooltips say what each does)."""

    num_gpus: int = 2
    gpu_memory_fraction: float = 0.9
    pipeline_parallel_size: int = 1
    tensor_parallel_size: int = 1
    data_parallel_size: int = 1
    use_fp16: bool = True
    use_bf16: bool = False
    enable_activation_checkpointing: bool = True
    enable_gradient_checkpointing: bool = False
    max_batch_size: int = 1
    max_sequence_length: int = 8192
    overlap_p2p_comm: bool = True
    use_flash_attention: bool = True
    use_sdpa: bool = True
    ulysses_degree: int = 0
    ring_degree: int = 0
    device: str = "auto"
    usp_backend: str = "auto"
    pipeline_mode: str = "exact"
    shard_weights: str = "auto"
    offload: str = "auto"
    parallel_plan: str = PLANS[0]
    gpu_shares: str = SHARES[0]

    @property
    def plan(self) -> ParallelPlan:
        """The parallel degrees as the widgets have them."""
        return ParallelPlan(
            num_gpus=self.num_gpus,
            data_parallel=self.data_parallel_size,
            pipeline_parallel=self.pipeline_parallel_size,
            tensor_parallel=self.tensor_parallel_size,
            ulysses_degree=self.ulysses_degree,
            ring_degree=self.ring_degree,
            speeds=self.speeds,
        )

    @property
    def speeds(self) -> tuple[int, ...]:
        """The relative speeds of the GPUs, from gpu_shares; empty where it has no numbers, or all are the same.

        Raises:
            SettingsError: the number of shares is not the number of GPUs.
        """
        if self.gpu_shares.strip() in SHARES:
            return ()
        try:
            numbers = [float(word) for word in re.split(r"[\s,;:/%]+", self.gpu_shares.strip(" %"))]
        except ValueError:
            numbers = []
        if len(numbers) != self.num_gpus or not all(0 < number < math.inf for number in numbers):
            raise SettingsError(
                f'gpu_shares is "{self.gpu_shares}", and num_gpus is {self.num_gpus}. Write auto, even, or '
                f"{'1 number' if self.num_gpus == 1 else f'{self.num_gpus} numbers'} above 0, such as "
                f"{', '.join(['2', *['1'] * (self.num_gpus - 1)])}."
            )
        if not all(number.is_integer() for number in numbers):
            numbers = [max(1.0, round(1000 * number / max(numbers))) for number in numbers]
        speeds = tuple(int(number) // math.gcd(*map(int, numbers)) for number in numbers)
        return speeds if len(set(speeds)) > 1 else ()

    @property
    def chooses_sizes(self) -> bool:
        """Whether the planner chooses the sizes that are left at 1, and the degrees that are left at 0."""
        exact = self.pipeline_mode == "exact" or self.pipeline_parallel_size == 1
        return self.parallel_plan == "auto" and exact and self.usp_backend != "xfuser"

    @property
    def runs_on_cuda(self) -> bool:
        """Whether the workers will run on GPUs of this machine."""
        return self.device == "cuda" or (self.device == "auto" and torch.cuda.is_available())

    def validate(self) -> None:
        """Check all that can be checked of the widgets without a model.

        Raises:
            SettingsError: the widgets contradict each other, or ask for GPUs that are not there.
        """
        try:
            check_num_gpus(self.num_gpus)
            if self.chooses_sizes:
                self.plan.completions()
            else:
                self.plan.validate()
        except PlanError as error:
            raise SettingsError(str(error)) from None
        if self.use_fp16 and self.use_bf16:
            raise SettingsError(
                "use_fp16 and use_bf16 are both on, and the activations can have one precision. "
                "Switch one of them off; with both off they have the precision of the weights."
            )
        if self.usp_backend == "xfuser" and self.pipeline_parallel_size * self.tensor_parallel_size > 1:
            raise SettingsError(
                "usp_backend is xfuser, which here knows sequence and data parallelism alone. "
                "Set usp_backend to native, or pipeline_parallel_size and tensor_parallel_size to 1."
            )
        self._check_devices()

    def _check_devices(self) -> None:
        if self.device not in DEVICES:
            raise SettingsError(f"device is {self.device}, which is none. Choose {', '.join(DEVICES)}.")
        if not self.runs_on_cuda:
            return
        present = torch.cuda.device_count()
        if present == 0:
            raise SettingsError(
                "device is cuda, but torch finds no CUDA GPU. Check nvidia-smi and that torch is a CUDA "
                "build, or set device to cpu."
            )
        if self.num_gpus > present:
            raise SettingsError(
                f"num_gpus is {self.num_gpus}, but ComfyUI sees {_gpus(present)}. Set num_gpus to {present} "
                "or less, or check nvidia-smi, CUDA_VISIBLE_DEVICES and ComfyUI's --cuda-device."
            )

    def pool_settings(self) -> PoolSettings:
        """Return the settings of the pool of workers; equal settings share one pool."""
        return PoolSettings(
            plan=self.plan,
            device=self.device,
            memory_fraction=self.gpu_memory_fraction,
            usp_backend=self.usp_backend,
            overlap=self.overlap_p2p_comm,
            pipeline_mode=self.pipeline_mode if self.pipeline_parallel_size > 1 else "exact",
            auto=self.chooses_sizes,
            by_speed=self.gpu_shares.strip() == "auto" and self.runs_on_cuda and _unlike_gpus(self.num_gpus),
        )

    def model_spec(
        self,
        path: str,
        base_precision: str,
        attention_mode: str,
        fp8_mode: str = "disabled",
        module: str = "",
        stamp: str = "",
    ) -> ModelSpec:
        """Return how the workers load and run the checkpoint at `path`, with the file `module` beside it, if any.

        `stamp` is that of the checkpoint's header: workers refuse a file that has another one.

        In an fp8 mode `base_precision` is the precision of weights that this mode takes (see
        `wanvideo.model.fp8_mode.weights_for`).

        Raises:
            SettingsError: the attention switches leave no kernel, or exclude the named kernel.
        """
        self._check_attention(attention_mode)
        return ModelSpec(
            path=path,
            weight_dtype=base_precision,
            compute_dtype=self.compute_dtype(base_precision),
            attention=attention_mode,
            allow_flash=self.use_flash_attention,
            allow_sdpa=self.use_sdpa,
            slice_tokens=self.max_sequence_length if self.enable_activation_checkpointing else 0,
            max_batch=self.max_batch_size,
            stamp=stamp,
            shard_weights=self.shard_weights,
            offload=self.offload,
            fp8_mode=fp8_mode,
            module=module,
        )

    def compute_dtype(self, base_precision: str) -> str:
        """Return the precision of activations in matrix products: `fp16`, `bf16`, or the weights' (bf16 for fp8)."""
        if self.use_fp16:
            return "fp16"
        return "bf16" if self.use_bf16 or base_precision.startswith("fp8") else base_precision

    def _check_attention(self, mode: str) -> None:
        if mode in TORCH_KERNELS and not self.use_sdpa:
            raise SettingsError(
                f"attention_mode is {mode}, but use_sdpa is off in XDit+USP Config. "
                "Switch use_sdpa on, or choose another attention_mode."
            )
        if mode in FLASH_KERNELS and not self.use_flash_attention:
            raise SettingsError(
                f"attention_mode is {mode}, but use_flash_attention is off in XDit+USP Config. "
                "Switch use_flash_attention on, or choose another attention_mode."
            )
        if mode == "auto" and not (self.use_sdpa or self.use_flash_attention):
            raise SettingsError(
                "use_sdpa and use_flash_attention are both off, which leaves no attention kernel. "
                "Switch one of them on in XDit+USP Config, or set attention_mode to sageattn in the loader."
            )


def _unlike_gpus(count: int) -> bool:
    return len({torch.cuda.get_device_name(index) for index in range(count)}) > 1


def _gpus(count: int) -> str:
    return "1 GPU" if count == 1 else f"{count} GPUs"
