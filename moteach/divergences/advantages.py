"""Advantages, their shaping and their importance weights, as pure functions of tensors.

Write `p` for the student, `q` for the teacher, and call log q(y) - log p(y) of a written token its log-ratio. Everything
here is a constant of the optimisation, hence detached, except `ppo_surrogate`, which is differentiable in the ratio.
"""

from __future__ import annotations

import math
from typing import Literal, get_args

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from moteach.errors import ConfigError, nearest

Shaping = Literal["none", "soft_log"]
"""What is done to a log-ratio before it becomes an advantage."""
Importance = Literal["none", "clip", "truncated", "masked"]
"""What is done to the ratio of the trainer's probability of a token to the sampler's."""


def group_advantages(
    rewards: Float[Tensor, "prompt sample"], *, epsilon: float = 1e-4, normalise: bool = True
) -> Float[Tensor, "prompt sample"]:
    """Advantages of the completions of one prompt against each other (GRPO, arXiv 2402.03300, outcome rewards).

        A_i = (r_i - mean(r)) / (std(r) + epsilon),    std divides by the number of graded completions

    A reward of NaN is a completion without a verifier: its advantage is 0 and the others are compared among themselves.
    A group of equal rewards has advantages of exactly 0, whatever rounding the mean has.

    Args:
        rewards: One row for each prompt.
        epsilon: Added to the standard deviation, in units of the reward.
        normalise: False leaves out the division (as in Dr. GRPO, arXiv 2503.20783), and A_i is in units of the reward.

    Returns:
        Advantages of the rewards' shape, never NaN.

    Raises:
        ConfigError: `epsilon` is negative.
    """
    if epsilon < 0.0:
        raise ConfigError(f"expected epsilon >= 0 beside a standard deviation, got {epsilon}; it would flip signs")
    graded = ~rewards.isnan()
    known = rewards.detach().masked_fill(~graded, 0.0)
    count = graded.sum(dim=1, keepdim=True).clamp_min(1)
    centred = (known - known.sum(dim=1, keepdim=True) / count).masked_fill(~graded, 0.0)
    if normalise:
        deviation = (centred.square().sum(dim=1, keepdim=True) / count).sqrt()
        centred = centred / (deviation + epsilon)
    lowest = rewards.detach().masked_fill(~graded, math.inf).amin(dim=1, keepdim=True)
    highest = rewards.detach().masked_fill(~graded, -math.inf).amax(dim=1, keepdim=True)
    return centred.masked_fill(lowest >= highest, 0.0)


def shape_log_ratio(
    log_ratio: Float[Tensor, "*token"], *, shaping: Shaping = "none", clip: float | None = None
) -> Float[Tensor, "*token"]:
    """Bounds a log-ratio, then compresses it: soft_log(x) = sign(x) log(1 + |x|) (arXiv 2607.13399).

    Neither keeps the expected gradient of reverse KL: they trade it for a smaller weight of single tokens.

    Args:
        log_ratio: log q(y) - log p(y).
        shaping: `soft_log` or `none`.
        clip: Largest magnitude, in nats of the log-ratio, before it is shaped; None leaves it free.

    Returns:
        Shaped values of the same signs.

    Raises:
        ConfigError: `clip` is not positive, or there is no such shaping.
    """
    if clip is not None and not clip > 0.0:
        raise ConfigError(f"expected a clip above 0 nats, or null, got {clip}; every advantage would be zero")
    shaped = log_ratio.detach()
    if clip is not None:
        shaped = shaped.clamp(-clip, clip)
    if shaping == "none":
        return shaped
    if shaping == "soft_log":
        return shaped.sign() * shaped.abs().log1p()
    raise ConfigError(f"expected a shaping of the log-ratio, got '{shaping}'; {nearest(shaping, get_args(Shaping))}")


