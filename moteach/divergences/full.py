"""Divergences over the whole vocabulary, as pure functions; here the two KL divergences and Jensen-Shannon's.

Write `p` for the student and `q` for the teacher (or the pooled target). Every function takes `(student, teacher)`, and
the two directions are never called by one name. A token that both exclude (logit -inf) contributes nothing; where
absolute continuity fails the value is +inf, never NaN, and the gradient of that token is zero: no finite step repairs
it, and the infinite loss is what a guard sees. The other functions live beside their components and are named here.

Temperatures divide the logits of each side. No value is rescaled by their square: the derivative with respect to the
logits shrinks with 1 / student_temperature, and the learning rate is where to make up for it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from moteach.divergences.adaptive import adaptive_kl, todi
from moteach.divergences.bounded import skew_forward_kl, skew_reverse_kl, total_variation
from moteach.divergences.generators import f_divergence
from moteach.divergences.powers import alpha_beta, renyi
from moteach.divergences.terms import log_mixture, logprobs_of, relative_entropy_terms, total
from moteach.errors import ConfigError
from moteach.types import Support

__all__ = [
    "JSD",
    "ForwardKL",
    "ReverseKL",
    "adaptive_kl",
    "alpha_beta",
    "entropy",
    "f_divergence",
    "forward_kl",
    "jsd",
    "renyi",
    "reverse_kl",
    "skew_forward_kl",
    "skew_reverse_kl",
    "todi",
    "total_variation",
]

_SUPPORTS: frozenset[Support] = frozenset({"full", "topk"})


def reverse_kl(
    student_logits: Float[Tensor, "*token vocab"],
    teacher_logits: Float[Tensor, "*token vocab"],
    *,
    student_temperature: float = 1.0,
    teacher_temperature: float = 1.0,
) -> Float[Tensor, "*token"]:
    """KL(student || teacher) = sum_v p_v (log p_v - log q_v), mode-seeking.

    Args:
        student_logits: Logits of `p`.
        teacher_logits: Logits of `q`.
        student_temperature: Divides the student's logits.
        teacher_temperature: Divides the teacher's logits.

    Returns:
        Nats per token; +inf where the teacher excludes a token that the student can write.

    Raises:
        ConfigError: A temperature is not positive.
    """
    p, q = logprobs_of(student_logits, student_temperature), logprobs_of(teacher_logits, teacher_temperature)
    return total(relative_entropy_terms(p, q))


def forward_kl(
    student_logits: Float[Tensor, "*token vocab"],
    teacher_logits: Float[Tensor, "*token vocab"],
    *,
    student_temperature: float = 1.0,
    teacher_temperature: float = 1.0,
) -> Float[Tensor, "*token"]:
    """KL(teacher || student) = sum_v q_v (log q_v - log p_v), mass-covering.

    Args:
        student_logits: Logits of `p`.
        teacher_logits: Logits of `q`.
        student_temperature: Divides the student's logits.
        teacher_temperature: Divides the teacher's logits.

    Returns:
        Nats per token; +inf where the student excludes a token that the teacher can write.

    Raises:
        ConfigError: A temperature is not positive.
    """
    p, q = logprobs_of(student_logits, student_temperature), logprobs_of(teacher_logits, teacher_temperature)
    return total(relative_entropy_terms(q, p))


def jsd(
    student_logits: Float[Tensor, "*token vocab"],
    teacher_logits: Float[Tensor, "*token vocab"],
    *,
    beta: float,
    student_temperature: float = 1.0,
    teacher_temperature: float = 1.0,
) -> Float[Tensor, "*token"]:
    """JSD_beta = beta KL(q || m) + (1 - beta) KL(p || m) with m = beta q + (1 - beta) p.

    `beta` is the weight of the *teacher*, as in GKD (arXiv 2306.13649, eq. 1); some codebases put it on the student.
    JSD_beta / beta tends to the forward KL as beta -> 0 and JSD_beta / (1 - beta) to the reverse KL as beta -> 1; the
    divergence itself tends to zero at both ends, so neither end is accepted. It is bounded by
    -beta log beta - (1 - beta) log(1 - beta) <= ln 2.

    Args:
        student_logits: Logits of `p`.
        teacher_logits: Logits of `q`.
        beta: Weight of the teacher, in (0, 1).
        student_temperature: Divides the student's logits.
        teacher_temperature: Divides the teacher's logits.

    Returns:
        Nats per token, always finite.

    Raises:
        ConfigError: `beta` is not strictly between 0 and 1, or a temperature is not positive.
    """
    _check_beta(beta)
    p, q = logprobs_of(student_logits, student_temperature), logprobs_of(teacher_logits, teacher_temperature)
    return total(_jsd_terms(p, q, beta))


@dataclass(frozen=True, kw_only=True)
class ReverseKL:
    """`reverse_kl` as a component: KL(student || teacher)."""

    name: ClassVar[str] = "reverse_kl"
    supports: ClassVar[frozenset[Support]] = _SUPPORTS
    slope: ClassVar[float] = 1.0

    def __call__(
        self, student_logits: Float[Tensor, "*token vocab"], teacher_logits: Float[Tensor, "*token vocab"]
    ) -> Float[Tensor, "*token"]:
        """See `reverse_kl`."""
        return reverse_kl(student_logits, teacher_logits)

    def terms(
        self, student_logprobs: Float[Tensor, "*token vocab"], teacher_logprobs: Float[Tensor, "*token vocab"]
    ) -> Float[Tensor, "*token vocab"]:
        """p_v (log p_v - log q_v)."""
        return relative_entropy_terms(student_logprobs, teacher_logprobs)

    def value_and_gradient(
        self, student_logprobs: Float[Tensor, "*token vocab"], teacher_logprobs: Float[Tensor, "*token vocab"]
    ) -> tuple[Float[Tensor, "*token"], Float[Tensor, "*token vocab"]]:
        """Value, and d/dz = p (log p - log q - KL(p || q))."""
        p = student_logprobs.exp()
        terms = (student_logprobs - teacher_logprobs).mul_(p)
        value = terms.sum(-1)
        if _all_finite(value):
            return value, terms.sub_(p.mul_(value.unsqueeze(-1)))
        terms, infinite = _kl_terms(student_logprobs, teacher_logprobs)
        value = terms.sum(-1)
        gradient = terms.sub_(p.mul_(value.unsqueeze(-1))).masked_fill_(infinite.unsqueeze(-1), 0.0)
        return value.masked_fill_(infinite, math.inf), gradient


@dataclass(frozen=True, kw_only=True)
class ForwardKL:
    """`forward_kl` as a component: KL(teacher || student)."""

    name: ClassVar[str] = "forward_kl"
    supports: ClassVar[frozenset[Support]] = _SUPPORTS
    slope: ClassVar[float] = -1.0

    def __call__(
        self, student_logits: Float[Tensor, "*token vocab"], teacher_logits: Float[Tensor, "*token vocab"]
    ) -> Float[Tensor, "*token"]:
        """See `forward_kl`."""
        return forward_kl(student_logits, teacher_logits)

    def terms(
        self, student_logprobs: Float[Tensor, "*token vocab"], teacher_logprobs: Float[Tensor, "*token vocab"]
    ) -> Float[Tensor, "*token vocab"]:
        """q_v (log q_v - log p_v)."""
        return relative_entropy_terms(teacher_logprobs, student_logprobs)

    def value_and_gradient(
        self, student_logprobs: Float[Tensor, "*token vocab"], teacher_logprobs: Float[Tensor, "*token vocab"]
    ) -> tuple[Float[Tensor, "*token"], Float[Tensor, "*token vocab"]]:
        """Value, and d/dz = p - q."""
        q = teacher_logprobs.exp()
        terms = (teacher_logprobs - student_logprobs).mul_(q)
        value = terms.sum(-1)
        if _all_finite(value):
            return value, torch.exp(student_logprobs, out=terms).sub_(q)
        terms, infinite = _kl_terms(teacher_logprobs, student_logprobs)
        value = terms.sum(-1).masked_fill_(infinite, math.inf)
        return value, torch.exp(student_logprobs, out=terms).sub_(q).masked_fill_(infinite.unsqueeze(-1), 0.0)


@dataclass(frozen=True, kw_only=True)
class JSD:
    """`jsd` as a component; `beta` is the weight of the teacher in the mixture and of KL(teacher || mixture)."""

    name: ClassVar[str] = "jsd"
    supports: ClassVar[frozenset[Support]] = _SUPPORTS
    slope: ClassVar[float] = 0.0
    beta: float = 0.5

    def __post_init__(self) -> None:
        _check_beta(self.beta)

    def __call__(
        self, student_logits: Float[Tensor, "*token vocab"], teacher_logits: Float[Tensor, "*token vocab"]
    ) -> Float[Tensor, "*token"]:
        """See `jsd`."""
        return jsd(student_logits, teacher_logits, beta=self.beta)

    def terms(
        self, student_logprobs: Float[Tensor, "*token vocab"], teacher_logprobs: Float[Tensor, "*token vocab"]
    ) -> Float[Tensor, "*token vocab"]:
        """(1 - beta) p_v (log p_v - log m_v) + beta q_v (log q_v - log m_v)."""
        return _jsd_terms(student_logprobs, teacher_logprobs, self.beta)

    def value_and_gradient(
        self, student_logprobs: Float[Tensor, "*token vocab"], teacher_logprobs: Float[Tensor, "*token vocab"]
    ) -> tuple[Float[Tensor, "*token"], Float[Tensor, "*token vocab"]]:
        """Value, and d/dz = (1 - beta) p (log p - log m - KL(p || m))."""
        student, teacher = student_logprobs, teacher_logprobs
        buffer = teacher + math.log(self.beta)
        mixture = student + _log1m(self.beta)
        torch.logaddexp(buffer, mixture, out=mixture)
        probs = teacher.exp()
        from_teacher = torch.sub(teacher, mixture, out=buffer).mul_(probs).sum(-1)
        torch.exp(student, out=probs)
        log_ratio = torch.sub(student, mixture, out=mixture)
        from_student = torch.mul(log_ratio, probs, out=buffer).sum(-1)
        if not _all_finite(from_teacher + from_student):
            return self._with_exclusions(student, teacher)
        gradient = buffer.sub_(probs.mul_(from_student.unsqueeze(-1))).mul_(1.0 - self.beta)
        return from_teacher * self.beta + from_student * (1.0 - self.beta), gradient

    def _with_exclusions(self, student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
        """The same where some logprobs are -inf, for which 0 * inf must be read as 0."""
        student_out, teacher_out = student == -math.inf, teacher == -math.inf
        mixture = torch.logaddexp(teacher + math.log(self.beta), student + _log1m(self.beta))
        from_teacher = (teacher - mixture).masked_fill_(teacher_out, 0.0).mul_(teacher.exp()).sum(-1)
        probs = student.exp()
        terms = (student - mixture).masked_fill_(student_out, 0.0).mul_(probs)
        from_student = terms.sum(-1)
        gradient = terms.sub_(probs.mul_(from_student.unsqueeze(-1))).mul_(1.0 - self.beta)
        return from_teacher * self.beta + from_student * (1.0 - self.beta), gradient


def entropy(logprobs: Float[Tensor, "*token vocab"]) -> Float[Tensor, "*token"]:
    """Entropy -sum_v p_v log p_v of normalised logprobs, in nats; an excluded entry (-inf) contributes nothing."""
    value = logprobs.exp().mul_(logprobs).sum(-1)
    if not _all_finite(value):
        value = logprobs.exp().mul_(logprobs.masked_fill(logprobs == -math.inf, 0.0)).sum(-1)
    return value.neg_()


def _jsd_terms(p: Tensor, q: Tensor, beta: float) -> Tensor:
    mixture = log_mixture(q, p, beta)
    return beta * relative_entropy_terms(q, mixture) + (1.0 - beta) * relative_entropy_terms(p, mixture)


def _kl_terms(p: Tensor, q: Tensor) -> tuple[Float[Tensor, "*token vocab"], Bool[Tensor, "*token"]]:
    """Terms p (log p - log q) with 0 where either is excluded, and the tokens whose sum is really +inf."""
    p_out, q_out = p == -math.inf, q == -math.inf
    infinite = (q_out & ~p_out).any(-1)
    return (p - q).masked_fill_(p_out | q_out, 0.0).mul_(p.exp()), infinite


def _all_finite(value: Tensor) -> bool:
    return bool(value.isfinite().all())


def _log1m(beta: float) -> float:
    return math.log1p(-beta)


def _check_beta(beta: float) -> None:
    if not 0.0 < beta < 1.0:
        raise ConfigError(
            f"expected 0 < beta < 1 in jsd, got {beta}; the divergence is identically zero at both ends, so nothing "
            "would be learned. For the limits use divergence=forward_kl (beta -> 0) or divergence=reverse_kl "
            "(beta -> 1)"
        )
