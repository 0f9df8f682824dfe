"""How far several teachers are from each other at a token."""

from __future__ import annotations

import math
from itertools import combinations

import torch
from jaxtyping import Float
from torch import Tensor

from moteach.divergences.full import jsd
from moteach.divergences.terms import relative_entropy_terms


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
    n = len(teacher_logprobs)
    likeliest = teacher_logprobs.argmax(-1).movedim(0, -1)
    differ = (likeliest.unsqueeze(-1) != likeliest.unsqueeze(-2)).sum((-1, -2))
    return differ.to(teacher_logprobs.dtype) / max(n * (n - 1), 1)


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
