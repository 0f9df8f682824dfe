"""Models beside the teachers that a pool compares them with: the checkpoint each was trained from, and one common anchor."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from jaxtyping import Float, Int
from torch import Tensor

from moteach.divergences.plan import Plan, check_evidence, positions_in
from moteach.errors import UnsupportedCombinationError
from moteach.types import TeacherEvidence

ANCHOR, REFERENCE = "anchor_logprobs", "reference_logprobs"


@dataclass(frozen=True, kw_only=True, slots=True)
class Origins:
    """Evidence of support `full`, and where each token lies in it."""

    references: tuple[TeacherEvidence, ...] = ()
    """One for each teacher, in their order, or none at all."""
    reference_positions: Int[Tensor, "teacher packed"] | None = None
    anchor: TeacherEvidence | None = None
    anchor_positions: Int[Tensor, "one packed"] | None = None


def make_origins(
    *,
    needs: Collection[str],
    teachers: Sequence[TeacherEvidence],
    references: Sequence[TeacherEvidence],
    anchor: TeacherEvidence | None,
    plan: Plan,
    vocab: int,
) -> Origins:
    """Picks what a pool needs and checks that it covers the tokens that are taught.

    Args:
        needs: Names of what the pool needs; what it does not need is left out.
        teachers: The teachers.
        references: What the checkpoints they were trained from say, under the teachers' names, in any order.
        anchor: What the common anchor says.
        plan: The tokens and the weights.
        vocab: Size of the student's vocabulary.

    Raises:
        UnsupportedCombinationError: Something is needed and not given, or not of support `full`.
        IncompatibleTeacherError: A vocabulary is not the student's.
        RoutingError: A token is taught that a reference or the anchor did not score.
    """
    positive: Float[Tensor, "packed teacher"] = plan.weights
    compared: dict[str, TeacherEvidence] = {entry.teacher_id: entry for entry in references}
    own: tuple[TeacherEvidence, ...] = ()
    if REFERENCE in needs:
        missing = [entry.teacher_id for entry in teachers if entry.teacher_id not in compared]
        if missing:
            raise _absent(f"what the checkpoint says that {', '.join(missing)} was trained from")
        own = tuple(compared[entry.teacher_id] for entry in teachers)
    if ANCHOR in needs and anchor is None:
        raise _absent("what the anchor says, the checkpoint the student starts from")
    anchors = (anchor,) if ANCHOR in needs and anchor is not None else ()
    for entry in (*own, *anchors):
        check_evidence(entry, vocab)
    return Origins(
        references=own,
        reference_positions=positions_in(own, positive > 0) if own else None,
        anchor=anchors[0] if anchors else None,
        anchor_positions=positions_in(anchors, ~plan.abstained.unsqueeze(-1)) if anchors else None,
    )


def _absent(what: str) -> UnsupportedCombinationError:
    return UnsupportedCombinationError(
        f"expected {what}, got nothing; the shift of a teacher would be measured from nowhere. Give it to the kernel, or "
        "choose a pool that needs none: conflict=geometric"
    )
