"""What a card of a teacher that is the student itself, or that is told more than the student, may say."""

from __future__ import annotations

from string import Formatter
from typing import TYPE_CHECKING

from moteach.errors import nearest

if TYPE_CHECKING:
    from moteach.catalogue.spec import ExpertSpec

STAGES = ("live", "ema", "snapshot")
FIELDS = ("prompt", "answer")


def context_problem(template: str) -> str | None:
    """Says what is wrong with the template of a context; None when nothing is."""
    try:
        named = fields_of(template)
    except ValueError as error:
        return f"expected a template with {{prompt}} and perhaps {{answer}} for 'context', got one that cannot be read: {error}"
    if odd := [name for name in named if name not in FIELDS]:
        return f"expected {{prompt}} and perhaps {{answer}} in 'context', got {{{odd[0]}}}; write a brace of the text twice"
    if "prompt" not in named:
        return "expected {prompt} in 'context', got none; the teacher would not know what was asked"
    return None


def fields_of(template: str) -> list[str]:
    """Names of the places in a template, in order.

    Raises:
        ValueError: It has a brace without a partner.
    """
    return [name for _, name, _, _ in Formatter().parse(template) if name is not None]


def student_problems(spec: ExpertSpec) -> list[tuple[str | None, str]]:
    """Lists what is wrong with a card that has `student`, as `problems_of` does."""
    assert spec.student is not None
    if spec.student not in STAGES:
        return [("student", f"expected a stage for 'student', got '{spec.student}'; {nearest(spec.student, STAGES)}")]
    beside = {
        "model": spec.model,
        "adapter": spec.adapter,
        "base": spec.base,
        "url": spec.url,
        "recipe": spec.recipe or None,
    }
    if given := [key for key, value in beside.items() if value]:
        return [
            (
                given[0],
                f"expected no '{given[0]}' beside 'student', got both; the weights are those of the run's student",
            )
        ]
    if spec.student == "live" and spec.context is None:
        message = (
            "expected 'context' beside 'student: live', got none; such a teacher agrees with every token of the student. "
            "Add a context, or choose ema or snapshot"
        )
        return [("student", message)]
    if not 0 <= spec.decay < 1:
        return [("decay", f"expected a number from 0 to below 1 for 'decay', got {spec.decay}")]
    if not spec.snapshot_steps or min(spec.snapshot_steps) < 0:
        return [("snapshot_steps", f"expected steps of at least 0 for 'snapshot_steps', got {spec.snapshot_steps}")]
    return []
