"""Bringing the workers to where a forward needs them: started, under the plan for it, with the model loaded."""

from __future__ import annotations

import functools
import logging
import time
from collections.abc import Callable
from dataclasses import replace

from ...wanvideo.base.config import WanConfig
from ...wanvideo.checkpoint.weight_source import model_config
from ..parallel.model_division import most_held
from ..plan.degrees import ParallelPlan
from ..plan.placement import PlacementError
from ..planner.planner import Planner, Workload
from ..protocol.reports import DeviceProfile
from ..protocol.requests import Probe, Reconfigure
from ..protocol.specs import ModelSpec, PoolSettings
from .failures import OutOfMemory
from .loaded_models import LoadedModels
from .rpc import Poll, WorkerClient

log = logging.getLogger(__name__)

MakeRoom = Callable[[int], object]
"""Called with the bytes that each GPU will need. It frees them elsewhere: in ComfyUI, or by ending other pools."""


class Preparation:
    """What is done for a forward before it runs. One thread at a time, as `WorkerClient`.

    Attributes:
        settings: of the pool, with the plan under which the workers run now.
    """

    def __init__(self, settings: PoolSettings, client: WorkerClient, models: LoadedModels):
        self.planner = Planner(settings)
        self.settings = replace(settings, plan=self.planner.first_plan)
        self._client, self._models = client, models

    def check(self, workload: Workload) -> None:
        """Check that forwards of this workload can be divided as was asked for. Starts nothing.

        Raises:
            CheckpointError, PlanError: they cannot.
        """
        self.planner.check(config_of(workload.spec), workload)

    def advance(self, workload: Workload, poll: Poll | None, made: set[int] | None) -> int | None:
        """Bring the workers to where forwards of this workload can run, or to where room on the GPUs is needed.

        Room is made by others, who must find nobody waiting for them: the caller does it in between, without its turn.

        Args:
            made: bytes for which room has been made on each GPU; None where nobody makes any.

        Returns:
            Bytes for which room must be made before this is called again; None where all is ready.
        """
        self._client.start(self.settings, poll)
        plan = self.planner.recall(workload, self.settings.plan)
        if plan is None:
            if (room := self._room_for(workload.spec, made)) is not None:  # before it is counted
                return room
            profiles, loaded = self.probe(poll), bool(self._models.specs)
            plan = self.planner.choose(config_of(workload.spec), workload, profiles, self.settings.plan, loaded)
        if plan != self.settings.plan:
            self._client.wait_for_abandoned(poll)
            self._reconfigure(plan, poll)
        room = self._room_for(workload.spec, made)
        if room is None:
            self._load(workload, poll)
        return room

    def probe(self, poll: Poll | None) -> tuple[DeviceProfile, ...]:
        """What the workers' devices do, measured the first time, and have room for, by rank."""
        self._client.wait_for_abandoned(poll)
        return self._client.ask(Probe, poll).outcomes

    def _room_for(self, spec: ModelSpec, made: set[int] | None) -> int | None:
        """Bytes that each GPU needs for what is to be loaded, or to come back from host memory; None where room for
        them has been made, or nothing is to come."""
        if made is None or self.settings.device != "cuda":
            return None
        if self._models.has(spec):
            room = self._models.coming_back(spec)
        else:
            room = most_held(config_of(spec), spec, self.settings.plan)
        return None if room in made else room

    def _reconfigure(self, plan: ParallelPlan, poll: Poll | None) -> None:
        """Change the plan, which takes a moment: `poll` may give that up where a worker shows no sign of life."""
        if not plan.holds_as(self.settings.plan):
            self._models.unload(self._models.specs, poll)

        def poll_in_silence() -> None:
            if poll is not None and self._client.silence.text:
                poll()

        try:
            self._client.ask(lambda number: Reconfigure(number, plan), poll_in_silence)
        except BaseException:  # ComfyUI's interrupt is no Exception
            self._client.close()  # the workers may be of two minds
            raise
        self.settings = replace(self.settings, plan=plan)

    def _load(self, workload: Workload, poll: Poll | None) -> None:
        spec = workload.spec
        if self._models.has(spec):
            return
        started = time.perf_counter()
        log.info("Loading %s on %d workers.", spec.name, self.settings.plan.num_gpus)
        self._models.unload_unused(poll)
        try:
            self._models.load(spec, workload.tokens, poll)
        except PlacementError as error:
            raise PlacementError(f"{error}{self._ways_out(workload, poll)}") from None
        log.info("%s is loaded after %.1f s.", spec.name, time.perf_counter() - started)

    def _ways_out(self, workload: Workload, poll: Poll | None) -> str:
        """Sizes that would fit, as a sentence; nothing where there are none, or no room to find out."""
        try:
            return self.planner.ways_out(config_of(workload.spec), workload, self.probe(poll))
        except OutOfMemory:
            return ""


@functools.lru_cache(maxsize=16)
def config_of(spec: ModelSpec) -> WanConfig:
    """The configuration of a model, read once for each spec: its `stamp` changes with the file."""
    return model_config(spec.path, spec.module, spec.stamp)
