"""Pools that trust teachers less where they disagree: by dropping outliers, weighing the token, or holding on to one."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from moteach.conflict.base import Accumulator, HeldTeachers, Target, whole_distributions_only
from moteach.conflict.power import PowerAccumulator, check_exponent
from moteach.conflict.select import Select
from moteach.divergences.disagreement import pairwise_jsd
from moteach.divergences.full import entropy
from moteach.errors import ConfigError
from moteach.types import Support

Disagreement = Literal["jsd", "neg_log_z"]
_MAJORITY = 3


@dataclass(frozen=True, kw_only=True)
class Trimmed:
    """Drops, at each token, the teachers farthest from the others, and pools the rest by a power mean.

    Farthest: the largest sum_j w_j JSD(q_k, q_j) / sum_j w_j over the other teachers j, one teacher after the other, the
    first of a tie. Two teachers are as far from each other as back, so none is dropped unless three have weight: there must
    be a majority to be far from. JSD and not a symmetrised KL, which is infinite for every pair with a teacher that excludes
    a token; whole teachers and not the extreme logprobs of each entry, because what is left of a teacher is then still a
    distribution that some teacher holds. It keeps the geometric pool from the veto of a single teacher. It holds all
    teachers of a chunk.

    Args:
        drop: How many teachers to drop at most, at least 1.
        r: Exponent of the pool of the rest: 0 geometric, 1 linear.

    Raises:
        ConfigError: drop is below 1, or r is not finite.
    """

    name: ClassVar[str] = "trimmed"
    supports: ClassVar[frozenset[Support]] = frozenset({"full"})
    needs: ClassVar[frozenset[str]] = frozenset()
    streams: ClassVar[bool] = False
    drop: int = 1
    r: float = 0.0

    def __post_init__(self) -> None:
        check_exponent(self.r, self.name)
        if self.drop < 1:
            raise ConfigError(
                f"conflict.drop: expected at least 1 teacher to drop, got {self.drop}; to keep all of them use conflict=power"
            )

    def accumulator(self, **context: Tensor) -> Accumulator:
        """Starts a pool; it holds all teachers."""
        return HeldTeachers(self._pool)

    def resolve_sampled(
        self, sampled_logprobs: Float[Tensor, "packed teacher"], weights: Float[Tensor, "packed teacher"]
    ) -> Float[Tensor, " packed"]:
        """Refused: the distance between teachers is one of whole distributions.

        Raises:
            UnsupportedCombinationError: Always.
        """
        raise whole_distributions_only(self.name, "the distance between teachers")

    def _pool(self, logprobs: Tensor, weights: Tensor) -> Target:
        kept = self._kept(logprobs, weights)
        rest = PowerAccumulator(r=self.r)
        for teacher_logprobs, given, stays in zip(logprobs, weights, kept, strict=True):
            rest.add(teacher_logprobs, given * stays)
        return rest.finish()

    def _kept(
        self, logprobs: Float[Tensor, "teacher token vocab"], weights: Float[Tensor, "teacher token"]
    ) -> Bool[Tensor, "teacher token"]:
        kept = (weights > 0).T
        if len(logprobs) < _MAJORITY:
            return kept.T
        # a silent teacher may hold anything, even NaN
        distances = pairwise_jsd(logprobs.masked_fill((weights == 0.0).unsqueeze(-1), 0.0))
        others = 1.0 - torch.eye(len(logprobs), dtype=logprobs.dtype, device=logprobs.device)
        for _ in range(self.drop):
            heard = weights.T * kept
            votes = heard.unsqueeze(-2) * others
            scores = (distances * votes).sum(-1) / votes.sum(-1).masked_fill(~kept, 1.0).clamp(min=1e-30)
            worst = scores.masked_fill(~kept, -1.0).argmax(-1, keepdim=True)
            enough = kept.sum(-1, keepdim=True) >= _MAJORITY
            kept = kept & ~torch.zeros_like(kept).scatter(-1, worst, enough)
        return kept.T


@dataclass(frozen=True, kw_only=True)
class Agreement:
    """A power-mean pool whose tokens count by 1 / (1 + gamma * disagreement).

    The form of the weight is UniSD's (arXiv 2605.06597), which divides the disagreement by the 95th percentile of the batch
    and caps it; a chunk does not know the batch, so here it is in nats and unscaled. The factor lowers the total weight of
    the loss: it is part of the target. `token_weights=agreement` is UniSD's, keeps the total and goes with any target.

    Args:
        gamma: Strength, at least 0; the weight is 1/2 at a disagreement of 1 / gamma nats.
        disagreement: `jsd`, the generalised Jensen-Shannon divergence of the teachers, at most the entropy of the weights;
            or `neg_log_z`, the unbounded -log of the normaliser of their geometric pool.
        r: Exponent of the pool: 0 geometric, 1 linear.

    Raises:
        ConfigError: gamma is negative or not finite, or r is not finite.
    """

    name: ClassVar[str] = "agreement"
    supports: ClassVar[frozenset[Support]] = frozenset({"full"})
    needs: ClassVar[frozenset[str]] = frozenset()
    streams: ClassVar[bool] = True
    gamma: float = 1.0
    disagreement: Disagreement = "jsd"
    r: float = 1.0

    def __post_init__(self) -> None:
        check_exponent(self.r, self.name)
        if not 0 <= self.gamma < math.inf:
            raise ConfigError(
                f"conflict.gamma: expected a finite number of at least 0, got {self.gamma}; tokens on which teachers disagree "
                "would count more, or not be finite"
            )

    def accumulator(self, **context: Tensor) -> Accumulator:
        """Starts a pool; it holds two distributions, the target and what the disagreement is measured with."""
        return _AgreementAccumulator(self)

    def resolve_sampled(
        self, sampled_logprobs: Float[Tensor, "packed teacher"], weights: Float[Tensor, "packed teacher"]
    ) -> Float[Tensor, " packed"]:
        """Refused: the disagreement is one of whole distributions.

        Raises:
            UnsupportedCombinationError: Always.
        """
        raise whole_distributions_only(self.name, "the disagreement of the teachers")


class _AgreementAccumulator:
    """The pool, the pool that measures, and the mean entropy of the teachers."""

    def __init__(self, settings: Agreement) -> None:
        self._settings = settings
        self._target = PowerAccumulator(r=settings.r)
        measures = 1.0 if settings.disagreement == "jsd" else 0.0
        self._meter = self._target if settings.r == measures else PowerAccumulator(r=measures)
        self._entropy: Tensor | None = None

    def add(self, teacher_logprobs: Float[Tensor, "token vocab"], weights: Float[Tensor, " token"]) -> None:
        if self._settings.disagreement == "jsd":
            weighted = (weights * entropy(teacher_logprobs)).masked_fill(weights == 0.0, 0.0)
            self._entropy = weighted if self._entropy is None else self._entropy + weighted
        # power means leave what they are given as it is
        self._target.add(teacher_logprobs, weights)
        if self._meter is not self._target:
            self._meter.add(teacher_logprobs, weights)

    def finish(self) -> Target:
        target = self._target.finish()
        meter = target if self._meter is self._target else self._meter.finish()
        apart = meter.neg_log_z if self._entropy is None else (entropy(meter.logprobs) - self._entropy).clamp(min=0.0)
        weight = 1.0 / (1.0 + self._settings.gamma * apart)
        return Target(logprobs=target.logprobs, token_weight=weight, neg_log_z=target.neg_log_z)


@dataclass(frozen=True, kw_only=True)
class Anchored:
    """The routed teacher, moved towards the pool of all by at most so many nats.

    The target is the point p_s proportional to anchor^(1-s) pool^s, s in [0, 1], with the largest s for which
    KL(p_s || anchor) <= nats. That divergence grows with s (its derivative is s times the variance of log(pool / anchor) under
    p_s), so bisection finds it to the last bit, in 24 looks at a chunk in float32 and 53 in float64, which makes it the dearest
    of the pools; and p_s is the distribution nearest to the pool, in KL(p || pool), among those within the budget. The anchor
    is the teacher with the largest weight, the first of a tie. What it excludes stays excluded, at any finite budget.

    Args:
        nats: Budget, at least 0; at 0 it is `select`, at infinity the pool.
        r: Exponent of the pool: 0 geometric, 1 linear.

    Raises:
        ConfigError: nats is negative, or r is not finite.
    """

    name: ClassVar[str] = "anchored"
    supports: ClassVar[frozenset[Support]] = frozenset({"full"})
    needs: ClassVar[frozenset[str]] = frozenset()
    streams: ClassVar[bool] = True
    nats: float = 0.1
    r: float = 0.0

    def __post_init__(self) -> None:
        check_exponent(self.r, self.name)
        if not self.nats >= 0:
            raise ConfigError(f"conflict.nats: expected a budget of at least 0 nats, got {self.nats}")

    def accumulator(self, **context: Tensor) -> Accumulator:
        """Starts a pool; it holds two distributions, the anchor and the pool."""
        return _AnchoredAccumulator(self)

    def resolve_sampled(
        self, sampled_logprobs: Float[Tensor, "packed teacher"], weights: Float[Tensor, "packed teacher"]
    ) -> Float[Tensor, " packed"]:
        """Refused: the budget is one of whole distributions.

        Raises:
            UnsupportedCombinationError: Always.
        """
        raise whole_distributions_only(self.name, "the divergence between a teacher and the pool")


class _AnchoredAccumulator:
    """The anchor and the pool."""

    def __init__(self, settings: Anchored) -> None:
        self._nats = settings.nats
        self._anchor = Select().accumulator()
        self._pool = PowerAccumulator(r=settings.r)

    def add(self, teacher_logprobs: Float[Tensor, "token vocab"], weights: Float[Tensor, " token"]) -> None:
        # a selection writes into the first teacher it is given
        self._anchor.add(teacher_logprobs.clone(), weights)
        self._pool.add(teacher_logprobs, weights)

    def finish(self) -> Target:
        anchor, pool = self._anchor.finish().logprobs, self._pool.finish()
        return Target(logprobs=moved(anchor, pool.logprobs, self._nats), token_weight=None, neg_log_z=pool.neg_log_z)


def moved(
    anchor: Float[Tensor, "token vocab"], towards: Float[Tensor, "token vocab"], nats: float
) -> Float[Tensor, "token vocab"]:
    """Moves one distribution towards another on the geometric path, up to a KL divergence from where it started.

    Args:
        anchor: Normalised logprobs of the start.
        towards: Normalised logprobs of the end.
        nats: Largest KL(result || anchor).

    Returns:
        Normalised logprobs; the end itself where it is near enough, the start where no step fits into the budget.
    """
    if nats in (0.0, math.inf):
        return towards if nats else anchor
    excluded = anchor == -math.inf
    outside = (excluded & (towards > -math.inf)).any(-1)
    tilt = (towards - anchor).masked_fill_(excluded, 0.0)
    far = outside | ~(_distance(towards, tilt) <= nats)
    if not bool(far.any()):
        return towards
    point = _last_within(anchor[far], tilt[far], nats)
    return towards.masked_scatter(far.unsqueeze(-1), point)


def _last_within(
    anchor: Float[Tensor, "token vocab"], tilt: Float[Tensor, "token vocab"], nats: float
) -> Float[Tensor, "token vocab"]:
    """The normalised anchor + s tilt with the largest s for which the divergence to the anchor is within the budget."""
    low, high = torch.zeros_like(anchor[:, :1]), torch.ones_like(anchor[:, :1])
    for _ in range(2 - math.frexp(torch.finfo(anchor.dtype).eps)[1]):
        middle = (low + high) / 2
        shift = middle * tilt
        point = anchor + shift
        log_z = point.logsumexp(-1, keepdim=True)
        fits = (_distance(point.sub_(log_z), shift.sub_(log_z)) <= nats).unsqueeze(-1)
        low, high = torch.where(fits, middle, low), torch.where(fits, high, middle)
    moves = low > 0
    point = torch.where(moves, anchor + low * tilt, anchor)
    return torch.where(moves, point.log_softmax(-1), anchor)


def _distance(
    logprobs: Float[Tensor, "token vocab"], log_ratio: Float[Tensor, "token vocab"]
) -> Float[Tensor, " token"]:
    """KL of a distribution to the one that its log-ratio refers to."""
    return (logprobs.exp() * log_ratio).masked_fill(logprobs == -math.inf, 0.0).sum(-1)
