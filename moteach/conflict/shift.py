"""Targets made from what each teacher *learned*: its logits minus those of the checkpoint it was trained from.

Library functions on plain logits; a constant added to any model's logits changes nothing. `moteach.conflict.shifts` has them
for a run.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor

from moteach.errors import ConfigError, UnsupportedCombinationError


def delta(
    anchor_logits: Float[Tensor, "*token vocab"],
    teacher_logits: Float[Tensor, "teacher *token vocab"],
    base_logits: Float[Tensor, "teacher *token vocab"],
    weights: Float[Tensor, "*token teacher"] | None = None,
) -> Float[Tensor, "*token vocab"]:
    """Delta-MOPD: softmax of anchor + sum_i w_i (teacher_i - base_i), the shifts of all teachers on top of one model.

    It equals `endpoint` exactly where sum_i w_i (base_i - anchor) is the same for all tokens of the vocabulary: always when
    every base is the anchor, but also when what sets the bases apart cancels.

    Args:
        anchor_logits: Logits of the model that is shifted, such as the student before training.
        teacher_logits: Logits of the teachers.
        base_logits: Logits of the checkpoint that each of them was trained from.
        weights: Factor on each shift, which need not sum to one; None stands for 1 each, as in the paper.

    Returns:
        Normalised logprobs.

    Raises:
        UnsupportedCombinationError: A base excludes a token that its teacher does not.
    """
    shifts = torch.stack([difference(*pair) for pair in zip(teacher_logits, base_logits, strict=True)])
    return _shifted(anchor_logits, shifts, weights)


def endpoint(
    anchor_logits: Float[Tensor, "*token vocab"],
    teacher_logits: Float[Tensor, "teacher *token vocab"],
    weights: Float[Tensor, "*token teacher"] | None = None,
) -> Float[Tensor, "*token vocab"]:
    """Softmax of anchor + sum_i w_i (teacher_i - anchor): what `delta` corrects.

    With weights that sum to one it is the geometric pool of the teachers, whatever the anchor.

    Args:
        anchor_logits: Logits of the model that is shifted.
        teacher_logits: Logits of the teachers.
        weights: Factor on each shift; None stands for 1 each.

    Returns:
        Normalised logprobs.

    Raises:
        UnsupportedCombinationError: The anchor excludes a token that a teacher does not.
    """
    return delta(anchor_logits, teacher_logits, anchor_logits.expand_as(teacher_logits), weights)


def proxy(
    base_logits: Float[Tensor, "*token vocab"],
    expert_logits: Float[Tensor, "*token vocab"],
    anti_logits: Float[Tensor, "*token vocab"],
    *,
    alpha: float = 1.0,
) -> Float[Tensor, "*token vocab"]:
    """DExperts and proxy-tuning (arXiv 2105.03023, 2401.08565): softmax of base + alpha (expert - anti).

    Args:
        base_logits: Logits of the model that is steered.
        expert_logits: Logits of the tuned model.
        anti_logits: Logits of the untuned model, or of an anti-expert.
        alpha: Strength; 0 is the base, negative steers away from the expert.

    Returns:
        Normalised logprobs.

    Raises:
        ConfigError: alpha is not finite.
        UnsupportedCombinationError: The anti-expert excludes a token that the expert does not, or the reverse for a
            negative alpha.
    """
    if not math.isfinite(alpha):
        raise ConfigError(f"expected a finite alpha in proxy, got {alpha}; the target would not be a distribution")
    if alpha < 0:
        expert_logits, anti_logits = anti_logits, expert_logits
    strength = base_logits.new_full((*base_logits.shape[:-1], 1), abs(alpha))
    return _shifted(base_logits, difference(expert_logits, anti_logits).unsqueeze(0), strength)


def difference(
    to: Float[Tensor, "*token vocab"], start: Float[Tensor, "*token vocab"]
) -> Float[Tensor, "*token vocab"]:
    """The shift between two models, to minus start; what both exclude does not move.

    Args:
        to: Logits of the model that was trained.
        start: Logits of the model it was trained from.

    Returns:
        The difference, a fresh tensor.

    Raises:
        UnsupportedCombinationError: The start excludes a token that the other does not.
    """
    bare = (start == -math.inf) & (to > -math.inf)
    if bool(bare.any()):
        raise UnsupportedCombinationError(
            f"expected a shift from a model that gives every token of the other one a probability, got {int(bare.sum())} "
            "entries that only the first excludes; they would rise to infinity and be all that is taught. Mask the same "
            "tokens in both, or pool the teachers instead"
        )
    return (to - start).masked_fill(start == -math.inf, 0.0)


def _shifted(
    anchor: Float[Tensor, "*token vocab"],
    shifts: Float[Tensor, "teacher *token vocab"],
    weights: Float[Tensor, "*token teacher"] | None,
) -> Float[Tensor, "*token vocab"]:
    if weights is None:
        return (anchor + shifts.sum(0)).log_softmax(-1)
    by_teacher = weights.movedim(-1, 0).unsqueeze(-1)
    # a weight of zero silences even a teacher that excludes the token
    return (anchor + (by_teacher * shifts).masked_fill(by_teacher == 0.0, 0.0).sum(0)).log_softmax(-1)
