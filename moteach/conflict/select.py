"""Hard choice: one teacher teaches the token alone, the one with the largest weight or the surest of its likeliest token."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from moteach.conflict.base import Accumulator, Target, check_weights, whole_distributions_only
from moteach.types import Support


@dataclass(frozen=True, kw_only=True)
class Select:
    """The target is bitwise the distribution of the teacher with the largest weight; a tie goes to the first teacher.

    Exact on every support: nothing is mixed.
    """

    name: ClassVar[str] = "select"
    supports: ClassVar[frozenset[Support]] = frozenset({"full", "topk", "sampled"})
    needs: ClassVar[frozenset[str]] = frozenset()
    streams: ClassVar[bool] = True

    def accumulator(self, **context: Tensor) -> Accumulator:
        """Starts a selection; it holds one distribution."""
        return _SelectAccumulator()

    def resolve_sampled(
        self, sampled_logprobs: Float[Tensor, "packed teacher"], weights: Float[Tensor, "packed teacher"]
    ) -> Float[Tensor, " packed"]:
        """Exact logprob of the written token: that of the chosen teacher.

        Args:
            sampled_logprobs: What each teacher gives the written token; only the chosen one is read.
            weights: Weight of each teacher at each token.

        Returns:
            The logprob under the chosen teacher.

        Raises:
            RoutingError: The weights of some token do not sum to one.
        """
        check_weights(weights)
        return sampled_logprobs.gather(-1, weights.argmax(-1, keepdim=True)).squeeze(-1)


@dataclass(frozen=True, kw_only=True)
class MaxPeak:
    """The target is bitwise the distribution of the teacher with the largest w_k max_v q_k(v); a tie goes to the first.

    With equal weights it is the max-peak routing of N-OPSD, for teachers that are near duplicates with complementary
    corrections, where averaging costs the corrections; its quantile gate is not part of this.
    """

    name: ClassVar[str] = "max_peak"
    supports: ClassVar[frozenset[Support]] = frozenset({"full"})
    needs: ClassVar[frozenset[str]] = frozenset()
    streams: ClassVar[bool] = True

    def accumulator(self, **context: Tensor) -> Accumulator:
        """Starts a selection; it holds one distribution."""
        return _PeakAccumulator()

    def resolve_sampled(
        self, sampled_logprobs: Float[Tensor, "packed teacher"], weights: Float[Tensor, "packed teacher"]
    ) -> Float[Tensor, " packed"]:
        """Refused: the written token need not be the likeliest.

        Raises:
            UnsupportedCombinationError: Always.
        """
        raise whole_distributions_only(self.name, "the largest probability of a teacher")


class _PeakAccumulator:
    """A selection by weight times largest probability."""

    def __init__(self) -> None:
        self._best = _SelectAccumulator()

    def add(self, teacher_logprobs: Float[Tensor, "token vocab"], weights: Float[Tensor, " token"]) -> None:
        peaks = weights * teacher_logprobs.amax(-1).exp()
        self._best.add(teacher_logprobs, peaks.masked_fill(weights == 0.0, 0.0))

    def finish(self) -> Target:
        return self._best.finish()


class _SelectAccumulator:
    """The best teacher so far."""

    def __init__(self) -> None:
        self._chosen: Tensor | None = None
        self._largest: Tensor | None = None

    def add(self, teacher_logprobs: Float[Tensor, "token vocab"], weights: Float[Tensor, " token"]) -> None:
        if self._chosen is None or self._largest is None:
            self._chosen, self._largest = teacher_logprobs, weights
            return
        better = weights > self._largest
        torch.where(better.unsqueeze(-1), teacher_logprobs, self._chosen, out=self._chosen)
        self._largest = torch.maximum(self._largest, weights)

    def finish(self) -> Target:
        assert self._chosen is not None, "finish() before add()"
        return Target(logprobs=self._chosen, token_weight=None, neg_log_z=self._chosen.new_zeros(len(self._chosen)))
