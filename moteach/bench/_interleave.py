"""One run of the trainer in which every step is followed by a step of the floor on the same prompts."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from moteach.bench._floor import Floor, FloorStep
from moteach.catalogue.spec import ExpertSpec
from moteach.routing.base import Router
from moteach.trainer import Trainer
from moteach.types import Prompt, RolloutBatch, Routing


@dataclass(frozen=True, kw_only=True)
class Pair:
    """One step of each arm."""

    seconds: Mapping[str, float]
    """Parts of moteach's step; `other` is what its own stopwatch does not see."""
    total: float
    """Wall seconds of moteach's step, from the end of the floor's last one."""
    tokens: int
    floor: FloorStep


@dataclass(kw_only=True)
class RouterTap:
    """Passes everything on to the run's router, and remembers the last batch."""

    router: Router
    rollouts: RolloutBatch | None = None
    routing: Routing | None = None
    merged: bool = False
    """Whether any row had more than one teacher so far."""

    def bind(self, experts: Sequence[ExpertSpec]) -> None:
        """Passes the experts on."""
        self.router.bind(experts)

    def route(self, prompts: Sequence[Prompt], rollouts: RolloutBatch | None = None) -> Routing:
        """Routes, and keeps what was routed."""
        self.routing = self.router.route(prompts, rollouts)
        self.rollouts = rollouts
        self.merged = self.merged or bool(((self.routing.weights > 0).sum(dim=1) > 1).any())
        return self.routing

    def state_dict(self) -> dict[str, Any]:
        """State of the run's router."""
        return self.router.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores the run's router."""
        self.router.load_state_dict(state)

    def batch(self) -> tuple[list[tuple[int, ...]], dict[str, Int[Tensor, " row"]], int]:
        """Returns the last batch as the floor takes it: prompts, rows of each teacher, longest completion."""
        assert self.rollouts is not None, "nothing was routed"
        assert self.routing is not None, "nothing was routed"
        chosen = self.routing.weights.argmax(dim=1).masked_fill(self.routing.abstained, -1)
        rows = {name: (chosen == i).nonzero(as_tuple=True)[0] for i, name in enumerate(self.routing.teacher_ids)}
        rollouts = self.rollouts.rollouts
        return (
            [rollout.prompt.token_ids for rollout in rollouts],
            {name: own for name, own in rows.items() if len(own)},
            max(len(rollout.completion_ids) for rollout in rollouts),
        )


@dataclass(kw_only=True)
class FloorTracker:
    """A tracker, the last of the run, that takes a step of the floor whenever moteach has finished one."""

    trainer: Trainer
    floor: Floor
    tap: RouterTap
    pairs: list[Pair] = field(default_factory=list)
    _begin: float = 0.0

    def start(self, *, run_dir: Path, config: Mapping[str, Any], step: int) -> None:
        """Starts the clock."""
        del run_dir, config, step
        self._begin = time.perf_counter()

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Closes moteach's step, takes the floor's, and starts the clock again."""
        total = time.perf_counter() - self._begin
        parts = {name.removeprefix("time/"): value for name, value in metrics.items() if name.startswith("time/")}
        parts["other"] = total - sum(parts.values())
        floor = self.floor_step(step)
        self.pairs.append(Pair(seconds=parts, total=total, tokens=int(metrics["num_tokens"]), floor=floor))
        self._begin = time.perf_counter()

    def floor_step(self, step: int) -> FloorStep:
        """Takes a step of the floor on the last batch, with the learning rate that moteach had for it."""
        prompts, rows_of, longest = self.tap.batch()
        return self.floor.step(prompts, rows_of, max_new_tokens=longest, lr=self.trainer.settings.lr_at(step - 1))

    def finish(self, summary: Mapping[str, Any]) -> None:
        """Nothing to close."""
        del summary


def one_step(trainer: Trainer, step: int) -> None:
    """Takes one step of moteach that is neither recorded nor saved."""
    rollouts = trainer.engine.generate(trainer.sampler.next(step), step=step, group_size=trainer.settings.group_size)
    routing = trainer.router.route([rollout.prompt for rollout in rollouts.rollouts], rollouts)
    evidence = trainer.teachers.score(rollouts, routing, support=trainer.settings.support, k=trainer.settings.k)
    trainer.update(step, rollouts, routing, evidence, trainer.grade(rollouts))
    trainer.engine.sync(trainer.student.model, version=step + 1)


def plain_adamw(parameters: Any, like: torch.optim.Optimizer) -> torch.optim.AdamW:
    """Makes an AdamW with the numbers of another."""
    return torch.optim.AdamW(parameters, **{key: like.defaults[key] for key in ("lr", "betas", "eps", "weight_decay")})
