"""KL divergences of both directions, mixed by weights that depend on the two distributions: AKL and ToDi.

Write `p` for the student and `q` for the teacher. As published, the weights are detached: no gradient flows through
them, so what the gradient descends is the mixture with its weights frozen at their present value (a semi-gradient).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from moteach.divergences.terms import align, closed_form, logprobs_of, relative_entropy_terms, total
from moteach.errors import ConfigError
from moteach.types import Support

_SUPPORTS: frozenset[Support] = frozenset({"full", "topk"})


def adaptive_kl(
    student_logits: Float[Tensor, "*token vocab"],
    teacher_logits: Float[Tensor, "*token vocab"],
    *,
    head_mass: float = 0.5,
    student_temperature: float = 1.0,
    teacher_temperature: float = 1.0,
) -> Float[Tensor, "*token"]:
    """Mixes w KL(q || p) + (1 - w) KL(p || q), w = g_head / (g_head + g_tail) detached: AKL (arXiv 2404.02657).

    g_head is the sum of |p_v - q_v| over the head, g_tail over the rest. Tokens are ranked by the teacher's
    probability, ties by token id; the head are those up to which the cumulative probability is at most `head_mass`. The
    token that crosses it belongs to the tail, except that the likeliest token is always in the head (as in the official
    code). Where p = q both divergences are zero, and w is taken to be 1/2.

    Args:
        student_logits: Logits of `p`.
        teacher_logits: Logits of `q`.
        head_mass: Cumulative probability of the teacher that the head may hold (mu), in (0, 1).
        student_temperature: Divides the student's logits.
        teacher_temperature: Divides the teacher's logits.

    Returns:
        Nats per token; +inf where a KL divergence of positive weight is infinite.

    Raises:
        ConfigError: `head_mass` is not strictly between 0 and 1, or a temperature is not positive.
    """
    _check_head_mass(head_mass)
    p, q = logprobs_of(student_logits, student_temperature), logprobs_of(teacher_logits, teacher_temperature)
    weight = _forward_weight(p.detach(), q.detach(), head_mass)
    value = _weighted(weight, total(relative_entropy_terms(q, p))) + _weighted(
        1.0 - weight, total(relative_entropy_terms(p, q))
    )
    return value.masked_fill(value.detach() == math.inf, math.inf)


def todi(
    student_logits: Float[Tensor, "*token vocab"],
    teacher_logits: Float[Tensor, "*token vocab"],
    *,
    student_temperature: float = 1.0,
    teacher_temperature: float = 1.0,
) -> Float[Tensor, "*token"]:
    """sum_v a_v q_v log(q_v / p_v) + (1 - a_v) p_v log(p_v / q_v), a_v = q_v / (p_v + q_v) detached.

    ToDi (arXiv 2505.16297): a_v is the sigmoid of log(q_v / p_v), so tokens that the student underrates follow the
    forward KL and those it overrates the reverse KL. With this a_v the *value* is (q_v - p_v) log(q_v / p_v) entry by
    entry, which is Jeffreys' divergence KL(p || q) + KL(q || p); only the semi-gradient is ToDi's own.

    Args:
        student_logits: Logits of `p`.
        teacher_logits: Logits of `q`.
        student_temperature: Divides the student's logits.
        teacher_temperature: Divides the teacher's logits.

    Returns:
        Nats per token; +inf where one side excludes what the other can write.

    Raises:
        ConfigError: A temperature is not positive.
    """
    p, q = logprobs_of(student_logits, student_temperature), logprobs_of(teacher_logits, teacher_temperature)
    return total(_todi_terms(p, q))


@dataclass(frozen=True, kw_only=True)
class AdaptiveKL:
    """`adaptive_kl` as a component; it ranks the whole vocabulary, so it is not a sum of terms."""

    name: ClassVar[str] = "adaptive_kl"
    supports: ClassVar[frozenset[Support]] = _SUPPORTS
    head_mass: float = 0.5

    def __post_init__(self) -> None:
        _check_head_mass(self.head_mass)

    def __call__(
        self, student_logits: Float[Tensor, "*token vocab"], teacher_logits: Float[Tensor, "*token vocab"]
    ) -> Float[Tensor, "*token"]:
        """See `adaptive_kl`."""
        return adaptive_kl(student_logits, teacher_logits, head_mass=self.head_mass)

    def value_and_gradient(
        self, student_logprobs: Float[Tensor, "*token vocab"], teacher_logprobs: Float[Tensor, "*token vocab"]
    ) -> tuple[Float[Tensor, "*token"], Float[Tensor, "*token vocab"]]:
        """Value, and the semi-gradient w (p - q) + (1 - w) p (log p - log q - KL(p || q))."""
        p = student_logprobs.exp()
        weight = _forward_weight(student_logprobs, teacher_logprobs, self.head_mass)
        forward = relative_entropy_terms(teacher_logprobs, student_logprobs).sum(-1)
        terms = relative_entropy_terms(student_logprobs, teacher_logprobs)
        reverse, gradient = closed_form(terms, terms.clone(), student_logprobs)
        value = _weighted(weight, forward) + _weighted(1.0 - weight, reverse)
        gradient.mul_((1.0 - weight).unsqueeze(-1)).add_(p.sub_(teacher_logprobs.exp()).mul_(weight.unsqueeze(-1)))
        return value, gradient.masked_fill_(value.isinf().unsqueeze(-1), 0.0)


@dataclass(frozen=True, kw_only=True)
class ToDi:
    """`todi` as a component."""

    name: ClassVar[str] = "todi"
    supports: ClassVar[frozenset[Support]] = _SUPPORTS
    slope: ClassVar[float] = 0.0

    def __call__(
        self, student_logits: Float[Tensor, "*token vocab"], teacher_logits: Float[Tensor, "*token vocab"]
    ) -> Float[Tensor, "*token"]:
        """See `todi`."""
        return todi(student_logits, teacher_logits)

    def terms(
        self, student_logprobs: Float[Tensor, "*token vocab"], teacher_logprobs: Float[Tensor, "*token vocab"]
    ) -> Float[Tensor, "*token vocab"]:
        """a_v q_v (log q_v - log p_v) + (1 - a_v) p_v (log p_v - log q_v), with a semi-gradient."""
        return _todi_terms(student_logprobs, teacher_logprobs)

    def value_and_gradient(
        self, student_logprobs: Float[Tensor, "*token vocab"], teacher_logprobs: Float[Tensor, "*token vocab"]
    ) -> tuple[Float[Tensor, "*token"], Float[Tensor, "*token vocab"]]:
        """Value, and the semi-gradient of s_v = (1 - a_v) p_v (log p_v - log q_v + 1) - a_v q_v."""
        log_ratio = align(student_logprobs, teacher_logprobs).log_ratio
        from_student = (-log_ratio).sigmoid_().mul_(student_logprobs.exp())
        from_teacher = log_ratio.sigmoid().mul_(teacher_logprobs.exp())
        slopes = (1.0 - log_ratio).mul_(from_student).sub_(from_teacher)
        return closed_form(_todi_terms(student_logprobs, teacher_logprobs), slopes, student_logprobs)


def _todi_terms(student_logprobs: Tensor, teacher_logprobs: Tensor) -> Tensor:
    pair = align(student_logprobs, teacher_logprobs)
    weight, rest = pair.log_ratio.detach().sigmoid(), pair.log_ratio.detach().neg().sigmoid()
    terms = pair.log_ratio * (weight * teacher_logprobs.exp() - rest * student_logprobs.exp())
    return terms.masked_fill(pair.student_out | pair.teacher_out, math.inf)


def _forward_weight(student_logprobs: Tensor, teacher_logprobs: Tensor, head_mass: float) -> Tensor:
    """Share of the L1 distance that lies in the head."""
    q, order = teacher_logprobs.exp().sort(dim=-1, descending=True, stable=True)
    head = q.cumsum(-1) <= head_mass
    head[..., 0] = True
    gap = (student_logprobs.exp() - teacher_logprobs.exp()).abs_().gather(-1, order)
    everything = gap.sum(-1)
    in_head = gap.mul_(head).sum(-1)
    return torch.where(everything > 0, in_head / everything, 0.5)


def _weighted(weight: Tensor, value: Tensor) -> Tensor:
    """The product, where a weight of zero removes an infinite value."""
    return weight * value.masked_fill(weight == 0, 0.0)


def _check_head_mass(head_mass: float) -> None:
    if not 0.0 < head_mass < 1.0:
        raise ConfigError(
            f"expected 0 < head_mass < 1 in adaptive_kl, got {head_mass}; with an empty tail it would be forward_kl for "
            "every token, and with an empty head reverse_kl: use divergence=forward_kl or divergence=reverse_kl"
        )
