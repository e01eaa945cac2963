"""Two models on a device that holds one of them: one leaves before the other comes, and none lies among activations."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from testkit import tiny
from wan_parallel.distributed.plan.degrees import ParallelPlan
from wan_parallel.distributed.protocol.requests import Forward, Load
from wan_parallel.distributed.protocol.specs import ModelSpec, PoolSettings, on_one_host
from wan_parallel.distributed.shm.arena import Arena, needed
from wan_parallel.distributed.shm.cancel import CancelBarrier, CancelMemory
from wan_parallel.distributed.shm.host import HostShare
from wan_parallel.distributed.weights import device_memory
from wan_parallel.distributed.weights.block_store import BlockStore
from wan_parallel.distributed.weights.flat_block import components
from wan_parallel.distributed.weights.loaded import ModelMemory
from wan_parallel.distributed.worker.worker import Worker
from wan_parallel.wanvideo.base.config import WanConfig
from wan_parallel.wanvideo.base.grid import grid_of

CONFIG = WanConfig(dim=256, ffn_dim=512, num_heads=2, num_layers=6, text_dim=64)


class Device:
    """A device of `cap` bytes for blocks: what enters and leaves it, and when the allocator's cache is given back."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.cap, self.most = 0, 0
        self.held: dict[tuple[int, int], int] = {}
        self.events: list[str] = []
        monkeypatch.setattr(ModelMemory, "room", lambda _memory: self.cap - sum(self.held.values()))
        monkeypatch.setattr(device_memory, "release_cache", lambda _device: self.events.append("release"))
        for name in ("_load_block", "onload", "offload"):
            monkeypatch.setattr(BlockStore, name, self._watched(name, getattr(BlockStore, name)))

    def _watched(self, name, method):
        def watched(store, number, *rest):
            method(store, number, *rest)
            self.events.append(name)
            present = store.on_device
            for index, block in store.states.items():
                self.held[id(store), index] = block.size if index in present else 0
            self.most = max(self.most, sum(self.held.values()))

        return watched


@pytest.fixture
def device(monkeypatch) -> Device:
    return Device(monkeypatch)


@pytest.mark.parametrize("offload", ["off", "auto"])
def test_one_of_two_experts_leaves_before_the_other_comes(device, tmp_path, offload):
    high, low = (
        ModelSpec(tiny.write_checkpoint(tmp_path / f"{name}.safetensors", CONFIG), "fp32", "fp32", offload=offload)
        for name in ("high", "low")
    )
    low = replace(low, slice_tokens=64)
    memory = CancelMemory(1)
    worker = Worker(0, PoolSettings(ParallelPlan(1), device="cpu"), CancelBarrier(memory.path), on_one_host(1))
    given, requests = tiny.inputs(CONFIG), []

    def forward(spec: ModelSpec) -> torch.Tensor:
        arena = Arena(needed(given) + 2**20)
        refs = [arena.write(tensor) for tensor in given]
        out = arena.allocate(torch.float32, (1, grid_of(given.x).tokens, CONFIG.out_dim * 4))
        requests.append(spec)
        for request in (Load(len(requests), spec, 16), Forward(len(requests), spec, arena.ref, *refs, out)):
            reply = worker.handle(request)
            assert reply.failure is None, reply.failure
        return arena.view(out).clone()

    device.cap = 2**40
    expected = forward(high)
    demand = worker.models.loaded[high].demand
    device.cap = demand.whole + demand.activations + demand.block  # one of them, and a block of the other
    assert torch.equal(forward(low), expected)
    for _ in range(3):
        device.events.clear()
        device.most = 0
        assert torch.equal(forward(high), expected)
        first = device.events.index("onload")
        assert "offload" not in device.events[first:] and device.events[first - 1] == "release"
        assert device.most <= device.cap - demand.activations
        assert torch.equal(forward(low), expected)
    for model in worker.models.loaded.values():
        assert model.blocks.mover.moved_out == model.blocks.host_bytes > 0  # once
        assert model.blocks.mover.moved_in > model.blocks.mover.moved_out  # with each turn


def test_a_block_on_a_gpu_is_one_allocation():
    """On a meta device, which a block store treats like a GPU."""
    weights = {f"blocks.{i}.{name}": torch.zeros(shape) for i in (0, 1) for name, shape in (("w", (7, 5)), ("b", (7,)))}
    device, model = torch.device("meta"), {}
    read = lambda name: (weights[name], torch.bfloat16)  # noqa: E731
    numbered = {"number_of": tiny.TINY.block_number, "order": (0, 1)}
    store = BlockStore(weights, read, model.__setitem__, device, **numbered)

    def storages() -> list[set[int]]:
        blocks = [[model[f"blocks.{i}.{name}"] for name in ("w", "b")] for i in (0, 1)]
        return [{tensor.untyped_storage()._cdata for tensor in block} for block in blocks]

    store.load(2)
    assert [len(block) for block in storages()] == [1, 1] and storages()[0] != storages()[1]
    store.update(["blocks.1.b"], lambda _name: torch.ones(7, dtype=torch.bfloat16), HostShare(1))
    assert len(storages()[1]) == 1
    # another dtype, for which it is laid out anew
    store.update(["blocks.1.b"], lambda name: weights[name], HostShare(1))
    assert len(storages()[1]) == 1 and store.on_device == [0, 1]
    assert components(model["blocks.1.b"])[""].dtype == torch.float32
