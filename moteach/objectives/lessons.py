"""What a gate that learns is taught with at every step: completions that are known to be right."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from moteach.objectives.base import Scored, tokens_per_chunk
from moteach.routing.context import GateContext
from moteach.routing.learned_gate import LearningGate, Lesson
from moteach.types import Evidence, Head, LossOutput, Prompt, RolloutBatch, Routing

FULL_REWARD = 1.0


@dataclass(frozen=True, kw_only=True)
class GateLessons:
    """Collects verified completions with the student's states and the teachers' logprobs, and lets the gate take a step.

    One more forward of the student on these rows, without a gradient; answers are also scored by their teachers.
    """

    gate: LearningGate
    answers: Callable[[Sequence[Prompt]], RolloutBatch | None]
    """Writes the prompts' own answers as completions."""

    def teach(
        self,
        student: nn.Module,
        scored: Scored,
        rewards: Sequence[float],
        *,
        ask: Callable[[RolloutBatch], tuple[Routing, Evidence]],
        micro_batches: Callable[[int], Sequence[Sequence[int]]],
    ) -> dict[str, float]:
        """Lets the gate learn from one step.

        Args:
            student: Called with rollouts and a loss.
            scored: What the student wrote and what the teachers said of it.
            rewards: A verified score a row; those below 1, or NaN, teach nothing.
            ask: Routes and scores completions that nobody has scored yet.
            micro_batches: Splits rows.

        Returns:
            The gate's metrics.
        """
        found: list[Lesson] = []
        rollouts, routing, evidence = scored.rollouts, scored.routing, scored.evidence
        if self.gate.source in ("rollouts", "both"):
            right = [row for row, reward in enumerate(rewards) if reward >= FULL_REWARD]
            kept = torch.isin(rollouts.token_rows, torch.tensor(right, dtype=torch.long))
            if bool(kept.any()):
                part = rollouts.select(right), routing.select(right), evidence.select(kept)
                found += _lessons(student, *part, micro_batches=micro_batches)
        if self.gate.source in ("answers", "both"):
            gold = self.answers([rollout.prompt for rollout in rollouts.rollouts])
            if gold is not None:
                found += _lessons(student, gold, *ask(gold), micro_batches=micro_batches)
        return self.gate.learn(found, routing.teacher_ids)


@torch.no_grad()
def _lessons(
    student: nn.Module,
    rollouts: RolloutBatch,
    routing: Routing,
    evidence: Evidence,
    *,
    micro_batches: Callable[[int], Sequence[Sequence[int]]],
) -> list[Lesson]:
    found: list[Lesson] = []
    rows_of = rollouts.token_rows
    for rows in micro_batches(len(rollouts)):
        kept = torch.isin(rows_of, torch.tensor(list(rows), dtype=torch.long))
        if not bool(kept.any()):
            continue
        part = rollouts.select(rows)

        def look(hidden: Tensor, head: Head, *, part: RolloutBatch = part, rows: Sequence[int] = rows) -> LossOutput:
            told = evidence.select(torch.isin(rows_of, torch.tensor(list(rows), dtype=torch.long)))
            seen = GateContext(
                rollouts=part, routing=routing.select(rows), evidence=told, chunk_size=tokens_per_chunk(None, head)
            )
            found.append(Lesson(hidden=hidden.detach(), logprobs=seen.written(), prior=seen.prior))
            return LossOutput(loss=torch.zeros(()), denominator=1.0)

        student(part, look)
    return found
