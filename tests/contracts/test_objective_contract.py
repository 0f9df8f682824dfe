"""Every YAML in conf/objective is an objective: a new option is tested by being there."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
import yaml
from torch import Tensor, nn

from moteach.config.build import build
from moteach.conflict.pools import Linear
from moteach.divergences.full import ReverseKL
from moteach.objectives.base import Normalise, Scored
from moteach.routing.token import PromptGate
from moteach.types import Evidence, Head, LossOutput, Prompt, Rollout, RolloutBatch, Routing, Support, TeacherEvidence

FILES = sorted((Path(__file__).parents[2] / "conf" / "objective").glob("*.yaml"))
VOCAB, HIDDEN = 7, 4


class Student(nn.Module):
    """Hidden states that depend on the token before, and a head."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.embedding = nn.Parameter(torch.randn(VOCAB, HIDDEN, generator=generator))
        self.head = nn.Parameter(torch.randn(VOCAB, HIDDEN, generator=generator))

    def forward(self, rollouts: RolloutBatch, loss: Callable[[Tensor, Head], LossOutput]) -> LossOutput:
        return loss(rollouts.pack(self.embedding[rollouts.input_ids]), Head(weight=self.head))

    def logprobs(self, rollouts: RolloutBatch) -> Tensor:
        """Logprobs of every token of the vocabulary, packed."""
        with torch.no_grad():
            return (rollouts.pack(self.embedding[rollouts.input_ids]) @ self.head.T).log_softmax(-1)


@pytest.fixture(params=FILES, ids=lambda path: path.stem)
def objective(request: pytest.FixtureRequest) -> Any:
    node = yaml.safe_load(request.param.read_text())
    return build(node, where="objective", gate=PromptGate(), resolver=Linear(), divergence=ReverseKL())


def batch() -> RolloutBatch:
    """Samples with the logprobs the student itself gives them."""
    completions = ((1, 2, 3, 4), (5,), (6, 0, 2))
    blank = [
        Rollout(
            prompt=Prompt(prompt_id=str(i), text="x", token_ids=(3,)),
            sample=0,
            completion_ids=ids,
            rollout_logprobs=(0.0,) * len(ids),
            finished=True,
            student_version=0,
        )
        for i, ids in enumerate(completions)
    ]
    made = RolloutBatch.from_rollouts(blank, pad_id=0)
    own = Student().logprobs(made).gather(1, made.token_targets.unsqueeze(1)).squeeze(1)
    made.rollout_logprobs[made.loss_mask] = own
    return made


def entry(name: str, hidden: Tensor, head: Tensor, rollouts: RolloutBatch) -> TeacherEvidence:
    """Everything that can be said about every token; an objective reads what it is defined on."""
    logprobs = (hidden @ head.T).log_softmax(-1)
    written = rollouts.token_targets.unsqueeze(1)
    return TeacherEvidence(
        teacher_id=name,
        support="full",
        tokens=torch.arange(rollouts.num_tokens),
        hidden=hidden,
        head=Head(weight=head),
        sampled_logprobs=logprobs.gather(1, written).squeeze(1),
    )


def evidence(rollouts: RolloutBatch, count: int) -> Evidence:
    entries = []
    for index in range(count):
        generator = torch.Generator().manual_seed(10 + index)
        hidden = torch.randn(rollouts.num_tokens, 2 + index, generator=generator)
        entries.append(entry(f"t{index}", hidden, torch.randn(VOCAB, 2 + index, generator=generator), rollouts))
    return Evidence(teachers=tuple(entries), num_tokens=rollouts.num_tokens)


def routing(rollouts: RolloutBatch, count: int) -> Routing:
    weights = torch.rand(len(rollouts), count, generator=torch.Generator().manual_seed(3)) + 0.1
    weights = weights / weights.sum(dim=1, keepdim=True)
    return Routing(
        teacher_ids=tuple(f"t{i}" for i in range(count)),
        prompt_ids=tuple(rollout.prompt.prompt_id for rollout in rollouts.rollouts),
        weights=weights,
        confidence=weights.amax(dim=1),
        abstained=torch.zeros(len(rollouts), dtype=torch.bool),
    )


