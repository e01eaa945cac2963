"""Displaced patches: what is stale is one step old, and everything else is as on the exact path."""

from __future__ import annotations

import itertools
import os
import signal
import time
from dataclasses import replace

import pytest
import testkit  # noqa: F401 (registers wan_parallel, also in the processes of a group)
import torch
import torch.distributed as dist
from testkit import gloo_group, tiny
from testkit.patch_runs import STEPS, UNEVEN, Ran, Reference, assert_like_the_reference, sample, through
from wan_parallel.distributed.approximate.kv_buffers import (
    INSTALL_LINE,
    BufferManager,
    Codec,
    make_buffers,
    manager_name,
    official_version,
)
from wan_parallel.distributed.approximate.schedule import FILL, STALE, PatchSettings, Schedule
from wan_parallel.distributed.approximate.stale import StaleError
from wan_parallel.distributed.client.failures import WorkerDied
from wan_parallel.distributed.client.pool import Pool
from wan_parallel.distributed.parallel.sequence_group import MissingPackage
from wan_parallel.distributed.plan.degrees import SPLIT_MODES, PatchSplit, PlanError
from wan_parallel.distributed.protocol.requests import Displaced
from wan_parallel.distributed.protocol.specs import ModelSpec

CPU = torch.device("cpu")
GATHERS = [
    "native",
    pytest.param(
        "official",
        marks=pytest.mark.skipif(not official_version(), reason=f"distrifuser is missing: {INSTALL_LINE}"),
    ),
]
MANAGERS = [*GATHERS, "host"]
DEFAULT = PatchSettings(PatchSplit("spatial", 32, 0), warmup_steps=2, sync_frequency=4, manager="native")


# The managers: buffers and their exchange.

SHAPES = [(2, 1, 6, 2, 4), (2, 1, 5, 2, 4), (3,)]  # of three layers
ROUNDS = 4
GROUPS = (2, 4)  # ranks


def content(rank: int, layer: int, step: int) -> torch.Tensor:
    """What a rank sends; every rank, layer and step has its own."""
    generator = torch.Generator().manual_seed(1000 * rank + 100 * layer + step)
    return torch.randn(SHAPES[layer], generator=generator)