def power_reward(
    student_logprobs: Float[Tensor, "*token"], teacher_logprobs: Float[Tensor, "*token"], *, alpha: float
) -> Float[Tensor, "*token"]:
    """q(y)^alpha - p(y)^alpha, in [-1, 1] (PowerOPD, arXiv 2606.17199).

    Divided by alpha it tends to the log-ratio as alpha -> 0; at alpha = 1 it is the difference of probabilities.

    Args:
        student_logprobs: log p of the written tokens.
        teacher_logprobs: log q of the written tokens.
        alpha: The power, above 0.

    Returns:
        Rewards without unit.

    Raises:
        ConfigError: `alpha` is not positive.
    """
    if not alpha > 0.0:
        raise ConfigError(f"expected alpha > 0 in the power reward, got {alpha}; at 0 every reward is zero")
    p, q = student_logprobs.detach(), teacher_logprobs.detach()
    largest = torch.maximum(p, q)
    neither = largest == -math.inf
    # the difference is taken in the exponent: a small alpha leaves nothing of that of two powers near one
    gap = (alpha * (q - p).abs()).masked_fill(neither, 0.0)
    return (q - p).masked_fill(neither, 0.0).sign() * (alpha * largest).exp() * -torch.expm1(-gap)


def discounted_to_go(
    rewards: Float[Tensor, " packed"], rows: Int[Tensor, " packed"], *, discount: float
) -> Float[Tensor, " packed"]:
    """G_t = sum over t' >= t in the same row of discount^(t' - t) r_t'.

    At discount 0 it is the reward itself. A divergence that is exact over the vocabulary depends on the prefix only, so
    as an advantage it is worth nothing at discount 0 (its expected gradient is exactly zero) and carries future credit
    above: with discount 1 the policy gradient on the values at t' > t and the back-propagated divergence at t add up to
    the gradient of the divergence of whole sequences.

    Args:
        rewards: Rewards of the trained tokens in packed order.
        rows: Row of each packed token, ascending (`RolloutBatch.token_rows`).
        discount: In [0, 1].

    Returns:
        G in packed order. Sums are made by doubling spans, log2(tokens) passes without division or cancellation.

    Raises:
        ConfigError: `discount` is outside [0, 1], or rows are not ascending.
    """
    if not 0.0 <= discount <= 1.0:
        raise ConfigError(f"expected a discount in [0, 1], got {discount}; later rewards would outweigh earlier ones")
    if bool((rows[1:] < rows[:-1]).any()):
        raise ConfigError("expected rows in ascending order, got mixed ones; rewards would leak between completions")
    total = rewards.detach().clone()
    span, factor = 1, discount
    while span < len(rows) and factor > 0.0:
        same = rows[span:] == rows[:-span]
        if not bool(same.any()):
            break
        later = torch.where(same, total[span:], torch.zeros_like(total[span:]))
        total = torch.cat([total[:-span] + factor * later, total[-span:]])
        span, factor = 2 * span, factor * factor
    return total


def position_baseline(returns: Float[Tensor, " packed"], rows: Int[Tensor, " packed"]) -> Float[Tensor, " packed"]:
    """Mean return of the *other* rows at the same place in their completions; 0 where no other row is that long.

    Leaving the row itself out keeps the baseline independent of the row's own tokens, so the expected gradient does not
    change.

    Args:
        returns: One value a token.
        rows: Row of each token, ascending.

    Returns:
        The baseline of each token, detached.
    """
    returns = returns.detach()
    if not len(returns):
        return returns
    new_row = torch.ones_like(rows, dtype=torch.bool)
    new_row[1:] = rows[1:] != rows[:-1]
    index = torch.arange(len(rows), device=rows.device)
    place = index - torch.where(new_row, index, 0).cummax(dim=0).values
    size = int(place.max()) + 1
    totals = returns.new_zeros(size).index_add_(0, place, returns)
    counts = returns.new_zeros(size).index_add_(0, place, torch.ones_like(returns))
    others = counts[place] - 1.0
    return torch.where(others > 0, (totals[place] - returns) / others.clamp_min(1.0), torch.zeros_like(returns))


