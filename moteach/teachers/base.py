"""The protocol of teachers: frozen models that say what they think of tokens the student wrote."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

from moteach.errors import DeadTeacherError, TeacherUnavailableError
from moteach.types import RolloutBatch, Support, TeacherEvidence

Answer = TeacherEvidence | DeadTeacherError | TeacherUnavailableError
"""What a teacher said, or why it could not."""


def answer_of(answer: Answer) -> TeacherEvidence:
    """Returns the evidence.

    Raises:
        DeadTeacherError: The teacher is dead.
        TeacherUnavailableError: It did not answer.
    """
    if isinstance(answer, TeacherEvidence):
        return answer
    raise answer


@runtime_checkable
class Teacher(Protocol):
    """Scores completions; one object per expert of the run.

    A teacher sees only the rows it was given. It never changes, never samples and never keeps a gradient.
    """

    @property
    def teacher_id(self) -> str:
        """Name of the expert."""
        ...

    @property
    def supports(self) -> frozenset[Support]:
        """What this teacher can say about a token."""
        ...

    def score(self, rollouts: RolloutBatch, *, support: Support, k: int | None = None) -> TeacherEvidence:
        """Scores every trained token of these rows.

        Args:
            rollouts: The rows this teacher was given, as a batch of their own.
            support: `full` (last hidden states and the head), `topk` (the k largest entries and the token the student
                wrote) or `sampled` (the token the student wrote).
            k: Number of entries, for `topk` only.

        Returns:
            Evidence whose `tokens` are the packed indices *of this batch*, 0 to `rollouts.num_tokens - 1`; the pool
            maps them to the whole batch.

        Raises:
            UnsupportedCombinationError: The teacher does not offer this support.
            ConfigError: `k` is missing, too large, or given with another support.
            DeadTeacherError: The scores are not finite.
        """
        ...
