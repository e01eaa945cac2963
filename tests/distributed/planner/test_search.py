"""Which plan is chosen for a model, a video and a machine, and what is refused."""

from __future__ import annotations

from dataclasses import replace

import pytest
import testkit  # noqa: F401 (registers wan_parallel)
from testkit import tiny
from wan_parallel.distributed.plan.degrees import ParallelPlan, PlanError
from wan_parallel.distributed.plan.placement import Demand, PlacementError, needed_bytes
from wan_parallel.distributed.planner.search import Choice, PlanRequest, Room, better, choose, placed, reason
from wan_parallel.distributed.protocol.machine import Machine
from wan_parallel.distributed.protocol.specs import ModelSpec, PoolSettings
from wan_parallel.wanvideo.base.config import PRESETS
from wan_parallel.wanvideo.variants.vace import Vace

GIB = 2**30
P480, P720 = 21 * 30 * 52, 21 * 45 * 80
NVLINK, HOST_LINK = Machine(), Machine(link=40e9)
PCIE_CARDS = Machine(products=60e12, memory=0.8e12, link=8e9, host=12e9)


def plan_request(
    asked: ParallelPlan, items: int = 2, size: str = "14b", tokens: int = P480, auto: bool = True, **spec: str
) -> PlanRequest:
    settings = PoolSettings(asked, auto=auto)
    model = ModelSpec(f"random:{size}", slice_tokens=8192, **spec)
    return PlanRequest(asked, settings, PRESETS[size], model, tokens, items)


def room(gib: float, gpus: int) -> Room:
    return Room((int(gib * GIB),) * gpus)


def chosen(asked: ParallelPlan, gib: float = 120, machine: Machine = NVLINK, **options) -> Choice:
    return choose(plan_request(asked, **options), machine, room(gib, asked.num_gpus))[0]


def sizes(choice: Choice) -> tuple[int, int, int]:
    plan = choice.plan
    return plan.data_parallel, plan.pipeline_parallel, plan.tensor_parallel


@pytest.mark.parametrize("machine", [NVLINK, HOST_LINK, PCIE_CARDS], ids=["NVLink", "host", "PCIe cards"])
def test_cfg_goes_to_two_halves_of_the_gpus(machine):
    for gpus in (2, 4) if machine is PCIE_CARDS else (2, 4, 8):  # on 8 of those either way takes as long
        assert sizes(chosen(ParallelPlan(gpus), machine=machine)) == (2, 1, 1)


@pytest.mark.parametrize("machine", [NVLINK, HOST_LINK, PCIE_CARDS], ids=["NVLink", "host", "PCIe cards"])
def test_a_single_item_is_shared_by_all(machine):
    for gpus in (1, 2, 3, 4, 5, 8):
        choice = chosen(ParallelPlan(gpus), machine=machine, items=1)
        assert sizes(choice) == (1, 1, 1) and choice.plan.sequence_degrees(40).ring == 1


def test_an_uneven_number_of_items_or_gpus_is_shared_by_all():
    assert sizes(chosen(ParallelPlan(4), items=3)) == (1, 1, 1)
    assert sizes(chosen(ParallelPlan(3), items=2)) == (1, 1, 1)


def test_data_parallel_is_not_chosen_where_its_activations_push_weights_out_at_a_cost():
    slow_bus = replace(NVLINK, host=0.5e9)
    assert sizes(chosen(ParallelPlan(4), 11, slow_bus)) == (1, 1, 1)
    assert chosen(ParallelPlan(4), 11, slow_bus).placement.resident == 40


@pytest.mark.parametrize("cap", [48, 24, 12])
def test_smaller_cards_share_weights_or_keep_them_in_host_memory(cap):
    choice = chosen(ParallelPlan(4), 0.95 * cap, PCIE_CARDS)
    whole = choice.placement.share == 1 and choice.placement.resident == 40
    assert whole == (cap == 48)
    assert chosen(ParallelPlan(1), 0.95 * 12, PCIE_CARDS).placement.resident < 40


