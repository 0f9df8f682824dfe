"""How far several teachers are from each other at a token."""

from __future__ import annotations

import math
from collections.abc import Collection
from itertools import combinations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from moteach.divergences.full import jsd
from moteach.divergences.terms import relative_entropy_terms

STREAMED = ("spread", "argmax_disagreement")
"""Statistics of several teachers that share a token, which hold none of them; every pass makes them."""
OF_TEACHERS = (*STREAMED, "teacher_jsd")
"""All statistics of several teachers that share a token, see `moteach.divergences.measure`."""


def pairwise_jsd(
    teacher_logprobs: Float[Tensor, "teacher *token vocab"],
) -> Float[Tensor, "*token teacher teacher"]:
    """Jensen-Shannon divergence of each pair of teachers, KL(q_i || m)/2 + KL(q_j || m)/2 with m their mean.

    It is used instead of a symmetrised KL because it stays finite, at most ln 2, where one teacher excludes a token.

    Args:
        teacher_logprobs: Normalised logprobs of each teacher.

    Returns:
        A symmetric matrix in nats for each token, with zeros on its diagonal.
    """
    n = len(teacher_logprobs)
    matrix = teacher_logprobs.new_zeros((*teacher_logprobs.shape[1:-1], n, n))
    for i, j in combinations(range(n), 2):
        matrix[..., i, j] = matrix[..., j, i] = jsd(teacher_logprobs[i], teacher_logprobs[j], beta=0.5)
    return matrix


def mean_pairwise_jsd(teacher_logprobs: Float[Tensor, "teacher *token vocab"]) -> Float[Tensor, "*token"]:
    """Mean of the Jensen-Shannon divergence over all pairs of teachers, in nats; zero for a single teacher.

    Args:
        teacher_logprobs: Normalised logprobs of each teacher.

    Returns:
        One value a token, from 0 to ln 2.
    """
    n = len(teacher_logprobs)
    return pairwise_jsd(teacher_logprobs).sum((-1, -2)) / max(n * (n - 1), 1)


def generalised_jsd(
    teacher_logprobs: Float[Tensor, "teacher *token vocab"], weights: Float[Tensor, "*token teacher"]
) -> Float[Tensor, "*token"]:
    """JSD_w = sum_k w_k KL(q_k || linear pool) = H(linear pool) - sum_k w_k H(q_k), at most the entropy of the weights.

    It is what is left of sum_k w_k KL(q_k || p) at its minimum, the linear pool (arXiv 1502.04206).

    Args:
        teacher_logprobs: Normalised logprobs of each teacher.
        weights: Weight of each teacher at each token, summing to one; a weight of zero silences a teacher.

    Returns:
        One value a token in nats, never negative.
    """
    by_teacher = weights.movedim(-1, 0).unsqueeze(-1)
    heard = teacher_logprobs.masked_fill(by_teacher == 0.0, -math.inf)
    linear = torch.logsumexp(heard + by_teacher.log(), dim=0)
    terms = relative_entropy_terms(heard, linear.expand_as(heard)).sum(-1)
    return (terms * by_teacher.squeeze(-1)).sum(0).clamp(min=0.0)


def argmax_disagreement(teacher_logprobs: Float[Tensor, "teacher *token vocab"]) -> Float[Tensor, "*token"]:
    """Share of the pairs of teachers whose likeliest tokens differ; zero for a single teacher.

    Args:
        teacher_logprobs: Logprobs or logits of each teacher.

    Returns:
        One value a token, from 0 to 1.
    """
    return differing_pairs(teacher_logprobs.argmax(-1).movedim(0, -1)).to(teacher_logprobs.dtype)


def differing_pairs(ids: Int[Tensor, "*token teacher"]) -> Float[Tensor, "*token"]:
    """Share of the pairs of teachers that name different ids, in float64; zero for a single teacher."""
    n = ids.shape[-1]
    differ = (ids.unsqueeze(-1) != ids.unsqueeze(-2)).sum((-1, -2))
    return differ.double() / max(n * (n - 1), 1)


def spread(
    teacher_logprobs: Float[Tensor, "teacher *token vocab"], student_logprobs: Float[Tensor, "*token vocab"]
) -> Float[Tensor, "*token"]:
    """Largest minus smallest logprob that the teachers give to the student's likeliest token (Open-MOPD, arXiv 2608.19098).

    Args:
        teacher_logprobs: Normalised logprobs of each teacher.
        student_logprobs: Logprobs or logits of the student.

    Returns:
        Nats a token; zero where all teachers exclude it, infinite where only some do.
    """
    likeliest = student_logprobs.argmax(-1, keepdim=True).expand(len(teacher_logprobs), *student_logprobs.shape[:-1], 1)
    said = teacher_logprobs.gather(-1, likeliest).squeeze(-1)
    return span(said.amin(0), said.amax(0))


def span(low: Float[Tensor, "*token"], high: Float[Tensor, "*token"]) -> Float[Tensor, "*token"]:
    """Difference of two logprobs, high minus low, and zero where both are -inf."""
    return torch.where(low == high, 0.0, high - low)


class Watch:
    """Takes the teachers of a chunk one at a time and tells how far they are from each other.

    Args:
        student_logprobs: Logprobs of the student.
        wanted: Which of `OF_TEACHERS` to make; others are ignored. Only `teacher_jsd` holds the teachers.
    """

    def __init__(self, student_logprobs: Float[Tensor, "token vocab"], wanted: Collection[str]) -> None:
        self._wanted = wanted
        self._watched = student_logprobs.argmax(-1, keepdim=True) if "spread" in wanted else None
        self._said: list[Tensor] = []
        self._likeliest: list[Tensor] = []
        self._held: list[Tensor] = []

    def add(self, teacher_logprobs: Float[Tensor, "token vocab"]) -> None:
        """Looks at one teacher."""
        if self._watched is not None:
            self._said.append(teacher_logprobs.gather(-1, self._watched).squeeze(-1))
        if "argmax_disagreement" in self._wanted:
            self._likeliest.append(teacher_logprobs.argmax(-1))
        if "teacher_jsd" in self._wanted:
            self._held.append(teacher_logprobs.clone())

    def finish(self) -> dict[str, Float[Tensor, " token"]]:
        """Returns the wanted statistics."""
        found: dict[str, Tensor] = {}
        if self._said:
            said = torch.stack(self._said)
            found["spread"] = span(said.amin(0), said.amax(0))
        if self._likeliest:
            found["argmax_disagreement"] = differing_pairs(torch.stack(self._likeliest, dim=-1))
        if self._held:
            found["teacher_jsd"] = mean_pairwise_jsd(torch.stack(self._held))
        return found
