"""Teachers that are asked once: what they said while the router was deciding is not computed again."""

from __future__ import annotations

from dataclasses import replace

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from moteach.divergences.logprobs import chunked_token_logprobs
from moteach.divergences.plan import full_evidence
from moteach.teachers.base import Teacher
from moteach.teachers.pool import TeacherPool
from moteach.teachers.references import References
from moteach.types import Evidence, RolloutBatch, Routing, Support, TeacherEvidence


class ReusingTeachers:
    """A pool for runs whose router hears teachers first.

    `ask` scores in the support of the run and keeps the answer until `score` is called with the same batch, so that a teacher
    sees a row once a step. Of `full` evidence the logprobs of the written tokens are read off its own hidden states.

    Args:
        pool: The teachers.
        support: Support of the run.
        k: Number of entries, for `topk`.
        chunk_size: Tokens whose logits exist at once.
    """

    def __init__(self, pool: TeacherPool, *, support: Support, k: int | None = None, chunk_size: int = 1024) -> None:
        self.pool = pool
        self.support = support
        self.k = k
        self.chunk_size = chunk_size
        self._rollouts: RolloutBatch | None = None
        self._asked: dict[str, Bool[Tensor, " batch"]] = {}
        self._said: dict[str, TeacherEvidence] = {}

    @property
    def teacher_ids(self) -> tuple[str, ...]:
        """Names of the teachers, in the order they were given."""
        return self.pool.teacher_ids

    def get(self, teacher_id: str) -> Teacher:
        """Returns one teacher, see `TeacherPool.get`."""
        return self.pool.get(teacher_id)

    def lap(self) -> dict[str, float]:
        """What asking servers took since the last lap, see `TeacherPool.lap`."""
        return self.pool.lap()

    def ask(self, rollouts: RolloutBatch, routing: Routing) -> Evidence:
        """Returns the logprobs of the written tokens, of the teachers and rows that `routing` names.

        Raises:
            MoteachError: As `TeacherPool.score`.
        """
        if self._rollouts is not rollouts:
            self._rollouts, self._asked, self._said = rollouts, {}, {}
        found = self._known(rollouts, routing)
        return replace(found, teachers=tuple(self._sampled(entry, rollouts) for entry in found.teachers))

    def score(self, rollouts: RolloutBatch, routing: Routing, *, support: Support, k: int | None = None) -> Evidence:
        """Scores as `TeacherPool.score`, asking only about what was not asked before; then forgets.

        Raises:
            MoteachError: As `TeacherPool.score`.
        """
        if self._rollouts is not rollouts or (support, k) != (self.support, self.k):
            return self.pool.score(rollouts, routing, support=support, k=k)
        found = self._known(rollouts, routing)
        # Hidden states of every teacher are large; the step needs those of its own routes alone.
        self._rollouts, self._asked, self._said = None, {}, {}
        return found

    @property
    def references(self) -> References:
        """The checkpoints the teachers were trained from."""
        return self.pool.references

    def score_references(
        self, rollouts: RolloutBatch, routing: Routing, *, support: Support, k: int | None = None
    ) -> Evidence:
        """Asks the checkpoint each teacher was trained from, see `TeacherPool.score_references`."""
        return self.pool.score_references(rollouts, routing, support=support, k=k)

    def _known(self, rollouts: RolloutBatch, routing: Routing) -> Evidence:
        """Asks about the rows that are new, and returns the evidence about all rows of `routing`."""
        wanted = routing.weights > 0
        new = wanted.clone()
        for column, name in enumerate(routing.teacher_ids):
            if name in self._asked:
                new[:, column] &= ~self._asked[name]
        fresh = self.pool.score(
            rollouts, replace(routing, weights=new.to(routing.weights.dtype)), support=self.support, k=self.k
        )
        for column, name in enumerate(routing.teacher_ids):
            self._asked[name] = new[:, column] | self._asked.get(name, torch.zeros(len(rollouts), dtype=torch.bool))
            entry, before = fresh.of(name), self._said.get(name)
            if entry is not None:
                self._said[name] = entry if before is None else _joined(before, entry)
        entries = []
        for column, name in enumerate(routing.teacher_ids):
            if name in self._said:
                mine = wanted[rollouts.token_rows[self._said[name].tokens], column]
                if bool(mine.any()) or self._said[name].partial:
                    entries.append(_taken(self._said[name], mine.nonzero(as_tuple=True)[0]))
        return Evidence(teachers=tuple(entries), num_tokens=rollouts.num_tokens)

    @torch.no_grad()
    def _sampled(self, entry: TeacherEvidence, rollouts: RolloutBatch) -> TeacherEvidence:
        logprobs = entry.sampled_logprobs
        if logprobs is None:
            hidden, head = full_evidence(entry)
            targets = rollouts.token_targets[entry.tokens].to(hidden.device)
            logprobs = chunked_token_logprobs(hidden, head, targets, chunk_size=self.chunk_size)
        return TeacherEvidence(
            teacher_id=entry.teacher_id,
            support="sampled",
            tokens=entry.tokens,
            sampled_logprobs=logprobs,
            partial=entry.partial,
        )


def _taken(entry: TeacherEvidence, places: Int[Tensor, " kept"]) -> TeacherEvidence:
    """The same evidence at these places of its own axis."""
    if len(places) == len(entry.tokens) and bool((places == torch.arange(len(places))).all()):
        return entry
    return replace(
        entry,
        tokens=entry.tokens[places],
        hidden=None if entry.hidden is None else entry.hidden[places],
        topk_ids=None if entry.topk_ids is None else entry.topk_ids[places],
        topk_logprobs=None if entry.topk_logprobs is None else entry.topk_logprobs[places],
        sampled_logprobs=None if entry.sampled_logprobs is None else entry.sampled_logprobs[places],
    )


def _joined(first: TeacherEvidence, second: TeacherEvidence) -> TeacherEvidence:
    """Two answers of one teacher about different tokens as one, tokens ascending."""

    def both(one: Tensor | None, other: Tensor | None) -> Tensor | None:
        return None if one is None or other is None else torch.cat([one, other])

    tokens = torch.cat([first.tokens, second.tokens])
    joined = replace(
        first,
        tokens=tokens,
        hidden=both(first.hidden, second.hidden),
        topk_ids=both(first.topk_ids, second.topk_ids),
        topk_logprobs=both(first.topk_logprobs, second.topk_logprobs),
        sampled_logprobs=both(first.sampled_logprobs, second.sampled_logprobs),
    )
    return _taken(joined, tokens.argsort())
