"""Weights from what each teacher gives to an answer that is known to be right: Bayes' rule over teachers.

Read the teachers with their weights as a mixture: teacher k is drawn with probability w_k, then it writes y with probability
q_k(y | x). When a right answer y* of the prompt is known (the reference, or a completion that was verified), the mixture is
conditioned on it:

    p(k | x, y*) = w_k q_k(y* | x) / sum_j w_j q_j(y* | x),     log q_k(y* | x) = sum_t log q_k(y*_t | x, y*_<t),

and the student's target is the pool with these weights. The conditioning never makes the known answer less likely:
sum_k p(k | y*) q_k(y*) = E_w[q^2] / E_w[q] >= E_w[q] = sum_k w_k q_k(y*), with equality only where all teachers agree on it. A
teacher that is confidently wrong on this very prompt loses by the nats it gives away, however sure it is of its own answer,
which no statistic of the teachers' distributions on the student's text can see.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from moteach.conflict.base import Accumulator
from moteach.conflict.partial import Missing
from moteach.conflict.pools import Linear
from moteach.conflict.sequence import tilted
from moteach.errors import ConfigError
from moteach.types import Support

VERIFIED_LOGPROBS = "verified_logprobs"
"""What a resolver with `condition` names among its `needs`."""


@runtime_checkable
class Conditioned(Protocol):
    """A resolver that changes the weights of whole prompts, before any teacher scores what the student wrote."""

    def condition(
        self,
        weights: Float[Tensor, "batch teacher"],
        totals: Float[Tensor, "batch teacher"],
        lengths: Int[Tensor, " batch"],
    ) -> Float[Tensor, "batch teacher"]:
        """Returns the weights given the right answers; rows sum to one, or are all zero where nobody may teach.

        Args:
            weights: Weights of the router.
            totals: Each teacher's logprob of the whole right answer, nats; -inf where it was not asked.
            lengths: Tokens of that answer; 0 where none is known, whose rows stay as they are.
        """


@dataclass(frozen=True, kw_only=True)
class Posterior:
    """Linear pool with the posterior weights of the teachers given a right answer of the prompt, see this module.

    Teachers that are left with less than `least` are dropped before they score the student's completion, so that what is
    usually one teacher a prompt costs one teacher a prompt; each teacher of the router scores the answer, which is a forward
    over prompt and answer without any generation. Where even the best of them gives the answer less than exp(-`ignorance`) a
    token, none of them knows it, and nobody teaches the prompt.

    Args:
        temperature: Divides the nats of the answer; 1 is Bayes' rule, infinity leaves the weights alone.
        ignorance: Nats a token of the right answer beyond which the best teacher counts as ignorant; infinity never.
        least: Smallest posterior weight of a teacher that is asked; the others share its weight.
        missing: As in `Linear`.

    Raises:
        ConfigError: An argument is out of range.
    """

    name: ClassVar[str] = "posterior"
    supports: ClassVar[frozenset[Support]] = frozenset({"full", "topk", "sampled"})
    needs: ClassVar[frozenset[str]] = frozenset({VERIFIED_LOGPROBS})
    streams: ClassVar[bool] = True
    temperature: float = 1.0
    ignorance: float = 1.0
    least: float = 0.01
    missing: Missing = "lower"

    def __post_init__(self) -> None:
        if not self.temperature > 0 or not self.ignorance > 0 or not 0 <= self.least < 0.5:
            raise ConfigError(
                "conflict=posterior: expected temperature and ignorance above 0 and least from 0 to below 0.5, got "
                f"{self.temperature}, {self.ignorance} and {self.least}; weights would not be those of Bayes' rule, or nobody "
                "would be left"
            )

    def condition(
        self,
        weights: Float[Tensor, "batch teacher"],
        totals: Float[Tensor, "batch teacher"],
        lengths: Int[Tensor, " batch"],
    ) -> Float[Tensor, "batch teacher"]:
        """Computes p(k | x, y*), without what is below `least`; rows of ignorant teachers are all zero."""
        known = (lengths > 0).unsqueeze(-1)
        found = tilted(weights, totals, temperature=self.temperature)
        kept = found.masked_fill(found < self.least, 0.0)
        kept = kept / kept.sum(-1, keepdim=True).clamp(min=torch.finfo(kept.dtype).tiny)
        heard = totals.masked_fill(weights <= 0, -math.inf)
        best = heard.amax(-1) if weights.shape[1] else lengths.new_zeros(len(lengths)).to(weights.dtype)
        ignorant = (-best > self.ignorance * lengths).unsqueeze(-1)
        return torch.where(known, kept.masked_fill(ignorant, 0.0), weights)

    def accumulator(self, **context: Tensor) -> Accumulator:
        """Starts a linear pool, the predictive distribution of the mixture; it holds one distribution."""
        return Linear().accumulator()

    def resolve_topk(
        self,
        ids: Int[Tensor, "teacher token given"],
        logprobs: Float[Tensor, "teacher token given"],
        weights: Float[Tensor, "token teacher"],
        k: int,
    ) -> tuple[Int[Tensor, "token k"], Float[Tensor, "token k"], Float[Tensor, " token"]]:
        """The linear pool's k likeliest tokens, with the weights as they are."""
        return Linear(missing=self.missing).resolve_topk(ids, logprobs, weights, k)

    def resolve_sampled(
        self, sampled_logprobs: Float[Tensor, "packed teacher"], weights: Float[Tensor, "packed teacher"]
    ) -> Float[Tensor, " packed"]:
        """Exact logprob of the written token, see `Linear`."""
        return Linear().resolve_sampled(sampled_logprobs, weights)
