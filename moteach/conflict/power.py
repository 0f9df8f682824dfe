"""Power-mean pools: log of (sum_k w_k q_k^r)^(1/r) / Z, a road from any veto (r = 0 and below) to none (r = 1).

Such a pool is the minimiser of sum_k w_k D_r(q_k, p), D_r(q, p) = (1 - sum_v q_v^r p_v^(1-r)) / (r (1 - r)) (Amari's alpha
divergences, Neural Computation 19(10), 2007), which are KL(q_k || p) at r -> 1 and KL(p || q_k) at r -> 0:
sum_k w_k D_r(q_k, p) = Z^r D_r(pool, p) + (1 - Z^r) / (r (1 - r)). By the inequality of means log Z has the sign of r - 1.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn.functional import logsigmoid

from moteach.conflict.base import Accumulator, Target, check_penalty, check_weights, whole_distributions_only
from moteach.divergences.full import entropy
from moteach.errors import ConfigError, UnsupportedCombinationError
from moteach.types import Support

Trust = Callable[[Tensor], Tensor]
"""Maps the logprobs of a teacher, `[token vocab]`, to the log of a factor on its weight, `[token]`."""


@dataclass(frozen=True, kw_only=True)
class Power:
    """Power-mean pool: r = 1 is `linear`, r = 0 the limit, which is `geometric`, r -> -inf the minimum, r -> inf the maximum.

    The value at r = 0 is the limit, and small r are as exact as large ones. On `sampled` it is exact at r = 1, elsewhere in
    the gradient only, see `resolve_sampled`.

    Args:
        r: Exponent, finite.
        sequence_penalty: Weight of -log Z of the states that a token leads to, see `moteach.conflict.base.check_penalty`.

    Raises:
        ConfigError: r is not finite, or sequence_penalty is negative or not finite.
    """

    name: ClassVar[str] = "power"
    supports: ClassVar[frozenset[Support]] = frozenset({"full", "sampled"})
    needs: ClassVar[frozenset[str]] = frozenset()
    streams: ClassVar[bool] = True
    r: float = 0.5
    sequence_penalty: float = 0.0

    def __post_init__(self) -> None:
        check_exponent(self.r, "power")
        check_penalty(self.sequence_penalty)

    def accumulator(self, **context: Tensor) -> Accumulator:
        """Starts a pool; it holds one distribution."""
        return PowerAccumulator(r=self.r)

    def resolve_sampled(
        self, sampled_logprobs: Float[Tensor, "packed teacher"], weights: Float[Tensor, "packed teacher"]
    ) -> Float[Tensor, " packed"]:
        """Unnormalised logprob of the written token: log of the power mean, which lacks -log Z.

        As for the geometric pool, Z depends on the prefix alone and is a baseline: the policy gradient is exact when
        rewards are not discounted into the past and not clipped, the value is off by -log Z. At r = 1, Z is 1.

        Args:
            sampled_logprobs: What each teacher gives the written token; ignored where its weight is zero.
            weights: Weight of each teacher at each token.

        Returns:
            The pooled logprob up to the normaliser.

        Raises:
            RoutingError: The weights of some token do not sum to one.
        """
        check_weights(weights)
        pool = PowerAccumulator(r=self.r)
        for column in range(weights.shape[1]):
            pool.add(sampled_logprobs[:, column, None].clone(), weights[:, column].to(sampled_logprobs.dtype))
        return pool.mean().squeeze(-1)


@dataclass(frozen=True, kw_only=True)
class EntropyWeighted:
    """Sure teachers count more: weights proportional to w_k exp(-H(q_k) / temperature), then a power-mean pool.

    With equal w_k and r = 0 it is the baseline "Entropy" of MOPD-Router (arXiv 2609.30837), softmax(-H / 0.1) on log T_k,
    which reports that it favours whichever teacher has the lowest entropy whatever the prompt: entropy is not competence.

    Args:
        temperature: Nats; infinity leaves the weights alone, towards 0 the teacher with the least entropy is selected.
        r: Exponent of the pool: 0 geometric, 1 linear.

    Raises:
        ConfigError: temperature is not positive, or r is not finite.
    """

    name: ClassVar[str] = "entropy_weighted"
    supports: ClassVar[frozenset[Support]] = frozenset({"full"})
    needs: ClassVar[frozenset[str]] = frozenset()
    streams: ClassVar[bool] = True
    temperature: float = 0.1
    r: float = 0.0

    def __post_init__(self) -> None:
        check_exponent(self.r, self.name)
        if not self.temperature > 0:
            raise ConfigError(
                f"conflict.temperature: expected a number of nats above 0, got {self.temperature}; it divides the entropy"
            )

    def accumulator(self, **context: Tensor) -> Accumulator:
        """Starts a pool; it holds one distribution."""
        return PowerAccumulator(r=self.r, trust=lambda logprobs: entropy(logprobs) / -self.temperature)

    def resolve_sampled(
        self, sampled_logprobs: Float[Tensor, "packed teacher"], weights: Float[Tensor, "packed teacher"]
    ) -> Float[Tensor, " packed"]:
        """Refused: one logprob has no entropy.

        Raises:
            UnsupportedCombinationError: Always.
        """
        raise whole_distributions_only(self.name, "the entropy of a teacher")


@dataclass(frozen=True, kw_only=True)
class ConfidenceWeighted:
    """Teachers count by their largest probability: weights proportional to w_k max_v q_k(v)^sharpness, then a power mean.

    Sharpness 0 is the plain pool; towards infinity and with equal w_k it becomes `max_peak`.

    Args:
        sharpness: Power of the largest probability, at least 0.
        r: Exponent of the pool: 0 geometric, 1 linear.

    Raises:
        ConfigError: sharpness is negative or not finite, or r is not finite.
    """

    name: ClassVar[str] = "confidence_weighted"
    supports: ClassVar[frozenset[Support]] = frozenset({"full"})
    needs: ClassVar[frozenset[str]] = frozenset()
    streams: ClassVar[bool] = True
    sharpness: float = 1.0
    r: float = 1.0

    def __post_init__(self) -> None:
        check_exponent(self.r, self.name)
        if not 0 <= self.sharpness < math.inf:
            raise ConfigError(
                f"conflict.sharpness: expected a finite number of at least 0, got {self.sharpness}; below 0 the least "
                "confident teacher would count most. For the most confident alone use conflict=max_peak"
            )

    def accumulator(self, **context: Tensor) -> Accumulator:
        """Starts a pool; it holds one distribution."""
        return PowerAccumulator(r=self.r, trust=lambda logprobs: logprobs.amax(-1) * self.sharpness)

    def resolve_sampled(
        self, sampled_logprobs: Float[Tensor, "packed teacher"], weights: Float[Tensor, "packed teacher"]
    ) -> Float[Tensor, " packed"]:
        """Refused: the written token need not be the likeliest.

        Raises:
            UnsupportedCombinationError: Always.
        """
        raise whole_distributions_only(self.name, "the largest probability of a teacher")


class PowerAccumulator:
    """Running power mean of exponent r; weights may be in any proportion, they are normalised on the way.

    Args:
        r: Exponent, finite.
        trust: Multiplies the weight of a teacher by what its own distribution says.
    """

    def __init__(self, *, r: float, trust: Trust | None = None) -> None:
        self._r = r
        self._trust = trust
        self._pooled: Tensor | None = None
        self._log_weight: Tensor | None = None
        self._speakers: Tensor | None = None

    def add(self, teacher_logprobs: Float[Tensor, "token vocab"], weights: Float[Tensor, " token"]) -> None:
        """Merges one teacher into the mean; it owns `teacher_logprobs` from here on."""
        speaks = weights > 0
        log_weight = weights.log()
        if self._trust is not None:
            log_weight = log_weight + self._trust(teacher_logprobs)
        log_weight = log_weight.masked_fill(~speaks, -math.inf)
        if self._pooled is None or self._log_weight is None or self._speakers is None:
            self._pooled, self._log_weight, self._speakers = teacher_logprobs, log_weight, speaks.long()
            return
        merges = speaks & (self._speakers > 0)
        if bool(merges.any()):
            odds = (log_weight - self._log_weight).masked_fill(~merges, 0.0).unsqueeze(-1)
            merged = _merge(self._pooled, teacher_logprobs, odds, self._r)
            teacher_logprobs = torch.where(merges.unsqueeze(-1), merged, teacher_logprobs)
        # a token heard from one teacher alone keeps what it said, bit by bit
        self._pooled = torch.where(speaks.unsqueeze(-1), teacher_logprobs, self._pooled)
        self._log_weight = torch.logaddexp(self._log_weight, log_weight)
        self._speakers = self._speakers + speaks

    def mean(self) -> Float[Tensor, "token vocab"]:
        """The log of the power mean, not normalised."""
        assert self._pooled is not None, "finish() before add()"
        return self._pooled

    def finish(self, *, ignored: Bool[Tensor, " token"] | None = None) -> Target:
        """Normalises the mean, except at tokens that the caller has no use for."""
        pooled, speakers = self.mean(), self._speakers
        assert speakers is not None
        log_z = pooled.logsumexp(-1).masked_fill(speakers == 1, 0.0)
        if ignored is not None:
            log_z = log_z.masked_fill(ignored, 0.0)
        disjoint = log_z == -math.inf
        if bool(disjoint.any()):
            raise UnsupportedCombinationError(
                f"expected teachers that share some token, got {int(disjoint.sum())} position(s) where they exclude each "
                f"other on the whole vocabulary; their power mean of exponent {self._r} is zero. Use an r above 0, "
                "conflict=linear or conflict=select"
            )
        if self._r == 1.0:
            neg_log_z = torch.zeros_like(log_z)
        else:
            # rounding may cross zero, the inequality of means does not
            neg_log_z = log_z.neg().clamp(min=0.0) if self._r < 1.0 else log_z.neg().clamp(max=0.0)
        return Target(logprobs=pooled - log_z.unsqueeze(-1), token_weight=None, neg_log_z=neg_log_z)


def check_exponent(r: float, name: str) -> None:
    """Refuses an exponent that is not a number.

    Args:
        r: Exponent of a power mean.
        name: The pool.

    Raises:
        ConfigError: r is not finite.
    """
    if not math.isfinite(r):
        raise ConfigError(
            f"conflict.r: expected a finite exponent for conflict={name}, got {r}; 0 is the geometric pool and 1 the linear "
            "one, and already -20 is near the minimum and 20 near the maximum of the teachers"
        )


def _merge(
    pooled: Float[Tensor, "token vocab"],
    incoming: Float[Tensor, "token vocab"],
    odds: Float[Tensor, "token 1"],
    r: float,
) -> Float[Tensor, "token vocab"]:
    """Power mean of two, the second with weight sigmoid(odds).

    (1/r) log1p(t expm1(r (b - a))) loses nothing for small r, and logaddexp of the weighted powers nothing for far ones.
    """
    gap = incoming - pooled
    if r == 0.0:
        excluded = (pooled == -math.inf) | (incoming == -math.inf)
        return gap.mul_(odds.sigmoid()).add_(pooled).masked_fill_(excluded, -math.inf)
    gap.mul_(r)
    # NaN and infinity, where one of them excludes the entry, are not near
    near = gap.abs() < 1.0
    close = gap.expm1_().mul_(odds.sigmoid()).log1p_().div_(r).add_(pooled)
    if bool(near.all()):
        return close
    far = torch.logaddexp(pooled * r + logsigmoid(-odds), incoming * r + logsigmoid(odds)).div_(r)
    return torch.where(near, close, far, out=far)
