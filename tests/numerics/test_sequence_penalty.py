"""The price of walking into a state where teachers disagree: a toy that can be solved by hand, by enumeration."""

from __future__ import annotations

import itertools
import math
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from moteach.conflict.pools import Geometric
from moteach.conflict.power import Power
from moteach.divergences.advantages import position_baseline
from moteach.divergences.full import ReverseKL
from moteach.errors import ConfigError
from moteach.objectives.base import Scored
from moteach.objectives.divergence import DivergenceObjective
from moteach.routing.token import PromptGate
from moteach.types import Evidence, Head, LossOutput, Prompt, Rollout, RolloutBatch, Routing, TeacherEvidence

A, B = 0, 1
START = 0
QUARREL = torch.tensor([[0.9, 0.1], [0.1, 0.9]], dtype=torch.float64)
COST = -math.log(2 * math.sqrt(0.9 * 0.1))
"""-log Z of the two teachers after B; after A, and at the start, both are uniform."""


class Student(nn.Module):
    """Logits of A and B at the start, after A and after B; it agrees with the pool wherever teachers quarrel."""

    def __init__(self, probability_of_a: float) -> None:
        super().__init__()
        logits = torch.zeros(3, 2, dtype=torch.float64)
        logits[START, A] = math.log(probability_of_a / (1 - probability_of_a))
        self.logits = nn.Parameter(logits)

    def forward(self, rollouts: RolloutBatch, loss: Any) -> LossOutput:
        output: LossOutput = loss(states(rollouts), Head(weight=self.logits.T))
        return output


def states(rollouts: RolloutBatch) -> Tensor:
    """One-hot state that predicts each written token: the start, or after A or B."""
    first = torch.zeros(rollouts.num_tokens, dtype=torch.bool)
    first[::2] = True
    before = torch.cat([torch.zeros(1, dtype=torch.long), rollouts.token_targets[:-1]])
    index = torch.where(first, START, before + 1)
    return torch.nn.functional.one_hot(index, 3).double()


def batch(*completions: tuple[int, int], student: Student) -> RolloutBatch:
    table = student.logits.detach().log_softmax(-1)
    rows = [
        Rollout(
            prompt=Prompt(prompt_id=f"p{i}", text="x", token_ids=(0,)),
            sample=0,
            completion_ids=ids,
            rollout_logprobs=(float(table[START, ids[0]]), float(table[1 + ids[0], ids[1]])),
            finished=True,
            student_version=0,
        )
        for i, ids in enumerate(completions)
    ]
    return RolloutBatch.from_rollouts(rows, pad_id=0)


def scored(rollouts: RolloutBatch) -> Scored:
    entries = []
    for index, after_b in enumerate(QUARREL):
        table = torch.full((3, 2), math.log(0.5), dtype=torch.float64)
        table[1 + B] = after_b.log()
        tokens = torch.arange(rollouts.num_tokens)
        entries.append(
            TeacherEvidence(
                teacher_id=f"t{index}",
                support="full",
                tokens=tokens,
                hidden=states(rollouts),
                head=Head(weight=table.T),
            )
        )
    weights = torch.full((len(rollouts), 2), 0.5)
    routing = Routing(
        teacher_ids=("t0", "t1"),
        prompt_ids=tuple(row.prompt.prompt_id for row in rollouts.rollouts),
        weights=weights,
        confidence=weights.amax(1),
        abstained=torch.zeros(len(rollouts), dtype=torch.bool),
    )
    return Scored.of(
        rollouts, routing, Evidence(teachers=tuple(entries), num_tokens=rollouts.num_tokens), normalise="token_mean"
    )


def slope(probability_of_a: float, *, rows: int = 1, **arguments: Any) -> float:
    """Expected derivative of the loss, summed over tokens, by the logit of A at the start."""
    student = Student(probability_of_a)
    penalty = arguments.pop("sequence_penalty", 0.0)
    objective = DivergenceObjective(
        gate=PromptGate(), resolver=Geometric(sequence_penalty=penalty), divergence=ReverseKL(), **arguments
    )
    table = student.logits.detach().softmax(-1)
    written = list(itertools.product((A, B), repeat=2))
    total = 0.0
    for group in itertools.product(written, repeat=rows):
        probability = math.prod(float(table[START, ids[0]] * table[1 + ids[0], ids[1]]) for ids in group)
        rollouts = batch(*group, student=student)
        output = student(rollouts, partial(objective, scored=scored(rollouts)))
        (gradient,) = torch.autograd.grad(output.loss, student.logits)
        total += 2 * probability * float(gradient[START, A])
    return total


