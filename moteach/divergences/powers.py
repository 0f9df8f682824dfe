"""Divergences made of powers of the two probabilities: the alpha-beta family and Renyi's.

Write `p` for the student and `q` for the teacher.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from moteach.divergences.terms import (
    align,
    at_exclusions,
    closed_form,
    logprobs_of,
    relative_entropy_terms,
    scaled_expm1,
    shielded,
    total,
)
from moteach.errors import ConfigError
from moteach.types import Support

_SUPPORTS: frozenset[Support] = frozenset({"full", "topk"})
_ROUNDING = 1e-12
"""alpha + beta is zero below this share of the larger of the two: 0.1 + 0.2 - 0.3 is not exactly zero."""


def alpha_beta(
    student_logits: Float[Tensor, "*token vocab"],
    teacher_logits: Float[Tensor, "*token vocab"],
    *,
    alpha: float,
    beta: float,
    student_temperature: float = 1.0,
    teacher_temperature: float = 1.0,
) -> Float[Tensor, "*token"]:
    """-1 / (alpha beta) sum_v [q^alpha p^beta - alpha / s q^s - beta / s p^s] with s = alpha + beta.

    ABKD (arXiv 2505.04560): `alpha` is the power of the *teacher*, `beta` that of the student. (1, 0) is the forward
    KL, (0, 1) the reverse KL. Wherever the formula divides by zero the value is its continuous limit; the official code
    gives alpha (or beta) times that limit there. With L = log q - log p and phi_a(x) = (exp(a x) - 1) / a, phi_0(x) =
    x, a term is p^s (phi_s(L) - phi_alpha(L)) / beta = q^s (phi_s(-L) - phi_beta(-L)) / alpha, and L^2 / 2 at (0, 0);
    the form that divides by the larger number is used. It loses digits in proportion to 1 / max(|alpha|, |beta|).

    Args:
        student_logits: Logits of `p`.
        teacher_logits: Logits of `q`.
        alpha: Power of the teacher, any real number.
        beta: Power of the student, any real number.
        student_temperature: Divides the student's logits.
        teacher_temperature: Divides the teacher's logits.

    Returns:
        One value per token. A token that only the student excludes leaves it finite if beta > 0 and s > 0, one that
        only the teacher excludes if alpha > 0 and s > 0; else it is +inf.

    Raises:
        ConfigError: `alpha` or `beta` is not finite, or a temperature is not positive.
    """
    _check_powers(alpha, beta)
    p, q = logprobs_of(student_logits, student_temperature), logprobs_of(teacher_logits, teacher_temperature)
    return total(_alpha_beta_terms(p, q, alpha, beta))


def renyi(
    student_logits: Float[Tensor, "*token vocab"],
    teacher_logits: Float[Tensor, "*token vocab"],
    *,
    order: float,
    student_temperature: float = 1.0,
    teacher_temperature: float = 1.0,
) -> Float[Tensor, "*token"]:
    """D_a(p || q) = 1 / (a - 1) log sum_v p_v^a q_v^(1 - a) of the given order a; its limit at 1 is the reverse KL.

    The definition is Renyi's (van Erven and Harremoes, arXiv 1206.2459). It grows with the order.

    Args:
        student_logits: Logits of `p`.
        teacher_logits: Logits of `q`.
        order: Positive; 1 is exactly the reverse KL.
        student_temperature: Divides the student's logits.
        teacher_temperature: Divides the teacher's logits.

    Returns:
        Nats per token. +inf from order 1 on where the teacher excludes a token that the student can write, below order
        1 only where they have no token in common.

    Raises:
        ConfigError: `order` is not positive and finite, or a temperature is not positive.
    """
    _check_order(order)
    p, q = logprobs_of(student_logits, student_temperature), logprobs_of(teacher_logits, teacher_temperature)
    return _renyi(p, q, order)


@dataclass(frozen=True, kw_only=True)
class AlphaBeta:
    """`alpha_beta` as a component; `alpha` is the power of the teacher and `beta` that of the student."""

    name: ClassVar[str] = "alpha_beta"
    supports: ClassVar[frozenset[Support]] = _SUPPORTS
    slope: ClassVar[float] = 0.0
    alpha: float = 0.2
    beta: float = 0.7

    def __post_init__(self) -> None:
        _check_powers(self.alpha, self.beta)

    def __call__(
        self, student_logits: Float[Tensor, "*token vocab"], teacher_logits: Float[Tensor, "*token vocab"]
    ) -> Float[Tensor, "*token"]:
        """See `alpha_beta`."""
        return alpha_beta(student_logits, teacher_logits, alpha=self.alpha, beta=self.beta)

    def terms(
        self, student_logprobs: Float[Tensor, "*token vocab"], teacher_logprobs: Float[Tensor, "*token vocab"]
    ) -> Float[Tensor, "*token vocab"]:
        """-[q^alpha p^beta - alpha / s q^s - beta / s p^s] / (alpha beta), non-negative at each entry."""
        return _alpha_beta_terms(student_logprobs, teacher_logprobs, self.alpha, self.beta)

    def value_and_gradient(
        self, student_logprobs: Float[Tensor, "*token vocab"], teacher_logprobs: Float[Tensor, "*token vocab"]
    ) -> tuple[Float[Tensor, "*token"], Float[Tensor, "*token vocab"]]:
        """Value, and the gradient of s_v = -p^s phi_alpha(log q - log p)."""
        power = _power_sum(self.alpha, self.beta)
        terms = _alpha_beta_terms(student_logprobs, teacher_logprobs, self.alpha, self.beta)
        pair = align(student_logprobs, teacher_logprobs)
        slopes = _scaled_phi(pair.student, pair.log_ratio, self.alpha, power).neg()
        slopes.masked_fill_(pair.student_out | (pair.log_ratio == 0), 0.0)
        if self.alpha > 0:  # else the value is infinite where the teacher alone excludes
            slopes = at_exclusions(slopes, pair.teacher_out, 1.0 / self.alpha, power * student_logprobs)
        return closed_form(terms, slopes, student_logprobs)


@dataclass(frozen=True, kw_only=True)
class Renyi:
    """`renyi` as a component; the logarithm is of the whole sum, so it is not a sum of terms."""

    name: ClassVar[str] = "renyi"
    supports: ClassVar[frozenset[Support]] = _SUPPORTS
    order: float = 0.5

    def __post_init__(self) -> None:
        _check_order(self.order)

    def __call__(
        self, student_logits: Float[Tensor, "*token vocab"], teacher_logits: Float[Tensor, "*token vocab"]
    ) -> Float[Tensor, "*token"]:
        """See `renyi`."""
        return renyi(student_logits, teacher_logits, order=self.order)

    def value_and_gradient(
        self, student_logprobs: Float[Tensor, "*token vocab"], teacher_logprobs: Float[Tensor, "*token vocab"]
    ) -> tuple[Float[Tensor, "*token"], Float[Tensor, "*token vocab"]]:
        """Value D, and d/dz = a p (exp((a - 1) (log p - log q - D)) - 1) / (a - 1)."""
        if self.order == 1.0:
            terms = relative_entropy_terms(student_logprobs, teacher_logprobs)
            return closed_form(terms, terms.clone(), student_logprobs)
        value = _renyi(student_logprobs, teacher_logprobs, self.order)
        infinite = value.isinf().unsqueeze(-1)
        centre = value.unsqueeze(-1).masked_fill(infinite, 0.0)
        excess = _excess(student_logprobs, teacher_logprobs, centre, self.order)
        return value, excess.mul_(self.order / (self.order - 1.0)).masked_fill_(infinite, 0.0)


def _alpha_beta_terms(student_logprobs: Tensor, teacher_logprobs: Tensor, alpha: float, beta: float) -> Tensor:
    return shielded(lambda p, q: _raw_alpha_beta_terms(p, q, alpha, beta), student_logprobs, teacher_logprobs)


def _raw_alpha_beta_terms(student_logprobs: Tensor, teacher_logprobs: Tensor, alpha: float, beta: float) -> Tensor:
    power = _power_sum(alpha, beta)
    pair = align(student_logprobs, teacher_logprobs)
    base, x, first, divisor = pair.student, pair.log_ratio, alpha, beta
    if abs(alpha) > abs(beta):
        base, x, first, divisor = pair.teacher, -pair.log_ratio, beta, alpha
    equal = pair.log_ratio == 0
    # a negative power of a tiny probability overflows, and infinity times zero is NaN
    base = base.masked_fill(equal, 0.0)
    if divisor == 0.0:
        terms = 0.5 * x.square()
    else:
        terms = (_scaled_phi(base, x, power, power) - _scaled_phi(base, x, first, power)) / divisor
    if power < 0.0:
        # two powers that both overflow: they belong to different probabilities, and so does their difference
        terms = torch.where(terms.isnan() & ~x.isnan(), math.inf, terms)
    of_teacher = 1.0 / (power * beta) if power > 0.0 and beta > 0.0 else math.inf
    of_student = 1.0 / (power * alpha) if power > 0.0 and alpha > 0.0 else math.inf
    terms = at_exclusions(terms, pair.student_out, of_teacher, power * teacher_logprobs)
    return at_exclusions(terms, pair.teacher_out, of_student, power * student_logprobs)


def _scaled_phi(log_base: Tensor, x: Tensor, a: float, power: float) -> Tensor:
    """exp(power log_base) phi_a(x)."""
    if a == 0.0:
        return (power * log_base).exp() * x
    return scaled_expm1(power * log_base, a * x) / a


def _power_sum(alpha: float, beta: float) -> float:
    power = alpha + beta
    return 0.0 if abs(power) < _ROUNDING * max(abs(alpha), abs(beta)) else power


def _renyi(student_logprobs: Tensor, teacher_logprobs: Tensor, order: float) -> Tensor:
    if order == 1.0:
        return total(relative_entropy_terms(student_logprobs, teacher_logprobs))
    away = order - 1.0
    student_out, teacher_out = student_logprobs == -math.inf, teacher_logprobs == -math.inf
    apart = teacher_out & ~student_out if order > 1.0 else student_out | teacher_out
    infinite = apart.any(-1) if order > 1.0 else apart.all(-1)
    pair = align(student_logprobs.detach(), teacher_logprobs.detach())
    exponent = pair.student - away * pair.log_ratio
    rough = exponent.masked_fill(student_out | teacher_out, -math.inf).logsumexp(-1) / away
    rough = rough.masked_fill(infinite, 0.0)
    # Near order 1 the logarithm is tiny and lost in rounding; what is left after the rough value is removed is not,
    # and its powers do not overflow. The derivative of this second step is that of the whole.
    blank = infinite.unsqueeze(-1)
    student_logprobs, teacher_logprobs = (
        student_logprobs.masked_fill(blank, 0.0),
        teacher_logprobs.masked_fill(blank, 0.0),
    )
    excess = _excess(student_logprobs, teacher_logprobs, rough.unsqueeze(-1), order)
    value = rough + excess.sum(-1).log1p() / away
    return value.masked_fill(infinite, math.inf)


def _excess(student_logprobs: Tensor, teacher_logprobs: Tensor, centre: Tensor, order: float) -> Tensor:
    """p_v (exp((a - 1) (log p_v - log q_v - centre)) - 1), with its limits at exclusions where the value is finite."""
    pair = align(student_logprobs, teacher_logprobs)
    excess = scaled_expm1(pair.student, (order - 1.0) * (-pair.log_ratio - centre))
    excess = torch.where(pair.teacher_out, -student_logprobs.exp(), excess)
    return excess.masked_fill(student_logprobs == -math.inf, 0.0)


def _check_powers(alpha: float, beta: float) -> None:
    if not (math.isfinite(alpha) and math.isfinite(beta)):
        raise ConfigError(
            f"expected finite alpha and beta in alpha_beta, got alpha={alpha} and beta={beta}; every term would be 0 or "
            "infinite. (1, 0) is forward_kl, (0, 1) reverse_kl"
        )


def _check_order(order: float) -> None:
    if not 0.0 < order < math.inf:
        raise ConfigError(
            f"expected a finite order > 0 in renyi, got {order}; at 0 the divergence only compares supports and has no "
            "gradient, below it is negative. order=1 is reverse_kl, order=0.5 is symmetric"
        )
