"""The plan of one pool over time: asks search.py once for each workload, and keeps to the answer."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import median

from ...wanvideo.attention.kernels import WITHOUT_LSE
from ...wanvideo.base.config import WanConfig
from ..parallel.model_division import check_plan, without_ring
from ..plan.degrees import ParallelPlan, PlanError
from ..protocol.machine import Machine
from ..protocol.reports import DeviceProfile
from ..protocol.specs import ModelSpec, PoolSettings
from .search import PlanRequest, Room, better, choose, nearest_text, possible, reason

log = logging.getLogger(__name__)
_SPEED_STEP = 5  # percent


@dataclass(frozen=True)
class Workload:
    """A kind of forward for which a plan is chosen.

    Args:
        tokens: of an item; 0 is 81 frames at 480p.
        items: batch items.
        sparse_cost: time of sparse self-attention, relative to dense attention (see `SparseSettings.cost`); None where
            self-attention is dense.
        kernel: the kernel of dense attention; "" is that of `spec`.
    """

    spec: ModelSpec
    tokens: int
    items: int
    sparse_cost: float | None = None
    kernel: str = ""

    @property
    def ringless(self) -> str:
        """What needs a plan without a ring, in words that begin a sentence; "" where nothing does."""
        if self.sparse_cost is not None:
            return "Sparse attention"
        name = self.kernel or self.spec.attention
        return f"The attention kernel {name}" if name in WITHOUT_LSE else ""


class Planner:
    """Chooses the plans of one pool, and remembers which plan was chosen for which kind of forward.

    Args:
        settings: of the pool. Its plan is what the user asked for.
    """

    def __init__(self, settings: PoolSettings):
        self.settings = settings
        self.reason = ""
        self._speeds_known = not settings.by_speed
        self._chosen: dict[Workload, ParallelPlan] = {}

    @property
    def first_plan(self) -> ParallelPlan:
        """A plan to start the workers with.

        Raises:
            PlanError: the sizes asked for do not share out the GPUs.
        """
        asked = self.settings.plan
        return asked.completions()[0] if self.settings.auto else asked

    def check(self, config: WanConfig, workload: Workload) -> None:
        """Check that the model can be run with the sizes that the user asked for, memory aside.

        Raises:
            PlanError: it cannot. The text says why, and which sizes are nearest.
        """
        if workload.sparse_cost is not None and self.settings.pipeline_mode == "pipefusion":
            raise PlanError(
                "PipeFusion keeps the keys of stale patches, which sparse attention cannot take. "
                "Set pipeline_mode to exact, or remove the sparse attention node."
            )
        if not self.settings.auto:
            check_plan(config, workload.spec, replace(self.settings, plan=self._as_set(config, workload)))
        else:
            possible(self._request(config, workload))

    def _as_set(self, config: WanConfig, workload: Workload) -> ParallelPlan:
        """The plan of a pool whose sizes are all set."""
        plan = self.settings.plan
        return without_ring(plan, config.num_heads, workload.ringless) if workload.ringless else plan

    def recall(self, config: WanConfig, workload: Workload, current: ParallelPlan) -> ParallelPlan | None:
        """The plan for forwards of this workload, if a plan was chosen before and changing to it moves no weights.

        So kinds of forwards that alternate, such as steps with more and with fewer items, have a plan each.
        """
        if not self._speeds_known:
            return None
        if not self.settings.auto:
            return self._as_set(config, workload)
        plan = self._chosen.get(workload)
        return plan if plan is not None and plan.holds_as(current) else None

    def choose(
        self,
        config: WanConfig,
        workload: Workload,
        profiles: Sequence[DeviceProfile],
        current: ParallelPlan,
        loaded: bool,
    ) -> ParallelPlan:
        """The plan for forwards of this workload.

        Args:
            profiles: by all workers.
            current: the plan under which they run now.
            loaded: whether they hold weights.

        Raises:
            PlanError, PlacementError: nothing that was asked for can run.
        """
        if not self._speeds_known:
            plan, self._speeds_known = replace(self.settings.plan, speeds=speeds_of(profiles)), True
            self.settings = replace(self.settings, plan=plan)
        if not self.settings.auto:
            return self._as_set(config, workload)
        request, machine = self._request(config, workload), slowest(profiles)
        choices = choose(request, machine, room_of(profiles))
        taken = better(choices, current, loaded)
        self._chosen[workload] = taken.plan
        self.reason = reason(choices, taken, request, machine, profiles[0].link)
        log.info("Plan: %s.", self.reason)
        return taken.plan

    def ways_out(self, config: WanConfig, workload: Workload, profiles: Sequence[DeviceProfile]) -> str:
        """The sizes nearest to those that were set and do not fit, as a sentence; nothing if there are none."""
        return nearest_text(self._request(config, workload), slowest(profiles), room_of(profiles))

    def _request(self, config: WanConfig, workload: Workload) -> PlanRequest:
        given = workload.spec, workload.tokens, workload.items, workload.sparse_cost, workload.ringless
        return PlanRequest(self.settings.plan, self.settings, config, *given)


def resolved(settings: PoolSettings) -> PoolSettings:
    """The settings with a `usp_backend` of "auto" replaced, and without choices that the backend leaves none.

    Raises:
        PlanError: the backend does not know the plan.
    """
    backend = "native" if settings.usp_backend == "auto" else settings.usp_backend
    if backend == "xfuser" and settings.plan.tensor_parallel * settings.plan.pipeline_parallel > 1:
        raise PlanError(
            "usp_backend is xfuser, which here knows sequence and data parallelism alone. "
            "Set usp_backend to native, or pipeline_parallel_size and tensor_parallel_size to 1."
        )
    exact = backend == "native" and settings.pipeline_mode == "exact"
    if settings.plan.speeds and not exact:
        raise PlanError(
            "GPUs can have unlike shares of a video in this pack's own exact attention alone. "
            "Set gpu_shares to even, or usp_backend to native and pipeline_mode to exact."
        )
    auto, by_speed = settings.auto and exact, settings.by_speed and exact  # cost.py knows about exact plans
    return replace(settings, usp_backend=backend, auto=auto, by_speed=by_speed)


def speeds_of(profiles: Sequence[DeviceProfile]) -> tuple[int, ...]:
    """How fast the workers' GPUs are, in percent of the fastest; empty where all are of one kind, or as fast.

    GPUs of one kind count as equally fast, whatever was measured. Speeds are rounded to steps of 5 %, so that the
    shares are the same after each start of the workers.
    """
    measured: dict[str, list[float]] = {}
    for worker in profiles:
        measured.setdefault(worker.device, []).append(worker.machine.products)
    rates = {kind: median(products) for kind, products in measured.items()}
    parts = (rates[worker.device] / max(rates.values()) for worker in profiles)
    speeds = tuple(max(_SPEED_STEP, _SPEED_STEP * round(100 * part / _SPEED_STEP)) for part in parts)
    return speeds if len(set(speeds)) > 1 else ()


def slowest(profiles: Sequence[DeviceProfile]) -> Machine:
    """The slowest rate of any worker, for each rate: all other workers wait for the slowest one."""
    machines = [worker.machine for worker in profiles]
    return Machine(
        products=min(machine.products for machine in machines),
        memory=min(machine.memory for machine in machines),
        link=min(machine.link for machine in machines),
        latency=max(machine.latency for machine in machines),
        host=min(machine.host for machine in machines),
    )


def room_of(profiles: Sequence[DeviceProfile]) -> Room:
    """Bytes that a model may take if all other models leave: on each worker's device, and in host memory."""
    host = min(worker.host_room for worker in profiles) + sum(worker.hosted for worker in profiles)
    return Room(tuple(worker.room for worker in profiles), host)
