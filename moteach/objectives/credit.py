"""A policy-gradient term of given advantages, beside a loss that is back-propagated."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from moteach.divergences.advantages import importance_weights
from moteach.divergences.logprobs import chunked_token_logprobs
from moteach.objectives.base import Scored
from moteach.types import Head

RATIO_LOW, RATIO_HIGH = 0.5, 2.0
"""Bounds of the trainer/sampler ratio, those of Nemotron-Cascade 2 (arXiv 2603.19220); outside, a token gets no credit."""


def credit_loss(
    hidden: Float[Tensor, "packed hidden"],
    head: Head,
    scored: Scored,
    *,
    advantages: Float[Tensor, " packed"],
    weights: Float[Tensor, " packed"],
    chunk_size: int,
) -> Float[Tensor, ""]:
    """-sum_t w_t * c_t * A_t * log S(y_t), with c_t = sg[S/mu] inside the bounds and 0 outside.

    Args:
        hidden: The student's states, in packed order.
        head: Its live head.
        scored: The rows.
        advantages: A_t, constants.
        weights: w_t.
        chunk_size: Tokens projected to the vocabulary at a time.
    """
    rollouts = scored.rollouts
    logprobs = chunked_token_logprobs(hidden, head, rollouts.token_targets, chunk_size=chunk_size)
    ratio = (logprobs.detach() - rollouts.rollout_logprobs[rollouts.loss_mask]).exp()
    kept, _ = importance_weights(ratio, mode="masked", low=RATIO_LOW, high=RATIO_HIGH)
    return -(weights * kept * advantages * logprobs).sum()
