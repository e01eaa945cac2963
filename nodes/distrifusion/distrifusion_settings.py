"""The settings of the DistriFusion loader, and their meaning to a pool and its patches. Imports no ComfyUI."""

from __future__ import annotations

from dataclasses import dataclass, replace

from ...distributed.approximate.schedule import PatchSettings
from ...distributed.plan.degrees import SPLIT_MODES, PatchSplit
from ...distributed.protocol.specs import ModelSpec, PoolSettings
from ..common.settings import SettingsError, USPConfig

PRECISIONS = ("fp16", "bf16", "fp32")
QUANTIZATIONS = ("disabled", "fp8_e4m3fn", "fp8_e5m2")
KV_BUFFERS = ("fp8", "as precision")


@dataclass(frozen=True)
class DistriFusionConfig:
    """The widgets of Official DistriFusion Model Loader behind the model, under their names there."""

    precision: str = "bf16"
    quantization: str = "disabled"
    num_gpus: int = 2
    patch_size: int = 64
    patch_overlap: int = 0
    split_mode: str = SPLIT_MODES[0]
    world_size: int = 0
    rank: int = 0
    attention_mode: str = "auto"
    warmup_steps: int = 4
    kv_buffers: str = KV_BUFFERS[0]
    split_cfg: bool = False
    manager: str = "auto"
    gpu_memory_fraction: float = 0.9
    device: str = "auto"

    @property
    def weight_dtype(self) -> str:
        """The precision or the 8-bit format of the weights."""
        return self.precision if self.quantization == "disabled" else self.quantization

    def validate(self) -> None:
        """Check all that can be checked of the widgets without a model.

        Raises:
            SettingsError: the widgets contradict each other or this machine.
        """
        if self.world_size not in (0, self.num_gpus):
            raise SettingsError(
                f"world_size is {self.world_size} and num_gpus {self.num_gpus}, but on one host they are the same, "
                f"and several hosts are not supported yet. Set world_size to {self.num_gpus}, or to 0 (automatic)."
            )
        if self.rank != 0:
            raise SettingsError(
                f"rank is {self.rank}, which is for several hosts, and they are not supported yet. "
                "Set rank to 0: the loader starts the processes of all GPUs of this host itself."
            )
        if self.split_cfg and self.num_gpus % 2:
            raise SettingsError(
                f"split_cfg gives each branch of cfg half of the GPUs, and num_gpus is {self.num_gpus}. "
                "Set num_gpus to an even number, or switch split_cfg off."
            )
        self._usp.validate()

    def pool_settings(self) -> PoolSettings:
        """Return the settings of the pool of workers; an XDit+USP Config with the same sizes gives the same pool."""
        return self._usp.pool_settings()

    def model_spec(self, path: str, stamp: str = "") -> ModelSpec:
        """Return how the workers load and run the checkpoint at `path`, whose header has this `stamp`: whole on each
        GPU, with nothing offloaded."""
        spec = self._usp.model_spec(path, self.weight_dtype, self.attention_mode, stamp=stamp)
        return replace(spec, compute_dtype=self.precision, shard_weights="off", offload="off")

    def patch_settings(self) -> PatchSettings:
        """Return how the frame is cut, and when patches may use keys and values that are one step old."""
        return PatchSettings(
            split=PatchSplit(self.split_mode, self.patch_size, self.patch_overlap),
            warmup_steps=self.warmup_steps,
            fp8_buffers=self.kv_buffers == "fp8",
            manager=self.manager,
        )

    @property
    def _usp(self) -> USPConfig:
        return USPConfig(
            num_gpus=self.num_gpus,
            gpu_memory_fraction=self.gpu_memory_fraction,
            data_parallel_size=2 if self.split_cfg else 1,
            use_fp16=self.precision == "fp16",
            use_bf16=self.precision == "bf16",
            device=self.device,
            parallel_plan="as_set",
            gpu_shares="even",
        )
