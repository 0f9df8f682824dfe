"""Asks the teachers of a run for their own answers: greedy, on training prompts, graded by the prompts' verifiers."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from torch import nn

from moteach.data.base import rows_by_domain
from moteach.errors import ConfigError, UnsupportedCombinationError
from moteach.evaluation.runner import Grade, grade_rollouts
from moteach.teachers.aligned import AlignedTeacher
from moteach.teachers.pool import TeacherPool
from moteach.teachers.reuse import ReusingTeachers
from moteach.types import Prompt

if TYPE_CHECKING:
    from moteach.rollouts.base import RolloutEngine

_TRIES = 8


class TeacherExaminer:
    """Generates with the teachers' own models, in batches, through rollout engines of the run's settings.

    Greedy answers need no noise, and the student's engine is left alone: a run's own samples are the same with and without
    an examiner.

    Args:
        teachers: The teachers of the run.
        engine_for: Makes an engine bound to a model.
        grade: Dispatches to the prompt's verifier.
        decode: Token ids to text, special tokens skipped.
        train: The training prompts, which may be lazy.
        seed: Seed of the draws.
    """

    def __init__(
        self,
        *,
        teachers: TeacherPool | ReusingTeachers,
        engine_for: Callable[[nn.Module], RolloutEngine],
        grade: Grade,
        decode: Callable[[Sequence[int]], str],
        train: Sequence[Prompt],
        seed: int,
    ) -> None:
        self._teachers = teachers
        self._engine_for = engine_for
        self._grade = grade
        self._decode = decode
        self._train = train
        self._rows = rows_by_domain(train)
        self._seed = seed

    def check(self) -> None:
        """Refuses teachers that cannot generate, and data that nothing can be graded on.

        Raises:
            UnsupportedCombinationError: Names the teachers.
            ConfigError: No training prompt that was looked at has a verifier.
        """
        mute = [name for name in self._teachers.teacher_ids if not _generates(self._teachers.get(name))]
        if mute:
            raise UnsupportedCombinationError(
                f"teacher_gate: expected teachers that can write answers of their own, got {', '.join(mute)}, which only score "
                "what the student wrote; they would pass or fail unseen. Use an in-process model, or teacher_gate=none"
            )
        if not any(self.draw(domain, count=1, turn=0) for domain in self._rows):
            raise ConfigError(
                "teacher_gate: expected training prompts with a column 'verifier', got none; every prompt would pass. Add the "
                "column, or choose teacher_gate=none"
            )

    def scores(self, teacher_id: str, prompts: Sequence[Prompt]) -> list[float]:
        """Grades a teacher's greedy answers; see `moteach.teachers.gating.Examiner`."""
        if not prompts:
            return []
        model: Any = self._teachers.get(teacher_id)
        batch = self._engine_for(model.model).generate(prompts, step=0, temperature=0.0)
        return grade_rollouts(batch, grade=self._grade, decode=self._decode)

    def draw(self, domain: str, *, count: int, turn: int) -> list[Prompt]:
        """Draws training prompts of a domain that have a verifier, keyed by seed, domain and turn.

        Looks at 8 times `count` prompts at most.
        """
        rows = self._rows.get(domain, ())
        chosen = random.Random(f"{self._seed}/{domain}/{turn}").sample(range(len(rows)), min(_TRIES * count, len(rows)))
        found: list[Prompt] = []
        for index in chosen:
            prompt = self._train[rows[index]]
            if prompt.verifier:
                found.append(prompt)
            if len(found) == count:
                break
        return found


def _generates(teacher: Any) -> bool:
    # a property that loads weights must not be read to find out whether it is there
    if isinstance(teacher, AlignedTeacher):
        return False
    return isinstance(getattr(type(teacher), "model", None), property) or isinstance(
        vars(teacher).get("model"), nn.Module
    )