def test_without_the_penalty_the_student_walks_into_the_quarrel_as_often_as_not() -> None:
    assert slope(0.5) == pytest.approx(0.0, abs=1e-9)
    assert slope(1 / (1 + math.exp(-COST))) > 0.01


@pytest.mark.parametrize("discount", [0.0, 1.0])
@pytest.mark.parametrize("rows", [1, 2])
def test_with_it_the_optimum_is_that_of_the_divergence_of_whole_completions(rows: int, discount: float) -> None:
    optimum = 1 / (1 + math.exp(-COST))
    assert optimum > 0.6
    assert slope(optimum, sequence_penalty=1.0, rows=rows, discount=discount) == pytest.approx(0.0, abs=1e-7)
    assert slope(0.5, sequence_penalty=1.0, rows=rows, discount=discount) < -0.05
    assert slope(0.9, sequence_penalty=1.0, rows=rows, discount=discount) > 0.05


def test_the_gradient_is_that_of_the_expected_price() -> None:
    for p in (0.3, 0.7):
        student = Student(p)
        probability = student.logits[START].softmax(-1)
        target = torch.tensor([0.5, 0.5], dtype=torch.float64)
        price = (probability * (probability / target).log()).sum() + 0.7 * probability[B] * COST
        (gradient,) = torch.autograd.grad(price, student.logits)
        assert slope(p, sequence_penalty=0.7) == pytest.approx(float(gradient[START, A]), abs=1e-7)
        # other rows as a baseline change no expectation
        assert slope(p, sequence_penalty=0.7, rows=2) == pytest.approx(float(gradient[START, A]), abs=1e-7)


def test_the_baseline_is_the_mean_of_the_other_rows_at_the_same_place() -> None:
    returns = torch.tensor([1.0, 2.0, 5.0, 3.0, 9.0, 10.0])
    rows = torch.tensor([0, 0, 1, 3, 3, 3])
    expected = torch.tensor([4.0, 9.0, 2.0, 3.0, 2.0, 0.0])
    torch.testing.assert_close(position_baseline(returns, rows), expected)
    assert position_baseline(torch.zeros(0), torch.zeros(0, dtype=torch.long)).shape == (0,)


def test_the_baseline_lowers_the_variance_of_the_credit() -> None:
    student = Student(0.5)
    objective = DivergenceObjective(gate=PromptGate(), resolver=Geometric(sequence_penalty=1.0), divergence=ReverseKL())
    generator = torch.Generator().manual_seed(0)
    groups = torch.randint(0, 2, (200, 8, 2), generator=generator)
    spread: dict[bool, list[float]] = {True: [], False: []}
    for group in groups.tolist():
        rollouts = batch(*(tuple(ids) for ids in group), student=student)
        given = scored(rollouts)
        for centred in (True, False):
            credit = objective.credit(
                rollouts, {"neg_log_z": torch.where(states(rollouts)[:, 1 + B] > 0, COST, 0.0).double()}
            )
            if not centred:
                to_go = torch.where(rollouts.token_targets == B, -COST, 0.0)
                credit = to_go.masked_fill(states(rollouts)[:, START] == 0, 0.0).double()
            loss = given.base_weights * credit
            score = torch.where(rollouts.token_targets == A, 0.5, -0.5) * states(rollouts)[:, START]
            spread[centred].append(float((loss * score).sum()))
    variance = {key: float(torch.tensor(values).var()) for key, values in spread.items()}
    assert variance[True] < 0.5 * variance[False]


@pytest.mark.parametrize("pool", [Geometric, Power])
@pytest.mark.parametrize("value", [-0.1, math.inf, math.nan])
def test_a_price_below_zero_is_refused(pool: Any, value: float) -> None:
    with pytest.raises(ConfigError, match="sequence_penalty: expected a finite weight of at least 0"):
        pool(sequence_penalty=value)
