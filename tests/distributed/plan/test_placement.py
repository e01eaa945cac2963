"""Where weights go, from the bytes that they need and the bytes that there are."""

from __future__ import annotations

import math

import pytest
from testkit.tiny import sentences
from wan_parallel.distributed.plan.placement import (
    REFERENCE_TOKENS,
    Demand,
    PlacementError,
    activation_bytes,
    choose_placement,
    demand_of,
    fitting_blocks,
    leaving_order,
    needed_bytes,
    room_beside,
)
from wan_parallel.wanvideo.base.config import PRESETS
from wan_parallel.wanvideo.variants.vace import Vace

GIB = 2**30
DEMAND = Demand(fixed=1 * GIB, block=1 * GIB, blocks=20, activations=3 * GIB)  # 24 GiB whole


def placed(room: float, ranks: int = 4, demand: Demand = DEMAND, **options) -> tuple[int, int]:
    placement = choose_placement(demand, [int(room * GIB)] * ranks, ranks, **options)
    return placement.share, placement.resident


@pytest.mark.parametrize(
    "room, expected",
    [
        (24, (1, 20)),  # whole
        (23.9, (4, 20)),  # 1 + 3 + two blocks + 20/4
        (11, (4, 20)),
        (10.9, (4, 19)),  # and some shares in host memory
        (6, (4, 0)),
    ],
)
def test_whole_where_it_fits_else_shared_else_partly_in_host_memory(room, expected):
    assert placed(room) == expected


def test_one_rank_has_nobody_to_share_with():
    assert placed(23.9, ranks=1) == (1, 17)
    assert placed(24, ranks=1, shard="on") == (1, 20)


def test_the_tightest_gpu_decides_for_all():
    room = [40 * GIB, 40 * GIB, 12 * GIB, 40 * GIB]
    placement = choose_placement(DEMAND, room, 4)
    assert (placement.share, placement.resident) == (4, 20)
    assert "21.00 GiB of weights and 3.00 GiB of activations, and the tightest GPU has 12.00 GiB" in placement.reason
    assert fitting_blocks(DEMAND, room[0], 4) == 20


def test_what_the_user_says_is_done():
    assert placed(99, shard="on") == (4, 20)
    assert placed(99, offload="on") == (4, 0)
    assert placed(99, shard="off", offload="on") == (1, 0)
    assert placed(20, shard="off") == (1, 14)


def test_what_needs_streaming_fits_where_it_is_said_to():
    for room in range(6, 24):
        share, resident = placed(room)
        assert needed_bytes(DEMAND, share, resident) <= room * GIB
        if resident < DEMAND.blocks:
            assert needed_bytes(DEMAND, share, resident + 1) > room * GIB or share > 1


@pytest.mark.parametrize(
    "room, options, way",
    [
        (5.9, {}, "use fewer frames"),
        (10.9, {"offload": "off"}, "Set offload to auto"),
        (23.9, {"offload": "off", "shard": "off"}, "set shard_weights to auto"),
    ],
    ids=str,
)
def test_what_does_not_fit_is_refused_with_what_is_missing_where(room, options, way):
    rooms = [30 * GIB, int(room * GIB), 30 * GIB, 30 * GIB]
    with pytest.raises(PlacementError) as refusal:
        choose_placement(DEMAND, rooms, 4, **options)
    text = str(refusal.value)
    assert text.startswith(f"The GPU of rank 1 has {room:.2f} GiB") and "0.10 GiB are missing" in text
    assert way.lower() in text.lower() and sentences(text) == 2


def test_host_memory_that_does_not_suffice_is_refused():
    with pytest.raises(PlacementError, match=r"20 of 20 blocks .* 80\.00 GiB .* 4 ranks") as refusal:
        placed(99, shard="off", offload="on", host_room=79 * GIB)
    assert sentences(str(refusal.value)) == 2 and "shard_weights" in str(refusal.value)
    assert placed(99, offload="on", host_room=20 * GIB) == (4, 0)  # shares of one copy


def test_the_estimate_of_activations_is_near_what_was_measured():
    """On one H200, 14B in bf16: 40 to 44 bytes a token and channel between 480p and 720p."""
    tokens_720 = 21 * 45 * 80
    low, high = (activation_bytes(PRESETS["14b"], tokens, 1, 2, 0) for tokens in (REFERENCE_TOKENS, tokens_720))
    measured = (42.4 - 34.1) * GIB / (tokens_720 - REFERENCE_TOKENS)
    assert measured <= (high - low) / (tokens_720 - REFERENCE_TOKENS) <= 1.6 * measured
    sliced = activation_bytes(PRESETS["14b"], tokens_720, 1, 2, 8192)
    assert sliced < high


def test_blocks_of_different_sizes_count_with_their_own():
    """As those of a VACE module in bf16 beside a model in fp8."""
    sizes = {f"blocks.{i}.w": GIB for i in range(20)} | {f"vace_blocks.{i}.w": 2 * GIB for i in range(5)}
    sizes |= {"vace_blocks.0.before_proj.weight": GIB, "head.w": GIB}
    demand = demand_of(sizes, PRESETS["14b"].having(Vace(8, 96)), 3 * GIB)
    assert (demand.fixed, demand.block, demand.blocks, demand.whole) == (2 * GIB, 2 * GIB, 25, 32 * GIB)
    assert placed(35, demand=demand) == (1, 25)
    assert placed(34.9, demand=demand) == (4, 25)
    assert placed(16.5, demand=demand) == (4, 25)  # 2 + 3 + two of the largest + 30/4
    assert placed(16.4, demand=demand) == (4, 24)
    for room in range(36, 141):
        share, resident = placed(room / 4, demand=demand)
        assert needed_bytes(demand, share, resident) <= room / 4 * GIB
        assert resident == 25 or needed_bytes(demand, share, resident + 1) > room / 4 * GIB


def test_blocks_leave_evenly_and_are_counted_as_they_leave():
    assert leaving_order("abcdefg") == list("aecgbfd")
    demand = Demand(fixed=0, block=7, blocks=4, activations=0, sizes=(1, 2, 4, 7))  # the third leaves behind the first
    assert [demand.parts(1, count) for count in range(5)] == [0, 7, 9, 13, 14]
    assert [fitting_blocks(demand, 14 + room, 2) for room in (-1, 0, 3, 4, 5, 7, 8, 99)] == [-1, 0, 0, 1, 2, 3, 4, 4]


@pytest.mark.parametrize("gpus, cap_14b, cap_1_3b", [(1, 48, 8), (2, 24, 4), (4, 12, 2), (8, 6, 1)])
def test_81_frames_at_480p_have_a_place_on_cards_that_shrink_with_their_number(gpus, cap_14b, cap_1_3b):
    for size, cap in (("14b", cap_14b), ("1.3b", cap_1_3b)):
        config = PRESETS[size]
        sizes = {name: math.prod(shape) * (2 if len(shape) == 2 else 4) for name, shape in config.shapes().items()}
        activations = activation_bytes(config, math.ceil(REFERENCE_TOKENS / gpus), 1, 2, 8192)
        demand = demand_of(sizes, config, activations)
        placement = choose_placement(demand, [cap * GIB] * gpus, gpus)
        assert placement.share in (1, gpus)
        assert needed_bytes(demand, placement.share, placement.resident) <= cap * GIB
        assert abs(demand.whole - 2 * config.parameters) < 0.02 * demand.whole


def test_a_gpu_that_takes_fewer_tokens_has_more_room_for_weights():
    assert room_beside([20, 12], [9, 4]) == [20, 17]
    assert room_beside([20, 12], [9, 9]) == [20, 12]
