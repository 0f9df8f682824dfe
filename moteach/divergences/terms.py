"""What the divergences are built of: logprobs from logits, terms that are safe at exclusions, and their sums.

Write `p` for the student's and `q` for the teacher's probabilities; all that is computed here starts from their logs. An
excluded token has the logprob -inf. A term is +inf where absolute continuity fails, and 0 where both sides exclude; the
operations are chosen such that neither its value nor its gradient is ever NaN for inputs that are not.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from moteach.errors import ConfigError

_ROOM = 0.9
"""Exponents up to this share of what the dtype can hold need no care."""

Terms = Callable[[Tensor, Tensor], Tensor]
"""Maps the logprobs of the student and of the teacher to one term for each entry."""


def logprobs_of(logits: Float[Tensor, "*token vocab"], temperature: float) -> Float[Tensor, "*token vocab"]:
    """Computes log softmax(logits / temperature); logits in half precision are normalised in float32.

    Args:
        logits: Scores over the vocabulary, -inf where a token is excluded.
        temperature: Divides the logits.

    Returns:
        Natural-log probabilities, float32 or float64.

    Raises:
        ConfigError: `temperature` is not positive and finite.
    """
    if not 0.0 < temperature < math.inf:
        raise ConfigError(
            f"expected a finite temperature above 0, got {temperature}; dividing the logits by it would turn the "
            "distribution around or make it undefined. 1.0 leaves the logits as they are"
        )
    if logits.dtype in (torch.float16, torch.bfloat16):
        logits = logits.float()
    return (logits if temperature == 1.0 else logits / temperature).log_softmax(-1)


class Aligned(NamedTuple):
    """Two logprobs without their infinities."""

    student: Float[Tensor, "*token vocab"]
    """log p, and 0 where either side excludes."""
    teacher: Float[Tensor, "*token vocab"]
    """log q, and 0 where either side excludes."""
    log_ratio: Float[Tensor, "*token vocab"]
    """log q - log p, and 0 where either side excludes."""
    student_out: Bool[Tensor, "*token vocab"]
    """The student alone excludes."""
    teacher_out: Bool[Tensor, "*token vocab"]
    """The teacher alone excludes."""


def align(student_logprobs: Float[Tensor, "*token vocab"], teacher_logprobs: Float[Tensor, "*token vocab"]) -> Aligned:
    """Replaces excluded entries, which would make NaN in a difference or in its gradient, and says where they were."""
    student_out, teacher_out = student_logprobs == -math.inf, teacher_logprobs == -math.inf
    either = student_out | teacher_out
    if not bool(either.any()):
        return Aligned(
            student_logprobs, teacher_logprobs, teacher_logprobs - student_logprobs, student_out, teacher_out
        )
    student, teacher = student_logprobs.masked_fill(either, 0.0), teacher_logprobs.masked_fill(either, 0.0)
    return Aligned(student, teacher, teacher - student, student_out & ~teacher_out, teacher_out & ~student_out)


def at_exclusions(
    terms: Float[Tensor, "*token vocab"],
    where: Bool[Tensor, "*token vocab"],
    coefficient: float,
    log_power: Float[Tensor, "*token vocab"],
) -> Float[Tensor, "*token vocab"]:
    """Puts coefficient * exp(log_power) where one side excludes; +inf for an infinite coefficient, even if exp is 0."""
    if not bool(where.any()):
        return terms
    if math.isinf(coefficient):
        return terms.masked_fill(where, math.inf)
    # where() passes a zero to the branch it does not take, and zero times an infinite power is NaN
    return torch.where(where, coefficient * log_power.masked_fill(~where, 0.0).exp(), terms)


def scaled_expm1(
    log_scale: Float[Tensor, "*token vocab"], x: Float[Tensor, "*token vocab"]
) -> Float[Tensor, "*token vocab"]:
    """Computes exp(log_scale) (exp(x) - 1), exact for small x and without overflow where the product fits."""
    room = _ROOM * math.log(torch.finfo(x.dtype).max)
    if x.numel() == 0 or (bool(x.detach().amax() < room) and bool(log_scale.detach().amin() > -room)):
        return log_scale.exp() * x.expm1()
    small = log_scale.exp() * x.clamp(max=1.0).expm1()
    return torch.where(x > 1.0, (log_scale + x).exp() - log_scale.exp(), small)


def relative_entropy_terms(
    of: Float[Tensor, "*token vocab"], to: Float[Tensor, "*token vocab"]
) -> Float[Tensor, "*token vocab"]:
    """Computes p_v (log p_v - log q_v) for p = exp(of) and q = exp(to), whose sum is KL(of || to).

    Returns:
        0 where `of` excludes, +inf where only `to` does, even if p underflows there.
    """
    terms = of.exp() * (of - to)
    if bool(terms.detach().sum().isfinite()):
        return terms
    of_out, to_out = of == -math.inf, to == -math.inf
    out = of_out | to_out
    log_ratio = of.masked_fill(out, 0.0) - to.masked_fill(out, 0.0)
    return (of.exp() * log_ratio).masked_fill(to_out & ~of_out, math.inf)


def log_mixture(
    first: Float[Tensor, "*token vocab"], second: Float[Tensor, "*token vocab"], weight: float
) -> Float[Tensor, "*token vocab"]:
    """Computes log(weight exp(first) + (1 - weight) exp(second)) for a weight in (0, 1); 0 where both are -inf."""
    neither = (first == -math.inf) & (second == -math.inf)
    # the derivative of logaddexp at (-inf, -inf) is NaN
    first, second = first.masked_fill(neither, 0.0), second.masked_fill(neither, 0.0)
    return torch.logaddexp(first + math.log(weight), second + math.log1p(-weight))


def shielded(
    terms: Terms, student_logprobs: Float[Tensor, "*token vocab"], teacher_logprobs: Float[Tensor, "*token vocab"]
) -> Float[Tensor, "*token vocab"]:
    """Evaluates terms that may overflow: those that are +inf get a zero gradient, instead of zero times infinity."""
    values = terms(student_logprobs, teacher_logprobs)
    if bool(values.detach().sum().isfinite()):
        return values
    infinite = values.detach() == math.inf
    if not bool(infinite.any()):
        return values
    # equal logprobs of zero have a term of zero, and every power of them is one
    student, teacher = student_logprobs.masked_fill(infinite, 0.0), teacher_logprobs.masked_fill(infinite, 0.0)
    return terms(student, teacher).masked_fill(infinite, math.inf)


def total(terms: Float[Tensor, "*token vocab"]) -> Float[Tensor, "*token"]:
    """Sums terms over the vocabulary; a token whose sum is +inf, or more than the dtype holds, has a zero gradient."""
    value = terms.sum(-1)
    return value.masked_fill(value.detach() == math.inf, math.inf)


def closed_form(
    terms: Float[Tensor, "*token vocab"],
    slopes: Float[Tensor, "*token vocab"],
    student_logprobs: Float[Tensor, "*token vocab"],
) -> tuple[Float[Tensor, "*token"], Float[Tensor, "*token vocab"]]:
    """Sums terms g(p_v, q_v) and turns their slopes s_v = p_v dg/dp_v into d/dz = s - p sum(s).

    Args:
        terms: g at each entry.
        slopes: s at each entry, 0 where the student excludes; overwritten.
        student_logprobs: log p, which sums to one.

    Returns:
        The value of each token, and its derivative with respect to the student's logits: zero where the value, or the
        sum of the slopes, is infinite.
    """
    value, pull = terms.sum(-1), slopes.sum(-1)
    gradient = slopes.sub_(student_logprobs.exp().mul_(pull.unsqueeze(-1)))
    infinite = value.isinf() | pull.isinf()
    return value, gradient.masked_fill_(infinite.unsqueeze(-1), 0.0)
