"""The loop: sample, generate, route, score, resolve, step."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch

from moteach.checkpoint import Checkpoints, flatten_optimizer, restore_optimizer, restore_tensors, trained_tensors
from moteach.data.sampling import Sampler
from moteach.errors import ConfigError, TrainingError
from moteach.objectives.base import Objective, token_weights
from moteach.objectives.metrics import rollout_metrics, teacher_metrics, token_metrics
from moteach.rollouts.base import RolloutEngine
from moteach.routing.base import Router
from moteach.routing.metrics import routing_metrics
from moteach.students import Student
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
    micro_batch_size: int | None = None
    checkpoint_every: int = 0

    def __post_init__(self) -> None:
        if self.micro_batch_size is not None and self.micro_batch_size < 1:
            raise ConfigError(f"micro_batch_size: expected at least 1 row, got {self.micro_batch_size}")

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
    student: Student
    teachers: TeacherPool
    router: Router
    objective: Objective
    sampler: Sampler
    engine: RolloutEngine
    optimizer: torch.optim.Optimizer
    trackers: Sequence[Tracker]
    traces: Traces
    checkpoints: Checkpoints
    grade: Callable[[RolloutBatch], list[float]]
    """Verified score of each rollout, NaN where there is no verifier."""
    identity: Mapping[str, Any] = field(default_factory=dict)
    """What must be the same on resume; saved with every checkpoint."""
    watch: Stopwatch = field(default_factory=Stopwatch)

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
            with self.watch("score"):
                evidence = self.teachers.score(rollouts, routing, support=self.settings.support, k=self.settings.k)
            with self.watch("update"):
                output = self.update(step, rollouts, routing, evidence)
            self.engine.sync(self.student.model, version=step + 1)
            self.record(step + 1, rollouts, routing, evidence, output)
            if self.checkpoint_due(step + 1):
                self.save(step + 1)

    def update(self, step: int, rollouts: RolloutBatch, routing: Routing, evidence: Evidence) -> LossOutput:
        """Takes one optimizer step on the batch, micro-batch by micro-batch; the gradients add up exactly."""
        if not evidence.teachers:
            return LossOutput(loss=torch.zeros(()), denominator=1.0, metrics={"skipped_step": 1.0})
        self.student.train()
        self.optimizer.zero_grad(set_to_none=True)
        output = self.forward(rollouts, routing, evidence)
        if not bool(torch.isfinite(output.loss)):
            raise TrainingError(
                f"the loss of step {step + 1} is {float(output.loss)}; a step would destroy the weights. The last "
                "checkpoint is in place: lower optim.lr, or choose a bounded divergence (divergence=jsd)"
            )
        grad_norm = torch.nn.utils.clip_grad_norm_(self.student.parameters(), self.settings.max_grad_norm)
        lr = self.settings.lr_at(step)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()
        return replace(output, metrics={"grad_norm": float(grad_norm), "learning_rate": lr})

    def forward(self, rollouts: RolloutBatch, routing: Routing, evidence: Evidence) -> LossOutput:
        """Computes the loss of the batch micro-batch by micro-batch, accumulating gradients where they are enabled."""
        weights = token_weights(rollouts, self.objective.normalise)
        token_rows = rollouts.token_rows
        outputs = []
        for rows in self.micro_batches(len(rollouts)):
            kept = (token_rows >= rows.start) & (token_rows < rows.stop)
            if not bool(kept.any()):
                continue
            output = self.objective(
                self.student, rollouts.select(rows), routing.select(rows), evidence.select(kept), weights[kept]
            )
            if output.loss.requires_grad:
                output.loss.backward()  # type: ignore[no-untyped-call]
            outputs.append(output)
        return _joined(outputs)

    @torch.no_grad()
    def held_out_divergence(self, prompts: Sequence[Prompt]) -> dict[str, float]:
        """Mean per-token divergence of the student to its routed teachers, on its own samples of held-out prompts.

        Returns:
            Nats per token under `mean` and under each domain.
        """
        rollouts = self.engine.generate(prompts, step=self.settings.max_steps)
        routing = self.router.route([rollout.prompt for rollout in rollouts.rollouts], rollouts)
        evidence = self.teachers.score(rollouts, routing, support=self.settings.support, k=self.settings.k)
        output = self.forward(rollouts, routing, evidence)
        found = token_metrics(rollouts, output.token_stats)
        domains = {key.partition("/")[2]: value for key, value in found.items() if key.startswith("divergence/")}
        return {"mean": found["divergence"], **domains}

    def micro_batches(self, rows: int) -> list[range]:
        """Splits the rows of a batch into consecutive ranges."""
        size = self.settings.micro_batch_size or max(rows, 1)
        return [range(begin, min(begin + size, rows)) for begin in range(0, rows, size)]

    def record(
        self, step: int, rollouts: RolloutBatch, routing: Routing, evidence: Evidence, output: LossOutput
    ) -> None:
        """Writes the step's metrics and traces."""
        with self.watch("record"):
            rewards = self.grade(rollouts)
            metrics = {
                "loss": float(output.loss),
                **token_metrics(rollouts, output.token_stats),
                **rollout_metrics(rollouts, rewards),
                **routing_metrics(routing),
                **teacher_metrics(evidence),
                **output.metrics,
            }
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


def _joined(outputs: Sequence[LossOutput]) -> LossOutput:
    """Adds the losses of micro-batches and joins their per-token values, which are in packed order already."""
    names = outputs[0].token_stats.keys()
    return LossOutput(
        loss=torch.stack([output.loss.detach() for output in outputs]).sum(),
        denominator=outputs[0].denominator,
        token_stats={name: torch.cat([output.token_stats[name] for output in outputs]) for name in names},
    )
