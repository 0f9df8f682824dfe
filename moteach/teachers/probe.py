"""Two models on the same tokens: how far the student is from a teacher where the student itself goes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from moteach.catalogue.modeling import body_and_head, hidden_states
from moteach.divergences.projection import project
from moteach.types import Prompt, RolloutBatch

UNIFORM = 0.01
"""Relative distance of the mean logprob from -ln V within which a distribution counts as uniform."""


@dataclass(frozen=True, kw_only=True)
class Probe:
    """What a comparison saw."""

    reverse_kl: float
    """Mean over tokens of KL(student || teacher), full vocabulary, in nats."""
    overlap: float
    """Mean over tokens of the share of common entries among the k largest."""
    tokens: int
    finite: bool
    """Every logprob of the teacher is finite."""
    uniform: bool
    """The teacher is uniform on every token: the mean over the vocabulary of its logprobs is within 1 % of -ln V."""


@dataclass(frozen=True, kw_only=True)
class Affinity:
    """How likely two models find reference answers."""

    teacher: float
    """Mean over the tokens of the answers of ln q(token), in nats; nearer to 0 is likelier."""
    student: float
    """The same of the student."""
    tokens: int
    answers: int


@torch.no_grad()
def affinity(teacher: nn.Module, student: Any, answers: RolloutBatch) -> Affinity:
    """Reads reference answers with both models, one at a time.

    Args:
        teacher: The teacher; rows of its head beyond the student's are left out.
        student: The student.
        answers: At least one answer, each written as the completion of its prompt.
    """
    training = student.training
    student.eval()
    found: tuple[list[Tensor], list[Tensor]] = ([], [])
    width = int(body_and_head(student)[1].weight.shape[0])
    try:
        for row in answers.rollouts:
            start = len(row.prompt.token_ids)
            ids = torch.tensor([[*row.prompt.token_ids, *row.completion_ids]], dtype=torch.long)
            for values, model in zip(found, (teacher, student), strict=True):
                logprobs = _logprobs(model, ids, start)[:, :width].log_softmax(dim=-1)
                values.append(logprobs.gather(1, ids[0, start:].unsqueeze(1)).squeeze(1).double())
    finally:
        student.train(training)
    theirs, mine = (torch.cat(values) for values in found)
    return Affinity(
        teacher=float(theirs.mean()), student=float(mine.mean()), tokens=len(mine), answers=len(answers.rollouts)
    )


@torch.no_grad()
def compare(
    teacher: nn.Module, student: Any, prompts: Sequence[Prompt], *, k: int, max_new_tokens: int, seed: int
) -> Probe:
    """Scores the student's own continuations with both models, one prompt at a time.

    Args:
        teacher: The teacher.
        student: The student, able to `generate`.
        prompts: At least one prompt.
        k: Entries compared by the overlap.
        max_new_tokens: Longest continuation.
        seed: Seed of the continuations, which are sampled at temperature 1.
    """
    training = student.training
    student.eval()
    reverse_kl: list[Tensor] = []
    overlap: list[Tensor] = []
    finite, uniform = True, True
    try:
        for index, prompt in enumerate(prompts):
            ids = _continue(student, prompt, max_new_tokens=max_new_tokens, seed=seed + index)
            mine = _logprobs(student, ids, len(prompt.token_ids))
            theirs = _logprobs(teacher, ids, len(prompt.token_ids))
            theirs = theirs[:, : mine.shape[1]].log_softmax(dim=-1)
            finite = finite and bool(torch.isfinite(theirs).all())
            floor = -math.log(theirs.shape[1])
            uniform = uniform and bool(((theirs.mean(dim=-1) - floor).abs() <= UNIFORM * -floor).all())
            reverse_kl.append((mine.exp() * (mine - theirs)).sum(dim=-1))
            overlap.append(_overlap(mine, theirs, k))
    finally:
        student.train(training)
    values, shares = torch.cat(reverse_kl), torch.cat(overlap)
    return Probe(
        reverse_kl=float(values.mean()),
        overlap=float(shares.mean()),
        tokens=len(values),
        finite=finite,
        uniform=uniform,
    )


def _continue(student: Any, prompt: Prompt, *, max_new_tokens: int, seed: int) -> Int[Tensor, "1 token"]:
    device = next(student.parameters()).device
    ids = torch.tensor([prompt.token_ids], dtype=torch.long, device=device)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        out: Tensor = student.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=True,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            max_new_tokens=max_new_tokens,
        )
    return out


def _logprobs(model: nn.Module, ids: Int[Tensor, "1 token"], start: int) -> Float[Tensor, "scored vocab"]:
    """Logprobs of the distributions that predict the tokens from `start` on."""
    body, head = body_and_head(model)
    ids = ids.to(head.weight.device)
    hidden = hidden_states(body, ids)
    return project(hidden[0, start - 1 : -1], head).log_softmax(dim=-1).cpu()


def _overlap(
    mine: Float[Tensor, "scored vocab"], theirs: Float[Tensor, "scored vocab"], k: int
) -> Float[Tensor, " scored"]:
    k = min(k, mine.shape[1])
    common = mine.topk(k).indices.unsqueeze(2) == theirs.topk(k).indices.unsqueeze(1)
    return common.any(dim=2).float().mean(dim=1)
