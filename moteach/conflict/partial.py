"""The linear pool of teachers that each say only their own k likeliest tokens: what is known of it, and bounds on the rest.

A token that a teacher did not name has, under that teacher, a probability in [0, min(its k-th probability, its tail)], the tail
being what it did not name. The linear pool is linear in each teacher, so these bounds carry over entry by entry, and it is
exact where all teachers named the same tokens. Pools with a normaliser over the vocabulary (geometric, power) have no such
bounds on k tokens alone, and a token that any teacher leaves out may be vetoed or not: they are refused on support topk.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

Missing = Literal["lower", "midpoint"]
"""What a missing entry counts as: zero, or half of its bound."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PartialPool:
    """The pool on the union of what the teachers named, in probabilities; slots that are not `counted` mean nothing."""

    ids: Int[Tensor, "token width"]
    """Distinct tokens of the vocabulary."""
    counted: Bool[Tensor, "token width"]
    lower: Float[Tensor, "token width"]
    """Missing entries taken as zero."""
    upper: Float[Tensor, "token width"]
    """Missing entries taken at their bound; may sum to more than one."""
    midpoint: Float[Tensor, "token width"]
    """Missing entries at half of their bound, or a teacher's tail spread over those it did not name where that is less; never
    sums to more than one."""


def linear_bounds(
    ids: Int[Tensor, "teacher token k"],
    logprobs: Float[Tensor, "teacher token k"],
    weights: Float[Tensor, "token teacher"],
) -> PartialPool:
    """Bounds sum_k w_k q_k on every token that some teacher with weight named.

    Args:
        ids: Distinct tokens of each teacher, its likeliest ones.
        logprobs: Their logprobs, normalised over the whole vocabulary; ignored where the weight is zero.
        weights: Weight of each teacher at each token.

    Returns:
        The union of the tokens and the bounds, in float64.
    """
    given = weights.T.double().unsqueeze(-1)
    heard = (given > 0).expand(ids.shape)
    named = logprobs.double().exp().masked_fill(~heard, 0.0)
    # a mass that rounds to one does not say how small the rest is
    tail = (1.0 - named.sum(-1, keepdim=True)).clamp(min=torch.finfo(logprobs.dtype).eps)
    cap = torch.minimum(named.amin(-1, keepdim=True), tail)

    order = _flat(ids).argsort(dim=-1, stable=True)
    ranked = _flat(ids).gather(-1, order)
    fresh = torch.ones_like(ranked)
    fresh[:, 1:] = (ranked[:, 1:] != ranked[:, :-1]).long()
    slot = fresh.cumsum(-1) - 1

    def collected(values: Tensor) -> Tensor:
        by_rank = _flat(values.expand(ids.shape)).gather(-1, order)
        return torch.zeros_like(by_rank).scatter_add_(-1, slot, by_rank)

    counted = collected(heard.double()) > 0
    left_out = (counted.sum(-1) - ids.shape[-1]).clamp(min=1).unsqueeze(-1)
    half = torch.minimum(cap / 2, tail / left_out)
    lower = collected(given * named)

    def with_missing(bound: Tensor) -> Tensor:
        weighted = (given * bound).masked_fill(given == 0.0, 0.0)
        # all teachers minus those that named the token; rounding may not go below what is known
        return lower + (weighted.sum(0) - collected(weighted)).clamp(min=0.0)

    return PartialPool(
        ids=torch.zeros_like(ranked).scatter_(-1, slot, ranked),
        counted=counted,
        lower=lower,
        upper=with_missing(cap),
        midpoint=with_missing(half),
    )


def likeliest(
    pool: PartialPool, k: int, missing: Missing
) -> tuple[Int[Tensor, "token k"], Float[Tensor, "token k"], Float[Tensor, " token"]]:
    """Takes the k likeliest tokens of the pool.

    A token that no teacher named is never among them, though it may be as likely as sum_k w_k min(k-th probability, tail).

    Args:
        pool: The bounds.
        k: How many; at most what one teacher named.
        missing: What a missing entry counts as.

    Returns:
        Ids, their logprobs normalised over the whole vocabulary, likeliest first, and the width of their bounds summed over
        them: the most probability that may be wrong.
    """
    estimate = pool.lower if missing == "lower" else pool.midpoint
    kept, slots = estimate.masked_fill(~pool.counted, -1.0).topk(k, dim=-1)
    slack = (pool.upper - pool.lower).gather(-1, slots).sum(-1)
    return pool.ids.gather(-1, slots), kept.log(), slack


def _flat(values: Tensor) -> Tensor:
    return values.transpose(0, 1).flatten(1)
