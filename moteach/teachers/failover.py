"""What a run does when a teacher is dead or does not answer: stop, drop its rows, give them to others; never make scores up."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor

from moteach.distributed import Ranks
from moteach.divergences.plan import full_evidence
from moteach.divergences.projection import project
from moteach.errors import ConfigError, DeadTeacherError, TeacherUnavailableError, nearest
from moteach.teachers.base import answer_of
from moteach.teachers.joining import joined, taken
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
    ranks: Ranks = field(default_factory=Ranks)
    """The processes that ask: they go through the same rounds, because some teachers answer all of them together."""
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
        check_rows(rollouts, routing)
        said: dict[str, TeacherEvidence] = {}
        failed: list[str] = []
        current, new = routing, routing.weights > 0
        while self.ranks.any(bool(new.any())):
            asked = replace(current, weights=new.to(routing.weights.dtype))
            lost = []
            for name, answer in pool.each(rollouts, asked, support=support, k=k):
                try:
                    whole = joined(said[name], answer_of(answer)) if name in said else answer_of(answer)
                    check_alive(whole, rollouts)
                    said[name] = whole
                except (DeadTeacherError, TeacherUnavailableError) as error:
                    self._lose(name, len(current.rows_of(name)), error)
                    lost.append(name)
            known, failed = current.weights > 0, failed + lost
            current = self.policy.reroute(routing, failed) if lost else current
            # whoever gained rows is asked about those alone
            new = (current.weights > 0) & ~known
        if isinstance(pool, ReusingTeachers) and pool.keeps(rollouts, support, k):
            pool.forget()
        entries = (
            _restricted(said[name], rollouts, current.rows_of(name))
            for name in routing.teacher_ids
            if name in said and name not in failed
        )
        found = tuple(entry for entry in entries if entry is not None)
        return Evidence(teachers=found, num_tokens=rollouts.num_tokens), current

    def ask(self, teachers: ReusingTeachers, rollouts: RolloutBatch, routing: Routing) -> Evidence:
        """Lets a router hear the teachers before it decides; one that fails says nothing, and its rows count as lost.

        The router then decides among the others: there is no routing yet that the policy could change.

        Returns:
            The logprobs of the written tokens.

        Raises:
            DeadTeacherError: A teacher is dead and the policy is `stop`, or it is the expert to fall back to.
            TeacherUnavailableError: Likewise for one that does not answer.
            MoteachError: As `TeacherPool.score`.
        """
        if self.policy.action == "stop":
            return teachers.ask(rollouts, routing)
        entries = []
        for name, answer in teachers.hear(rollouts, routing):
            try:
                check_alive(answer_of(answer), rollouts)
                entries.append(answer_of(answer))
            except (DeadTeacherError, TeacherUnavailableError) as error:
                self._lose(name, len(routing.rows_of(name)), error)
        return teachers.sampled(entries, rollouts)

    def _lose(self, name: str, rows: int, error: DeadTeacherError | TeacherUnavailableError) -> None:
        """Counts the rows of a teacher that failed; nobody is left to take those of the expert to fall back to."""
        if name == self.policy.expert:
            raise error
        self.lost[name] = self.lost.get(name, 0) + rows

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


def _restricted(said: TeacherEvidence, rollouts: RolloutBatch, rows: Tensor) -> TeacherEvidence | None:
    """Keeps what was said about these rows, in the numbering of the whole batch."""
    mine = torch.isin(rollouts.token_rows[said.tokens], rows)
    heard = bool(mine.any()) or said.partial
    return taken(said, mine.nonzero(as_tuple=True)[0]) if heard else None
