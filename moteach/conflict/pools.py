"""The two classical opinion pools: linear (mixture of experts' opinions) and geometric (product of experts).

The linear pool is the minimiser of sum_k w_k KL(q_k || p), the geometric one of sum_k w_k KL(p || q_k); the latter is
externally Bayesian (arXiv 1502.04206). The geometric pool lets any teacher veto a token, the linear pool none: use the
first when teachers are calibrated on one support, the second when one of them may be sure and wrong.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from moteach.conflict.base import Accumulator, Target, check_penalty, check_weights
from moteach.conflict.partial import Missing, likeliest, linear_bounds
from moteach.errors import UnsupportedCombinationError
from moteach.types import Support


@dataclass(frozen=True, kw_only=True)
class Linear:
    """Linear pool: log sum_k w_k q_k. Exact on `sampled` too, where it is logsumexp_k(log w_k + log q_k(y)).

    On `topk` it is exact on tokens that all teachers name; others are bounded, see `moteach.conflict.partial`.

    Args:
        missing: On `topk`, what a token that a teacher did not name counts as: `lower`, zero, or `midpoint`, half of its bound.
    """

    name: ClassVar[str] = "linear"
    supports: ClassVar[frozenset[Support]] = frozenset({"full", "topk", "sampled"})
    needs: ClassVar[frozenset[str]] = frozenset()
    streams: ClassVar[bool] = True
    missing: Missing = "lower"

    def accumulator(self, **context: Tensor) -> Accumulator:
        """Starts a pool; it holds one distribution."""
        return _LinearAccumulator()

    def resolve_topk(
        self,
        ids: Int[Tensor, "teacher token given"],
        logprobs: Float[Tensor, "teacher token given"],
        weights: Float[Tensor, "token teacher"],
        k: int,
    ) -> tuple[Int[Tensor, "token k"], Float[Tensor, "token k"], Float[Tensor, " token"]]:
        """The pool's k likeliest tokens, see `moteach.conflict.partial.likeliest`."""
        return likeliest(linear_bounds(ids, logprobs, weights), k, self.missing)

    def resolve_sampled(
        self, sampled_logprobs: Float[Tensor, "packed teacher"], weights: Float[Tensor, "packed teacher"]
    ) -> Float[Tensor, " packed"]:
        """Exact logprob of the written token: logsumexp over teachers of log w_k + log q_k(y).

        Args:
            sampled_logprobs: What each teacher gives the written token; ignored where its weight is zero.
            weights: Weight of each teacher at each token.

        Returns:
            The pooled logprob.

        Raises:
            RoutingError: The weights of some token do not sum to one.
        """
        check_weights(weights)
        weighted = sampled_logprobs + weights.log().to(sampled_logprobs.dtype)
        return weighted.masked_fill(weights == 0.0, -math.inf).logsumexp(-1)


@dataclass(frozen=True, kw_only=True)
class Geometric:
    """Geometric pool (product of experts): prod_k q_k^w_k / Z, with -log Z >= 0 the price of disagreement.

    For two teachers log Z = -(1 - w) D_w(q_1 || q_2), a Renyi divergence of order w. Teachers that exclude each other
    on the whole vocabulary have no geometric pool. On `sampled` it is exact in the gradient only, see
    `resolve_sampled`.

    Args:
        sequence_penalty: Weight of -log Z of the states that a token leads to, see `check_penalty`.

    Raises:
        ConfigError: sequence_penalty is negative or not finite.
    """

    name: ClassVar[str] = "geometric"
    supports: ClassVar[frozenset[Support]] = frozenset({"full", "sampled"})
    needs: ClassVar[frozenset[str]] = frozenset()
    streams: ClassVar[bool] = True
    sequence_penalty: float = 0.0

    def __post_init__(self) -> None:
        check_penalty(self.sequence_penalty)

    def accumulator(self, **context: Tensor) -> Accumulator:
        """Starts a pool; it holds one distribution."""
        return _GeometricAccumulator()

    def resolve_sampled(
        self, sampled_logprobs: Float[Tensor, "packed teacher"], weights: Float[Tensor, "packed teacher"]
    ) -> Float[Tensor, " packed"]:
        """Unnormalised logprob of the written token: sum_k w_k log q_k(y), which lacks -log Z.

        Z depends on the prefix alone, so it is a baseline: the policy gradient is exact when rewards are not discounted
        into the past (discount 0) and not clipped. The *value* is never exact, it is too low by -log Z.

        Args:
            sampled_logprobs: What each teacher gives the written token; ignored where its weight is zero.
            weights: Weight of each teacher at each token.

        Returns:
            The pooled logprob up to the normaliser.

        Raises:
            RoutingError: The weights of some token do not sum to one.
        """
        check_weights(weights)
        weighted = sampled_logprobs * weights.to(sampled_logprobs.dtype)
        return weighted.masked_fill(weights == 0.0, 0.0).sum(-1)