def run(objective: Any, routes: Routing, said: Evidence, *, scale: float = 1.0) -> tuple[LossOutput, list[Tensor]]:
    rollouts, student = batch(), Student()
    scored = Scored.of(rollouts, routes, said, normalise=objective.normalise)
    scored = replace(scored, token_weights=scored.token_weights * scale)
    output = student(rollouts, partial(objective, scored=scored))
    output.loss.backward()
    gradients = [parameter.grad for parameter in student.parameters() if parameter.grad is not None]
    return output, gradients


def test_there_are_options() -> None:
    assert {"divergence", "policy_gradient"} <= {path.stem for path in FILES}


def test_it_says_what_it_is_defined_on(objective: Any) -> None:
    assert objective.supports
    assert objective.supports <= set(get_args(Support))
    assert objective.normalise in get_args(Normalise)


@pytest.mark.parametrize("count", [1, 2, 5])
def test_any_number_of_teachers_gives_one_finite_loss_that_reaches_every_weight(objective: Any, count: int) -> None:
    rollouts = batch()
    output, gradients = run(objective, routing(rollouts, count), evidence(rollouts, count))
    assert output.loss.shape == ()
    assert bool(torch.isfinite(output.loss))
    assert len(gradients) == 2
    assert all(bool(gradient.isfinite().all() and gradient.any()) for gradient in gradients)
    assert "divergence" in output.token_stats
    for name, values in output.token_stats.items():
        assert values.shape == (rollouts.num_tokens,), name
        assert not values.requires_grad, name


def test_permuting_the_teachers_changes_nothing(objective: Any) -> None:
    rollouts, order = batch(), [2, 0, 1]
    routes, said = routing(rollouts, 3), evidence(rollouts, 3)
    straight, gradients = run(objective, routes, said)
    shuffled = Evidence(teachers=tuple(said.teachers[i] for i in order), num_tokens=said.num_tokens)
    other, others = run(objective, routes, shuffled)
    torch.testing.assert_close(other.loss, straight.loss, atol=1e-6, rtol=1e-5)
    for left, right in zip(others, gradients, strict=True):
        torch.testing.assert_close(left, right, atol=1e-6, rtol=1e-5)


def test_loss_and_gradient_are_linear_in_the_token_weights(objective: Any) -> None:
    rollouts = batch()
    routes, said = routing(rollouts, 2), evidence(rollouts, 2)
    one, gradients = run(objective, routes, said)
    half, halves = run(objective, routes, said, scale=0.5)
    torch.testing.assert_close(half.loss, one.loss / 2)
    for left, right in zip(halves, gradients, strict=True):
        torch.testing.assert_close(left, right / 2)


def test_a_teacher_that_agrees_with_the_student_moves_nothing(objective: Any) -> None:
    rollouts, student = batch(), Student()
    hidden = rollouts.pack(student.embedding[rollouts.input_ids]).detach()
    twin = Evidence(teachers=(entry("t0", hidden, student.head.detach(), rollouts),), num_tokens=rollouts.num_tokens)
    output, gradients = run(objective, routing(rollouts, 1), twin)
    torch.testing.assert_close(output.token_stats["divergence"], torch.zeros(rollouts.num_tokens), atol=1e-5, rtol=0)
    for gradient in gradients:
        torch.testing.assert_close(gradient, torch.zeros_like(gradient), atol=1e-5, rtol=0)


def test_the_teachers_get_no_gradient(objective: Any) -> None:
    rollouts = batch()
    said = evidence(rollouts, 1)
    hidden, head = said.teachers[0].hidden, said.teachers[0].head
    assert hidden is not None
    assert head is not None
    hidden.requires_grad_()
    head.weight.requires_grad_()
    run(objective, routing(rollouts, 1), said)
    assert hidden.grad is None
    assert head.weight.grad is None
