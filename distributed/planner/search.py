"""Which plan to run: of the plans that fit into memory, the one that is expected to be fastest.

Only the sizes of exact parallelism are chosen here, and never an approximate strategy.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from ...wanvideo.base.config import WanConfig
from ...wanvideo.checkpoint.weight_source import DTYPES, WEIGHT_DTYPES, storage_bytes_of
from ..parallel.model_division import check_plan, parts_of, sparse_bytes_on_rank, without_ring
from ..plan.degrees import ParallelPlan, PlanError
from ..plan.placement import (
    REFERENCE_TOKENS,
    SEGMENT,
    Demand,
    Placement,
    PlacementError,
    activation_bytes,
    choose_placement,
    demand_of,
    room_beside,
)
from ..protocol.machine import Machine
from ..protocol.specs import ModelSpec, PoolSettings
from .cost import Blocks, Expected, Work, expect

_ALIKE = 0.02
"""Plans whose expected times differ by a smaller share are taken for equally fast; the plan that divides the model into
fewer parts is then chosen."""
_CLEAR_GAIN = 0.1
"""The workers change to another plan if it takes less time than the present plan by this share of the present time."""
_FORWARDS_AHEAD = 40
"""A plan for which the weights must be read again has to save the time of reading within so many forwards (20
steps)."""
_READ_RATE, _READ_START = 2e9, 2.0
"""Bytes/s at which a worker reads its weights from the page cache, and the seconds that every load takes besides."""


@dataclass(frozen=True)
class Room:
    """Bytes that weights and activations may take: on each worker's device, and in host memory for all together."""

    devices: tuple[int, ...]
    host: int = 2**62


@dataclass(frozen=True)
class Choice:
    """A plan that fits, how long a forward takes under it, and where the weights then lie."""

    plan: ParallelPlan
    expected: Expected
    placement: Placement
    demand: Demand

    @property
    def seconds(self) -> float:
        """Expected seconds of a forward."""
        return self.expected.seconds


@dataclass(frozen=True)
class PlanRequest:
    """The plan that is wanted: for forwards of one kind, of one model, in a pool with these settings.

    Args:
        asked: sizes that the user has set. Sizes left at 1, and degrees left at 0, are free where `settings.auto` is
            on.
        settings: of the pool; `settings.plan` does not count.
        sparse_cost, ringless: as in `Workload`.
    """

    asked: ParallelPlan
    settings: PoolSettings
    config: WanConfig
    spec: ModelSpec
    tokens: int
    items: int
    sparse_cost: float | None = None
    ringless: str = ""

    @property
    def work(self) -> Work:
        """The forward whose time counts; a video of unknown length is taken for 81 frames at 480p."""
        return Work(
            self.tokens or REFERENCE_TOKENS,
            self.items,
            DTYPES[self.spec.compute_dtype].itemsize,
            self.spec.max_batch,
            self.settings.overlap,
            1.0 if self.sparse_cost is None else self.sparse_cost,
        )

    def free(self) -> PlanRequest:
        """The same request with all sizes free to be chosen."""
        return replace(self, asked=ParallelPlan(self.asked.num_gpus, speeds=self.asked.speeds))


def possible(request: PlanRequest) -> list[ParallelPlan]:
    """The plans by which the model can be divided, memory aside.

    Raises:
        PlanError: there is none. The text says why, and which sizes are nearest.
    """
    plans, refusals = [], []
    for plan in request.asked.completions() if request.settings.auto else [request.asked]:
        try:
            if request.ringless:
                plan = without_ring(plan, request.config.num_heads, request.ringless)
            check_plan(request.config, request.spec, replace(request.settings, plan=plan))
        except PlanError as error:
            refusals.append(error)
            continue
        plans.append(plan)
    if not plans:
        raise PlanError(f"{refusals[0]}{_naming_nearest(request, _possible_sizes(request))}")
    return plans


def choose(request: PlanRequest, machine: Machine, room: Room) -> list[Choice]:
    """The plans that fit, the one to run first.

    Raises:
        PlanError: the model cannot be divided like this.
        PlacementError: nothing fits. The text says what is missing, and which sizes are nearest.
    """
    choices, refusals = _fitting(request, possible(request), machine, room)
    if not choices:
        raise PlacementError(f"{refusals[0]}{nearest_text(request, machine, room)}")
    fastest = min(choice.seconds for choice in choices)
    alike = [choice for choice in choices if choice.seconds <= (1 + _ALIKE) * fastest]
    first = min(alike, key=lambda choice: (_divided(choice.plan), choice.seconds))
    return [first, *sorted((c for c in choices if c is not first), key=lambda choice: choice.seconds)]


def nearest_text(request: PlanRequest, machine: Machine, room: Room) -> str:
    """A sentence that names the fitting plan nearest to the sizes asked for; "" where no plan fits."""
    fitting, _ = _fitting(request, _possible_sizes(request), machine, room)
    return _naming_nearest(request, [choice.plan for choice in fitting])


def better(choices: Sequence[Choice], current: ParallelPlan, loaded: bool) -> Choice:
    """The first choice, or the plan that runs already while it fits and the gain is not clear.

    Args:
        loaded: whether workers hold weights under `current`.
    """
    first, running = choices[0], next((choice for choice in choices if choice.plan == current), None)
    if running is None or not loaded:
        return first
    gain = running.seconds - first.seconds
    if gain <= _CLEAR_GAIN * running.seconds:
        return running
    if current.holds_as(first.plan) and running.placement.share == first.placement.share:
        return first
    reading = _READ_START + first.demand.whole / _READ_RATE
    return first if gain * _FORWARDS_AHEAD > reading else running