class _LinearAccumulator:
    """Running log of the mixture."""

    def __init__(self) -> None:
        self._pooled: Tensor | None = None

    def add(self, teacher_logprobs: Float[Tensor, "token vocab"], weights: Float[Tensor, " token"]) -> None:
        # log 1 = 0 and logaddexp(x, -inf) = x exactly, which is what makes a one-hot weight equal to selection bitwise
        if not bool((weights == 1.0).all()):
            teacher_logprobs.add_(weights.log().unsqueeze(-1))
        silent = weights == 0.0
        if bool(silent.any()):
            teacher_logprobs.masked_fill_(silent.unsqueeze(-1), -math.inf)
        if self._pooled is None:
            self._pooled = teacher_logprobs
        else:
            torch.logaddexp(self._pooled, teacher_logprobs, out=self._pooled)

    def finish(self) -> Target:
        assert self._pooled is not None, "finish() before add()"
        return Target(logprobs=self._pooled, token_weight=None, neg_log_z=self._pooled.new_zeros(len(self._pooled)))


class _GeometricAccumulator:
    """Running weighted sum of logprobs, and the largest weight seen, which tells one-hot tokens from mixed ones."""

    def __init__(self) -> None:
        self._pooled: Tensor | None = None
        self._largest: Tensor | None = None

    def add(self, teacher_logprobs: Float[Tensor, "token vocab"], weights: Float[Tensor, " token"]) -> None:
        silent = weights == 0.0
        if not bool((weights == 1.0).all()):
            teacher_logprobs.mul_(weights.unsqueeze(-1))
        if bool(silent.any()):
            teacher_logprobs.masked_fill_(silent.unsqueeze(-1), 0.0)
        if self._pooled is None or self._largest is None:
            self._pooled, self._largest = teacher_logprobs, weights
        else:
            self._pooled.add_(teacher_logprobs)
            self._largest = torch.maximum(self._largest, weights)

    def finish(self) -> Target:
        assert self._pooled is not None, "finish() before add()"
        assert self._largest is not None
        one_hot = self._largest == 1.0
        if bool(one_hot.all()):
            return Target(logprobs=self._pooled, token_weight=None, neg_log_z=torch.zeros_like(self._largest))
        log_z = self._pooled.logsumexp(-1).masked_fill_(one_hot, 0.0)
        disjoint = log_z == -math.inf
        if bool(disjoint.any()):
            raise UnsupportedCombinationError(
                f"expected teachers that share some token, got {int(disjoint.sum())} position(s) where they exclude "
                "each other on the whole vocabulary; their geometric pool does not exist. Use conflict=linear or "
                "conflict=select"
            )
        pooled = self._pooled.sub_(log_z.unsqueeze(-1))
        return Target(logprobs=pooled, token_weight=None, neg_log_z=log_z.neg_().clamp_min_(0.0))
