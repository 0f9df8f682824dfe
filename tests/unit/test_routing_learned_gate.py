from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from moteach.errors import CheckpointError, ConfigError
from moteach.routing.confidence import ConfidenceGate
from moteach.routing.context import GateContext
from moteach.routing.learned_gate import LearnedGate, Lesson, learning_part, mixture_log_likelihood
from moteach.routing.switch_penalty import SwitchPenaltyGate
from moteach.types import Head, Prompt, Rollout, RolloutBatch, Routing

TEACHERS, WIDTH = ("alpha", "beta", "gamma"), 4


def lesson(seed: int = 0, tokens: int = 40) -> Lesson:
    """Where the first feature is positive `alpha` is right, else `gamma`; `beta` never is."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(tokens, WIDTH, generator=generator)
    first = hidden[:, 0] > hidden.mean(-1)
    logprobs = torch.full((tokens, 3), math.log(0.01))
    logprobs[first, 0] = logprobs[~first, 2] = math.log(0.9)
    return Lesson(hidden=hidden, logprobs=logprobs, prior=torch.full((tokens, 3), 1 / 3))


def context(hidden: Tensor, weights: Tensor, names: tuple[str, ...] = TEACHERS) -> GateContext:
    row = Rollout(
        prompt=Prompt(prompt_id="p", text="x", token_ids=(1,)),
        sample=0,
        completion_ids=(2,) * len(hidden),
        rollout_logprobs=(-1.0,) * len(hidden),
        finished=True,
        student_version=0,
    )
    routing = Routing(
        teacher_ids=names,
        prompt_ids=("p",),
        weights=weights.unsqueeze(0),
        confidence=weights.max().unsqueeze(0),
        abstained=weights.sum().unsqueeze(0) == 0,
    )
    return GateContext(
        rollouts=RolloutBatch.from_rollouts([row], pad_id=0),
        routing=routing,
        student_hidden=hidden,
        student_head=Head(weight=torch.zeros(3, WIDTH)),
    )


def trained(steps: int = 150, **arguments: Any) -> LearnedGate:
    gate = LearnedGate(lr=0.02, **arguments)
    for step in range(steps):
        gate.learn([lesson(step)], TEACHERS)
    return gate


def test_the_likelihood_is_that_of_the_mixture() -> None:
    gate = torch.tensor([[0.2, 0.5, 0.3], [1.0, 0.0, 0.0]], dtype=torch.float64)
    logprobs = torch.tensor([[-1.0, -3.0, -0.2], [-2.0, -math.inf, -1.0]], dtype=torch.float64)
    want = [math.log(0.2 * math.exp(-1) + 0.5 * math.exp(-3) + 0.3 * math.exp(-0.2)), -2.0]
    assert mixture_log_likelihood(gate, logprobs).tolist() == pytest.approx(want, abs=1e-12)


def test_its_gradient_is_the_posterior_minus_the_gate() -> None:
    scores = torch.randn(1, 3, dtype=torch.float64, requires_grad=True)
    logprobs = torch.tensor([[-1.0, -3.0, -0.2]], dtype=torch.float64)
    gate = scores.softmax(-1)
    mixture_log_likelihood(gate, logprobs).sum().backward()
    joint = gate.detach() * logprobs.exp()
    torch.testing.assert_close(scores.grad, joint / joint.sum() - gate.detach())


def test_it_learns_who_is_right_where() -> None:
    new = lesson(seed=999)
    weights = trained().weights(context(new.hidden, torch.full((3,), 1 / 3)))
    right = new.logprobs.argmax(-1)
    assert float((weights.argmax(-1) == right).double().mean()) > 0.9
    assert float(weights[:, 1].max()) < 0.1


def test_no_candidate_falls_below_its_share_of_the_exploration() -> None:
    weights = trained(exploration=0.3).weights(context(lesson(999).hidden, torch.full((3,), 1 / 3)))
    assert float(weights.min()) >= 0.1 - 1e-6
    torch.testing.assert_close(weights.sum(-1), torch.ones(len(weights)))


def test_the_entropy_bonus_keeps_the_gate_open() -> None:
    closed, opened = (
        trained(steps=60, entropy_bonus=bonus, exploration=0.0).learn([lesson(5)], TEACHERS)["gate/entropy"]
        for bonus in (0.0, 5.0)
    )
    assert opened > closed + 0.2


def test_before_the_first_lesson_it_repeats_the_router() -> None:
    prior = torch.tensor([0.7, 0.3, 0.0])
    assert torch.equal(LearnedGate(hard=True).weights(context(lesson().hidden, prior)), prior.expand(40, 3))
    assert LearnedGate().learn([], TEACHERS) == {"gate/tokens": 0.0}


def test_the_order_of_the_teachers_is_no_part_of_what_is_learned() -> None:
    order, given = [2, 0, 1], lesson(999)
    prior = torch.tensor([0.5, 0.2, 0.3])
    gate = trained()
    names = tuple(TEACHERS[i] for i in order)
    straight = gate.weights(context(given.hidden, prior))
    torch.testing.assert_close(gate.weights(context(given.hidden, prior[order], names)), straight[:, order])


def test_what_is_restored_goes_on_bitwise() -> None:
    gate = trained(steps=5)
    other = LearnedGate(lr=0.02)
    other.load_state_dict(gate.state_dict(), {name: value.clone() for name, value in gate.tensors().items()})
    for step in range(5, 9):
        assert gate.learn([lesson(step)], TEACHERS) == other.learn([lesson(step)], TEACHERS)
    left, right = gate.tensors(), other.tensors()
    assert left.keys() == right.keys()
    assert all(torch.equal(left[name], right[name]) for name in left)


def test_a_checkpoint_before_the_first_lesson_and_one_without_tensors() -> None:
    fresh = LearnedGate()
    fresh.load_state_dict(LearnedGate().state_dict(), {})
    assert fresh.tensors() == {}
    with pytest.raises(CheckpointError, match="no tensors"):
        fresh.load_state_dict(trained(steps=1).state_dict(), {})


def test_a_gate_around_it_lets_it_learn() -> None:
    inner = LearnedGate()
    assert learning_part(inner) is inner
    assert learning_part(SwitchPenaltyGate(gate=inner)) is inner
    assert learning_part(ConfidenceGate()) is None


@pytest.mark.parametrize("wrong", [{"hidden": 0}, {"lr": 0.0}, {"exploration": 1.0}, {"entropy_bonus": -1.0}])
def test_numbers_out_of_range_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="gate: expected"):
        LearnedGate(**wrong)
