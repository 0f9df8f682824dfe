"""Teachers that are asked once: what they said while the router was deciding is not computed again."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from jaxtyping import Bool
from torch import Tensor

from moteach.divergences.logprobs import chunked_token_logprobs
from moteach.divergences.plan import full_evidence
from moteach.teachers.base import Answer, Teacher, answer_of
from moteach.teachers.joining import joined, taken
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
        entries = [answer_of(said) for _, said in self.hear(rollouts, routing)]
        return self.sampled(entries, rollouts)

    def hear(self, rollouts: RolloutBatch, routing: Routing) -> Iterator[tuple[str, Answer]]:
        """Asks as `each` does, in the support of the run, and keeps the answers for `score` with the same batch."""
        if self._rollouts is not rollouts:
            self.forget()
            self._rollouts = rollouts
        return self.each(rollouts, routing, support=self.support, k=self.k)

    def sampled(self, entries: Sequence[TeacherEvidence], rollouts: RolloutBatch) -> Evidence:
        """Returns the logprobs of the written tokens alone."""
        return Evidence(
            teachers=tuple(self._sampled(entry, rollouts) for entry in entries), num_tokens=rollouts.num_tokens
        )

    def forget(self) -> None:
        """Lets go of what was said: hidden states of every teacher are large, and a step needs those of its routes alone."""
        self._rollouts, self._asked, self._said = None, {}, {}

    def score(self, rollouts: RolloutBatch, routing: Routing, *, support: Support, k: int | None = None) -> Evidence:
        """Scores as `TeacherPool.score`, asking only about what was not asked before; then forgets.

        Raises:
            MoteachError: As `TeacherPool.score`.
        """
        kept = self.keeps(rollouts, support, k)
        entries = tuple(answer_of(said) for _, said in self.each(rollouts, routing, support=support, k=k))
        if kept:
            self.forget()
        return Evidence(teachers=entries, num_tokens=rollouts.num_tokens)

    @property
    def references(self) -> References:
        """The checkpoints the teachers were trained from."""
        return self.pool.references

    def score_references(
        self, rollouts: RolloutBatch, routing: Routing, *, support: Support, k: int | None = None
    ) -> Evidence:
        """Asks the checkpoint each teacher was trained from, see `TeacherPool.score_references`."""
        return self.pool.score_references(rollouts, routing, support=support, k=k)

    def each(
        self, rollouts: RolloutBatch, routing: Routing, *, support: Support, k: int | None = None
    ) -> Iterator[tuple[str, Answer]]:
        """Answers as `TeacherPool.each`, asking only about what was not asked before; a failure is not kept."""
        if not self.keeps(rollouts, support, k):
            yield from self.pool.each(rollouts, routing, support=support, k=k)
            return
        wanted = routing.weights > 0
        new = wanted.clone()
        for column, name in enumerate(routing.teacher_ids):
            if name in self._asked:
                new[:, column] &= ~self._asked[name]
        fresh = replace(routing, weights=new.to(routing.weights.dtype))
        answers = dict(self.pool.each(rollouts, fresh, support=support, k=k))
        for column, name in enumerate(routing.teacher_ids):
            answer = answers.get(name)
            if answer is not None and not isinstance(answer, TeacherEvidence):
                yield name, answer
                continue
            asked = self._asked.get(name, torch.zeros(len(rollouts), dtype=torch.bool))
            self._asked[name] = new[:, column] | asked
            if answer is not None:
                self._said[name] = joined(self._said[name], answer) if name in self._said else answer
            if name in self._said:
                mine = wanted[rollouts.token_rows[self._said[name].tokens], column]
                if bool(mine.any()) or self._said[name].partial:
                    yield name, taken(self._said[name], mine.nonzero(as_tuple=True)[0])

    def keeps(self, rollouts: RolloutBatch, support: Support, k: int | None) -> bool:
        """Whether answers to this question are kept until `score` or `forget`."""
        return self._rollouts is rollouts and (support, k) == (self.support, self.k)

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
