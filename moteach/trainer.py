"""The loop: sample, generate, route, score, resolve, step."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Literal, cast

import torch
from torch import Tensor

from moteach.checkpoint import Checkpoints, flatten_optimizer, restore_optimizer, restore_tensors, trained_tensors
from moteach.data.sampling import Sampler, StepFeedback
from moteach.errors import ConfigError, TrainingError
from moteach.learner import Learner
from moteach.objectives.balance import balance_metrics
from moteach.objectives.base import Scored, token_weights
from moteach.objectives.metrics import rollout_metrics, teacher_metrics, token_metrics
from moteach.objectives.mix import Mix, outcome_advantages
from moteach.rollouts.base import RolloutEngine
from moteach.routing.base import Router
from moteach.routing.metrics import routing_metrics
from moteach.students import Student
from moteach.teachers.base import Teacher
from moteach.teachers.failover import Failover
from moteach.teachers.gating import NoTeacherGate, TeacherGate
from moteach.teachers.pool import TeacherPool
from moteach.tracking.base import Tracker
from moteach.tracking.traces import Traces
from moteach.types import Evidence, LossOutput, Prompt, RolloutBatch, Routing, Support

Schedule = Literal["cosine", "linear", "constant"]


@dataclass(frozen=True, kw_only=True)
class TrainerSettings:
    """The numbers of the loop; `moteach.config.schema` says what each means."""

    max_steps: int
    support: Support = "full"
    k: int | None = None
    group_size: int = 1
    lr: float = 1e-3
    warmup_steps: int = 0
    schedule: Schedule = "cosine"
    final_lr_fraction: float = 0.0
    max_grad_norm: float = 1.0
    updates_per_step: int = 1
    gradient_cosine_every: int = 0
    checkpoint_every: int = 0

    def __post_init__(self) -> None:
        if self.updates_per_step < 1:
            raise ConfigError(f"updates_per_step: expected at least 1 update, got {self.updates_per_step}")

    def lr_at(self, step: int) -> float:
        """Learning rate of the update that takes `step` to `step + 1`: linear warm-up, then the schedule."""
        if step < self.warmup_steps:
            return self.lr * (step + 1) / self.warmup_steps
        if self.schedule == "constant":
            return self.lr
        done = (step - self.warmup_steps) / max(self.max_steps - self.warmup_steps - 1, 1)
        shape = 0.5 * (1 + math.cos(math.pi * done)) if self.schedule == "cosine" else 1 - done
        return self.lr * (self.final_lr_fraction + (1 - self.final_lr_fraction) * shape)


@dataclass
class Stopwatch:
    """Seconds spent in each part of a step."""

    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def __call__(self, part: str) -> Iterator[None]:
        """Adds the time of the block to `part`."""
        begin = time.perf_counter()
        yield
        self.seconds[part] = self.seconds.get(part, 0.0) + time.perf_counter() - begin

    def lap(self) -> dict[str, float]:
        """Returns `time/<part>` and `step_time` since the last lap, and starts over."""
        metrics = {f"time/{part}": value for part, value in self.seconds.items()}
        metrics["step_time"] = sum(self.seconds.values())
        self.seconds.clear()
        return metrics


@dataclass(kw_only=True)
class Trainer:
    """Multi-teacher on-policy distillation over four protocols: sampler, engine, router, objective.

    One step, as DeepSeek-V4 and MiMo-V2-Flash run it: the student writes its own completions, the router decides who
    teaches each of them, those teachers grade every token, the objective resolves them into one target, the student takes
    a gradient step. N teachers is the only path.
    """

    settings: TrainerSettings
    learner: Learner
    teachers: TeacherPool
    router: Router
    sampler: Sampler
    engine: RolloutEngine
    optimizer: torch.optim.Optimizer
    trackers: Sequence[Tracker]
    traces: Traces
    checkpoints: Checkpoints
    grade: Callable[[RolloutBatch], list[float]]
    """Verified score of each rollout, NaN where there is no verifier."""
    mix: Mix = field(default_factory=Mix)
    reference: Teacher | None = None
    """The model the student is held near to, with `mix.reference`."""
    answers: Callable[[Sequence[Prompt]], RolloutBatch | None] | None = None
    """Writes the prompts' own answers as completions, with `mix.supervised`."""
    teacher_gate: TeacherGate = field(default_factory=NoTeacherGate)
    """Who of the routed teachers may teach."""
    failover: Failover = field(default_factory=Failover)
    """What happens when a teacher fails."""
    identity: Mapping[str, Any] = field(default_factory=dict)
    """What must be the same on resume; saved with every checkpoint."""
    watch: Stopwatch = field(default_factory=Stopwatch)

    @property
    def student(self) -> Student:
        """The model that is trained."""
        return cast(Student, self.learner.student)

    def train(self, start: int = 0) -> None:
        """Runs the steps from `start` to `max_steps`.

        Raises:
            TrainingError: When the loss is not finite; the last checkpoint is in place.
        """
        self.engine.sync(self.student.model, version=start)
        for step in range(start, self.settings.max_steps):
            with self.watch("generate"):
                prompts = self.sampler.next(step)
                rollouts = self.engine.generate(prompts, step=step, group_size=self.settings.group_size)
            with self.watch("route"):
                routing = self.router.route([rollout.prompt for rollout in rollouts.rollouts], rollouts)
                routing = self.teacher_gate.admit(step, rollouts, routing)
            with self.watch("score"):
                evidence, routing = self.score(rollouts, routing)
            with self.watch("record"):
                rewards = self.grade(rollouts)
                self.teacher_gate.observe(rollouts, evidence, rewards)
            with self.watch("update"):
                output = self.update(step, rollouts, routing, evidence, rewards)
            self.engine.sync(self.student.model, version=step + 1)
            self.record(step + 1, rollouts, routing, evidence, rewards, output)
            if self.checkpoint_due(step + 1):
                self.save(step + 1)

    def score(self, rollouts: RolloutBatch, routing: Routing) -> tuple[Evidence, Routing]:
        """Asks the teachers; the routing comes back without those that failed."""
        return self.failover.score(self.teachers, rollouts, routing, support=self.settings.support, k=self.settings.k)

    def update(
        self, step: int, rollouts: RolloutBatch, routing: Routing, evidence: Evidence, rewards: Sequence[float]
    ) -> LossOutput:
        """Takes the optimizer steps of one batch: `updates_per_step`, each on its own share of the rows."""
        if not evidence.teachers and self.mix == Mix():
            return LossOutput(loss=torch.zeros(()), denominator=1.0, metrics={"skipped_step": 1.0})
        self.student.train()
        scored = self.scored(rollouts, routing, evidence, rewards)
        count = min(self.settings.updates_per_step, len(rollouts))
        if count > 1 and getattr(self.learner.objective, "needs_proximal", False):
            scored = replace(scored, proximal_logprobs=self.learner.proximal_logprobs(rollouts))
        metrics: dict[str, float] = {}
        every = self.settings.gradient_cosine_every
        if every and step % every == 0:
            metrics = self.learner.domain_gradients(scored)
        outputs, places = [], []
        # strided, because rows come domain by domain
        for rows in (range(first, len(rollouts), count) for first in range(count)):
            part = scored if count == 1 else self._share(scored, rows)
            outputs.append(self.optimize(step, part))
            places.append(scored.kept(rows))
        joined = _joined(outputs, places)
        return replace(joined, metrics={**joined.metrics, **metrics})

    def scored(self, rollouts: RolloutBatch, routing: Routing, evidence: Evidence, rewards: Sequence[float]) -> Scored:
        """Joins what the teachers said with what is mixed into their loss."""
        scored = Scored.of(rollouts, routing, evidence, normalise=self.learner.objective.normalise)
        if self.mix.outcome > 0:
            advantages = outcome_advantages(rollouts, rewards, self.mix)
            if self.teacher_gate.unverified == "outcome":
                advantages = advantages * routing.abstained[rollouts.token_rows]
            scored = replace(scored, outcome_advantages=advantages)
        if self.mix.reference > 0 and self.reference is not None:
            said = self.reference.score(rollouts, support="full")
            scored = replace(scored, reference=Evidence(teachers=(said,), num_tokens=rollouts.num_tokens))
        return scored

    def optimize(self, step: int, scored: Scored) -> LossOutput:
        """Takes one optimizer step, micro-batch by micro-batch; the gradients add up exactly.

        Raises:
            TrainingError: When the loss or its gradient is not finite; the weights are as they were.
        """
        self.optimizer.zero_grad(set_to_none=True)
        output = self.learner.loss(scored)
        metrics: dict[str, float] = {}
        if self.mix.supervised > 0 and self.answers is not None:
            gold = self.answers([rollout.prompt for rollout in scored.rollouts.rollouts])
            metrics["supervised_loss"] = 0.0 if gold is None else self.learner.supervised(gold, self.mix.supervised)
        grad_norm = torch.nn.utils.clip_grad_norm_(self.student.parameters(), self.settings.max_grad_norm)
        for name, value in (("loss", output.loss), ("norm of the gradient", grad_norm)):
            if not bool(torch.isfinite(value)):
                raise TrainingError(
                    f"the {name} of step {step + 1} is {float(value)}; a step would destroy the weights. The last "
                    "checkpoint is in place: lower optim.lr, or choose a bounded divergence (divergence=jsd)"
                )
        lr = self.settings.lr_at(step)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()
        metrics |= {"grad_norm": float(grad_norm), "learning_rate": lr}
        return replace(output, metrics={**output.metrics, **metrics})

    @torch.no_grad()
    def held_out_divergence(self, prompts: Sequence[Prompt]) -> dict[str, float]:
        """Mean per-token divergence of the student to its routed teachers, on its own samples of held-out prompts.

        Returns:
            Nats per token under `mean` and under each domain.
        """
        rollouts = self.engine.generate(prompts, step=self.settings.max_steps)
        routing = self.router.route([rollout.prompt for rollout in rollouts.rollouts], rollouts)
        evidence, routing = self.score(rollouts, routing)
        scored = Scored.of(rollouts, routing, evidence, normalise=self.learner.objective.normalise)
        found = token_metrics(rollouts, self.learner.loss(scored, weigh=False).token_stats)
        domains = {key.partition("/")[2]: value for key, value in found.items() if key.startswith("divergence/")}
        return {"mean": found["divergence"], **domains}

    def _share(self, scored: Scored, rows: Sequence[int]) -> Scored:
        """The rows of one of several updates, weighted as a batch of their own."""
        part = scored.select(rows)
        weights = token_weights(part.rollouts, self.learner.objective.normalise)
        return replace(part, base_weights=weights, token_weights=weights)

    def record(
        self,
        step: int,
        rollouts: RolloutBatch,
        routing: Routing,
        evidence: Evidence,
        rewards: Sequence[float],
        output: LossOutput,
    ) -> None:
        """Tells the sampler what the step showed, and writes the step's metrics and traces."""
        with self.watch("record"):
            of_tokens = token_metrics(rollouts, output.token_stats)
            self.sampler.observe(_feedback(step, rollouts, rewards, of_tokens))
            metrics = {
                "loss": float(output.loss),
                **of_tokens,
                **rollout_metrics(rollouts, rewards),
                **routing_metrics(routing),
                **teacher_metrics(evidence),
                **self.teacher_gate.metrics(),
                **self.failover.metrics(self.teachers.teacher_ids),
                **self.sampler.metrics(),
                **output.metrics,
            }
            if "weight" in output.token_stats:
                before = token_weights(rollouts, self.learner.objective.normalise)
                metrics |= balance_metrics(rollouts, output.token_stats, before, output.token_stats["weight"])
            self.traces.record(step, rollouts, routing, rewards)
        metrics.update(self.watch.lap())
        for tracker in self.trackers:
            tracker.log(step, metrics)

    def checkpoint_due(self, step: int) -> bool:
        """True every `checkpoint_every` steps and after the last one."""
        every = self.settings.checkpoint_every
        return step == self.settings.max_steps or (every > 0 and step % every == 0)

    def save(self, step: int) -> None:
        """Flushes the traces, then writes a checkpoint with everything the next step depends on."""
        self.traces.flush(step)
        buffers, groups = flatten_optimizer(self.optimizer)
        state = {
            "step": step,
            "identity": dict(self.identity),
            "optimizer_groups": groups,
            "sampler": self.sampler.state_dict(),
            "router": self.router.state_dict(),
            "balance": self.learner.balance.state_dict(),
            "teacher_gate": self.teacher_gate.state_dict(),
        }
        tensors = {
            "student": trained_tensors(self.student),
            "optimizer": buffers,
            "rng": {"torch": torch.get_rng_state()},
        }
        self.checkpoints.save(step, tensors=tensors, state=state)

    def resume(self, step: int) -> None:
        """Restores the checkpoint of `step`."""
        tensors, state = self.checkpoints.load(step)
        restore_tensors(self.student, tensors["student"])
        restore_optimizer(self.optimizer, tensors.get("optimizer", {}), state["optimizer_groups"])
        torch.set_rng_state(tensors["rng"]["torch"])
        self.sampler.load_state_dict(state["sampler"])
        self.router.load_state_dict(state["router"])
        self.learner.balance.load_state_dict(state["balance"])
        self.teacher_gate.load_state_dict(state["teacher_gate"])


