"""Aggregation in loss space: a weighted sum of one divergence a teacher, instead of one divergence to a pool.

A resolver that aggregates says so by `aggregates`; its accumulator is of the linear pool, which is what statistics that speak
of a target (its entropy, its logprob of the written token) then mean.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from moteach.conflict.base import Accumulator, check_weights, whole_distributions_only
from moteach.conflict.pools import Linear
from moteach.types import Support


@dataclass(frozen=True, kw_only=True)
class SumOfDivergences:
    """The loss is sum_k w_k D(student, q_k), exact for every divergence; see `sum_of_divergences`.

    One divergence a teacher is paid. The loss never vanishes where teachers differ: its least value is what they are apart.
    """

    name: ClassVar[str] = "sum_of_divergences"
    supports: ClassVar[frozenset[Support]] = frozenset({"full"})
    needs: ClassVar[frozenset[str]] = frozenset()
    streams: ClassVar[bool] = True
    aggregates: ClassVar[bool] = True

    def accumulator(self, **context: Tensor) -> Accumulator:
        """Starts a linear pool, for statistics; it holds one distribution."""
        return Linear().accumulator()

    def resolve_sampled(
        self, sampled_logprobs: Float[Tensor, "packed teacher"], weights: Float[Tensor, "packed teacher"]
    ) -> Float[Tensor, " packed"]:
        """Refused: one logprob is no divergence.

        Raises:
            UnsupportedCombinationError: Always.
        """
        raise whole_distributions_only(self.name, "each teacher's divergence from the student")


def sum_of_divergences(
    divergence: Callable[[Tensor, Tensor], Tensor],
    student_logits: Float[Tensor, "*token vocab"],
    teacher_logprobs: Float[Tensor, "teacher *token vocab"],
    weights: Float[Tensor, "*token teacher"],
) -> Float[Tensor, "*token"]:
    """Computes sum_k w_k D(student, teacher_k), DeepSeek-V4's Eq. 29 (arXiv 2606.19348) taken literally.

    For reverse KL it is KL(student || geometric pool) - log Z, for forward KL it is KL(linear pool || student) + JSD_w: the
    value differs from that of the pool by a constant of the student, the gradient by nothing, and the pool costs one
    divergence instead of one a teacher. For other divergences the two differ, and only this one is Eq. 29.

    Args:
        divergence: Any divergence of `moteach.divergences`.
        student_logits: Logits of the student, differentiable.
        teacher_logprobs: Normalised logprobs of each teacher, constants.
        weights: Weight of each teacher at each token, summing to one; a weight of zero silences a teacher.

    Returns:
        One value a token, in the unit of the divergence, differentiable in the student.

    Raises:
        RoutingError: The weights of some token are negative, not finite, or do not sum to one.
    """
    check_weights(weights)
    values = []
    for given, said in zip(weights.movedim(-1, 0), teacher_logprobs.detach(), strict=True):
        silent = given == 0.0
        # zero times the infinite divergence, or the NaN, of a silent teacher would not be zero
        heard = torch.where(silent.unsqueeze(-1), torch.zeros_like(said).log_softmax(-1), said)
        values.append(given.to(said.dtype) * divergence(student_logits, heard))
    return torch.stack(values).sum(0)