def reason(choices: Sequence[Choice], taken: Choice, request: PlanRequest, machine: Machine, link: str) -> str:
    """Why this plan, in one line for the log and the status."""
    heads, work, expected = request.config.num_heads, request.work, taken.expected
    items = "1 item" if work.items == 1 else f"{work.items} items"
    parts = {"weights": expected.weights, "idle stages": expected.idle}
    parts = {"compute": expected.compute, "exchange": expected.exchange} | {k: s for k, s in parts.items() if s}
    others = [c for c in choices if c is not taken and c.plan.data_parallel <= max(work.items, 1)]
    beside = _compared(taken, others[0], heads) if others else ""
    links = f", {machine.link / 1e9:.3g} GB/s between workers ({link})" if taken.plan.num_gpus > 1 else ""
    return (
        f"{taken.plan.describe(heads)}, for {items} of {work.tokens} tokens: {taken.seconds:.3g} s expected "
        f"({', '.join(f'{name} {seconds:.3g}' for name, seconds in parts.items())}){beside}; "
        f"measured {machine.products / 1e12:.3g} TFLOP/s{links}"
    )


def _compared(taken: Choice, best: Choice, heads: int) -> str:
    """How the best of the other plans compares with the plan taken, in words."""
    other = f"{_short(best.plan, heads)} {best.seconds:.3g} s"
    if best.seconds >= (1 - _ALIKE) * taken.seconds:
        return f", next {other}"
    return f", though {other}: that does not make up for a change"


def placed(request: PlanRequest, plan: ParallelPlan, room: Room) -> tuple[Demand, Placement]:
    """The demand and the placement of the ranks that would have most bytes in host memory, or else most of the model.

    `Models.load` will place the weights in the same way.

    Raises:
        PlacementError: it does not fit.
    """
    spec, work = request.spec, request.work
    unit = SEGMENT if request.settings.device == "cuda" else 1
    parts, ways = parts_of(request.config, plan, _held_sizes(spec)), []
    for ranks in plan.replicas():
        own = [plan.tokens_of(rank, work.tokens) for rank in ranks]
        size = work.itemsize, spec.slice_tokens
        more = 0
        if request.sparse_cost is not None:
            more = spec.max_batch * sparse_bytes_on_rank(request.config, plan, work.tokens)
        activations = [activation_bytes(request.config, tokens, spec.max_batch, *size) + more for tokens in own]
        demand = demand_of(parts[plan.mesh.coords(ranks[0]).stage], request.config, max(activations), unit)
        there = room_beside([room.devices[rank] for rank in ranks], activations)
        on_host = room.host * len(ranks) // plan.num_gpus
        choices = spec.shard_weights, spec.offload
        ways.append((demand, choose_placement(demand, there, len(ranks), *choices, on_host, ranks)))
    return max(ways, key=lambda way: (way[0].blocks - way[1].resident, way[0].whole))


@functools.lru_cache(maxsize=16)
def _held_sizes(spec: ModelSpec) -> Mapping[str, int]:
    return storage_bytes_of(spec.path, WEIGHT_DTYPES[spec.weight_dtype], spec.module, in_dim=spec.in_dim)


def _fitting(
    request: PlanRequest, plans: Iterable[ParallelPlan], machine: Machine, room: Room
) -> tuple[list[Choice], list[PlacementError]]:
    choices, refusals = [], []
    for plan in plans:
        try:
            demand, placement = placed(request, plan, room)
        except PlacementError as error:
            refusals.append(error)
            continue
        blocks = Blocks(demand.usual_block, placement.share, demand.blocks - placement.resident)
        expected = expect(request.config, plan, request.work, machine, blocks)
        choices.append(Choice(plan, expected, placement, demand))
    return choices, refusals


def _possible_sizes(request: PlanRequest) -> list[ParallelPlan]:
    """The plans that run this model if the user sets no size; empty where no plan runs the model."""
    try:
        return possible(replace(request.free(), settings=replace(request.settings, auto=True)))
    except PlanError:
        return []


def _naming_nearest(request: PlanRequest, plans: Sequence[ParallelPlan]) -> str:
    asked = request.asked
    others = [plan for plan in plans if plan != asked]
    if asked == request.free().asked or not others:
        return ""
    nearest = min(others, key=lambda plan: _distance(asked, plan))
    names = ("data_parallel_size", "pipeline_parallel_size", "tensor_parallel_size")
    sizes = ", ".join(f"{name} {size}" for name, size in zip(names, _sizes(nearest), strict=True))
    return f" The nearest sizes that work are {sizes}."


def _distance(a: ParallelPlan, b: ParallelPlan) -> float:
    return sum(abs(math.log2(y / x)) for x, y in zip(_sizes(a), _sizes(b), strict=True))


def _sizes(plan: ParallelPlan) -> tuple[int, int, int]:
    return plan.data_parallel, plan.pipeline_parallel, plan.tensor_parallel


def _divided(plan: ParallelPlan) -> int:
    return math.prod(_sizes(plan))


def _short(plan: ParallelPlan, heads: int) -> str:
    return plan.describe(heads).split(": ")[1]
