"""What both trainings share: the clock, the optimiser with its schedule, and the state to resume from."""

from __future__ import annotations

import argparse
import copy
import logging
import math
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from .files import load_state, save_state

log = logging.getLogger(__name__)

STATE_SECONDS = 120.0
LOG_SECONDS = 30.0


@dataclass(frozen=True)
class Recipe:
    """The numbers of one training."""

    learning_rate: float
    betas: tuple[float, float]
    weight_decay: float
    warmup_steps: int
    average: float  # decay of the weights' moving average
    clip: float = 1.0
    last_rate: float = 0.01  # of learning_rate, at the end


class Clock:
    """Time of this run and of those before it. The share of the whole that is over drives the schedules."""

    def __init__(self, arguments: argparse.Namespace):
        self._start = time.monotonic()
        seconds = 60 * arguments.minutes
        if arguments.until is not None:
            seconds = min(seconds, arguments.until - time.time())
        self.seconds = max(seconds, 1.0)
        self.spent_before = 0.0
        self._total = 60 * arguments.total_minutes

    @property
    def elapsed(self) -> float:
        return time.monotonic() - self._start

    @property
    def spent(self) -> float:
        return self.spent_before + self.elapsed

    @property
    def over(self) -> bool:
        return self.elapsed >= self.seconds

    @property
    def progress(self) -> float:
        """0 at the start of the first run, 1 at the end of the last."""
        return min(1.0, self.spent / max(self._total, self.spent_before + self.seconds))


class Every:
    """True once in so many seconds."""

    def __init__(self, seconds: float):
        self.seconds, self._last = seconds, time.monotonic()

    def __call__(self) -> bool:
        if time.monotonic() - self._last < self.seconds:
            return False
        self._last = time.monotonic()
        return True


class Trainer:
    """A model, its optimiser, the moving average of its weights, and the state file."""

    def __init__(self, model: nn.Module, recipe: Recipe, clock: Clock, state: Path, device: torch.device):
        self.model, self.recipe, self.clock, self.state = model, recipe, clock, state
        self.average = copy.deepcopy(model).eval().requires_grad_(False)
        self.optimizer = torch.optim.AdamW(
            model.parameters(), recipe.learning_rate, recipe.betas, weight_decay=recipe.weight_decay,
            fused=device.type == "cuda",
        )  # fmt: skip
        self.steps = 0
        if state.is_file():
            self._resume()

    def step(self, loss: torch.Tensor) -> None:
        """One update of the weights and of their average."""
        for group in self.optimizer.param_groups:
            group["lr"] = self._rate()
        loss.backward()
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), self.recipe.clip)
        if norm.isfinite():
            self.optimizer.step()
        else:
            log.warning("step %d has a gradient that is not finite and is left out", self.steps)
        self.optimizer.zero_grad(set_to_none=True)
        self.steps += 1
        decay = min(self.recipe.average, (1 + self.steps) / (10 + self.steps))
        with torch.no_grad():
            for average, current in zip(self.average.parameters(), self.model.parameters(), strict=True):
                average.lerp_(current, 1 - decay)

    def _rate(self) -> float:
        """Linear warm-up in steps, then half a cosine over the time."""
        recipe = self.recipe
        cosine = 0.5 * (1 + math.cos(math.pi * self.clock.progress))
        warmup = min(1.0, (self.steps + 1) / recipe.warmup_steps)
        return recipe.learning_rate * warmup * (recipe.last_rate + (1 - recipe.last_rate) * cosine)

    def save(self) -> None:
        moments = {
            f"{index}.{key}": value
            for index, entry in self.optimizer.state_dict()["state"].items()
            for key, value in entry.items()
        }
        groups = {"model": self.model.state_dict(), "average": self.average.state_dict(), "moments": moments}
        save_state(self.state, groups, {"steps": self.steps, "seconds": self.clock.spent})

    def _resume(self) -> None:
        groups, facts = load_state(self.state)
        self.model.load_state_dict(groups["model"])
        self.average.load_state_dict(groups["average"])
        saved = self.optimizer.state_dict()
        for name, value in groups["moments"].items():
            index, key = name.split(".", 1)
            saved["state"].setdefault(int(index), {})[key] = value
        self.optimizer.load_state_dict(saved)
        self.steps, self.clock.spent_before = int(facts["steps"]), float(facts["seconds"])
        log.info("goes on after %d steps and %.0f s", self.steps, self.clock.spent_before)


def facts_of(trainer: Trainer, arguments: argparse.Namespace, device: torch.device) -> dict[str, object]:
    """What a shipped file says about its training."""
    return {
        "training_steps": trainer.steps,
        "training_seconds": round(trainer.clock.spent),
        "training_device": torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU",
        "training_commit": arguments.commit,
        "data_seed": arguments.seed,
        "torch": torch.__version__,
    }