def test_weights_are_divided_where_they_may_neither_be_shared_nor_lie_in_host_memory():
    alone = {"shard_weights": "off", "offload": "off"}
    assert sizes(chosen(ParallelPlan(4), 24, **alone))[2] == 2
    assert sizes(chosen(ParallelPlan(4), 23, PCIE_CARDS, **alone))[1:] != (1, 1)
    with pytest.raises(PlacementError, match="use fewer frames"):
        chosen(ParallelPlan(4), 6, **alone)


@pytest.mark.parametrize("gpus, cap_14b, cap_1_3b", [(1, 48, 8), (2, 24, 4), (4, 12, 2), (8, 6, 1)])
def test_81_frames_at_480p_have_a_plan_on_cards_that_shrink_with_their_number(gpus, cap_14b, cap_1_3b):
    for size, cap in (("14b", cap_14b), ("1.3b", cap_1_3b)):
        for machine in (NVLINK, HOST_LINK, PCIE_CARDS):
            choice = chosen(ParallelPlan(gpus), cap, machine, size=size)
            needed = needed_bytes(choice.demand, choice.placement.share, choice.placement.resident)
            assert needed <= cap * GIB


@pytest.mark.parametrize(
    "asked, kept",
    [
        ({"tensor_parallel": 2}, (None, None, 2)),
        ({"pipeline_parallel": 4}, (1, 4, 1)),
        ({"pipeline_parallel": 2, "tensor_parallel": 2}, (1, 2, 2)),
        ({"data_parallel": 4}, (4, 1, 1)),
        ({"ulysses_degree": 4}, (1, 1, 1)),
        ({"ulysses_degree": 2, "ring_degree": 1}, (2, 1, 1)),
    ],
    ids=str,
)
def test_what_the_user_has_set_is_kept_and_the_rest_chosen(asked, kept):
    choice = chosen(ParallelPlan(4, **asked))
    assert all(want in (None, got) for want, got in zip(kept, sizes(choice), strict=True)), choice.plan
    assert all(getattr(choice.plan, name) == value for name, value in asked.items())


def test_without_auto_the_sizes_are_those_that_stand_there():
    assert sizes(chosen(ParallelPlan(4), auto=False)) == (1, 1, 1)
    assert sizes(chosen(ParallelPlan(4, data_parallel=2), auto=False, items=1)) == (2, 1, 1)


@pytest.mark.parametrize("auto", [True, False])
@pytest.mark.parametrize(
    "asked, why, nearest",
    [
        (ParallelPlan(8, tensor_parallel=8), "does not divide the 12 heads", "tensor_parallel_size 4"),
        (ParallelPlan(8, ulysses_degree=8, tensor_parallel=1, ring_degree=1), None, None),
    ],
    ids=str,
)
def test_what_cannot_be_divided_is_refused_with_the_nearest_sizes(auto, asked, why, nearest):
    if why is None:
        assert sizes(chosen(asked, size="1.3b", auto=auto)) == (1, 1, 1)
        return
    with pytest.raises(PlanError, match=why) as refusal:
        chosen(asked, size="1.3b", auto=auto)
    assert nearest in str(refusal.value) and tiny.sentences(str(refusal.value)) == 3


def test_vace_is_put_into_stages_where_it_is_asked_for():
    vace = PRESETS["14b"].having(Vace(8, 96))
    choices = choose(replace(plan_request(ParallelPlan(4)), config=vace), NVLINK, room(200, 4))
    assert {choice.plan.pipeline_parallel for choice in choices} == {1, 2, 4}
    two = choose(replace(plan_request(ParallelPlan(4, pipeline_parallel=2)), config=vace), NVLINK, room(200, 4))
    assert {choice.plan.pipeline_parallel for choice in two} == {2}


def test_explicit_sizes_that_do_not_fit_are_refused_with_the_nearest_that_do():
    with pytest.raises(PlacementError, match="are missing") as refusal:
        chosen(ParallelPlan(4, data_parallel=4), 16, auto=False, shard_weights="off", offload="off", tokens=P720)
    assert tiny.sentences(str(refusal.value)) == 2  # nothing fits
    with pytest.raises(PlacementError) as refusal:
        chosen(ParallelPlan(4, data_parallel=4), 24, shard_weights="off", offload="off")
    text = str(refusal.value)
    assert "GiB are missing" in text
    assert "sizes that work are data_parallel_size 2, pipeline_parallel_size 1, tensor_parallel_size 2." in text


