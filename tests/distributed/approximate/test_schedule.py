"""Which steps of a sampling run may use what the step before left behind, and what starts a run anew."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from wan_parallel.distributed.approximate.schedule import PatchSettings, Schedule
from wan_parallel.distributed.plan.degrees import PatchSplit
from wan_parallel.distributed.protocol.requests import Displaced

LETTERS = {"exact": "e", "fill": "f", "stale": "s"}
SETTINGS = PatchSettings(warmup_steps=3, sync_frequency=4)
NOISE = torch.randn(1, 16, 3, 6, 8, generator=torch.Generator().manual_seed(0))
OTHER = torch.randn(1, 16, 3, 6, 8, generator=torch.Generator().manual_seed(1))


class Run:
    """A sampler that asks a schedule before each step; its latent moves a little from step to step."""

    def __init__(self, schedule: Schedule, settings: PatchSettings = SETTINGS, branch_ids: tuple[str, ...] = ("a",)):
        self.schedule, self.settings, self.branch_ids = schedule, settings, branch_ids
        self.x, self.sigma, self.state = NOISE, 1.0, "model"
        self.plans: list[Displaced] = []

    def step(self, count: int = 1) -> str:
        """Take steps; one letter for each."""
        first = len(self.plans)
        for _ in range(count):
            timestep = torch.full((len(self.x),), 1000 * self.sigma)
            self.plans.append(self.schedule.plan(self.settings, self.state, self.branch_ids, self.x, timestep))
            self.x, self.sigma = 0.9 * self.x, self.sigma - 0.03
        return "".join(LETTERS[plan.kind] for plan in self.plans[first:])


@pytest.mark.parametrize(
    "warmup, sync, expected",
    [
        (4, 10, "eeefsssssssssfssssss"),
        (1, 10, "fsssssssssfsssssssss"),
        (0, 10, "fssssssssfsssssssssf"),  # a first step has nothing to use
        (3, 4, "eefsssfsssfsssfsssfs"),
        (2, 2, "efsfsfsfsfsfsfsfsfsf"),
        (4, 1, "e" * 20),
        (30, 10, "e" * 20),
        (20, 10, "e" * 19 + "f"),
    ],
)
def test_warm_up_and_frequency(warmup, sync, expected):
    assert Run(Schedule(), PatchSettings(warmup_steps=warmup, sync_frequency=sync)).step(20) == expected


@pytest.mark.parametrize("warmup", range(0, 7))
def test_every_stale_step_follows_a_stale_one_or_a_fill_and_a_fill_is_never_for_nothing(warmup):
    for sync in range(1, 11):
        kinds = Run(Schedule(), PatchSettings(warmup_steps=warmup, sync_frequency=sync)).step(30)
        for before, now in zip("e" + kinds, kinds, strict=False):
            assert now != "s" or before in "fs", (sync, kinds)
            assert before != "f" or now == "s", (sync, kinds)
        assert "s" not in kinds[: max(1, warmup)], sync
        assert sync > 1 or "s" not in kinds


def test_the_plan_carries_what_the_workers_need():
    settings = PatchSettings(PatchSplit("temporal", 96, 8), 1, 10, True, "native")
    plan = Schedule().plan(settings, "model", ("a", "b"), NOISE.expand(2, -1, -1, -1, -1), torch.tensor([1.0, 1.0]))
    assert (plan.split, plan.fp8_buffers, plan.manager) == (settings.split, True, "native")
    assert plan.branch_ids == ("a", "b") and plan.kind == "fill" and plan.run


def test_the_last_step_is_told():
    run = Run(Schedule())
    assert run.schedule.last is None
    run.step(4)
    assert (run.schedule.last.index, run.schedule.last.kind, run.schedule.last.synchronous) == (3, "stale", False)


# What starts anew.


def restarted(run: Run) -> bool:
    return run.step(4) == "eefs"


def test_a_step_back_in_noise_starts_anew():
    run = Run(Schedule())
    assert run.step(5) == "eefss"
    run.sigma = 1.0
    assert restarted(run)


def test_another_latent_starts_anew():
    run = Run(Schedule())
    run.step(5)
    run.x = OTHER
    assert restarted(run)


def test_the_same_latent_at_the_same_noise_starts_anew():
    """A run that was cancelled in its first step, and queued again."""
    for steps in (1, 2, 3):
        run = Run(Schedule())
        run.step(steps - 1)
        x, sigma = run.x, run.sigma
        run.step()
        run.x, run.sigma = x, sigma
        assert restarted(run), steps


def test_another_resolution_starts_anew():
    run = Run(Schedule())
    run.step(5)
    run.x = torch.cat([run.x, run.x], dim=-1)
    assert restarted(run)


def test_another_state_starts_anew_with_buffers_of_its_own():
    run = Run(Schedule())
    run.step(5)
    run.state = "the low-noise expert"
    assert restarted(run)
    assert run.plans[4].run != run.plans[5].run == run.plans[6].run


def test_other_settings_start_anew():
    run = Run(Schedule())
    run.step(5)
    run.settings = replace(SETTINGS, split=PatchSplit("temporal"))
    assert restarted(run)


def test_restart_forgets_the_run():
    run = Run(Schedule())
    run.step(5)
    run.schedule.restart()
    assert restarted(run)
    assert run.plans[4].run != run.plans[5].run


def test_two_schedules_have_runs_of_their_own():
    one, two = Run(Schedule()), Run(Schedule())
    one.step(), two.step()
    assert one.plans[0].run != two.plans[0].run


def test_a_sampler_that_asks_twice_at_one_noise_level_goes_on():
    """Heun's second evaluation, with a latent that is a little different."""
    run = Run(Schedule())
    run.step(4)
    run.sigma += 0.03
    assert run.step(2) == "ss"


# Branches.


def test_two_branches_that_take_turns_do_not_disturb_each_other():
    schedule = Schedule()
    positive, negative = Run(schedule, branch_ids=("positive",)), Run(schedule, branch_ids=("negative",))
    for expected in "eefsssfsssf":
        assert positive.step() == negative.step() == expected
    assert {plan.run for plan in positive.plans} == {plan.run for plan in negative.plans}


def test_a_branch_that_joins_late_warms_up_by_itself():
    schedule = Schedule()
    positive, negative = Run(schedule, branch_ids=("positive",)), Run(schedule, branch_ids=("negative",))
    assert positive.step(5) == "eefss"
    assert negative.step(4) == "eefs"
    assert positive.step() == "s"
