"""Weigh each teacher by how sure it is of the next token."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from moteach.divergences.full import entropy
from moteach.routing.context import GateContext, check_temperature, put, softmax_weights, weights_of
from moteach.types import Support

Measure = Literal["entropy", "top_probability"]


class ConfidenceGate:
    """w_k = prior_k exp(c_k / temperature) / sum_j ..., c_k the confidence of teacher k at this prefix.

    `entropy`: c_k = -H(T_k), nats, the entropy baseline of MOPD-Router (arXiv 2609.30837), which it finds weak: it follows
    the teacher of the lowest entropy whatever the prefix. `top_probability`: c_k = log max_v T_k(v). The prior is the
    router's weight, 1/m for candidates that are alike, where the formula is the published one.

    Args:
        measure: What confidence is.
        temperature: Nats in which it is read; small is close to `hard`.
        hard: The largest takes all.
        trace: Write a row a token into `routing.parquet`.

    Raises:
        ConfigError: The temperature is not positive.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"teachers"})
    supports: ClassVar[frozenset[Support]] = frozenset({"full"})
    per_token: ClassVar[bool] = True

    def __init__(
        self, *, measure: Measure = "entropy", temperature: float = 0.1, hard: bool = False, trace: bool = False
    ) -> None:
        check_temperature(temperature)
        self.measure = measure
        self.temperature = temperature
        self.hard = hard
        self.trace = trace

    @torch.no_grad()
    def weights(self, context: GateContext) -> Float[Tensor, "packed teacher"]:
        """Confidence of each candidate, chunk by chunk."""
        weights = weights_of(context)
        for chunk in context.chunks():
            sure = [-entropy(q) if self.measure == "entropy" else q.amax(-1) for q in chunk.teachers]
            scores = torch.stack(sure, dim=-1)
            put(weights, chunk, softmax_weights(scores, chunk.prior, temperature=self.temperature, hard=self.hard))
        return weights
