"""What a run does when a teacher is dead or does not answer: stop, drop its rows, give them to others; never make scores up."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor

from moteach.divergences.plan import full_evidence
from moteach.divergences.projection import project
from moteach.errors import ConfigError, DeadTeacherError, TeacherUnavailableError, nearest
from moteach.teachers.pool import TeacherPool, check_rows
from moteach.teachers.reuse import ReusingTeachers
from moteach.types import Evidence, RolloutBatch, Routing, Support, TeacherEvidence

Action = Literal["stop", "drop", "fallback", "renormalise"]
_ACTIONS = ("stop", "drop", "fallback:<expert>", "renormalise")

UNIFORM = 1e-3
"""Relative distance of the entropy from ln V within which a distribution counts as uniform; a living teacher is far from it
on some token of every completion."""
FROZEN = 1e-3
"""Largest change of a logprob between contexts, in nats, that still counts as none: above the rounding of float32 forwards
(3e-6 in a model of one layer), far below what contexts change in a living teacher."""
_LOOKED_AT, _FEWEST = 32, 4


@dataclass(frozen=True, kw_only=True)
class FailurePolicy:
    """What happens to the rows of a teacher that fails."""

    action: Action = "stop"
    """`stop`: the run ends with the error. `drop`: nobody teaches the rows it was to grade. `renormalise`: the other teachers
    of the row share its weight, and rows without another one abstain. `fallback`: the named expert takes its weight."""
    expert: str | None = None
    """Expert of `fallback`."""

    @classmethod
    def parse(cls, text: str, *, experts: Sequence[str]) -> FailurePolicy:
        """Reads `stop`, `drop`, `renormalise` or `fallback:<expert>`.

        Args:
            text: The value of `teachers.on_failure`.
            experts: Experts of the run.

        Raises:
            ConfigError: It is none of these, or the expert is not one of the run's.
        """
        action, _, expert = text.partition(":")
        if action == "fallback" and expert not in experts:
            raise ConfigError(
                f"teachers.on_failure: expected fallback:<expert> with one of the run's experts, got '{text}'; the rows of a "
                f"dead teacher would have nobody; {nearest(expert, experts)}"
            )
        if action not in ("stop", "drop", "fallback", "renormalise") or (expert and action != "fallback"):
            raise ConfigError(f"teachers.on_failure: got '{text}'; {nearest(text, _ACTIONS)}")
        return cls(action=action, expert=expert or None)  # type: ignore[arg-type]

    def reroute(self, routing: Routing, failed: Sequence[str]) -> Routing:
        """Takes the failed teachers out of a routing; the rows they had no weight in stay as they are, to the bit."""
        columns = [routing.teacher_ids.index(name) for name in failed]
        before = routing.weights
        lost = before[:, columns].sum(dim=1)
        hit = lost > 0
        left = before.clone()
        left[:, columns] = 0
        if self.action == "drop":
            left[hit] = 0
        elif self.action == "fallback" and self.expert is not None:
            left[hit, routing.teacher_ids.index(self.expert)] += lost[hit]
        total = left.sum(dim=1, keepdim=True)
        normalised = left / torch.where(total == 0, torch.ones_like(total), total)
        weights = torch.where(hit.unsqueeze(1), normalised, before)
        empty = hit & (weights.sum(dim=1) == 0)
        return replace(
            routing,
            weights=weights,
            abstained=routing.abstained | empty,
            confidence=torch.where(empty, torch.zeros_like(routing.confidence), routing.confidence),
        )


@dataclass(kw_only=True)
class Failover:
    """Scores a batch under a failure policy.

    A teacher fails when it raises `DeadTeacherError` or `TeacherUnavailableError`, or when its scores are uniform or do not
    depend on the context (see `check_alive`). It is asked again in the next step. Its scores are never replaced by numbers:
    the routing changes, and the teachers that gained rows are asked about them.
    """

    policy: FailurePolicy = field(default_factory=FailurePolicy)
    lost: dict[str, int] = field(default_factory=dict)
    """Rows that each teacher failed to grade since the last `metrics`."""

    def score(
        self,
        pool: TeacherPool | ReusingTeachers,
        rollouts: RolloutBatch,
        routing: Routing,
        *,
        support: Support,
        k: int | None = None,
    ) -> tuple[Evidence, Routing]:
        """Asks each teacher about its rows and applies the policy to those that fail.

        Returns:
            The evidence, and the routing that it answers: the one given, without the failed teachers.

        Raises:
            DeadTeacherError: A teacher is dead and the policy is `stop`, or the expert to fall back to fails too.
            TeacherUnavailableError: Likewise for one that does not answer.
            MoteachError: As `TeacherPool.score`.
        """
        if self.policy.action == "stop":
            evidence = pool.score(rollouts, routing, support=support, k=k)
            for entry in evidence.teachers:
                check_alive(entry, rollouts)
            return evidence, routing
        pool = pool.pool if isinstance(pool, ReusingTeachers) else pool
        check_rows(rollouts, routing)
        said: dict[str, TeacherEvidence | None] = {}
        asked: dict[str, Tensor] = {}
        failed: list[str] = []
        current = routing
        settled = False
        while not settled:
            settled = True
            for name in (name for name in routing.teacher_ids if name not in failed):
                rows = current.rows_of(name)
                known = asked.get(name)
                if known is not None and bool(torch.isin(rows, known).all()):
                    said[name] = _restricted(said[name], rollouts, rows)
                else:
                    try:
                        said[name] = pool.ask(name, rollouts, current, support=support, k=k)
                        check_alive(said[name], rollouts)
                    except (DeadTeacherError, TeacherUnavailableError):
                        if name == self.policy.expert:
                            raise
                        self.lost[name] = self.lost.get(name, 0) + len(rows)
                        failed.append(name)
                        current, settled = self.policy.reroute(routing, failed), False
                        # begin anew at once: whoever comes later is asked about the rows it gained in the same call
                        break
                asked[name] = rows
        entries = (said.get(name) for name in routing.teacher_ids if name not in failed)
        found = tuple(entry for entry in entries if entry is not None)
        return Evidence(teachers=found, num_tokens=rollouts.num_tokens), current

    def metrics(self, teacher_ids: Sequence[str]) -> dict[str, float]:
        """Returns `teacher_failures/<teacher>`, rows it failed to grade, and counts anew; under `stop` there is none.

        A step that asks more than once (answers for a resolver, lessons of a gate) counts the rows of every question.
        """
        if self.policy.action == "stop":
            return {}
        lost, self.lost = self.lost, {}
        return {f"teacher_failures/{name}": float(lost.get(name, 0)) for name in teacher_ids}


def check_alive(said: TeacherEvidence | None, rollouts: RolloutBatch) -> None:
    """Looks at a few tokens for scores that say nothing: uniform ones, and ones that do not depend on the context.

    On support `full` at most 32 tokens are projected. A verdict needs at least 4 tokens with different written tokens before
    them: two equal contexts have equal scores in every teacher. On `sampled`, where only the written token is known, scores
    are uniform when tokens that differ all have one logprob, and frozen when each token has the same logprob in every
    context that it was written in.

    Args:
        said: Evidence about the whole batch's tokens, or None.
        rollouts: The whole batch.

    Raises:
        DeadTeacherError: The teacher is uniform or frozen.
    """
    if said is None or len(said.tokens) < _FEWEST:
        return
    step = -(-len(said.tokens) // _LOOKED_AT)
    if said.hidden is not None and said.head is not None:
        hidden, head = full_evidence(said)
        logprobs = project(hidden[::step], head).float().log_softmax(dim=-1)
        if not bool(torch.isfinite(logprobs).all()):
            problem = "NaN or infinite logprobs"
        else:
            full = math.log(logprobs.shape[1])
            entropy = -(logprobs.exp() * logprobs).sum(dim=-1)
            flat = bool((full - entropy <= UNIFORM * full).all())
            problem = "the uniform distribution" if flat else _frozen(logprobs)
    elif said.topk_logprobs is not None and said.topk_ids is not None:
        values, ids = said.topk_logprobs, said.topk_ids
        # with k below V the tail is unknown, but only equal entries can be the k largest of a uniform distribution
        flat = values.shape[1] > 1 and bool(((values[:, :1] - values[:, -1:]) <= UNIFORM).all())
        same = bool((ids == ids[:1]).all())
        problem = "the uniform distribution" if flat else _frozen(values) if same else ""
    elif said.sampled_logprobs is not None:
        problem = _dead_written(said.sampled_logprobs.float(), rollouts.token_targets[said.tokens])
    else:
        return
    if problem and _contexts(said, rollouts) >= _FEWEST:
        raise DeadTeacherError(
            f"expected opinions from the teacher '{said.teacher_id}', got {problem} on {len(said.tokens)} tokens; the student "
            "would forget. Check its weights (moteach experts check), or set teachers.on_failure"
        )


def _frozen(values: Tensor) -> str:
    return "the same distribution in every context" if bool(((values - values[:1]).abs() <= FROZEN).all()) else ""


def _dead_written(logprobs: Tensor, targets: Tensor) -> str:
    targets = targets.to(logprobs.device)
    kinds, place, counts = torch.unique(targets, return_inverse=True, return_counts=True)
    # an almost certain teacher gives every written token almost the same logprob, 0; a uniform one -ln V
    if len(kinds) >= _FEWEST and bool((logprobs - logprobs[0]).abs().max() <= FROZEN) and float(logprobs[0]) < -0.5:
        return "one logprob for all tokens, as of the uniform distribution,"
    low = torch.full((len(kinds),), math.inf, device=logprobs.device).scatter_reduce(0, place, logprobs, "amin")
    high = torch.full((len(kinds),), -math.inf, device=logprobs.device).scatter_reduce(0, place, logprobs, "amax")
    # tokens that a teacher is certain of tell nothing: their logprob is 0 in every context
    telling = (counts > 1) & (low < -0.5)
    same = bool((high - low <= FROZEN)[telling].all())
    return "the same logprobs in every context" if same and int(telling.sum()) >= _FEWEST else ""


def _contexts(said: TeacherEvidence, rollouts: RolloutBatch) -> int:
    """Number of different tokens right before those that were scored: a lower bound of the number of contexts."""
    rows, positions = rollouts.loss_mask.nonzero(as_tuple=True)
    before = rollouts.input_ids[rows, positions - 1]
    return len(set(before[said.tokens.cpu()].tolist()))


def _restricted(said: TeacherEvidence | None, rollouts: RolloutBatch, rows: Tensor) -> TeacherEvidence | None:
    """Keeps what was said about these rows, in the numbering of the whole batch."""
    if said is None:
        return None
    mine = torch.isin(rollouts.token_rows[said.tokens], rows)
    if bool(mine.all()):
        return said
    if not bool(mine.any()) and not said.partial:
        return None
    return replace(
        said,
        tokens=said.tokens[mine],
        hidden=None if said.hidden is None else said.hidden[mine],
        topk_ids=None if said.topk_ids is None else said.topk_ids[mine],
        topk_logprobs=None if said.topk_logprobs is None else said.topk_logprobs[mine],
        sampled_logprobs=None if said.sampled_logprobs is None else said.sampled_logprobs[mine],
    )