def _joined(outputs: Sequence[LossOutput], places: Sequence[Tensor]) -> LossOutput:
    """Means of the updates' losses and metrics, and their per-token values in the packed order of the whole batch."""
    stats: dict[str, Tensor] = {}
    for output, kept in zip(outputs, places, strict=True):
        for name, values in output.token_stats.items():
            stats.setdefault(name, values.new_zeros(len(kept)))[kept] = values
    names = dict.fromkeys(name for output in outputs for name in output.metrics)
    found = {name: [output.metrics[name] for output in outputs if name in output.metrics] for name in names}
    return LossOutput(
        loss=torch.stack([output.loss for output in outputs]).mean(),
        denominator=1.0,
        token_stats=stats,
        metrics={name: sum(values) / len(values) for name, values in found.items()},
    )


def _feedback(
    step: int, rollouts: RolloutBatch, rewards: Sequence[float], metrics: Mapping[str, float]
) -> StepFeedback:
    """What a sampler learns from a step."""
    graded: dict[str, list[float]] = {}
    for rollout, reward in zip(rollouts.rollouts, rewards, strict=True):
        if not math.isnan(reward):
            graded.setdefault(rollout.prompt.prompt_id, []).append(reward)
    divergence = {name.partition("/")[2]: value for name, value in metrics.items() if name.startswith("divergence/")}
    return StepFeedback(step=step, divergence=divergence, rewards=graded)
