"""A pool whose forwards ask for sparse attention or another dense kernel: no reload, plans without rings, refusals."""

from __future__ import annotations

from dataclasses import replace

import pytest
from testkit import tiny
from wan_parallel.distributed.client.attention_count import AttentionCounter
from wan_parallel.distributed.client.pool import Pool
from wan_parallel.distributed.client.preparation import workload_of
from wan_parallel.distributed.plan.degrees import ParallelPlan, PatchSplit, PlanError
from wan_parallel.distributed.planner.cost import Work, expect
from wan_parallel.distributed.planner.planner import Planner, Workload
from wan_parallel.distributed.planner.search import PlanRequest, Room, choose, placed, possible
from wan_parallel.distributed.protocol.machine import Machine
from wan_parallel.distributed.protocol.messages import decode, encode
from wan_parallel.distributed.protocol.refs import ArenaRef, TensorRef
from wan_parallel.distributed.protocol.reports import AttentionUse
from wan_parallel.distributed.protocol.requests import Displaced, Forward
from wan_parallel.distributed.protocol.specs import ModelSpec, PoolSettings
from wan_parallel.wanvideo.attention import kitchen
from wan_parallel.wanvideo.attention.kernels import AttentionError
from wan_parallel.wanvideo.base.attention_choice import AttentionChoice, SparseError, SparseSettings, sparse_bytes
from wan_parallel.wanvideo.base.config import PRESETS

with_kitchen = pytest.mark.skipif(kitchen.refusal("") is not None, reason="comfy-kitchen is not installed")
SIZE = (3, 20, 22)
KEEP = SparseSettings(keep=0.2, extra_tokens=64, dense_blocks=(1,), min_tokens=0, sigma_start=0.9)
FAST = Machine(products=6.7e14, link=2e11)
BIG = ModelSpec("random:1.3b")


def asks(settings: SparseSettings = KEEP, sigma: float | None = 0.5) -> AttentionChoice:
    return AttentionChoice(settings, sigma)


@with_kitchen
def test_settings_change_between_forwards_and_nothing_is_loaded_anew(pool_of, spec, model):
    pool, given = pool_of(2), tiny.inputs(size=SIZE)
    dense = pool.forward(spec, *given)
    assert pool.status().attention is None
    before = pool.status().workers[0].models[0], pool.worker_pids
    kept = pool.forward(spec, *given, attention=asks())
    more = pool.forward(spec, *given, attention=asks(replace(KEEP, keep=0.9)))
    early = pool.forward(spec, *given, attention=asks(replace(KEEP, keep=0.9), 0.95))
    assert 0.8 * tiny.relative_error(kept, dense) > tiny.relative_error(more, dense) > 1e-5
    assert tiny.relative_error(early, dense) == 0 and tiny.relative_error(dense, model(*given)) <= 2e-6
    count = pool.status().attention
    assert (count.sparse, count.dense) == (1, 1) and "sigma 0.95 is outside" in count.last.why_dense
    assert (pool.status().workers[0].models[0], pool.worker_pids) == before
    assert tiny.relative_error(pool.forward(spec, *given), dense) == 0
    assert pool.status().attention is None


@with_kitchen
def test_the_dense_kernel_below_is_the_one_that_is_asked_for(pool_of, spec):
    pool, given = pool_of(1), tiny.inputs(size=SIZE)
    dense = pool.forward(spec, *given)
    assert tiny.relative_error(pool.forward(spec, *given, attention=AttentionChoice(kernel="sdpa")), dense) == 0
    assert pool.status().attention.last == AttentionUse("sdpa", 0, 2)
    with pytest.raises(AttentionError, match="comfy_kitchen_int8 does not run on cpu") as refusal:
        pool.forward(spec, *given, attention=AttentionChoice(KEEP, 0.5, "comfy_kitchen_int8"))
    assert tiny.sentences(str(refusal.value)) == 2
    assert tiny.relative_error(pool.forward(spec, *given), dense) == 0


def refused(pool: Pool, spec: ModelSpec, error: type[Exception], attention: AttentionChoice, **more: object) -> str:
    with pytest.raises(error) as refusal:
        pool.forward(spec, *tiny.inputs(size=SIZE), attention=attention, **more)
    assert tiny.sentences(str(refusal.value)) == 2
    return str(refusal.value)


def test_what_cannot_be_sparse_is_refused_before_anything_starts(spec):
    ring = Pool(PoolSettings(ParallelPlan(2, ring_degree=2), device="cpu"))
    assert "the plan has a ring" in refused(ring, spec, PlanError, asks())
    stages = Pool(PoolSettings(ParallelPlan(2, pipeline_parallel=2), device="cpu", pipeline_mode="pipefusion"))
    assert "PipeFusion keeps the keys" in refused(stages, spec, PlanError, asks())
    patches = Displaced("fill", "run", ("a",), PatchSplit())
    plain = Pool(PoolSettings(ParallelPlan(2), device="cpu"))
    assert "the strategy displaced" in refused(plain, spec, PlanError, asks(), displaced=patches)
    beyond = asks(replace(KEEP, dense_blocks=(0, 2)))
    assert "block 2, but this model has 2 blocks" in refused(plain, spec, SparseError, beyond)
    assert not ring.alive and not stages.alive and not plain.alive