def run_managers(rank: int, world: int, names: list[str]) -> gloo_group.Results:
    """What each manager's buffers hold when a layer's turn comes, and after `clear`: in a group of all ranks, and in
    groups of two."""
    results = {}
    for name, ranks in itertools.product(names, GROUPS):
        groups = [dist.new_group(list(range(first, first + ranks))) for first in range(0, world, ranks)]
        manager = make_buffers(name, rank, rank % ranks, ranks, CPU, groups[rank // ranks])
        results |= {f"{name} {ranks} {when}": held for when, held in run_manager(manager, rank).items()}
    return results


def run_manager(manager: BufferManager, rank: int) -> gloo_group.Results:
    """The buffers by step and layer."""
    results, layers = {}, range(len(SHAPES))
    assert [manager.register_tensor(shape, torch.float32) for shape in SHAPES] == list(layers)
    manager.create_buffer()
    assert manager.handles == [None] * len(SHAPES)
    for step, layer in itertools.product(range(ROUNDS), layers):
        handle, manager.handles[layer] = manager.handles[layer], None
        assert (handle is None) == (step == 0)
        if handle is not None:
            handle.wait()
            results[f"{step} {layer}"] = torch.stack(manager.get_buffer_list(layer))
        manager.enqueue(layer, content(rank, layer, step))
    for _ in range(2):  # the second time with nothing under way
        manager.clear()
        assert manager.handles == [None] * len(SHAPES)
    return results | {f"{ROUNDS} {layer}": torch.stack(manager.get_buffer_list(layer)) for layer in layers}


@pytest.fixture(scope="module")
def exchanged(tmp_path_factory) -> list[gloo_group.Results]:
    """Results of both managers (of ours where the other is missing), by rank."""
    names = [manager_name("native", CPU)] + ([manager_name("official", CPU)] if official_version() else [])
    return gloo_group.run(max(GROUPS), run_managers, tmp_path_factory.mktemp("managers"), names)


@pytest.mark.parametrize("step", range(1, ROUNDS + 1))  # the last one after `clear`
@pytest.mark.parametrize("ranks", GROUPS)
@pytest.mark.parametrize("manager", GATHERS)
def test_what_a_manager_holds_is_one_step_old(exchanged, manager, ranks, step):
    for rank, results in enumerate(exchanged):
        group = range(rank // ranks * ranks, (rank // ranks + 1) * ranks)
        for layer in range(len(SHAPES)):
            before = torch.stack([content(other, layer, step - 1) for other in group])
            assert torch.equal(results[f"{manager_name(manager, CPU)} {ranks} {step} {layer}"], before)


@pytest.mark.parametrize("manager", GATHERS)
def test_buffers_of_two_types_are_refused(manager):
    made = make_buffers(manager_name(manager, CPU), 0, 0, 1, CPU, None)
    made.register_tensor((2,), torch.float32)
    with pytest.raises((ValueError, AssertionError)) as refusal:  # distrifuser asserts
        made.register_tensor((2,), torch.float16)
    assert not isinstance(made, BufferManager) or tiny.sentences(str(refusal.value)) == 2


def test_the_name_of_a_manager_has_its_version():
    assert manager_name("native", CPU) == "native"
    assert manager_name("auto", CPU) == (f"distrifuser {official_version()}" if official_version() else "native")


# The codec.


def keys_and_values(tokens: int, dtype: torch.dtype) -> torch.Tensor:
    """Two items of three heads, which are small, middling and large."""
    kv = torch.randn(2, 2, tokens, 3, 16, generator=torch.Generator().manual_seed(0))
    return (kv * torch.tensor([1e-3, 1.0, 300.0]).view(-1, 1)).to(dtype)


def round_trip(codec: Codec, kv: torch.Tensor) -> torch.Tensor:
    encoded = codec.encode(kv)
    assert encoded.shape == codec.shape and encoded.dtype == codec.dtype
    out = torch.empty_like(kv)
    codec.decode(encoded, out)
    return out


@pytest.mark.parametrize("tokens", [7, 9])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_plain_buffers_keep_every_bit(tokens, dtype):
    kv = keys_and_values(tokens, dtype)
    assert torch.equal(round_trip(Codec(2, 9, 3, 16, dtype, False), kv), kv)


@pytest.mark.parametrize("tokens", [7, 9])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_fp8_buffers_are_within_a_sixteenth_for_heads_of_any_size(tokens, dtype):
    kv = keys_and_values(tokens, dtype)
    got, kv = round_trip(Codec(2, 9, 3, 16, dtype, True), kv).float(), kv.float()
    largest = kv.abs().amax(4, keepdim=True)
    rounding = 2.0**-4 + (2.0**-7 if dtype != torch.float32 else 2.0**-20)  # of e4m3's 3 bits, and of the dtype
    assert ((got - kv).abs() <= rounding * kv.abs() + 2.0**-9 * largest / 448 + 1e-12).all()
    for head in range(3):
        assert tiny.relative_error(got[:, :, :, head], kv[:, :, :, head]) < 0.04


def test_fp8_buffers_are_half_as_large():
    plain, fp8 = (Codec(1, 4096, 40, 128, torch.bfloat16, fp8) for fp8 in (False, True))
    nbytes = [torch.empty(codec.shape, dtype=codec.dtype, device="meta").nbytes for codec in (plain, fp8)]
    assert 0.5 < nbytes[1] / nbytes[0] < 0.52


def test_keys_of_zero_come_back_as_zero():
    kv = torch.zeros(2, 1, 5, 3, 16)
    assert torch.equal(round_trip(Codec(1, 5, 3, 16, torch.float32, True), kv), kv)


# Runs through a pool, and what they are compared with.


@pytest.mark.parametrize("manager", MANAGERS)
@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("overlap", [0, 8, 16])
@pytest.mark.parametrize("mode", SPLIT_MODES)
def test_a_run_is_that_of_the_reference(pool_of, spec, model, mode, overlap, ranks, manager):
    settings = replace(DEFAULT, split=PatchSplit(mode, 32, overlap), manager=manager)
    assert_like_the_reference(pool_of(ranks), spec, model, settings)


@pytest.mark.parametrize("size", [(4, 16, 8), (3, 9, 5), (4, 13, 2)], ids=str)
@pytest.mark.parametrize("batch, max_batch", [(2, 1), (2, 2), (3, 2)])
def test_batches_and_odd_sizes_are_those_of_the_reference(pool_of, spec, model, size, batch, max_batch):
    one_by_one = [slice(i, i + max_batch) for i in range(0, batch, max_batch)]
    settings = replace(DEFAULT, split=PatchSplit("spatiotemporal", 32, 8))
    got = sample(through(pool_of(4), replace(spec, max_batch=max_batch)), settings, batch, size)
    with torch.inference_mode():
        parts = [
            sample(Reference(model, 4, 8), settings, batch, size, items=items, schedule=Schedule())
            for items in one_by_one
        ]
    assert tiny.relative_error(got.last, torch.cat([part.last for part in parts])) <= 1e-5


@pytest.mark.parametrize("manager", MANAGERS)
def test_fp8_buffers_are_those_of_the_reference(pool_of, spec, model, manager):
    settings = replace(DEFAULT, split=PatchSplit("spatial", 32, 16), fp8_buffers=True, manager=manager)
    assert_like_the_reference(pool_of(4), spec, model, settings)


# As on the exact path.


@pytest.mark.parametrize("manager", MANAGERS)
@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("mode", SPLIT_MODES)
def test_without_stale_steps_every_bit_is_that_of_the_exact_path(pool_of, spec, mode, ranks, manager):
    forward = through(pool_of(ranks), spec)
    exact = sample(forward, None)
    settings = replace(DEFAULT, split=PatchSplit(mode, 32, 8), manager=manager)
    every_step = sample(forward, replace(settings, sync_frequency=1))
    long_warm_up = sample(forward, replace(settings, warmup_steps=STEPS, sync_frequency=10))
    assert every_step.kinds == "e" * STEPS and long_warm_up.kinds == "e" * (STEPS - 1) + "f"
    assert torch.equal(every_step.last, exact.last)
    assert torch.equal(long_warm_up.last, exact.last)


def test_warm_up_is_the_exact_path_bit_for_bit(pool_of, spec):
    forward = through(pool_of(4), spec)
    exact, displaced = sample(forward, None), sample(forward, replace(DEFAULT, warmup_steps=3))
    same = [torch.equal(a, b) for a, b in zip(exact.latents, displaced.latents, strict=True)]
    assert displaced.kinds == "eefsssfs" and same == [True] * 3 + [False] * 5


@pytest.mark.parametrize("mode, size", [("spatial", (3, 8, 6)), ("temporal", (2, 8, 6))])
def test_an_overlap_over_everything_is_the_exact_path(pool_of, spec, mode, size):
    forward = through(pool_of(2), spec)
    settings = replace(DEFAULT, split=PatchSplit(mode, 32, 32 if mode == "spatial" else 16))
    displaced = sample(forward, settings, size=size)
    assert displaced.kinds == "efsssfss"
    assert tiny.relative_error(displaced.last, sample(forward, None, size=size).last) <= 1e-6


def test_one_worker_runs_the_exact_path(pool_of, spec):
    forward = through(pool_of(1), spec)
    assert torch.equal(sample(forward, DEFAULT).last, sample(forward, None).last)


# Branches, groups, runs.


@pytest.mark.parametrize("max_batch", [1, 2])
def test_branches_of_one_forward_share_nothing(pool_of, spec, max_batch):
    forward = through(pool_of(2), replace(spec, max_batch=max_batch))
    both = sample(forward, DEFAULT, batch=2)
    for i in range(2):
        alone = sample(forward, DEFAULT, batch=2, items=slice(i, i + 1))
        assert tiny.relative_error(both.last[i : i + 1], alone.last) <= 1e-6


def test_branches_of_forwards_that_take_turns_share_nothing(pool_of, spec):
    forward, schedule = through(pool_of(2), spec), Schedule()
    alone = [sample(forward, DEFAULT, batch=2, items=slice(i, i + 1)).last for i in range(2)]
    _, _, context = tiny.inputs(size=UNEVEN, batch=2)
    latents = list(tiny.inputs(size=UNEVEN, batch=2).x.split(1))
    for step in range(STEPS):
        timestep = torch.full((1,), 1000 * (1 - step / STEPS))
        for i, x in enumerate(latents):
            part = schedule.plan(DEFAULT, "model", (f"branch {i}",), x, timestep)
            latents[i] = x - 0.05 * forward(x, timestep, context[i : i + 1], part)
    assert all(torch.equal(x, expected) for x, expected in zip(latents, alone, strict=True))


def test_data_parallel_groups_have_patches_of_their_own(pool_of, spec):
    grouped = sample(through(pool_of(4, data_parallel=2), spec), DEFAULT, batch=2)
    together = sample(through(pool_of(2), spec), DEFAULT, batch=2)
    assert "s" in grouped.kinds
    assert tiny.relative_error(grouped.last, together.last) <= 1e-6


def test_a_single_item_takes_all_groups(pool_of, spec, model):
    assert_like_the_reference(pool_of(4, data_parallel=2), spec, model, DEFAULT)


@pytest.mark.parametrize("settings", [DEFAULT, replace(DEFAULT, warmup_steps=1, sync_frequency=10)], ids=["2", "1"])
def test_a_run_that_begins_again_is_a_fresh_run(pool_of, spec, settings):
    forward, fresh = through(pool_of(4), spec), sample(through(pool_of(4), spec), settings)
    for steps in (1, 2, 5):
        schedule = Schedule()
        first = sample(forward, settings, steps=STEPS, schedule=schedule).latents[steps - 1]
        assert torch.equal(first, fresh.latents[steps - 1])
        again = sample(forward, settings, schedule=schedule)
        assert again.kinds == fresh.kinds and torch.equal(again.last, fresh.last)


def test_other_patches_and_sizes_alternate(pool_of, spec):
    forward = through(pool_of(4), spec)
    splits, sizes = [PatchSplit(mode, 32, 8) for mode in SPLIT_MODES], [UNEVEN, (4, 16, 4)]
    ways = [(replace(DEFAULT, split=split), size) for split in splits for size in sizes]
    schedule = Schedule()
    fresh = [sample(forward, settings, size=size).last for settings, size in ways]
    again = [sample(forward, settings, size=size, schedule=schedule).last for settings, size in ways]
    assert all(torch.equal(a, b) for a, b in zip(fresh, again, strict=True))


def test_trim_drops_the_buffers_and_the_next_run_is_right(pool_of, spec):
    pool = pool_of(2)
    fresh = sample(through(pool, spec), DEFAULT).last
    assert pool.status().exchanges
    pool.trim()
    assert torch.equal(sample(through(pool, spec), DEFAULT).last, fresh)


@pytest.mark.parametrize("manager", GATHERS)
def test_the_exchange_is_told(pool_of, spec, manager):
    pool, settings = pool_of(4), replace(DEFAULT, split=PatchSplit("spatial", 32, 0), manager=manager)
    assert sample(through(pool, spec), settings, steps=4).kinds[-1] == "s"
    longest = 2 * 5 * 3 * 2 * 256 * 4  # bytes of keys and values of two rows
    for exchange in pool.status().exchanges:
        assert exchange.manager == manager_name(manager, CPU)
        assert exchange.buffers == 2 * 4 * longest  # of two layers and four ranks
        assert exchange.received == 2 * 3 * longest
        assert exchange.seconds > 0 and exchange.waited >= 0


def test_host_memory_is_kept_for_the_next_run(pool_of, spec):
    pool, settings = pool_of(4), replace(DEFAULT, manager="host")
    fresh = sample(through(pool, spec), settings).last
    held = [exchange.buffers for exchange in pool.status().exchanges]
    pool.trim()
    assert torch.equal(sample(through(pool, spec), settings).last, fresh)
    assert torch.equal(sample(through(pool, spec), replace(settings, sync_frequency=2)).last, pairs(pool, spec).last)
    longest = 2 * 5 * 3 * 2 * 256 * 4  # bytes of keys and values of two rows
    assert held == [3 * 4 * longest] * 4  # three layers' on the way, of four ranks


def pairs(pool: Pool, spec: ModelSpec) -> Ran:
    """A run whose every other step is synchronous, by gathers."""
    return sample(through(pool, spec), replace(DEFAULT, sync_frequency=2))


# What goes wrong.


class Interrupted(BaseException):
    """As ComfyUI's, no Exception."""


def stale_plan(branch_ids: tuple[str, ...] = ("a",), **fields: object) -> Displaced:
    return replace(Displaced(STALE, "a run", branch_ids, DEFAULT.split, manager="native"), **fields)


def test_a_stale_step_without_a_step_before_is_refused(pool_of, spec, model):
    pool, given = pool_of(2), tiny.inputs(size=UNEVEN)
    pids = pool.worker_pids
    with pytest.raises(StaleError, match="no keys and values of the step before") as refusal:
        pool.forward(spec, *given, displaced=stale_plan())
    assert tiny.sentences(str(refusal.value)) == 2
    assert tiny.relative_error(pool.forward(spec, *given), model(*given)) <= 2e-6
    assert not pids or pool.worker_pids == pids


@pytest.mark.skipif(bool(official_version()), reason="distrifuser is installed")
def test_the_official_manager_is_refused_with_the_line_that_installs_it(pool_of, spec, model):
    pool, given = pool_of(2), tiny.inputs(size=UNEVEN)
    with pytest.raises(MissingPackage, match="pip install --no-deps git") as refusal:
        pool.forward(spec, *given, displaced=stale_plan(kind=FILL, run="another", manager="official"))
    assert "is not installed. Run: pip" in str(refusal.value)
    assert tiny.relative_error(pool.forward(spec, *given), model(*given)) <= 2e-6


def test_patches_that_cannot_be_cut_are_refused_and_the_pool_goes_on(pool_of, spec):
    pool = pool_of(4)
    forward, expected = through(pool, spec), sample(through(pool, spec), DEFAULT).last
    pids = pool.worker_pids
    for split in (PatchSplit("spatial", 128, 0), PatchSplit("spatial", 64, 0), PatchSplit("temporal", 32, 32)):
        with pytest.raises(PlanError) as refusal:
            sample(forward, replace(DEFAULT, split=split))
        assert tiny.sentences(str(refusal.value)) == 2
    assert torch.equal(sample(forward, DEFAULT).last, expected)
    assert pool.worker_pids == pids


@pytest.mark.parametrize("manager", ["native", "host"])
@pytest.mark.parametrize("kind", [FILL, STALE])
@pytest.mark.parametrize("overlap", [0, 16])
def test_a_run_after_one_that_was_cancelled_is_right(own_pool, spec, kind, overlap, manager):
    split = PatchSplit("spatial", 32, overlap)
    settings = PatchSettings(split, warmup_steps=1, sync_frequency=10, manager=manager)
    forward, schedule = through(own_pool, spec), Schedule()
    fresh = sample(forward, settings)
    pids, stopped = own_pool.worker_pids, []

    def interrupt() -> None:
        raise Interrupted

    def cancelled(x: torch.Tensor, timestep: torch.Tensor, context: torch.Tensor, part: Displaced) -> torch.Tensor:
        if part.kind != kind:
            return forward(x, timestep, context, part)
        stopped.append(pids[1])
        os.kill(pids[1], signal.SIGSTOP)  # a step that takes long
        return own_pool.forward(spec, x, timestep, context, poll=interrupt, displaced=part)

    for _ in range(2):
        with pytest.raises(Interrupted):
            sample(cancelled, settings, schedule=schedule)
        os.kill(stopped.pop(), signal.SIGCONT)
    again = sample(forward, settings, schedule=schedule)
    assert again.kinds == fresh.kinds and torch.equal(again.last, fresh.last)
    assert own_pool.worker_pids == pids


@pytest.mark.parametrize("manager", ["native", "host"])
def test_a_stale_step_after_one_that_was_given_up_is_refused(own_pool, spec, manager):
    """The schedule begins anew where it can tell; where it cannot, the workers do not mix two steps."""
    how = {"manager": manager, "run": f"a run of {manager}"}
    given, forward = tiny.inputs(size=UNEVEN), through(own_pool, spec)
    assert forward(*given, stale_plan(kind=FILL, **how)).isfinite().all()
    assert forward(*given, stale_plan(**how)).isfinite().all()
    os.kill(own_pool.worker_pids[1], signal.SIGSTOP)

    def interrupt() -> None:
        raise Interrupted

    with pytest.raises(Interrupted):
        own_pool.forward(spec, *given, poll=interrupt, displaced=stale_plan(kind=FILL, **how))
    time.sleep(0.5)  # until the launcher has passed the cancel on: the step would else end as if nobody had given it up
    os.kill(own_pool.worker_pids[1], signal.SIGCONT)
    with pytest.raises(StaleError, match="no keys and values of the step before"):
        forward(*given, stale_plan(**how))
    forward(*given, stale_plan(kind=FILL, **how))
    forward(*given, stale_plan(**how))


@pytest.mark.parametrize("manager", MANAGERS)
def test_a_worker_that_dies_in_a_gather_fails_the_run_and_the_next_one_is_right(own_pool, spec, manager):
    settings, killed = replace(DEFAULT, manager=manager), []
    forward, schedule = through(own_pool, spec), Schedule()
    fresh = sample(forward, settings)
    victim = own_pool.worker_pids[1]

    def kill() -> None:
        if not killed:
            killed.append(time.monotonic())
            os.kill(victim, signal.SIGKILL)

    def dying(x: torch.Tensor, timestep: torch.Tensor, context: torch.Tensor, part: Displaced) -> torch.Tensor:
        if part.kind != STALE:
            return forward(x, timestep, context, part)
        os.kill(victim, signal.SIGSTOP)  # the other one's gathers of this step stay under way
        return own_pool.forward(spec, x, timestep, context, poll=kill, displaced=part)

    with pytest.raises(WorkerDied, match="rank 1") as death:
        sample(dying, settings, schedule=schedule)
    assert time.monotonic() - killed[0] < 5
    assert tiny.sentences(str(death.value)) == 2
    again = sample(forward, settings, schedule=schedule)
    assert again.kinds == fresh.kinds and torch.equal(again.last, fresh.last)
    assert victim not in own_pool.worker_pids
