"""The loop: sample, generate, route, score, resolve, step."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import Any, cast

import torch
from torch import Tensor

from moteach.checkpoint import Checkpoints
from moteach.data.feedback import feedback_of
from moteach.data.sampling import Sampler
from moteach.distributed import Ranks, full
from moteach.errors import TrainingError
from moteach.gathering import Whole, gather_whole, join_outputs
from moteach.learner import Learner
from moteach.objectives.balance import balance_metrics
from moteach.objectives.base import Scored, token_weights
from moteach.objectives.conditioning import Conditioning
from moteach.objectives.gating import gate_metrics, trace_of
from moteach.objectives.lessons import GateLessons
from moteach.objectives.metrics import rollout_metrics, staleness_metrics, teacher_metrics, token_metrics
from moteach.objectives.mix import Mix, outcome_advantages
from moteach.rollouts.base import RolloutEngine
from moteach.routing.base import ObservingRouter, Router, RoutingFeedback
from moteach.routing.metrics import routing_metrics
from moteach.saving import resume, save
from moteach.settings import TrainerSettings
from moteach.sharding import whole
from moteach.students import Student
from moteach.teachers.base import Teacher
from moteach.teachers.failover import Failover
from moteach.teachers.following import follow
from moteach.teachers.gating import NoTeacherGate, TeacherGate
from moteach.teachers.pool import TeacherPool
from moteach.teachers.reuse import ReusingTeachers
from moteach.tracking.base import Tracker
from moteach.tracking.stopwatch import Stopwatch
from moteach.tracking.traces import Traces
from moteach.types import Evidence, LossOutput, Prompt, RolloutBatch, Routing


@dataclass(kw_only=True)
class Trainer:
    """Multi-teacher on-policy distillation over four protocols: sampler, engine, router, objective.

    One step, as DeepSeek-V4 and MiMo-V2-Flash run it: the student writes its own completions, the router decides who
    teaches each of them, those teachers grade every token, the objective resolves them into one target, the student takes
    a gradient step. N teachers is the only path.
    """

    settings: TrainerSettings
    learner: Learner
    teachers: TeacherPool | ReusingTeachers
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
    """The model the student is held near to, with `mix.reference`; also what shifts are added to."""
    answers: Callable[[Sequence[Prompt]], RolloutBatch | None] | None = None
    """Writes the prompts' own answers as completions, with `mix.supervised`."""
    conditioning: Conditioning | None = None
    """Weights the teachers by right answers, for a resolver that needs them."""
    lessons: GateLessons | None = None
    """What a gate that learns is taught with."""
    teacher_gate: TeacherGate = field(default_factory=NoTeacherGate)
    """Who of the routed teachers may teach."""
    failover: Failover = field(default_factory=Failover)
    """What happens when a teacher fails."""
    identity: Mapping[str, Any] = field(default_factory=dict)
    """What must be the same on resume; saved with every checkpoint."""
    watch: Stopwatch = field(default_factory=Stopwatch)

    @property
    def ranks(self) -> Ranks:
        """The processes that train the student together."""
        return self.learner.ranks

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
                rollouts = self.write(self.sampler.next(step), step=step, group_size=self.settings.group_size)
            with self.watch("record"):
                rewards = self.grade(rollouts)
            with self.watch("route"):
                routing = self.router.route([rollout.prompt for rollout in rollouts.rollouts], rollouts)
                routing = self.teacher_gate.admit(step, rollouts, routing)
                routing, notes = self.condition(rollouts, routing, rewards)
            with self.watch("score"):
                evidence, routing = self.score(rollouts, routing)
                self.teacher_gate.observe(rollouts, evidence, rewards)
            with self.watch("update"):
                output = self.update(step, rollouts, routing, evidence, rewards)
                output = replace(output, metrics={**notes, **output.metrics})
            self.engine.sync(self.student.model, version=step + 1)
            follow(self.teachers, version=step + 1)
            self.record(step + 1, rollouts, routing, evidence, rewards, output)
            if self.checkpoint_due(step + 1):
                self.save(step + 1)

    def write(self, prompts: Sequence[Prompt], *, step: int, group_size: int = 1) -> RolloutBatch:
        """Completes this rank's share of prompts; what writes elsewhere needs nothing of the student gathered here."""
        with nullcontext() if getattr(self.engine, "served", False) else whole(self.student):
            return self.engine.generate(self.ranks.share(prompts), step=step, group_size=group_size)

    def condition(
        self, rollouts: RolloutBatch, routing: Routing, rewards: Sequence[float]
    ) -> tuple[Routing, dict[str, float]]:
        """Reweights the teachers by what they give to right answers, for a resolver that asks for it."""
        if self.conditioning is None:
            return routing, {}

        def ask(known: RolloutBatch, given: Routing) -> Evidence:
            return self.failover.score(self.teachers, known, given, support="sampled")[0]

        return self.conditioning(rollouts, routing, rewards, ask=ask, ranks=self.ranks)

    def score(self, rollouts: RolloutBatch, routing: Routing) -> tuple[Evidence, Routing]:
        """Asks the teachers; the routing comes back without those that failed."""
        return self.failover.score(self.teachers, rollouts, routing, support=self.settings.support, k=self.settings.k)

    def update(
        self, step: int, rollouts: RolloutBatch, routing: Routing, evidence: Evidence, rewards: Sequence[float]
    ) -> LossOutput:
        """Takes the optimizer steps of one batch: `updates_per_step`, each on its own share of the rows."""
        if self.mix == Mix() and not self.ranks.any(bool(evidence.teachers)):
            return LossOutput(loss=torch.zeros(()), denominator=1.0, metrics={"skipped_step": 1.0})
        self.student.train()
        scored = self.scored(rollouts, routing, evidence, rewards)
        count = max(1, min(self.settings.updates_per_step, self.ranks.least(len(rollouts))))
        if count > 1 and getattr(self.learner.objective, "needs_proximal", False):
            scored = replace(scored, proximal_logprobs=self.learner.proximal_logprobs(rollouts))
        metrics: dict[str, float] = {}
        every = self.settings.gradient_cosine_every
        if every and step % every == 0:
            metrics = self.learner.domain_gradients(scored)
        looked: dict[str, Tensor] = {}
        if self.settings.diagnostics_due(step) and self.ranks.any(bool(evidence.teachers)):
            looked = self.learner.diagnostics(scored, self.settings.support)
        outputs, places = [], []
        # strided, because rows come domain by domain
        for rows in (range(first, len(rollouts), count) for first in range(count)):
            part = scored if count == 1 else self._share(scored, rows)
            outputs.append(self.optimize(step, part))
            places.append(scored.kept(rows))
        if self.lessons is not None:
            split = self.learner.micro_batches
            metrics |= self.lessons.teach(self.student, scored, rewards, ask=self.ask, micro_batches=split)
        joined = join_outputs(outputs, places)
        return replace(joined, token_stats={**joined.token_stats, **looked}, metrics={**joined.metrics, **metrics})

    def ask(self, rollouts: RolloutBatch) -> tuple[Routing, Evidence]:
        """Routes and scores completions."""
        routing = self.router.route([rollout.prompt for rollout in rollouts.rollouts], rollouts)
        evidence, routing = self.score(rollouts, routing)
        return routing, evidence

    def scored(self, rollouts: RolloutBatch, routing: Routing, evidence: Evidence, rewards: Sequence[float]) -> Scored:
        """Joins what the teachers said with what is mixed into their loss."""
        scored = self.unmixed(rollouts, routing, evidence)
        if self.mix.outcome > 0:
            advantages = outcome_advantages(rollouts, rewards, self.mix)
            if self.teacher_gate.unverified == "outcome":
                advantages = advantages * routing.abstained[rollouts.token_rows]
            scored = replace(scored, outcome_advantages=advantages)
        if self.mix.reference > 0 and self.reference is not None:
            said = self.reference.score(rollouts, support="full")
            scored = replace(scored, reference=Evidence(teachers=(said,), num_tokens=rollouts.num_tokens))
        return self.with_references(scored)

    def unmixed(self, rollouts: RolloutBatch, routing: Routing, evidence: Evidence) -> Scored:
        """Weights each token by its share of the global batch, and nothing else."""
        return Scored.of(
            rollouts,
            routing,
            evidence,
            normalise=self.learner.objective.normalise,
            size=self.learner.size_of(rollouts),
        )

    def with_references(self, scored: Scored) -> Scored:
        """Adds what the teachers' origins and the student's own say, where gate or resolver compare with them."""
        needs = self.learner.objective.needs
        if "anchor_logprobs" in needs and self.reference is not None and scored.reference is None:
            said = self.reference.score(scored.rollouts, support="full")
            scored = replace(scored, reference=Evidence(teachers=(said,), num_tokens=scored.rollouts.num_tokens))
        if "references" not in needs:
            return scored
        origins = self.teachers.score_references(
            scored.rollouts, scored.routing, support=self.settings.support, k=self.settings.k
        )
        return replace(scored, references=origins)

    def optimize(self, step: int, scored: Scored) -> LossOutput:
        """Takes one optimizer step, micro-batch by micro-batch; the gradients add up exactly.

        Raises:
            TrainingError: When the loss or its gradient is not finite; the weights are as they were.
        """
        self.optimizer.zero_grad(set_to_none=True)
        output = self.learner.loss(scored)
        output = replace(output, loss=self.ranks.sum(output.loss))
        metrics: dict[str, float] = {}
        if self.mix.supervised > 0 and self.answers is not None:
            gold = self.answers([rollout.prompt for rollout in scored.rollouts.rollouts])
            metrics["supervised_loss"] = self.learner.supervised(gold, self.mix.supervised)
        grad_norm = full(torch.nn.utils.clip_grad_norm_(self.student.parameters(), self.settings.max_grad_norm))
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
        rollouts = self.write(prompts, step=self.settings.max_steps)
        routing, evidence = self.ask(rollouts)
        scored = self.with_references(self.unmixed(rollouts, routing, evidence))
        stats = self.learner.loss(scored, weigh=False).token_stats
        seen = self.gathered(rollouts, routing, evidence, [math.nan] * len(rollouts), stats, group_size=1)
        found = token_metrics(seen.rollouts, seen.stats)
        domains = {key.partition("/")[2]: value for key, value in found.items() if key.startswith("divergence/")}
        return {"mean": found["divergence"], **domains}

    def _share(self, scored: Scored, rows: Sequence[int]) -> Scored:
        """The rows of one of several updates, weighted as a batch of their own."""
        part = scored.select(rows)
        size = self.learner.size_of(part.rollouts)
        weights = token_weights(part.rollouts, self.learner.objective.normalise, size=size)
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
        """Tells the sampler, and a router that learns, what the step showed, and writes the step's metrics and traces."""
        with self.watch("record"):
            seen = self.gathered(rollouts, routing, evidence, rewards, output.token_stats)
            of_tokens = token_metrics(seen.rollouts, seen.stats)
            self.sampler.observe(feedback_of(step, seen.rollouts, seen.rewards, of_tokens))
            if isinstance(self.router, ObservingRouter):
                self.router.observe(
                    RoutingFeedback(
                        step=step, rollouts=seen.rollouts, routing=seen.routing, rewards=tuple(seen.rewards)
                    )
                )
            metrics = {
                "loss": float(output.loss),
                **of_tokens,
                **rollout_metrics(seen.rollouts, seen.rewards),
                **staleness_metrics(seen.rollouts, step - 1),
                **routing_metrics(seen.routing),
                **gate_metrics(seen.rollouts, seen.routing, seen.stats),
                **teacher_metrics(seen.evidence),
                **self.teachers.lap(),
                **getattr(self.engine, "lap", dict)(),
                **self.teacher_gate.metrics(),
                **self.failover.metrics(self.teachers.teacher_ids),
                **self.sampler.metrics(),
                **output.metrics,
            }
            if "weight" in seen.stats:
                before = token_weights(seen.rollouts, self.learner.objective.normalise)
                metrics |= balance_metrics(seen.rollouts, seen.stats, before, seen.stats["weight"])
            if self.ranks.is_first:
                self.traces.record(step, seen.rollouts, seen.routing, seen.rewards, trace_of(seen.stats, seen.routing))
        metrics.update(self.watch.lap())
        for tracker in self.trackers:
            tracker.log(step, metrics)

    def gathered(
        self,
        rollouts: RolloutBatch,
        routing: Routing,
        evidence: Evidence,
        rewards: Sequence[float],
        stats: Mapping[str, Tensor],
        *,
        group_size: int | None = None,
    ) -> Whole:
        """Puts the rows of all ranks together, so that what looks at a step sees all of it."""
        return gather_whole(
            self.ranks,
            rollouts=rollouts,
            routing=routing,
            evidence=evidence,
            rewards=rewards,
            stats=stats,
            group_size=group_size or self.settings.group_size,
        )

    def checkpoint_due(self, step: int) -> bool:
        """True every `checkpoint_every` steps and after the last one."""
        every = self.settings.checkpoint_every
        return step == self.settings.max_steps or (every > 0 and step % every == 0)

    def save(self, step: int) -> None:
        """Flushes the traces, then writes a checkpoint with everything the next step depends on."""
        save(self, step)

    def resume(self, step: int) -> None:
        """Restores the checkpoint of `step`."""
        resume(self, step)