def importance_weights(
    ratio: Float[Tensor, "*token"], *, mode: Importance, low: float, high: float
) -> tuple[Float[Tensor, "*token"], Bool[Tensor, "*token"]]:
    """Weight of a token that the sampler wrote with another probability than the trainer gives it.

    With r = p_trainer(y) / p_sampler(y): `none` 1; `clip` clamp(r, low, high); `truncated` min(r, high) (TIS);
    `masked` r where low <= r <= high, else 0 (MiMo-V2-Flash, arXiv 2601.02780, Eq. 8; IcePop).

    Args:
        ratio: r, not negative.
        mode: One of the four.
        low: Smallest trusted ratio, at most 1; not read by `none` and `truncated`.
        high: Largest trusted ratio, at least 1; not read by `none`.

    Returns:
        Detached weights, and True where a token was masked, which only `masked` does.

    Raises:
        ConfigError: An on-policy token (r = 1) would be changed, `low` is negative, or there is no such mode.
    """
    if mode not in get_args(Importance):
        raise ConfigError(f"expected a mode of importance weights, got '{mode}'; {nearest(mode, get_args(Importance))}")
    if mode != "none" and not 0.0 <= low <= 1.0 <= high:
        raise ConfigError(
            f"expected 0 <= low <= 1 <= high, got {low} and {high}; an on-policy token has ratio 1 and would be changed"
        )
    ratio = ratio.detach()
    masked = torch.zeros_like(ratio, dtype=torch.bool)
    if mode == "none":
        return torch.ones_like(ratio), masked
    if mode == "clip":
        return ratio.clamp(low, high), masked
    if mode == "truncated":
        return ratio.clamp_max(high), masked
    masked = ~((ratio >= low) & (ratio <= high))
    return ratio.masked_fill(masked, 0.0), masked


def ppo_surrogate(
    ratio: Float[Tensor, "*token"], advantages: Float[Tensor, "*token"], *, epsilon_low: float, epsilon_high: float
) -> Float[Tensor, "*token"]:
    """min(r A, clip(r, 1 - epsilon_low, 1 + epsilon_high) A), to be maximised.

    Nemotron 3 Ultra, arXiv 2606.15007, Eq. 3, where `importance_weights` multiply it. Its gradient is A grad r, and zero
    once r has moved past the bound in the direction that A rewards.

    Args:
        ratio: r = p(y) / p_old(y), differentiable.
        advantages: A, a constant.
        epsilon_low: How far r may fall, in [0, 1].
        epsilon_high: How far r may rise, at least 0.

    Returns:
        The surrogate of each token, differentiable in `ratio`.

    Raises:
        ConfigError: A bound is outside its range.
    """
    if not (0.0 <= epsilon_low <= 1.0 and epsilon_high >= 0.0):
        raise ConfigError(
            f"expected 0 <= epsilon_low <= 1 and epsilon_high >= 0, got {epsilon_low} and {epsilon_high}; an on-policy "
            "token has ratio 1 and would be clipped"
        )
    advantages = advantages.detach()
    return torch.minimum(ratio * advantages, ratio.clamp(1.0 - epsilon_low, 1.0 + epsilon_high) * advantages)


def kl_baseline_advantages(
    log_ratio: Float[Tensor, "*token"], reverse_kl: Float[Tensor, "*token"]
) -> Float[Tensor, "*token"]:
    """A = log-ratio + KL(p || q): the log-ratio minus its own mean, -KL, as a baseline (vOPD, arXiv 2605.07865).

    The mean of A under p is zero at each prefix and its policy gradient is that of the log-ratio itself: a baseline that
    depends on the prefix alone changes the variance, not the expectation.

    Args:
        log_ratio: log q(y) - log p(y) of the written tokens.
        reverse_kl: KL(p || q) of the same positions, over the whole vocabulary.

    Returns:
        Advantages in nats, detached.
    """
    return (log_ratio + reverse_kl).detach()
