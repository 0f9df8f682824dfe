"""Weights from what each teacher thinks of the completion as a whole: its mean logprob of the written tokens.

Write CE_k for minus that mean, nats per token, so that exp(CE_k) is the teacher's perplexity. The factor of a teacher is the
same at every token of a completion; it multiplies the weights before any teacher's head is projected, so that a teacher left
without weight costs nothing there.

Published uses read CE on text that is known to be right: FuseLLM on its training text, PackLLM on the prompt. Here it is read
on what the student wrote, where a low CE says that the teacher would have written the same, right or wrong: these resolvers
favour the teacher that is nearest to the student and teaches least. Between teachers that are all good at a prompt this is what
keeps the student in reach; it finds no competence. Use a router for that.
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
from moteach.conflict.pools import Geometric, Linear
from moteach.conflict.select import Select
from moteach.errors import ConfigError
from moteach.types import Support

SEQUENCE_LOGPROBS = "sequence_logprobs"
"""What a resolver with `reweigh` names among its `needs`."""
_LEAST = -1e30


@runtime_checkable
class SequenceWeighted(Protocol):
    """A resolver that changes the weights of whole completions before its pool sees them."""

    def reweigh(
        self, weights: Float[Tensor, "packed teacher"], sequence_logprobs: Float[Tensor, "packed teacher"]
    ) -> Float[Tensor, "packed teacher"]:
        """Returns the weights of each token, summing to one again; all zero where they were all zero.

        Args:
            weights: Weights of the gate.
            sequence_logprobs: Each teacher's mean logprob of the completion that the token belongs to.
        """


@dataclass(frozen=True, kw_only=True)
class MinCE:
    """The teacher with the least cross-entropy on the completion teaches all of it alone (FuseLLM's MinCE, arXiv 2401.10491).

    Among the teachers that have weight at a token; the first of a tie, whatever the sizes of their weights.
    """

    name: ClassVar[str] = "min_ce"
    supports: ClassVar[frozenset[Support]] = frozenset({"full", "topk", "sampled"})
    needs: ClassVar[frozenset[str]] = frozenset({SEQUENCE_LOGPROBS})
    streams: ClassVar[bool] = True

    def reweigh(
        self, weights: Float[Tensor, "packed teacher"], sequence_logprobs: Float[Tensor, "packed teacher"]
    ) -> Float[Tensor, "packed teacher"]:
        """One for the teacher of least cross-entropy, zero for the others."""
        heard = weights > 0
        if weights.shape[1] == 0:
            return weights
        best = sequence_logprobs.clamp(min=_LEAST).masked_fill(~heard, -math.inf).argmax(-1, keepdim=True)
        alone = torch.zeros_like(weights).scatter_(-1, best, 1.0)
        return alone * heard.any(-1, keepdim=True)

    def accumulator(self, **context: Tensor) -> Accumulator:
        """Starts a selection by the weights as they are."""
        return Select().accumulator()

    def resolve_sampled(
        self, sampled_logprobs: Float[Tensor, "packed teacher"], weights: Float[Tensor, "packed teacher"]
    ) -> Float[Tensor, " packed"]:
        """Exact logprob of the written token, see `Select`."""
        return Select().resolve_sampled(sampled_logprobs, weights)


@dataclass(frozen=True, kw_only=True)
class InverseCE:
    """Linear pool with weights proportional to w_k / exp(CE_k) (FuseLLM's AvgCE, arXiv 2401.10491): w_k over the perplexity.

    Args:
        missing: As in `Linear`.
    """

    name: ClassVar[str] = "inverse_ce"
    supports: ClassVar[frozenset[Support]] = frozenset({"full", "topk", "sampled"})
    needs: ClassVar[frozenset[str]] = frozenset({SEQUENCE_LOGPROBS})
    streams: ClassVar[bool] = True
    missing: Missing = "lower"

    def reweigh(
        self, weights: Float[Tensor, "packed teacher"], sequence_logprobs: Float[Tensor, "packed teacher"]
    ) -> Float[Tensor, "packed teacher"]:
        """Weights proportional to w_k exp(-CE_k)."""
        return tilted(weights, sequence_logprobs, temperature=1.0)

    def accumulator(self, **context: Tensor) -> Accumulator:
        """Starts a linear pool; it holds one distribution."""
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


@dataclass(frozen=True, kw_only=True)
class Perplexity:
    """Geometric pool with weights proportional to w_k exp(-log PPL_k / temperature) (PackLLM's `sim`, arXiv 2404.11531).

    log PPL is CE, so at temperature 1 the weights are those of `inverse_ce`: the two published methods differ in the pool, and
    in the text that CE is read on. PackLLM mixes logits, which is the geometric pool.

    Args:
        temperature: Nats per token; infinity leaves the weights alone, towards 0 it becomes `min_ce`.

    Raises:
        ConfigError: temperature is not positive.
    """

    name: ClassVar[str] = "perplexity"
    supports: ClassVar[frozenset[Support]] = frozenset({"full", "sampled"})
    needs: ClassVar[frozenset[str]] = frozenset({SEQUENCE_LOGPROBS})
    streams: ClassVar[bool] = True
    temperature: float = 1.0

    def __post_init__(self) -> None:
        if not self.temperature > 0:
            raise ConfigError(
                f"conflict.temperature: expected a number of nats above 0, got {self.temperature}; it divides the "
                "cross-entropy. For the teacher of least cross-entropy alone use conflict=min_ce"
            )

    def reweigh(
        self, weights: Float[Tensor, "packed teacher"], sequence_logprobs: Float[Tensor, "packed teacher"]
    ) -> Float[Tensor, "packed teacher"]:
        """Weights proportional to w_k exp(-CE_k / temperature)."""
        return tilted(weights, sequence_logprobs, temperature=self.temperature)

    def accumulator(self, **context: Tensor) -> Accumulator:
        """Starts a geometric pool; it holds one distribution."""
        return Geometric().accumulator()

    def resolve_sampled(
        self, sampled_logprobs: Float[Tensor, "packed teacher"], weights: Float[Tensor, "packed teacher"]
    ) -> Float[Tensor, " packed"]:
        """Logprob of the written token up to -log Z, see `Geometric.resolve_sampled`."""
        return Geometric().resolve_sampled(sampled_logprobs, weights)


def tilted(
    weights: Float[Tensor, "row teacher"], sequence_logprobs: Float[Tensor, "row teacher"], *, temperature: float
) -> Float[Tensor, "row teacher"]:
    """Computes w_k exp(l_k / temperature) / sum_j w_j exp(l_j / temperature), l the logprob of a text, mean or total.

    Where every teacher with weight excludes the text (l = -inf), the weights stay as they are.

    Args:
        weights: Non-negative; a row that is all zero stays so.
        sequence_logprobs: Logprobs; ignored where the weight is zero.
        temperature: Nats, above 0.

    Returns:
        Weights that sum to one in each row that has any.
    """
    heard = weights > 0
    if weights.shape[1] == 0:
        return weights
    said = sequence_logprobs.to(weights.dtype).clamp(min=_LEAST).masked_fill(~heard, -math.inf)
    # the best teacher at 0: a temperature near zero may not overflow the others' and the excluded stay apart
    said = (said - said.amax(-1, keepdim=True)).masked_fill(~heard, -math.inf) / temperature
    scores = (weights.log() + said).masked_fill(~heard, -math.inf)
    silent = ~heard.any(-1, keepdim=True)
    return scores.masked_fill(silent, 0.0).softmax(-1).masked_fill(silent, 0.0)
