"""One rank's models in the process of the test."""

from __future__ import annotations

import torch
from wan_parallel.distributed.parallel.pipeline import Stage
from wan_parallel.distributed.parallel.tensor import TensorShard
from wan_parallel.distributed.plan.degrees import ParallelPlan
from wan_parallel.distributed.protocol.refs import LoraRef
from wan_parallel.distributed.protocol.requests import ApplyLora
from wan_parallel.distributed.protocol.specs import ModelSpec, PoolSettings
from wan_parallel.distributed.shm.arena import Arena, ArenaReader, needed
from wan_parallel.distributed.weights.flat_block import components
from wan_parallel.distributed.weights.models import Models

from testkit import tiny


class Rank:
    """One worker's models in this process, and what it has read of the file since the load."""

    def __init__(self, spec: ModelSpec):
        self.spec = spec
        settings = PoolSettings(ParallelPlan(1), "cpu")
        self.models = Models(0, settings, torch.device("cpu"), TensorShard(), Stage(0, (0,)))
        self.models.load(spec, 64, lambda heads: None)
        self.read: list[str] = []
        source, tensor = self.loaded.source, self.loaded.source.tensor
        source.tensor = lambda name: (self.read.append(name), tensor(name))[1]

    @property
    def loaded(self):
        return self.models.loaded[self.spec]

    def lora(self, uuid: str, seed: int, names: list[str]) -> set[str]:
        """Merge a LoRA on these weights alone; the weights of blocks that it has read for that."""
        self.read.clear()
        shapes, generator = tiny.TINY.shapes(), torch.Generator().manual_seed(seed)
        changes = {name: torch.randn(shapes[name], generator=generator) * 0.1 for name in names}
        arena = Arena(needed(changes.values()))
        refs = {name: (LoraRef("Difference", (arena.write(t),), 1.0),) for name, t in changes.items()}
        self.models.apply_lora(ApplyLora(1, self.spec, uuid, arena.ref, refs), ArenaReader())
        arena.close()
        return {name for name in self.read if name.startswith("blocks.")}

    def weights(self) -> dict[str, torch.Tensor]:
        return {
            f"{name}/{key}": tensor.view(torch.uint8).clone() if tensor.is_floating_point() else tensor.clone()
            for name, weight in self.loaded.model.weights()
            for key, tensor in components(weight.data if isinstance(weight, torch.nn.Parameter) else weight).items()
        }