# Another forward, once workers run.


def at(seconds: float, plan: ParallelPlan, like: Choice) -> Choice:
    expected = replace(like.expected, compute=seconds, exchange=0.0, weights=0.0, idle=0.0)
    return replace(like, plan=plan, expected=expected)


U4, D2U2, T4 = ParallelPlan(4), ParallelPlan(4, data_parallel=2), ParallelPlan(4, tensor_parallel=4)


@pytest.fixture(scope="module")
def some() -> Choice:
    return chosen(ParallelPlan(4))


def test_a_running_plan_stays_unless_the_gain_is_clear(some):
    for faster, expected in ((0.95, U4), (0.85, D2U2)):
        choices = [at(faster, D2U2, some), at(1.0, U4, some)]
        assert better(choices, U4, loaded=True).plan == expected
        assert better(choices, U4, loaded=False).plan == D2U2


def test_weights_are_read_again_only_where_that_pays(some):
    assert better([at(0.8, U4, some), at(1.0, T4, some)], T4, loaded=True).plan == T4  # 40 x 0.2 s against 16 s
    assert better([at(8, U4, some), at(10, T4, some)], T4, loaded=True).plan == U4


def test_a_plan_that_no_longer_fits_is_given_up(some):
    assert better([at(1.0, T4, some)], U4, loaded=True).plan == T4


def test_plans_that_hold_the_same_weights_are_known():
    assert U4.holds_as(D2U2) and D2U2.holds_as(U4)
    assert not U4.holds_as(T4)
    stages = ParallelPlan(4, pipeline_parallel=2)
    assert not stages.holds_as(replace(stages, data_parallel=2))  # ranks change places
    tensor = ParallelPlan(4, tensor_parallel=2)
    assert tensor.holds_as(replace(tensor, data_parallel=2))


def test_the_reason_is_one_line_with_figures():
    asked = plan_request(ParallelPlan(4))
    choices = choose(asked, NVLINK, room(120, 4))
    text = reason(choices, choices[0], asked, NVLINK, "NVLink")
    assert text.startswith("4 workers: data 2 x Ulysses 2 x ring 1, for 2 items of 32760 tokens: 1.28 s expected")
    assert "Ulysses 4 x ring 1 1.32 s" in text and "250 GB/s between workers (NVLink)" in text and "\n" not in text
    kept = reason(choices, choices[1], asked, NVLINK, "NVLink")
    assert "though data 2 x Ulysses 2 x ring 1 1.28 s: that does not make up for a change" in kept
    single = plan_request(ParallelPlan(2), items=1)
    others = choose(single, NVLINK, room(120, 2))
    assert "data 2" not in reason(others, others[0], single, NVLINK, "NVLink")  # both share the item: the same again
    alone = plan_request(ParallelPlan(1))
    only = choose(alone, NVLINK, room(120, 1))
    assert reason(only, only[0], alone, NVLINK, "no other GPU").endswith("exchange 0); measured 770 TFLOP/s")


def test_the_demand_is_that_of_the_rank_with_most():
    def demand(**sizes: int) -> Demand:
        return placed(plan_request(ParallelPlan(4)), ParallelPlan(4, **sizes), room(120, 4))[0]

    whole, half, quarter = demand(), demand(pipeline_parallel=2), demand(tensor_parallel=4)
    assert (half.blocks, quarter.blocks) == (20, 40)
    assert half.block == whole.block and quarter.block == pytest.approx(whole.block / 4, rel=0.01)


def test_ranks_that_hold_the_same_part_share_its_blocks():
    sizes = {"pipeline_parallel": 2, "tensor_parallel": 2}
    demand, placement = placed(plan_request(ParallelPlan(8)), ParallelPlan(8, **sizes), room(9, 8))
    assert placement.share == 2 and demand.blocks == 20
