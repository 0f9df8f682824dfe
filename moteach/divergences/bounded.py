"""Divergences that stay finite whatever either side excludes: total variation and the skewed KL divergences.

Write `p` for the student and `q` for the teacher.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from jaxtyping import Float
from torch import Tensor

from moteach.divergences.terms import closed_form, log_mixture, logprobs_of, relative_entropy_terms, total
from moteach.errors import ConfigError
from moteach.types import Support

_SUPPORTS: frozenset[Support] = frozenset({"full", "topk"})


def total_variation(
    student_logits: Float[Tensor, "*token vocab"],
    teacher_logits: Float[Tensor, "*token vocab"],
    *,
    student_temperature: float = 1.0,
    teacher_temperature: float = 1.0,
) -> Float[Tensor, "*token"]:
    """TV = 1/2 sum_v |p_v - q_v|, which is one minus the acceptance rate sum_v p_v min(q_v / p_v, 1).

    At p_v = q_v it has a kink, where the derivative is taken to be zero. By Pinsker TV <= sqrt(KL / 2) for either KL.

    Args:
        student_logits: Logits of `p`.
        teacher_logits: Logits of `q`.
        student_temperature: Divides the student's logits.
        teacher_temperature: Divides the teacher's logits.

    Returns:
        A probability per token, in [0, 1].

    Raises:
        ConfigError: A temperature is not positive.
    """
    p, q = logprobs_of(student_logits, student_temperature), logprobs_of(teacher_logits, teacher_temperature)
    return total(_variation(p, q))


def skew_forward_kl(
    student_logits: Float[Tensor, "*token vocab"],
    teacher_logits: Float[Tensor, "*token vocab"],
    *,
    alpha: float = 0.1,
    student_temperature: float = 1.0,
    teacher_temperature: float = 1.0,
) -> Float[Tensor, "*token"]:
    """KL(q || alpha q + (1 - alpha) p), DistiLLM's skew KL (arXiv 2402.03898): `alpha` is the weight of the teacher.

    It tends to the forward KL as alpha -> 0, and is at most -log alpha.

    Args:
        student_logits: Logits of `p`.
        teacher_logits: Logits of `q`.
        alpha: Weight of the teacher in the mixture, in (0, 1).
        student_temperature: Divides the student's logits.
        teacher_temperature: Divides the teacher's logits.

    Returns:
        Nats per token, always finite.

    Raises:
        ConfigError: `alpha` is not strictly between 0 and 1, or a temperature is not positive.
    """
    _check_alpha(alpha, "forward_kl")
    p, q = logprobs_of(student_logits, student_temperature), logprobs_of(teacher_logits, teacher_temperature)
    return total(_skewed(q, p, alpha))


def skew_reverse_kl(
    student_logits: Float[Tensor, "*token vocab"],
    teacher_logits: Float[Tensor, "*token vocab"],
    *,
    alpha: float = 0.1,
    student_temperature: float = 1.0,
    teacher_temperature: float = 1.0,
) -> Float[Tensor, "*token"]:
    """KL(p || alpha p + (1 - alpha) q), DistiLLM's skew reverse KL (arXiv 2402.03898): `alpha` weights the student.

    It tends to the reverse KL as alpha -> 0, and is at most -log alpha. The mixture is differentiated too, as in
    DistiLLM; DistiLLM-2 (arXiv 2503.07067) detaches it.

    Args:
        student_logits: Logits of `p`.
        teacher_logits: Logits of `q`.
        alpha: Weight of the student in the mixture, in (0, 1).
        student_temperature: Divides the student's logits.
        teacher_temperature: Divides the teacher's logits.

    Returns:
        Nats per token, always finite.

    Raises:
        ConfigError: `alpha` is not strictly between 0 and 1, or a temperature is not positive.
    """
    _check_alpha(alpha, "reverse_kl")
    p, q = logprobs_of(student_logits, student_temperature), logprobs_of(teacher_logits, teacher_temperature)
    return total(_skewed(p, q, alpha))


@dataclass(frozen=True, kw_only=True)
class TotalVariation:
    """`total_variation` as a component: half the L1 distance of the probabilities."""

    name: ClassVar[str] = "total_variation"
    supports: ClassVar[frozenset[Support]] = _SUPPORTS
    slope: ClassVar[float] = 0.0

    def __call__(
        self, student_logits: Float[Tensor, "*token vocab"], teacher_logits: Float[Tensor, "*token vocab"]
    ) -> Float[Tensor, "*token"]:
        """See `total_variation`."""
        return total_variation(student_logits, teacher_logits)

    def terms(
        self, student_logprobs: Float[Tensor, "*token vocab"], teacher_logprobs: Float[Tensor, "*token vocab"]
    ) -> Float[Tensor, "*token vocab"]:
        """|p_v - q_v| / 2."""
        return _variation(student_logprobs, teacher_logprobs)

    def value_and_gradient(
        self, student_logprobs: Float[Tensor, "*token vocab"], teacher_logprobs: Float[Tensor, "*token vocab"]
    ) -> tuple[Float[Tensor, "*token"], Float[Tensor, "*token vocab"]]:
        """Value, and the gradient of s_v = p_v sign(p_v - q_v) / 2."""
        p = student_logprobs.exp()
        difference = teacher_logprobs.exp().neg_().add_(p)
        return closed_form(difference.abs().mul_(0.5), difference.sign_().mul_(p).mul_(0.5), student_logprobs)


@dataclass(frozen=True, kw_only=True)
class SkewForwardKL:
    """`skew_forward_kl` as a component; `alpha` is the weight of the teacher in the mixture."""

    name: ClassVar[str] = "skew_forward_kl"
    supports: ClassVar[frozenset[Support]] = _SUPPORTS
    alpha: float = 0.1

    def __post_init__(self) -> None:
        _check_alpha(self.alpha, "forward_kl")

    @property
    def slope(self) -> float:
        """-(1 - alpha)."""
        return self.alpha - 1.0

    def __call__(
        self, student_logits: Float[Tensor, "*token vocab"], teacher_logits: Float[Tensor, "*token vocab"]
    ) -> Float[Tensor, "*token"]:
        """See `skew_forward_kl`."""
        return skew_forward_kl(student_logits, teacher_logits, alpha=self.alpha)

    def terms(
        self, student_logprobs: Float[Tensor, "*token vocab"], teacher_logprobs: Float[Tensor, "*token vocab"]
    ) -> Float[Tensor, "*token vocab"]:
        """q_v (log q_v - log m_v)."""
        return _skewed(teacher_logprobs, student_logprobs, self.alpha)

    def value_and_gradient(
        self, student_logprobs: Float[Tensor, "*token vocab"], teacher_logprobs: Float[Tensor, "*token vocab"]
    ) -> tuple[Float[Tensor, "*token"], Float[Tensor, "*token vocab"]]:
        """Value, and the gradient of s_v = -(1 - alpha) p_v q_v / m_v."""
        mixture = log_mixture(teacher_logprobs, student_logprobs, self.alpha)
        slopes = (student_logprobs + teacher_logprobs - mixture).exp_().mul_(self.alpha - 1.0)
        return closed_form(relative_entropy_terms(teacher_logprobs, mixture), slopes, student_logprobs)


@dataclass(frozen=True, kw_only=True)
class SkewReverseKL:
    """`skew_reverse_kl` as a component; `alpha` is the weight of the student in the mixture."""

    name: ClassVar[str] = "skew_reverse_kl"
    supports: ClassVar[frozenset[Support]] = _SUPPORTS
    alpha: float = 0.1

    def __post_init__(self) -> None:
        _check_alpha(self.alpha, "reverse_kl")

    @property
    def slope(self) -> float:
        """1 - alpha."""
        return 1.0 - self.alpha

    def __call__(
        self, student_logits: Float[Tensor, "*token vocab"], teacher_logits: Float[Tensor, "*token vocab"]
    ) -> Float[Tensor, "*token"]:
        """See `skew_reverse_kl`."""
        return skew_reverse_kl(student_logits, teacher_logits, alpha=self.alpha)

    def terms(
        self, student_logprobs: Float[Tensor, "*token vocab"], teacher_logprobs: Float[Tensor, "*token vocab"]
    ) -> Float[Tensor, "*token vocab"]:
        """p_v (log p_v - log m_v)."""
        return _skewed(student_logprobs, teacher_logprobs, self.alpha)

    def value_and_gradient(
        self, student_logprobs: Float[Tensor, "*token vocab"], teacher_logprobs: Float[Tensor, "*token vocab"]
    ) -> tuple[Float[Tensor, "*token"], Float[Tensor, "*token vocab"]]:
        """Value, and the gradient of s_v = p_v (log p_v - log m_v) + (1 - alpha) p_v q_v / m_v."""
        mixture = log_mixture(student_logprobs, teacher_logprobs, self.alpha)
        terms = relative_entropy_terms(student_logprobs, mixture)
        slopes = (student_logprobs + teacher_logprobs - mixture).exp_().mul_(1.0 - self.alpha).add_(terms)
        return closed_form(terms, slopes, student_logprobs)


def _variation(student_logprobs: Tensor, teacher_logprobs: Tensor) -> Tensor:
    return (student_logprobs.exp() - teacher_logprobs.exp()).abs() * 0.5


def _skewed(of: Tensor, other: Tensor, alpha: float) -> Tensor:
    """Terms of KL(of || alpha of + (1 - alpha) other)."""
    return relative_entropy_terms(of, log_mixture(of, other, alpha))


def _check_alpha(alpha: float, limit: str) -> None:
    if not 0.0 < alpha < 1.0:
        raise ConfigError(
            f"expected 0 < alpha < 1 in skew_{limit}, got {alpha}; at 1 the divergence is identically zero and nothing "
            f"would be learned, and at 0 it is {limit}: use divergence={limit}"
        )
