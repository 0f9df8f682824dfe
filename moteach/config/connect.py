"""Wires parts of a run to what they need of the others: a router to the teachers' evidence, an engine to the ranks."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from moteach.distributed import Ranks
from moteach.errors import ConfigError
from moteach.rollouts.base import RolloutEngine
from moteach.routing.base import AskingRouter, ReliabilityReader
from moteach.students import Student
from moteach.teachers.pool import TeacherPool
from moteach.teachers.reuse import ReusingTeachers
from moteach.trainer import Trainer
from moteach.types import Prompt, ReliabilityTable


def connect_engine(engine: RolloutEngine, student: Student, ranks: Ranks) -> RolloutEngine:
    """Tells an engine that sends the student's weights who holds them together."""
    if ranks.size > 1 and hasattr(engine, "join"):
        engine.join(ranks, student)
    return engine


def connect_router(trainer: Trainer) -> None:
    """Gives a router what it needs: the record of the teachers, or a way to ask them, who then remember what they said.

    Raises:
        ConfigError: It reads a record that nothing in the run keeps.
    """
    router, pool = trainer.router, trainer.teachers
    if isinstance(router, ReliabilityReader):
        table = getattr(trainer.teacher_gate, "reliability", None)
        if not isinstance(table, ReliabilityTable):
            raise ConfigError(
                f"router={type(router).__name__}: expected a teacher gate that keeps a record of the teachers, got "
                f"teacher_gate={trainer.teacher_gate.name}; all of them would look alike. Set teacher_gate=reliable"
            )
        router.bind_reliability(table)
    if isinstance(router, AskingRouter) and "evidence" in router.needs and isinstance(pool, TeacherPool):
        teachers = ReusingTeachers(pool, support=trainer.settings.support, k=trainer.settings.k)
        trainer.teachers = teachers
        router.bind_teachers(partial(trainer.failover.ask, teachers))


def check_router_needs(router: Any, drawn: Sequence[Prompt]) -> None:
    """Looks for the verifiers that a router learns from.

    Raises:
        ConfigError: No training prompt has one.
    """
    if "rewards" in getattr(router, "needs", ()) and not any(prompt.verifier for prompt in drawn):
        raise ConfigError(
            f"router={type(router).__name__}: expected training prompts with a column 'verifier', got none; it would send "
            "prompts to random teachers throughout. Add the column, or choose router=embedding_prototype"
        )
