"""A student of two tables whose every completion can be enumerated, and what its teachers say."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from moteach.objectives.base import Scored
from moteach.types import Evidence, Head, LossOutput, Prompt, Rollout, RolloutBatch, Routing, Support, TeacherEvidence

VOCAB, HIDDEN, START = 4, 3, 0


class Bigram(nn.Module):
    """The next token depends on the one before: hidden = embedding[token], logits = hidden @ head.T, in float64."""

    def __init__(self, seed: int = 0, scale: float = 1.0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.embedding = nn.Parameter(torch.randn(VOCAB, HIDDEN, generator=generator, dtype=torch.float64) * scale)
        self.head = nn.Parameter(torch.randn(VOCAB, HIDDEN, generator=generator, dtype=torch.float64))

    def forward(self, rollouts: RolloutBatch, loss: Callable[[Tensor, Head], LossOutput]) -> LossOutput:
        return loss(rollouts.pack(self.embedding[rollouts.input_ids]), Head(weight=self.head))

    def table(self) -> Tensor:
        """Logprobs of every next token after every token."""
        return (self.embedding @ self.head.T).log_softmax(-1)


def rollout(
    ids: Sequence[int], *, sampler: Tensor, prompt: str = "p", sample: int = 0, domain: str | None = None
) -> Rollout:
    before = [START, *ids[:-1]]
    return Rollout(
        prompt=Prompt(prompt_id=prompt, text="x", token_ids=(START,), domain=domain),
        sample=sample,
        completion_ids=tuple(ids),
        rollout_logprobs=tuple(float(sampler.detach()[a, b]) for a, b in zip(before, ids, strict=True)),
        finished=True,
        student_version=0,
    )


def batch(completions: Sequence[Sequence[int]], sampler: Tensor) -> RolloutBatch:
    rows = [rollout(ids, sampler=sampler, prompt=f"p{i}") for i, ids in enumerate(completions)]
    return RolloutBatch.from_rollouts(rows, pad_id=0)


def routing(rollouts: RolloutBatch, weights: Sequence[float]) -> Routing:
    rows = torch.tensor([list(weights)] * len(rollouts))
    return Routing(
        teacher_ids=tuple(f"t{i}" for i in range(len(weights))),
        prompt_ids=tuple(row.prompt.prompt_id for row in rollouts.rollouts),
        weights=rows,
        confidence=rows.amax(dim=1),
        abstained=rows.sum(dim=1) == 0,
    )


def evidence(rollouts: RolloutBatch, teachers: Sequence[Bigram], support: Support, k: int = 2) -> Evidence:
    """What each teacher says about every token, on a support."""
    entries = []
    for index, teacher in enumerate(teachers):
        with torch.no_grad():
            hidden = rollouts.pack(teacher.embedding[rollouts.input_ids])
            logprobs = (hidden @ teacher.head.T).log_softmax(-1)
        fields: dict[str, Any] = {}
        if support == "full":
            fields = {"hidden": hidden, "head": Head(weight=teacher.head.detach())}
        else:
            fields["sampled_logprobs"] = logprobs.gather(1, rollouts.token_targets.unsqueeze(1)).squeeze(1)
        if support == "topk":
            fields["topk_logprobs"], fields["topk_ids"] = logprobs.topk(k, dim=-1)
        tokens = torch.arange(rollouts.num_tokens)
        entries.append(TeacherEvidence(teacher_id=f"t{index}", support=support, tokens=tokens, **fields))
    return Evidence(teachers=tuple(entries), num_tokens=rollouts.num_tokens)


def scored(
    rollouts: RolloutBatch,
    teachers: Sequence[Bigram],
    support: Support,
    *,
    weights: Sequence[float] | None = None,
    normalise: Any = "token_mean",
    k: int = 2,
) -> Scored:
    shares = [1 / len(teachers)] * len(teachers) if weights is None else weights
    return Scored.of(rollouts, routing(rollouts, shares), evidence(rollouts, teachers, support, k), normalise=normalise)


def run(objective: Any, student: nn.Module, given: Scored) -> tuple[LossOutput, list[Tensor]]:
    """The loss and its gradient by the student's two tables."""
    output: LossOutput = student(given.rollouts, partial(objective, scored=given))
    return output, list(torch.autograd.grad(output.loss, list(student.parameters()), allow_unused=True))


def completions(student: Bigram, length: int) -> Iterator[tuple[tuple[int, ...], float]]:
    """Every completion of a length with its probability under the student."""
    table = student.table().detach()
    for ids in itertools.product(range(VOCAB), repeat=length):
        before = (START, *ids[:-1])
        yield ids, float(sum(table[a, b] for a, b in zip(before, ids, strict=True)).exp())


def expected_gradient(objective: Any, student: Bigram, teachers: Sequence[Bigram], support: Support, *, length: int,
                      **options: Any) -> list[Tensor]:  # fmt: skip
    """Sum over everything the student could write of its probability times the gradient of its loss.

    The loss of a sequence of n tokens is multiplied by n, so that a mean over tokens is a sum.
    """
    total = [torch.zeros_like(parameter) for parameter in student.parameters()]
    for ids, probability in completions(student, length):
        _, gradients = run(
            objective, student, scored(batch([ids], student.table().detach()), teachers, support, **options)
        )
        total = [so_far + length * probability * gradient for so_far, gradient in zip(total, gradients, strict=True)]
    return total


def sequence_reverse_kl(student: Bigram, teacher: Bigram, length: int) -> Tensor:
    """KL between the distributions over whole completions, by enumeration, differentiable."""
    ours, theirs = student.table(), teacher.table().detach()
    total = torch.zeros((), dtype=torch.float64)
    for ids in itertools.product(range(VOCAB), repeat=length):
        pairs = list(zip((START, *ids[:-1]), ids, strict=True))
        p = torch.stack([ours[a, b] for a, b in pairs]).sum()
        q = torch.stack([theirs[a, b] for a, b in pairs]).sum()
        total = total + p.exp() * (p - q)
    return total
