"""A batch taken apart by teacher: each one's share of the loss, and a gradient of its own."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import combinations

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from moteach.objectives.base import Scored
from moteach.types import Evidence, LossOutput


@dataclass(frozen=True, kw_only=True, slots=True)
class Share:
    """What one teacher teaches of a batch."""

    teacher_id: str
    scored: Scored
    """The rows in which it teaches."""
    kept: Bool[Tensor, " packed"]
    """Where the tokens of these rows are in the batch."""
    weights: Float[Tensor, " kept"]
    """Its weight at each of them."""


def shares(scored: Scored, weights: Float[Tensor, "packed scored_teacher"]) -> list[Share]:
    """Takes a batch apart: in each share one teacher teaches alone, and its weight is in the weights of the tokens.

    The losses of the shares add up to sum_t w_t sum_k w_tk loss(t, k). Teachers whose share weighs nothing are left out, or
    their empty gradient would take part in a combination.

    Args:
        scored: The batch with its final token weights.
        weights: Weight of each teacher of the evidence at each token.
    """
    found = []
    for column, entry in enumerate(scored.evidence.teachers):
        own = weights[:, column]
        token_weights = scored.token_weights * own.to(scored.token_weights.dtype)
        rows = torch.unique(scored.rollouts.token_rows[token_weights > 0]).tolist()
        if not rows:
            continue
        alone = torch.zeros(len(own), len(scored.routing.teacher_ids), dtype=scored.routing.weights.dtype)
        alone[:, scored.routing.teacher_ids.index(entry.teacher_id)] = (own > 0).to(alone.dtype)
        part = replace(
            scored,
            evidence=Evidence(teachers=(entry,), num_tokens=scored.evidence.num_tokens),
            token_weights=token_weights,
            teacher_weights=alone,
            # measured against all teachers together
            stats=None,
        )
        kept = scored.kept(rows)
        found.append(Share(teacher_id=entry.teacher_id, scored=part.select(rows), kept=kept, weights=own[kept]))
    return found


def joined(
    parts: Sequence[Share], outputs: Sequence[LossOutput], num_tokens: int
) -> tuple[Tensor, dict[str, Float[Tensor, " packed"]]]:
    """Adds up the losses of the shares, and averages their per-token values with the teachers' weights.

    Args:
        parts: The shares.
        outputs: What the objective made of each.
        num_tokens: Tokens of the batch.

    Returns:
        The loss, and statistics by name; `abstained` is 1 where no share teaches.
    """
    loss = torch.zeros(())
    stats: dict[str, Tensor] = {}
    abstained = torch.ones(num_tokens)
    for part, output in zip(parts, outputs, strict=True):
        loss = loss + output.loss
        for name, values in output.token_stats.items():
            if name == "abstained":
                abstained[part.kept] = torch.minimum(abstained[part.kept], values.to(abstained.dtype))
                continue
            weighted = (values * part.weights.to(values.dtype)).masked_fill(part.weights == 0.0, 0.0)
            stats.setdefault(name, values.new_zeros(num_tokens))[part.kept] += weighted
    return loss, {**stats, "abstained": abstained}


class OwnGradients:
    """Collects the gradient of each teacher and puts one update in their place; idle where autograd is off.

    Args:
        student: The trained model; what its parameters have of a gradient is kept and added to.
    """

    def __init__(self, student: nn.Module) -> None:
        self._active = torch.is_grad_enabled()
        self._parameters = [parameter for parameter in student.parameters() if parameter.requires_grad]
        self._before = [parameter.grad for parameter in self._parameters]
        self._vectors: dict[str, Tensor] = {}

    @contextmanager
    def of(self, teacher_id: str) -> Iterator[None]:
        """Takes what the block leaves in the parameters as the gradient of this teacher."""
        if not self._active:
            yield
            return
        for parameter in self._parameters:
            parameter.grad = None
        yield
        found = [torch.zeros_like(p) if p.grad is None else p.grad for p in self._parameters]
        self._vectors[teacher_id] = torch.cat([gradient.flatten() for gradient in found])

    def combine(self, how: Callable[[Tensor], Tensor]) -> dict[str, float]:
        """Writes the update; a teacher alone is its own.

        Args:
            how: Makes one vector of one a teacher.

        Returns:
            Norm of each teacher's gradient, the cosine between each two, and that of the update to their sum.
        """
        if not self._active:
            return {}
        for parameter, before in zip(self._parameters, self._before, strict=True):
            parameter.grad = before
        if not self._vectors:
            return {}
        metrics = {f"teacher_gradient_norm/{name}": float(vector.norm()) for name, vector in self._vectors.items()}
        for left, right in combinations(self._vectors, 2):
            metrics[f"teacher_gradient_cosine/{left}/{right}"] = _cosine(self._vectors[left], self._vectors[right])
        stacked = torch.stack(list(self._vectors.values()))
        self._vectors.clear()
        update = stacked[0] if len(stacked) == 1 else how(stacked)
        if len(stacked) > 1:
            metrics["surgery_cosine"] = _cosine(update, stacked.sum(0))
        sizes = [parameter.numel() for parameter in self._parameters]
        for parameter, piece in zip(self._parameters, torch.split(update, sizes), strict=True):
            own = piece.view_as(parameter).to(parameter.dtype)
            parameter.grad = own.clone() if parameter.grad is None else parameter.grad + own
        return metrics


def _cosine(left: Tensor, right: Tensor) -> float:
    return float(torch.nn.functional.cosine_similarity(left, right, dim=0))
