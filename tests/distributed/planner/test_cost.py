"""What a forward is expected to take, beside what was measured on 4 H200s (benchmarks/results, benchmarks/LOG.md)."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from wan_parallel.distributed.plan.degrees import ParallelPlan
from wan_parallel.distributed.planner.cost import Blocks, Work, block_flops, expect
from wan_parallel.distributed.protocol.machine import Machine
from wan_parallel.wanvideo.attention.kernels import get_kernel
from wan_parallel.wanvideo.base.conditioning import Conditioning
from wan_parallel.wanvideo.base.config import PRESETS
from wan_parallel.wanvideo.model.model import model_class
from wan_parallel.wanvideo.variants.animate import Animate
from wan_parallel.wanvideo.variants.humo import Humo
from wan_parallel.wanvideo.variants.infinitetalk import InfiniteTalk
from wan_parallel.wanvideo.variants.s2v import S2V

P480, P720 = 21 * 30 * 52, 21 * 45 * 80
NVLINK = Machine()
HOST_LINK = replace(NVLINK, link=30e9)  # NCCL_P2P_DISABLE=1
U4 = ParallelPlan(4)
D2U2 = ParallelPlan(4, data_parallel=2)
T4 = ParallelPlan(4, tensor_parallel=4)
P4 = ParallelPlan(4, pipeline_parallel=4)
BLOCK = 660 * 10**6


def seconds(
    plan: ParallelPlan,
    machine: Machine = NVLINK,
    items: int = 1,
    tokens: int = P480,
    size: str = "14b",
    overlap: bool = True,
    **blocks: int,
) -> float:
    return expect(PRESETS[size], plan, Work(tokens, items, overlap=overlap), machine, Blocks(**blocks)).seconds


U2 = ParallelPlan(2)


@pytest.mark.parametrize(
    "plan, machine, tokens, size, overlap, measured",
    [
        (ParallelPlan(1), NVLINK, P480, "14b", True, 2.36),
        (ParallelPlan(1), NVLINK, P720, "14b", True, 9.27),
        (U2, NVLINK, P480, "14b", True, 1.323),
        (U2, NVLINK, P720, "14b", True, 4.82),
        (U2, NVLINK, P480, "14b", False, 1.39),
        (U2, HOST_LINK, P480, "14b", True, 1.364),
        (U2, HOST_LINK, P720, "14b", True, 4.84),
        (U2, HOST_LINK, P480, "14b", False, 1.760),
        (U2, HOST_LINK, P720, "14b", False, 5.80),
        (ParallelPlan(3), NVLINK, P480, "14b", False, 0.916),
        (U4, NVLINK, P480, "14b", True, 0.677),
        (U4, NVLINK, P720, "14b", True, 2.45),
        (U4, NVLINK, P480, "14b", False, 0.706),
        (U4, NVLINK, P720, "14b", False, 2.48),
        (U4, HOST_LINK, P480, "14b", False, 0.906),
        (U4, HOST_LINK, P720, "14b", False, 3.00),
        (ParallelPlan(4, ulysses_degree=2), NVLINK, P480, "14b", True, 0.792),
        (ParallelPlan(4, ulysses_degree=1), NVLINK, P480, "14b", True, 0.785),
        (ParallelPlan(1), NVLINK, P480, "1.3b", True, 0.435),
        (ParallelPlan(1), NVLINK, P720, "1.3b", True, 1.900),
    ],
)
def test_the_expectation_is_near_what_was_measured(plan, machine, tokens, size, overlap, measured):
    expected = seconds(plan, machine, tokens=tokens, size=size, overlap=overlap)
    assert expected == pytest.approx(measured, rel=0.1)


def test_ulysses_is_expected_to_beat_rings_as_it_does():
    ring, mixed = ParallelPlan(4, ulysses_degree=1), ParallelPlan(4, ulysses_degree=2)
    assert seconds(U4) < min(seconds(ring), seconds(mixed))


@pytest.mark.parametrize("machine", [NVLINK, HOST_LINK], ids=["NVLink", "host"])
def test_two_branches_on_two_halves_of_the_gpus_exchange_less(machine):
    assert seconds(D2U2, machine, items=2) < seconds(U4, machine, items=2)


def test_the_gain_of_two_halves_is_clear_where_links_are_slow():
    assert seconds(D2U2, HOST_LINK, items=2) < 0.95 * seconds(U4, HOST_LINK, items=2)


def test_one_item_takes_the_same_under_either_plan_as_all_gpus_share_it():
    assert seconds(D2U2, items=1) == seconds(U4, items=1)


def test_an_exchange_beside_the_computation_costs_less():
    for machine in (NVLINK, HOST_LINK):
        assert seconds(ParallelPlan(1)) / 4 < seconds(U4, machine) < seconds(U4, machine, overlap=False)


def test_with_a_ring_the_exchange_of_heads_is_waited_for():
    config, slow = PRESETS["14b"], replace(NVLINK, link=1e9)
    rings = expect(config, ParallelPlan(4, ulysses_degree=2), Work(P480), slow).exchange
    heads = config.num_layers * 4 * (P480 / 4) * config.dim * 2 / 2 / slow.link  # half of each of the four leaves
    assert rings >= heads > expect(config, U4, Work(P480), slow).exchange


def test_three_items_are_better_shared_by_all_than_split_two_to_one():
    assert seconds(U4, items=3) < seconds(D2U2, items=3)


@pytest.mark.parametrize("machine", [NVLINK, HOST_LINK], ids=["NVLink", "host"])
def test_dividing_the_weights_costs_time(machine):
    for items in (1, 2):
        assert seconds(U4, machine, items) < min(seconds(T4, machine, items), seconds(P4, machine, items))


def test_sums_over_a_slow_link_cost_more_than_idle_stages():
    assert seconds(T4, NVLINK, 2) < seconds(P4, NVLINK, 2)
    slow = replace(NVLINK, link=20e9)
    assert seconds(P4, slow, 2) < seconds(T4, slow, 2)


@pytest.mark.parametrize("stages, items, share", [(2, 2, 2 / 3), (4, 2, 2 / 5), (2, 1, 1 / 2)])
def test_stages_stand_idle_as_the_guide_says(stages, items, share):
    expected = expect(PRESETS["14b"], ParallelPlan(stages, pipeline_parallel=stages), Work(P480, items), NVLINK)
    assert expected.compute / (expected.compute + expected.idle) == pytest.approx(share, rel=0.01)


def test_weights_that_arrive_in_time_cost_little_and_late_ones_their_delay():
    shared, hosted = {"nbytes": BLOCK, "share": 4}, {"nbytes": BLOCK, "hosted": 40}
    assert seconds(U4) < seconds(U4, **shared) < 1.1 * seconds(U4)
    assert seconds(U4, tokens=P720, **hosted) == pytest.approx(seconds(U4, tokens=P720), rel=0.02)
    slow_bus = replace(NVLINK, host=10e9)
    assert seconds(U4, slow_bus, **hosted) == pytest.approx(40 * BLOCK / 10e9, rel=0.1)
    assert seconds(U4, slow_bus, **hosted, share=4) < seconds(U4, slow_bus, **hosted)


P480_ONE = 30 * 52  # a latent frame
I2V = replace(PRESETS["14b"], in_dim=36, image_dim=1280)
HEARING = {
    "InfiniteTalk": I2V.having(InfiniteTalk(768)),
    "HuMo": PRESETS["14b"].having(Humo(features=8 * 5 * 1280, hidden=512, width=1536, tokens=16)),
    "Animate": I2V.having(Animate()),
    "S2V": PRESETS["14b"].having(S2V()),
}


@pytest.mark.parametrize("name", ["1.3b", "14b", "InfiniteTalk"])
@pytest.mark.parametrize("frames", [1, 3])
def test_the_arithmetic_of_a_block_is_what_torch_counts(name, frames):
    config = PRESETS.get(name) or HEARING[name]
    config = replace(config, num_layers=1)
    with torch.device("meta"):
        model = model_class(config)(config, get_kernel("sdpa", torch.device("cpu"), torch.float32))
        x, text = torch.empty(1, config.in_dim, frames, 60, 104), torch.empty(1, 512, config.text_dim)
        image = torch.empty(1, 257, 1280) if config.image_dim else None
        audio = torch.empty(1, frames, 32, 768) if config.get(InfiniteTalk) else None
        with FlopCounterMode(display=False) as counter, torch.inference_mode():
            model(x, torch.empty(1), text, Conditioning(image=image, audio=audio))
    counted = sum(counter.get_flop_counts()[f"{type(model).__name__}.blocks.0"].values())
    assert sum(block_flops(config, frames * P480_ONE)) == counted


@pytest.mark.parametrize("name", HEARING)
def test_layers_that_hear_take_arithmetic_and_exchanges(name):
    config = HEARING[name]
    deaf = replace(config, additions=())
    work = Work(P480, 2)

    def more(plan: ParallelPlan, part: str) -> float:
        both = (getattr(expect(each, plan, work, NVLINK), part) for each in (config, deaf))
        return next(both) - next(both)

    share = config.side_attention.share
    products = config.num_layers * share * 4 * P480 * config.dim**2 / NVLINK.products
    assert products < more(ParallelPlan(1), "compute") / 2 < 1.5 * products  # for one item
    assert more(T4, "compute") == pytest.approx(more(ParallelPlan(1), "compute") / 4, rel=0.4)
    assert more(U4, "exchange") == 0.0
    sums = expect(deaf, T4, work, NVLINK).exchange
    assert more(T4, "exchange") == pytest.approx(sums / 2 * share, rel=0.4)  # one sum beside the two that show


def test_two_speakers_take_a_few_percent_more():
    """As the arithmetic's docstring says: the queries of all tokens to the keys of the first frame."""
    apart = 4 * P480 * P480_ONE * 5120
    assert 0.015 < apart / sum(block_flops(HEARING["InfiniteTalk"], P480)) < 0.025


def test_the_arithmetic_is_that_of_the_benchmarks():
    from benchlib.flops import forward_flops

    for config in PRESETS.values():
        for tokens in (P480, P720):
            counted = config.num_layers * sum(block_flops(config, tokens))
            assert counted == forward_flops(config, tokens)
            assert sum(block_flops(config, tokens, ranks=2, tensor=2)) == pytest.approx(
                counted / config.num_layers / 4, rel=0.02
            )
