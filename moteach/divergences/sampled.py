"""Estimators of reverse KL from the tokens that the student wrote.

For a token y drawn from the student p, with teacher q and r = q(y) / p(y) (Schulman, http://joschu.net/blog/kl-approx.html):

    k1 = -log r        k2 = (log r)^2 / 2        k3 = r - 1 - log r

k1 and k3 have the mean KL(p || q); k2 does not, and is close where p and q are. A good value is not a good gradient, and
the right one depends on what is done with the estimate ("reward": detached, weighting the gradient of log p(y)):

| | expected gradient as a loss | as a reward -k, expected gradient of the return |
|---|---|---|
| k1 | 0 | -grad KL(p, q): right |
| k2 | grad KL(p, q): right | -grad E_p[k2] + grad KL(p, q): pulls towards and away |
| k3 | grad KL(q, p): the other direction | -grad KL(p, q) + grad KL(q, p): pulls towards and away |
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor

from moteach.errors import ConfigError, UnsupportedCombinationError, nearest

Estimator = Literal["k1", "k2", "k3"]
"""Which function of the log-ratio stands for the divergence."""
PerToken = Callable[[Tensor, Tensor], Tensor]
"""From the student's and the teacher's logprobs of the written tokens to one value a token."""


def k1(student_logprobs: Float[Tensor, "*token"], teacher_logprobs: Float[Tensor, "*token"]) -> Float[Tensor, "*token"]:
    """k1 = log p(y) - log q(y): unbiased, negative as often as not.

    E_p[grad k1] = E_p[grad log p] = 0, so it teaches nothing as a loss; sg[-k1] is the right reward. For q = N(0, 1) and
    p = N(mu, 1) its standard deviation is 2 / mu times the divergence.

    Args:
        student_logprobs: log p of the written tokens.
        teacher_logprobs: log q of the written tokens.

    Returns:
        Nats, differentiable; +inf where the teacher excludes the token.
    """
    return student_logprobs - teacher_logprobs


def k2(student_logprobs: Float[Tensor, "*token"], teacher_logprobs: Float[Tensor, "*token"]) -> Float[Tensor, "*token"]:
    """k2 = (log p(y) - log q(y))^2 / 2: biased in value, of small variance near q.

    E_p[grad k2] = E_p[(log p - log q) grad log p] = grad KL(p || q) exactly, at any distance. As a reward it is wrong:
    it does not know on which side of the teacher a token is, and E_p[-k2 grad log p] = -grad E_p[k2] + grad KL(p || q).

    Args:
        student_logprobs: log p of the written tokens.
        teacher_logprobs: log q of the written tokens.

    Returns:
        Squared nats halved, differentiable; +inf where the teacher excludes the token.
    """
    return 0.5 * (student_logprobs - teacher_logprobs).square()


def k3(student_logprobs: Float[Tensor, "*token"], teacher_logprobs: Float[Tensor, "*token"]) -> Float[Tensor, "*token"]:
    """k3 = r - 1 - log r with r = q(y) / p(y): unbiased, never negative, of small variance near q.

    E_p[grad k3] = E_p[(1 - r) grad log p] = grad KL(q || p): as a loss it is forward KL, whatever its value says. As a
    reward -k3 the return has the gradient -grad KL(p || q) + grad KL(q || p).

    Args:
        student_logprobs: log p of the written tokens.
        teacher_logprobs: log q of the written tokens.

    Returns:
        Nats, differentiable; +inf where the teacher excludes the token.
    """
    log_ratio = teacher_logprobs - student_logprobs
    return log_ratio.expm1() - log_ratio


_ESTIMATORS: dict[str, PerToken] = {"k1": k1, "k2": k2, "k3": k3}


def estimator_loss(name: Estimator) -> PerToken:
    """Returns the estimator to be back-propagated.

    Args:
        name: `k2` for the gradient of reverse KL, `k3` for that of forward KL.

    Raises:
        UnsupportedCombinationError: `k1`, whose expected gradient is zero.
        ConfigError: There is no such estimator.
    """
    if _known(name) == "k1":
        raise UnsupportedCombinationError(
            "expected the estimator k2 or k3 as a loss, got k1: its expected gradient is zero, and each sample pushes the "
            "token that was written down, teacher or not. Use it as a reward (objective=policy_gradient), or k2 for the same "
            "expected gradient by back-propagation"
        )
    return _ESTIMATORS[name]


def estimator_reward(name: Estimator) -> PerToken:
    """Returns the reward of a written token, to be maximised: sg[-k1] = sg[log q(y) - log p(y)].

    Args:
        name: `k1`, the only one whose policy gradient is that of reverse KL.

    Raises:
        UnsupportedCombinationError: `k2` or `k3`.
        ConfigError: There is no such estimator.
    """
    if _known(name) != "k1":
        wrong = {
            "k2": "it is never negative, so a token that the teacher likes better than the student does is punished like "
            "one it likes less",
            "k3": "its expected gradient adds that of forward KL with the wrong sign",
        }[name]
        raise UnsupportedCombinationError(
            f"expected the estimator k1 as a reward, got {name}: {wrong}. Use estimator=k1 (the right gradient at any "
            "distance), or back-propagate k2 for reverse KL or k3 for forward KL (objective=sampled_loss)"
        )
    return _reward


@dataclass(frozen=True, kw_only=True, slots=True)
class SampledTail:
    """An estimate of reverse KL from a head that is summed and a tail that is sampled."""

    surrogate: Float[Tensor, "*token"]
    """Differentiable; its expected gradient is that of reverse KL. Its value means nothing."""
    value: Float[Tensor, "*token"]
    """Nats, detached; its expectation is the reverse KL."""


def topk_sampled_tail(
    student_logprobs: Float[Tensor, "*token vocab"],
    teacher_logprobs: Float[Tensor, "*token vocab"],
    ids: Int[Tensor, "*token k"],
    written: Int[Tensor, "*token"],
    *,
    importance_ratio: Float[Tensor, "*token"] | None = None,
) -> SampledTail:
    """Reverse KL with k tokens summed and the rest seen through the one that was written, right at every k.

    With S the given tokens, y the written one and l(v) = log p(v) - log q(v):

        value     = sum_S p l + [y not in S] w l(y)
        surrogate = sum_S (p l - p + q) + [y not in S] sg[w l(y)] log p(y)

    E_y[grad surrogate] = sum_S p l grad log p + sum_rest p l grad log p = grad KL(p || q). The head without `- p` has the
    gradient sum_S p (l + 1) grad log p, so that the estimator of EMA-PG (arXiv 2602.04417, its published code), the value
    back-propagated on the head and a detached tail, is biased by the gradient of the student's mass on S; it is gone
    only when S holds all of the mass.

    Args:
        student_logprobs: Normalised log p.
        teacher_logprobs: Normalised log q.
        ids: Distinct tokens of S; a constant, which may depend on the prefix but not on `written`.
        written: The token y that was sampled.
        importance_ratio: w = p(y) / mu(y) when y was drawn from mu instead of p; detached, None stands for one.

    Returns:
        The surrogate and the value, +inf (and without gradient) where the teacher excludes a token of S, or the written
        token, that the student does not.
    """
    p, q = student_logprobs.gather(-1, ids), teacher_logprobs.gather(-1, ids).detach()
    mine = student_logprobs.gather(-1, written.unsqueeze(-1)).squeeze(-1)
    theirs = teacher_logprobs.gather(-1, written.unsqueeze(-1)).squeeze(-1).detach()
    in_tail = (ids != written.unsqueeze(-1)).all(-1)
    p_out, q_out = p == -math.inf, q == -math.inf
    infinite = (q_out & ~p_out).any(-1) | ((theirs == -math.inf) & (mine > -math.inf))
    # p log p/q is zero where p is, while q alone still counts; infinite tokens leave the graph before they reach it
    void = p_out | q_out | infinite.unsqueeze(-1)
    p_safe, q_safe = p.masked_fill(void, 0.0), q.masked_fill(void, 0.0)
    seen = in_tail & ~infinite
    mine, theirs = mine.masked_fill(~seen, 0.0), theirs.masked_fill(~seen, 0.0)
    tail = (mine - theirs).detach()
    if importance_ratio is not None:
        tail = torch.where(seen, importance_ratio.detach() * tail, torch.zeros_like(tail))
    terms = p_safe.exp() * (p_safe - q_safe)
    head = (terms - p_safe.exp() + q_safe.exp()).sum(-1)
    surrogate = head + tail * mine
    value = terms.detach().sum(-1) + tail
    return SampledTail(surrogate=surrogate.masked_fill(infinite, math.inf), value=value.masked_fill(infinite, math.inf))


def _reward(
    student_logprobs: Float[Tensor, "*token"], teacher_logprobs: Float[Tensor, "*token"]
) -> Float[Tensor, "*token"]:
    return (teacher_logprobs - student_logprobs).detach()


def _known(name: str) -> str:
    if name not in _ESTIMATORS:
        raise ConfigError(f"expected an estimator, got '{name}'; {nearest(name, get_args(Estimator))}")
    return name
