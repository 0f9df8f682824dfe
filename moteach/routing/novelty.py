"""Weigh each teacher by what it says that the student does not, where the student can follow."""

from __future__ import annotations

import math
from typing import ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from moteach.errors import ConfigError
from moteach.routing.context import GateContext, check_temperature, put, softmax_weights, weights_of
from moteach.types import Support

Against = Literal["student", "reference"]


class NoveltyGate:
    """w_k = prior_k exp(u_k / temperature) / sum_j ..., u_k = sqrt(m_S m_k) (1 - exp(-JS_k / scale)).

    The accessible novelty of MOPD-Router (arXiv 2609.30837): S and T_k are cut to the tokens that are among the k likeliest of
    both; m_S and m_k are their masses there (what is accessible), JS_k the Jensen-Shannon divergence in nats of the two
    renormalised to it (what is new). A teacher without a shared token has novelty 0.

    Args:
        against: Whose knowledge novelty is measured from: the `student`, or the `reference` the teacher was trained from.
        k: Likeliest tokens of each, at most the vocabulary.
        scale: Nats of JS at which novelty is 1 - 1/e.
        temperature: In which novelty, a number from 0 to 1, is read.
        hard: The largest takes all.
        trace: Write a row a token into `routing.parquet`.

    Raises:
        ConfigError: k, scale or temperature is not positive.
    """

    supports: ClassVar[frozenset[Support]] = frozenset({"full"})
    per_token: ClassVar[bool] = True

    def __init__(
        self,
        *,
        against: Against = "student",
        k: int = 16,
        scale: float = 0.1,
        temperature: float = 0.1,
        hard: bool = False,
        trace: bool = False,
    ) -> None:
        check_temperature(temperature)
        if k < 1 or not 0 < scale < math.inf:
            raise ConfigError(f"gate: expected k >= 1 and a finite scale above 0, got k={k} and scale={scale}")
        self.needs = frozenset({"teachers", "student" if against == "student" else "references"})
        self.against = against
        self.k = k
        self.scale = scale
        self.temperature = temperature
        self.hard = hard
        self.trace = trace

    @torch.no_grad()
    def weights(self, context: GateContext) -> Float[Tensor, "packed teacher"]:
        """Novelty of each candidate, chunk by chunk."""
        weights, own = weights_of(context), self.against == "student"
        for chunk in context.chunks(student=own, references=not own):
            scores = []
            for column, teacher in enumerate(chunk.teachers):
                known = chunk.student if chunk.references is None else chunk.references[column]
                assert known is not None
                scores.append(accessible_novelty(known, teacher, k=self.k, scale=self.scale))
            put(
                weights,
                chunk,
                softmax_weights(torch.stack(scores, -1), chunk.prior, temperature=self.temperature, hard=self.hard),
            )
        return weights


def accessible_novelty(
    student_logprobs: Float[Tensor, "token vocab"],
    teacher_logprobs: Float[Tensor, "token vocab"],
    *,
    k: int,
    scale: float,
) -> Float[Tensor, " token"]:
    """Computes sqrt(m_S m_T) (1 - exp(-JS / scale)) on the tokens that are among the k likeliest of both, see `NoveltyGate`."""
    k = min(k, student_logprobs.shape[-1])
    shared = torch.ones_like(student_logprobs, dtype=torch.bool)
    for logprobs in (student_logprobs, teacher_logprobs):
        shared &= torch.zeros_like(shared).scatter_(-1, logprobs.topk(k, dim=-1).indices, True)
    cut = [side.double().masked_fill(~shared, -math.inf) for side in (student_logprobs, teacher_logprobs)]
    masses = [side.exp().sum(-1) for side in cut]
    p, q = (side.exp() / mass.clamp(min=1e-300).unsqueeze(-1) for side, mass in zip(cut, masses, strict=True))
    middle = (p + q) / 2
    surprise = torch.xlogy(p, p) + torch.xlogy(q, q) - 2 * torch.xlogy(middle, middle)
    divergence = surprise.sum(-1).clamp(min=0.0) / 2
    return (masses[0] * masses[1]).sqrt() * (1 - (-divergence / scale).exp())