def test_a_video_that_is_too_short_to_be_sparse_may_have_a_ring(pool_of, spec, model):
    given = tiny.inputs(size=SIZE)
    out = pool_of(2, ring_degree=2).forward(spec, *given, attention=asks(replace(KEEP, min_tokens=331)))
    assert tiny.relative_error(out, model(*given)) <= 2e-6


# Plans.


def test_the_automatic_plan_has_no_ring_where_attention_is_sparse():
    """12 heads on 8 GPUs: Ulysses 4 x ring 2 is faster where attention is dense."""
    settings = PoolSettings(ParallelPlan(8), auto=True)
    dense = PlanRequest(ParallelPlan(8), settings, PRESETS["1.3b"], BIG, 32760, 1)
    sparse = replace(dense, sparse_cost=0.3, ringless="Sparse attention")
    assert any(plan.sequence_degrees(12).ring > 1 for plan in possible(dense))
    assert possible(sparse) and all(plan.sequence_degrees(12).ring == 1 for plan in possible(sparse))
    best = choose(sparse, FAST, Room((2**37,) * 8))[0].plan
    assert best.sequence_degrees(12, best.group_ranks(1)).ring == 1


def test_a_plan_that_is_set_changes_where_a_degree_is_open_and_comes_back():
    planner, config = Planner(PoolSettings(ParallelPlan(8))), PRESETS["1.3b"]
    dense, sparse = Workload(BIG, 32760, 1), Workload(BIG, 32760, 1, 0.3)
    without = planner.recall(config, sparse, ParallelPlan(8))
    assert str(without.sequence_degrees(12)) == "Ulysses 8 x ring 1"
    assert planner.recall(config, dense, without) == ParallelPlan(8)
    assert without.holds_as(ParallelPlan(8))  # no weights move


def test_a_kernel_without_a_log_sum_exp_has_a_plan_without_a_ring():
    planner, config = Planner(PoolSettings(ParallelPlan(8))), PRESETS["1.3b"]
    named = Workload(replace(BIG, attention="comfy_kitchen_int8"), 32760, 1)
    below = workload_of(BIG, 32760, 1, AttentionChoice(kernel="comfy_kitchen_int8"))
    for workload in (named, below):
        assert planner.recall(config, workload, ParallelPlan(8)).sequence_degrees(12).ring == 1
        assert all(plan.sequence_degrees(12).ring == 1 for plan in possible(planner._request(config, workload)))
    with pytest.raises(PlanError, match="The attention kernel comfy_kitchen_int8 needs all keys"):
        Planner(PoolSettings(ParallelPlan(8, ring_degree=2))).check(config, named)


def test_all_steps_of_a_run_have_one_plan():
    spec = ModelSpec("random:14b")
    settings = SparseSettings(keep=0.1)
    early, late = (workload_of(spec, 75600, 1, AttentionChoice(settings, sigma)) for sigma in (0.99, 0.5))
    assert early == late and early.sparse_cost == pytest.approx(settings.cost(40))
    assert workload_of(spec, 12000, 1, AttentionChoice(settings)) == workload_of(spec, 12000, 1, AttentionChoice())


def test_the_cost_model_knows_the_share_that_is_kept():
    """14B at 720p on one H200: dense 9.27 s, of which 40 x 172 ms are self-attention; 40 x 46 ms with 10 % kept."""
    config, plan, work = PRESETS["14b"], ParallelPlan(1), Work(75600)
    cost = SparseSettings(keep=0.1, extra_tokens=0).cost(40)
    dense, sparse = (expect(config, plan, each, FAST).seconds for each in (work, replace(work, self_attention=cost)))
    assert dense - sparse == pytest.approx(40 * (172 - 46) / 1000, rel=0.2)


def test_memory_for_the_kernel_is_counted_before_weights_are_placed():
    settings = PoolSettings(ParallelPlan(2), device="cpu")
    dense = PlanRequest(ParallelPlan(2), settings, PRESETS["14b"], ModelSpec("random:14b"), 75600, 1)
    room = Room((2**37, 2**37))
    more = placed(replace(dense, sparse_cost=0.3), ParallelPlan(2), room)[0].activations
    assert more - placed(dense, ParallelPlan(2), room)[0].activations == sparse_bytes(75600, 20)


# On the way.


def test_the_choice_travels_with_the_request():
    ref = TensorRef("float32", (1,), 0)
    choice = AttentionChoice(KEEP, 0.25, "sdpa")
    request = Forward(3, ModelSpec("x"), ArenaRef("", 1, 0), ref, ref, ref, ref, attention=choice)
    assert decode(encode(request)) == request


def test_forwards_are_counted_since_the_settings_changed():
    counter = AttentionCounter()
    sparse, dense = AttentionUse("sdpa", 1, 2, "kept"), AttentionUse("sdpa", 0, 2, "kept", "why")
    for use, sigma in ((dense, 0.9), (sparse, 0.8), (sparse, 0.7)):
        counter.count(asks(sigma=sigma), use)
    assert (counter.count_now.sparse, counter.count_now.dense) == (2, 1)
    counter.count(asks(replace(KEEP, keep=0.5)), sparse)
    assert (counter.count_now.sparse, counter.count_now.dense) == (1, 0)
    counter.count(AttentionChoice(), None)
    assert counter.count_now is None
