"""Gradient surgery through the learner: gradients of teachers by hand, combined, against what lands in the parameters."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from objective_cases import Bigram, batch, run, scored
from torch import Tensor

from moteach.conflict.gradients import cagrad, mgda, pcgrad, sign_vote
from moteach.conflict.losses import SumOfDivergences
from moteach.conflict.select import Select
from moteach.conflict.surgery import MGDA, CAGrad, PCGrad, SignVote
from moteach.divergences.full import JSD, ReverseKL
from moteach.learner import Learner
from moteach.objectives.balance import TokenShare
from moteach.objectives.base import Scored
from moteach.objectives.divergence import DivergenceObjective
from moteach.objectives.mix import Mix, MixedObjective
from moteach.objectives.policy_gradient import PolicyGradientObjective
from moteach.objectives.token_masks import FirstTokens
from moteach.objectives.topk import TopKObjective
from moteach.routing.token import PromptGate

ROWS = [(1, 2, 3), (2,), (3, 3, 1, 0)]
GIVEN = (0.2, 0.5, 0.3)
# the second and the third pull against each other
TEACHERS = [Bigram(26, 1.0), Bigram(27, 1.3), Bigram(28, 1.6)]
COMBINED = [
    (PCGrad(), pcgrad),
    (MGDA(), lambda g: 3 * mgda(g)),
    (CAGrad(c=0.4), lambda g: 3 * cagrad(g, c=0.4)),
    (CAGrad(c=0.4, rescale=False), lambda g: 3 * cagrad(g, c=0.4, rescale=False)),
    (SignVote(), lambda g: 3 * sign_vote(g)),
]


def given(support: Any = "full") -> Scored:
    return scored(batch(ROWS, Bigram(0).table()), TEACHERS, support, weights=GIVEN, k=4)


def objective(resolver: Any, kind: Any = DivergenceObjective, **options: Any) -> Any:
    return MixedObjective(kind(gate=PromptGate(), resolver=resolver, divergence=ReverseKL(), **options), Mix())


def learned(resolver: Any, case: Scored, *, kind: Any = DivergenceObjective, options: Any = None, **rest: Any) -> Any:
    """Output, and the gradient as one vector."""
    student = Bigram(0)
    learner = Learner(student=student, objective=objective(resolver, kind, **(options or {})), **rest)
    output = learner.loss(case)
    return output, torch.cat([parameter.grad.flatten() for parameter in student.parameters()])


def by_hand(support: Any = "full", *, kind: Any = DivergenceObjective, **options: Any) -> Tensor:
    """Each teacher alone, its loss times its weight."""
    rows = []
    for teacher, weight in zip(TEACHERS, GIVEN, strict=True):
        case = scored(batch(ROWS, Bigram(0).table()), [teacher], support, k=4)
        _, gradients = run(objective(Select(), kind, **options), Bigram(0), case)
        rows.append(weight * torch.cat([gradient.flatten() for gradient in gradients]))
    return torch.stack(rows)


@pytest.mark.parametrize(("resolver", "combine"), COMBINED)
@pytest.mark.parametrize("size", [None, 1])
def test_the_update_is_the_combination_of_each_teachers_gradient(resolver: Any, combine: Any, size: Any) -> None:
    own = by_hand()
    output, update = learned(resolver, given(), micro_batch_size=size)
    torch.testing.assert_close(update, combine(own), rtol=1e-5, atol=1e-7)
    assert not torch.allclose(update, own.sum(0), rtol=1e-2)
    cosine = torch.nn.functional.cosine_similarity(own[0], own[2], dim=0)
    assert output.metrics["teacher_gradient_cosine/t0/t2"] == pytest.approx(float(cosine), rel=1e-5)
    assert output.metrics["teacher_gradient_norm/t1"] == pytest.approx(float(own[1].norm()), rel=1e-5)


@pytest.mark.parametrize(
    ("support", "kind", "options"),
    [
        ("topk", TopKObjective, {"k": 3, "truncation": "tail_bucket"}),
        ("sampled", PolicyGradientObjective, {}),
        ("full", PolicyGradientObjective, {"baseline": "reverse_kl"}),
    ],
)
def test_it_takes_any_objective_on_any_support(support: Any, kind: Any, options: dict[str, Any]) -> None:
    own = by_hand(support, kind=kind, **options)
    _, update = learned(PCGrad(), given(support), kind=kind, options=options)
    torch.testing.assert_close(update, pcgrad(own), rtol=1e-5, atol=1e-8)


def test_loss_and_statistics_are_those_of_the_sum_of_divergences() -> None:
    output, _ = learned(MGDA(), given())
    summed, _ = learned(SumOfDivergences(), given())
    torch.testing.assert_close(output.loss, summed.loss, rtol=1e-6, atol=1e-9)
    for name in ("divergence", "student_entropy", "student_logprobs", "abstained", "weight"):
        torch.testing.assert_close(
            output.token_stats[name].double(), summed.token_stats[name].double(), rtol=1e-6, atol=1e-8
        )


@pytest.mark.parametrize("resolver", [PCGrad(), MGDA(), SignVote(), CAGrad(c=0.0)])
def test_teachers_that_agree_give_the_gradient_of_the_sum(resolver: Any) -> None:
    case = scored(batch(ROWS, Bigram(0).table()), [TEACHERS[0]] * 3, "full", weights=[1 / 3] * 3)
    _, update = learned(resolver, case)
    _, summed = learned(SumOfDivergences(), case)
    torch.testing.assert_close(update, summed, rtol=1e-5, atol=1e-8)


def test_a_teacher_without_tokens_takes_no_part_and_hard_routing_pays_each_row_once() -> None:
    case = given()
    weights = torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [1.0, 0.0, 0.0]])
    case = replace(case, routing=replace(case.routing, weights=weights))
    student, rows = Bigram(0), []
    plain = student.forward
    student.forward = lambda rollouts, loss: rows.append(len(rollouts)) or plain(rollouts, loss)  # type: ignore[assignment]
    output = Learner(student=student, objective=objective(MGDA())).loss(case)
    assert sorted(rows) == [1, 2]
    assert "teacher_gradient_norm/t2" not in output.metrics
    assert "teacher_gradient_cosine/t0/t1" in output.metrics
    _, summed = learned(SumOfDivergences(), case)
    update = torch.cat([parameter.grad.flatten() for parameter in student.parameters()])
    assert update.norm() > 1e-6
    assert not torch.allclose(update, summed, rtol=1e-2)


def test_token_weights_and_balance_are_made_of_the_whole_batch() -> None:
    choices: dict[str, Any] = {"token_weights": (FirstTokens(count=2),), "balance": TokenShare()}
    output, update = learned(PCGrad(), given(), **choices)
    summed, _ = learned(SumOfDivergences(), given(), **choices)
    torch.testing.assert_close(output.token_stats["weight"], summed.token_stats["weight"])
    assert int((output.token_stats["weight"] == 0).sum()) == 3
    assert not torch.allclose(update, learned(PCGrad(), given())[1], rtol=1e-2)


def test_without_autograd_nothing_is_touched_and_the_loss_is_the_same() -> None:
    student = Bigram(0)
    student.head.grad = torch.ones_like(student.head)
    learner = Learner(student=student, objective=objective(CAGrad()))
    with torch.no_grad():
        output = learner.loss(given(), weigh=False)
    assert torch.equal(student.head.grad, torch.ones_like(student.head))
    assert student.embedding.grad is None
    torch.testing.assert_close(output.loss, learned(CAGrad(), given())[0].loss)
    learner.loss(given())
    embedding, head = learned(CAGrad(), given())[1].split([12, 12])
    torch.testing.assert_close(student.head.grad.flatten(), head + 1.0)
    torch.testing.assert_close(student.embedding.grad.flatten(), embedding)


def test_other_divergences_are_those_of_each_teacher() -> None:
    student = Bigram(0)
    made = DivergenceObjective(gate=PromptGate(), resolver=PCGrad(), divergence=JSD(beta=0.3))
    output = Learner(student=student, objective=made).loss(given())
    summed = DivergenceObjective(gate=PromptGate(), resolver=SumOfDivergences(), divergence=JSD(beta=0.3))
    expected, _ = run(summed, Bigram(0), given())
    torch.testing.assert_close(
        output.token_stats["divergence"], expected.token_stats["divergence"], rtol=1e-6, atol=1e-8
    )
