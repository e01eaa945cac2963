"""A strategy is found by its name, and decides about tokens, attention and memory; the worker knows none of them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from testkit import tiny, worker_group
from testkit.tiny import sentences
from wan_parallel.distributed.approximate.schedule import PatchSettings
from wan_parallel.distributed.approximate.strategies.displaced import DisplacedPatches
from wan_parallel.distributed.approximate.strategies.pipefusion import PipeFusion
from wan_parallel.distributed.client.pipefusion_runs import PipeFusionRuns
from wan_parallel.distributed.client.sampling_runs import SampledForward
from wan_parallel.distributed.parallel import strategy
from wan_parallel.distributed.parallel.exact import Exact, ExactStep
from wan_parallel.distributed.parallel.groups import ParallelGroups
from wan_parallel.distributed.parallel.strategy import Step, StepInputs, Strategies, Strategy, WorkItem
from wan_parallel.distributed.plan.degrees import ParallelPlan, PatchSplit, PlanError
from wan_parallel.distributed.protocol.reports import MemoryUse
from wan_parallel.distributed.protocol.requests import Displaced, Load, Unload
from wan_parallel.distributed.protocol.specs import ModelSpec, PoolSettings, on_one_host
from wan_parallel.distributed.shm.arena import Arena
from wan_parallel.distributed.shm.cancel import CancelBarrier, CancelMemory
from wan_parallel.distributed.worker.worker import Worker
from wan_parallel.wanvideo.base.grid import grid_of, unpatchify
from wan_parallel.wanvideo.model.model import WanModel

CPU = torch.device("cpu")


@pytest.fixture
def registered(monkeypatch) -> Iterator[None]:
    """Strategies that a test defines are forgotten behind it."""
    monkeypatch.setattr(strategy, "_registered", dict(strategy._registered))
    yield


@pytest.fixture
def alone() -> ParallelGroups:
    return ParallelGroups(0, PoolSettings(ParallelPlan(1), "cpu"), CPU)


def test_every_strategy_is_found_by_its_name_and_made_once(alone):
    known = Strategies(alone)
    made = {name: known.named(name) for name in ("exact", "displaced", "pipefusion")}
    assert list(map(type, made.values())) == [Exact, DisplacedPatches, PipeFusion]
    assert known.named("displaced") is made["displaced"]
    assert [one.keeps_texts for one in made.values()] == [True, False, True]
    assert known.nbytes == 0


def test_an_unknown_strategy_is_refused_with_the_names_of_those_that_there_are(alone):
    with pytest.raises(PlanError, match=r"called faster\. Use one of displaced, exact, pipefusion") as refusal:
        Strategies(alone).named("faster")
    assert sentences(str(refusal.value)) == 2


def test_a_class_without_a_name_is_a_base_for_others(registered, alone):
    class Base(Exact):
        pass

    class Named(Base, name="named"):
        pass

    assert isinstance(Strategies(alone).named("named"), Named)
    assert Base not in strategy._registered.values()


class Noted(Step):
    """An exact step that tells what is asked of it."""

    def __init__(self, owner: NotedStrategy, inputs: StepInputs):
        self.owner, self.exact = owner, ExactStep(owner.parallel, inputs)
        owner.notes.append("begin")

    @property
    def new_bytes(self) -> int:
        self.owner.notes.append("bytes")
        return 0

    def work(self, items: slice) -> list[WorkItem]:
        self.owner.notes.append(f"work {items.start}")
        (item,) = self.exact.work(items)
        return [WorkItem(items, item.part, item.tokens, item.attend, lambda: self.owner.notes.append("finish"))]


class NotedStrategy(Strategy):
    notes: list[str]

    def __init__(self, parallel: ParallelGroups):
        super().__init__(parallel)
        self.notes = []

    def begin(self, inputs: StepInputs) -> Step:
        return Noted(self, inputs)

    @property
    def nbytes(self) -> int:
        return 1000

    def trim(self) -> None:
        self.notes.append("trim")

    def close(self) -> None:
        self.notes.append("close")


def test_a_worker_runs_a_strategy_that_it_has_never_heard_of(registered, tmp_path):
    class _New(NotedStrategy, name="new"):
        pass

    path = tiny.write_checkpoint(tmp_path / "tiny.safetensors", tiny.TINY)
    spec, barrier = ModelSpec(path, "fp32", "fp32"), CancelMemory(1)
    given = tiny.inputs(size=(2, 6, 4), batch=2)
    part = Displaced("stale", "run", ("a", "b"), PatchSplit(), strategy="new")
    job = worker_group.Job(ParallelPlan(1), spec, given, part)
    arena = Arena(worker_group.room(job))
    forward = worker_group.request(2, job, arena)
    worker = Worker(0, job.settings, CancelBarrier(barrier.path), on_one_host(1))
    with torch.inference_mode():
        for request in (Load(1, spec), forward):
            worker_group.handle(worker, request)
        made = worker.runner.strategies.named("new")
        assert made.notes == ["begin", "bytes", "work 0", "work 1", "finish", "finish"]
        assert isinstance(worker.memory.last, MemoryUse) and worker.memory.last.cache >= 1000
        worker.trim()
        worker_group.handle(worker, Unload(3, (spec,)))
        assert made.notes[-2:] == ["trim", "close"]
        latent = unpatchify(arena.view(forward.out).clone(), grid_of(given.x), tuple(given.x.shape[-3:]))
        expected = WanModel.from_checkpoint(path)(*given)
    assert tiny.relative_error(latent, expected) <= 2e-6


def test_the_forward_of_the_worker_names_no_concrete_strategy():
    package = Path(strategy.__file__).parent.parent
    text = (package / "worker" / "forward.py").read_text()
    for name in ("displaced_", "pipefusion", "Stale", "Fill", "Stream", "xfuser", "PatchParallel", ".exact"):
        assert name not in text, name


def test_the_client_of_a_pool_that_streams_asks_for_that_strategy():
    settings = PoolSettings(ParallelPlan(2, pipeline_parallel=2), "cpu", pipeline_mode="pipefusion")
    pool = SimpleNamespace(settings=settings, launcher_pid=0)
    runs, sampled = PipeFusionRuns(tiny.TINY, ModelSpec("x", "fp32", "fp32"), pool), SampledForward(("a",), 20)
    with runs.step(torch.ones(1, 16, 3, 8, 8), torch.tensor([900.0]), sampled, "", lambda _nbytes: None) as asked:
        assert asked.strategy == PipeFusion.name
    assert PatchSettings().strategy == DisplacedPatches.name
