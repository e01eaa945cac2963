"""How GPUs are shared out, and what is refused before anything starts."""

from __future__ import annotations

import itertools

import pytest
from testkit import tiny
from wan_parallel.distributed.client.pool import acquire
from wan_parallel.distributed.plan.degrees import ParallelPlan, PlanError, SequenceDegrees, bounds, shares
from wan_parallel.distributed.protocol.specs import PoolSettings

WAN_HEADS = (12, 24, 40)


def refusal(**fields: int) -> str:
    with pytest.raises(PlanError) as error:
        ParallelPlan(**fields).validate()
    text = str(error.value)
    assert tiny.sentences(text) == 2, text
    return text


@pytest.mark.parametrize("heads", WAN_HEADS)
@pytest.mark.parametrize("num_gpus", range(1, 9))
def test_every_number_of_gpus_runs_every_wan(num_gpus, heads):
    plan = ParallelPlan(num_gpus)
    plan.validate()
    degrees = plan.sequence_degrees(heads)
    assert degrees.ulysses * degrees.ring == num_gpus == degrees.ranks
    assert degrees.ulysses <= heads


@pytest.mark.parametrize("heads", WAN_HEADS)
@pytest.mark.parametrize("num_gpus", range(1, 9))
def test_the_choice_is_the_cheapest_of_all(num_gpus, heads):
    plan = ParallelPlan(num_gpus)
    chosen = plan.attention_cost(plan.sequence_degrees(heads), heads)
    for ulysses in range(1, num_gpus + 1):
        if num_gpus % ulysses == 0:
            assert chosen <= plan.attention_cost(SequenceDegrees(ulysses, num_gpus // ulysses), heads)


@pytest.mark.parametrize(
    "num_gpus, heads, expected",
    [
        (8, 12, (4, 2)),  # 1.3B: 8 does not divide 12
        (8, 40, (8, 1)),
        (8, 24, (8, 1)),
        (4, 40, (4, 1)),
        (3, 12, (3, 1)),
        (3, 40, (3, 1)),  # 14, 13 and 13 heads cost less than a ring of 3
        (6, 12, (6, 1)),
        (2, 40, (2, 1)),
        (1, 12, (1, 1)),
    ],
)
def test_known_choices(num_gpus, heads, expected):
    assert ParallelPlan(num_gpus).sequence_degrees(heads) == SequenceDegrees(*expected)


def test_ulysses_is_taken_wherever_it_divides_the_heads():
    for num_gpus in range(1, 9):
        for heads in WAN_HEADS:
            if heads % num_gpus == 0:
                assert ParallelPlan(num_gpus).sequence_degrees(heads) == SequenceDegrees(num_gpus, 1)


@pytest.mark.parametrize(
    "ulysses, ring, expected", [(2, 0, (2, 4)), (0, 8, (1, 8)), (8, 1, (8, 1)), (0, 1, (8, 1)), (1, 0, (1, 8))]
)
def test_the_degrees_that_the_user_sets_are_kept(ulysses, ring, expected):
    plan = ParallelPlan(8, ulysses_degree=ulysses, ring_degree=ring)
    plan.validate()
    assert plan.sequence_degrees(12) == SequenceDegrees(*expected)


def test_data_parallel_groups_share_the_gpus():
    plan = ParallelPlan(8, data_parallel=2)
    plan.validate()
    assert plan.sequence_ranks == 4
    assert plan.sequence_degrees(40).ranks == 4


def test_all_gpus_share_the_sequence_of_a_batch_that_is_too_small_to_split():
    plan = ParallelPlan(4, data_parallel=2, ulysses_degree=2, ring_degree=1)
    plan.validate()
    assert [plan.group_ranks(batch) for batch in (1, 2, 3)] == [4, 2, 2]
    assert plan.sequence_degrees(40) == SequenceDegrees(2, 1)
    assert plan.sequence_degrees(40, 4).ranks == 4  # the user's degrees are meant for a group of 2


def test_a_plan_is_described_in_one_line():
    assert ParallelPlan(8).describe(12) == "8 workers: data 1 x Ulysses 4 x ring 2"
    assert ParallelPlan(1).describe(40) == "1 worker: data 1 x Ulysses 1 x ring 1"
    assert ParallelPlan(4, data_parallel=2).describe(40) == "4 workers: data 2 x Ulysses 2 x ring 1"
    everything = ParallelPlan(8, tensor_parallel=2, pipeline_parallel=2)
    assert everything.describe(40) == "8 workers: data 1 x pipeline 2 x Ulysses 2 x ring 1 x tensor 2"


@pytest.mark.parametrize(
    "sizes",
    [
        {},
        {"tensor_parallel": 2},
        {"pipeline_parallel": 4, "tensor_parallel": 2},
        {"data_parallel": 2, "pipeline_parallel": 2, "tensor_parallel": 2},
        {"data_parallel": 2, "tensor_parallel": 2},
    ],
    ids=str,
)
def test_every_rank_has_one_place_and_one_group_of_each_kind(sizes):
    plan = ParallelPlan(8, **sizes)
    plan.validate()
    assert [plan.mesh.rank(plan.mesh.coords(rank)) for rank in range(8)] == list(range(8))
    assert len({plan.mesh.coords(rank) for rank in range(8)}) == 8
    merged = plan.sequence_ranks * plan.data_parallel
    kinds = {
        plan.tensor_parallel: plan.mesh.groups("tensor"),
        plan.pipeline_parallel: plan.mesh.groups("stage"),
        plan.sequence_ranks: plan.sequence_groups(plan.sequence_ranks),
        merged: plan.sequence_groups(merged),
    }
    for size, groups in kinds.items():
        assert sorted(itertools.chain(*groups)) == list(range(8))
        assert {len(group) for group in groups} == {size}


def test_neighbours_hold_the_same_matrices_and_groups_of_the_batch_are_farthest_apart():
    plan = ParallelPlan(8, data_parallel=2, pipeline_parallel=2, tensor_parallel=2)
    assert plan.mesh.groups("tensor") == [(0, 1), (2, 3), (4, 5), (6, 7)]
    assert plan.mesh.groups("stage") == [(0, 2), (1, 3), (4, 6), (5, 7)]
    assert plan.sequence_groups(1) == [(rank,) for rank in range(8)]
    assert plan.sequence_groups(2) == [(0, 4), (1, 5), (2, 6), (3, 7)]  # a batch too small to split


def test_tensor_parallel_ranks_share_out_the_heads_they_have():
    plan = ParallelPlan(8, tensor_parallel=2)
    assert plan.sequence_degrees(12) == SequenceDegrees(2, 2)  # 6 heads over 4 ranks
    assert plan.sequence_degrees(40) == SequenceDegrees(4, 1)


# Refusals.


@pytest.mark.parametrize("num_gpus", [0, -1])
def test_less_than_one_gpu_is_refused(num_gpus):
    text = refusal(num_gpus=num_gpus)
    assert f"num_gpus is {num_gpus}" in text and "1 or more" in text


@pytest.mark.parametrize("name", ["data_parallel", "pipeline_parallel", "tensor_parallel"])
@pytest.mark.parametrize(
    "num_gpus, size, working", [(3, 2, "1, 3"), (2, 4, "1, 2"), (8, 3, "1, 2, 4, 8"), (4, 0, "1, 2, 4")]
)
def test_a_size_that_does_not_divide_is_refused_with_those_that_do(name, num_gpus, size, working):
    text = refusal(num_gpus=num_gpus, **{name: size})
    assert f"{name}_size {size} does not divide num_gpus {num_gpus}" in text
    assert f"Use one of {working}." in text


def test_sizes_whose_product_does_not_divide_are_refused_with_the_products_that_do():
    text = refusal(num_gpus=6, data_parallel=2, tensor_parallel=2)
    assert "data_parallel_size 2 x tensor_parallel_size 2 is 4, which does not divide num_gpus 6" in text
    assert "Make their product one of 1, 2, 3, 6." in text
    assert "is 8, which does not divide num_gpus 4" in refusal(
        num_gpus=4, data_parallel=2, pipeline_parallel=2, tensor_parallel=2
    )


def model_refusal(num_heads: int, num_layers: int, **fields: int) -> str:
    plan = ParallelPlan(**fields)
    plan.validate()
    with pytest.raises(PlanError) as error:
        plan.check_model(num_heads, num_layers)
    text = str(error.value)
    assert tiny.sentences(text) == 2, text
    return text


def test_a_tensor_size_that_does_not_divide_the_heads_is_refused_with_those_that_do():
    text = model_refusal(12, 30, num_gpus=8, tensor_parallel=8)
    assert "tensor_parallel_size 8 does not divide the 12 heads of this model. Use one of 1, 2, 4." in text
    ParallelPlan(5, tensor_parallel=5).check_model(40, 40)


def test_more_stages_than_blocks_are_refused():
    text = model_refusal(12, 3, num_gpus=4, pipeline_parallel=4)
    assert "pipeline_parallel_size is 4, but this model has 3 blocks. Set it to 3 or less." in text


def test_degrees_that_do_not_multiply_out_are_refused_with_the_product_that_does():
    text = refusal(num_gpus=8, ulysses_degree=4, ring_degree=4)
    assert "is 16, but 8 GPUs" in text and "Make their product 8" in text
    text = refusal(num_gpus=8, data_parallel=2, ulysses_degree=8, ring_degree=1)
    assert "is 8, but 4 GPUs" in text and "Make their product 4" in text


@pytest.mark.parametrize("name", ["ulysses_degree", "ring_degree"])
def test_a_degree_that_does_not_divide_is_refused_with_those_that_do(name):
    text = refusal(num_gpus=6, **{name: 4})
    assert f"{name} 4 does not divide the 6 GPUs" in text and "1, 2, 3, 6, or 0" in text


@pytest.mark.parametrize("name", ["ulysses_degree", "ring_degree"])
def test_a_negative_degree_is_refused(name):
    refusal(num_gpus=2, **{name: -2})


def test_more_ulysses_ranks_than_heads_are_refused_with_the_heads_there_are():
    with pytest.raises(PlanError, match=r"2 heads cannot be shared by ulysses_degree 4\. Set it to 2 ") as error:
        ParallelPlan(4, ulysses_degree=4).sequence_degrees(2)
    assert tiny.sentences(str(error.value)) == 2


def test_no_pool_is_made_of_a_plan_that_cannot_work():
    with pytest.raises(PlanError):
        acquire(PoolSettings(ParallelPlan(3, data_parallel=2), device="cpu"))


# Shares.


@pytest.mark.parametrize("total", [0, 1, 5, 12, 32760, 75600])
@pytest.mark.parametrize("parts", range(1, 9))
def test_shares_are_whole_and_differ_by_one_at_most(total, parts):
    split = shares(total, parts)
    assert len(split) == parts and sum(split) == total
    assert max(split) - min(split) <= 1
    assert split == sorted(split, reverse=True)


@pytest.mark.parametrize("total, parts", [(10, 3), (2, 5), (0, 2), (75600, 8)])
def test_bounds_cover_everything_once(total, parts):
    edges = [bounds(total, parts, i) for i in range(parts)]
    assert edges[0][0] == 0 and edges[-1][1] == total
    assert all(one[1] == two[0] for one, two in itertools.pairwise(edges))
    assert [stop - start for start, stop in edges] == shares(total, parts)


# GPUs of different speeds.


@pytest.mark.parametrize(
    "total, speeds, expected",
    [
        (40, (2, 1), [27, 13]),
        (12, (100, 45), [8, 4]),  # done after 8.9; 9 and 3 would be after 9
        (12, (3, 3, 2, 2), [4, 4, 2, 2]),
        (6, (1000, 1, 1, 1), [3, 1, 1, 1]),
        (40, (7, 7), [20, 20]),
        (41, (1, 1, 1), [14, 14, 13]),
        (2, (1, 5, 5), [1, 1, 0]),
    ],
)
def test_unlike_shares(total, speeds, expected):
    assert shares(total, len(speeds), speeds) == expected


UNLIKE = [(12, (100, 45)), (13, (5, 4, 3)), (9, (1, 9)), (11, (7, 2, 2)), (8, (1, 1, 30))]


@pytest.mark.parametrize("total, speeds", UNLIKE)
def test_no_other_shares_are_done_earlier(total, speeds):
    ways = (way for way in itertools.product(range(1, total), repeat=len(speeds)) if sum(way) == total)
    earliest = min(max(n / speed for n, speed in zip(way, speeds, strict=True)) for way in ways)
    assert max(n / speed for n, speed in zip(shares(total, len(speeds), speeds), speeds, strict=True)) == earliest


def test_who_has_the_same_tokens_as_a_slower_rank_goes_at_its_pace():
    tensor = ParallelPlan(4, tensor_parallel=2, speeds=(9, 4, 5, 8))
    assert [tensor.sequence_speeds(group) for group in tensor.sequence_groups(2)] == [(4, 5), (4, 5)]
    stages = ParallelPlan(4, pipeline_parallel=2, speeds=(9, 4, 5, 8))
    assert [stages.sequence_speeds(group) for group in stages.sequence_groups(2)] == [(5, 4), (5, 4)]
    data = ParallelPlan(4, data_parallel=2, speeds=(9, 4, 5, 8))
    assert [data.sequence_speeds(group) for group in data.sequence_groups(2)] == [(9, 4), (5, 8)]
    assert data.sequence_speeds(data.sequence_groups(4)[0]) == (9, 4, 5, 8)
    assert [data.tokens_of(rank, 130) for rank in range(4)] == [90, 40, 50, 80]
    assert ParallelPlan(4).tokens_of(3, 130) == 33


def test_unlike_gpus_share_a_sequence_after_their_speed():
    plan = ParallelPlan(2, speeds=(2, 1))
    plan.validate()
    assert plan.token_cost(3000, 2) == pytest.approx(2 / 3)  # half the even share would be 1
    assert plan.attention_cost(SequenceDegrees(2, 1), 40) == pytest.approx(27 / 40)
    assert plan.attention_cost(SequenceDegrees(1, 2), 40) == pytest.approx(1.2 * 2 / 3)
    assert plan.describe(40) == "2 workers: data 1 x Ulysses 2 x ring 1 at speeds 2:1"
    assert ParallelPlan(2).token_cost(3001, 2) == 1.0


@pytest.mark.parametrize("speeds", [(1, 2, 3), (1, 0), (3,)])
def test_speeds_that_are_not_one_for_each_gpu_are_refused(speeds):
    assert "Give 2 numbers above 0" in refusal(num_gpus=2, speeds=speeds)
