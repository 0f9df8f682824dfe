"""Bayes' rule over teachers given a right answer: against enumeration of the mixture, and its promise."""

from __future__ import annotations

import math

import pytest
import torch

from moteach.conflict.posterior import Posterior
from moteach.errors import ConfigError
from moteach.objectives.conditioning import Conditioning
from moteach.types import Evidence, Prompt, Rollout, RolloutBatch, Routing, TeacherEvidence

EXACT = Posterior(least=0.0, ignorance=math.inf)


def draw(rows: int = 7, teachers: int = 3, length: int = 4, vocab: int = 3):
    noise = torch.Generator().manual_seed(0)
    tables = torch.randn(teachers, rows, length, vocab, generator=noise, dtype=torch.float64).log_softmax(-1)
    weights = torch.rand(rows, teachers, generator=noise, dtype=torch.float64)
    weights[0, 1] = 0.0
    weights = weights / weights.sum(-1, keepdim=True)
    answers = torch.randint(vocab, (rows, length), generator=noise)
    totals = torch.stack([table.gather(-1, answers.unsqueeze(-1)).squeeze(-1).sum(-1) for table in tables], dim=1)
    return tables, weights, answers, totals


def test_the_weights_are_those_of_the_mixture_conditioned_on_the_answer() -> None:
    tables, weights, answers, totals = draw()
    lengths = torch.full((len(weights),), answers.shape[1])
    found = EXACT.condition(weights, totals, lengths)
    for row in range(len(weights)):
        # the joint of teacher and every text of this length, by enumeration
        joint = torch.zeros(len(tables), dtype=torch.float64)
        total = 0.0
        for text in torch.cartesian_prod(*[torch.arange(3)] * 4):
            each = (
                torch.stack([table[row].gather(-1, text.unsqueeze(-1)).sum().exp() for table in tables]) * weights[row]
            )
            total += float(each.sum())
            if torch.equal(text, answers[row]):
                joint = each
        assert total == pytest.approx(1.0, abs=1e-12)
        torch.testing.assert_close(found[row], joint / joint.sum(), rtol=1e-12, atol=1e-12)


def test_conditioning_never_makes_the_answer_less_likely() -> None:
    _, weights, answers, totals = draw(rows=200)
    found = EXACT.condition(weights, totals, torch.full((200,), answers.shape[1]))
    before = (weights * totals.exp()).sum(-1)
    after = (found * totals.exp()).sum(-1)
    assert bool((after >= before - 1e-15).all())
    assert float((after / before).max()) > 1.5


def test_teachers_that_agree_on_the_answer_keep_their_weights_and_infinite_temperature_keeps_all() -> None:
    _, weights, answers, totals = draw()
    lengths = torch.full((len(weights),), answers.shape[1])
    same = totals[:, :1].expand_as(totals)
    torch.testing.assert_close(EXACT.condition(weights, same, lengths), weights, rtol=1e-12, atol=1e-12)
    hot = Posterior(temperature=math.inf, least=0.0, ignorance=math.inf)
    torch.testing.assert_close(hot.condition(weights, totals, lengths), weights, rtol=1e-12, atol=1e-12)


def test_a_teacher_that_excludes_the_answer_is_out_and_a_silent_one_stays_out() -> None:
    weights = torch.tensor([[0.5, 0.5, 0.0]])
    totals = torch.tensor([[-math.inf, -2.0, 0.0]])
    assert EXACT.condition(weights, totals, torch.tensor([3])).tolist() == [[0.0, 1.0, 0.0]]
    # nobody with weight allows it: nothing is learned about who is right
    shut = torch.tensor([[-math.inf, -math.inf, 0.0]])
    assert EXACT.condition(weights, shut, torch.tensor([3])).tolist() == weights.tolist()


def test_ignorant_teachers_teach_nothing_and_unknown_prompts_stay_as_they_were() -> None:
    weights = torch.tensor([[0.5, 0.5], [0.5, 0.5], [0.5, 0.5]])
    totals = torch.tensor([[-0.1, -9.0], [-6.1, -9.0], [-math.inf, -math.inf]])
    found = Posterior(ignorance=2.0).condition(weights, totals, torch.tensor([3, 3, 0]))
    assert found[0].tolist() == [1.0, 0.0]
    assert found[1].tolist() == [0.0, 0.0]
    assert found[2].tolist() == [0.5, 0.5]


def test_what_is_left_after_dropping_sums_to_one_and_permutes_with_the_teachers() -> None:
    _, weights, answers, totals = draw(rows=50)
    lengths = torch.full((50,), answers.shape[1])
    resolver = Posterior(least=0.2, ignorance=math.inf)
    found = resolver.condition(weights, totals, lengths)
    assert bool(((found == 0) | (found >= 0.2)).all())
    torch.testing.assert_close(found.sum(-1), torch.ones(50, dtype=torch.float64))
    order = torch.tensor([2, 0, 1])
    torch.testing.assert_close(resolver.condition(weights[:, order], totals[:, order], lengths), found[:, order])


@pytest.mark.parametrize("bad", [{"temperature": 0.0}, {"ignorance": 0.0}, {"least": 0.5}, {"least": -0.1}])
def test_arguments_out_of_range_are_refused(bad: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match="posterior"):
        Posterior(**bad)


def rollout(name: str, completion: tuple[int, ...], sample: int = 0, answer: str | None = None) -> Rollout:
    return Rollout(
        prompt=Prompt(prompt_id=name, text=name, token_ids=(1,), answer=answer),
        sample=sample,
        completion_ids=completion,
        rollout_logprobs=(-1.0,) * len(completion),
        finished=True,
        student_version=0,
    )


def test_answers_come_first_then_verified_completions_and_each_prompt_is_asked_about_once() -> None:
    rows = [
        rollout("gold", (7, 7), sample=0, answer="9"),
        rollout("gold", (7,), sample=1, answer="9"),
        rollout("won", (4, 4), sample=0),
        rollout("won", (5, 5, 5), sample=1),
        rollout("lost", (6,), sample=0),
    ]
    batch = RolloutBatch.from_rollouts(rows, pad_id=0)
    routing = Routing(
        teacher_ids=("a", "b"),
        prompt_ids=tuple(row.prompt.prompt_id for row in rows),
        weights=torch.full((5, 2), 0.5),
        confidence=torch.full((5,), 0.5),
        abstained=torch.zeros(5, dtype=torch.bool),
    )
    asked: list[list[tuple[str, tuple[int, ...]]]] = []

    def answers(prompts):
        gold = [rollout("gold", (9,), answer="9")] if any(prompt.answer for prompt in prompts) else []
        return RolloutBatch.from_rollouts(gold, pad_id=0) if gold else None

    def ask(known: RolloutBatch, given: Routing) -> Evidence:
        asked.append([(row.prompt.prompt_id, row.completion_ids) for row in known.rollouts])
        tokens = torch.arange(known.num_tokens)
        # a gives every token -0.1; b gives a token minus its id
        said = {"a": torch.full((len(tokens),), -0.1), "b": -known.token_targets.float()}
        return Evidence(
            teachers=tuple(
                TeacherEvidence(teacher_id=name, support="sampled", tokens=tokens, sampled_logprobs=values)
                for name, values in said.items()
            ),
            num_tokens=known.num_tokens,
        )

    conditioning = Conditioning(resolver=EXACT, answers=answers)
    found, metrics = conditioning(batch, routing, [0.0, 0.0, 0.0, 1.0, 0.0], ask=ask)
    assert asked == [[("gold", (9,)), ("won", (5, 5, 5))]]
    gold, won = 1 / (1 + math.exp(-8.9)), 1 / (1 + math.exp(-14.7))
    torch.testing.assert_close(found.weights[:, 0], torch.tensor([gold, gold, won, won, 0.5]))
    assert metrics["posterior/known"] == pytest.approx(0.8)
    assert metrics["posterior/ignorant"] == 0.0
    shy = Conditioning(resolver=Posterior(ignorance=0.05), answers=answers)
    found, metrics = shy(batch, routing, [0.0, 0.0, 0.0, 1.0, 0.0], ask=ask)
    assert found.abstained.tolist() == [True, True, True, True, False]
    assert metrics["posterior/ignorant"] == pytest.approx(0.8)


def test_where_no_row_has_two_teachers_nobody_is_asked_and_nothing_changes() -> None:
    rows = [rollout("gold", (7,), answer="9"), rollout("other", (4,), answer="9")]
    batch = RolloutBatch.from_rollouts(rows, pad_id=0)
    routing = Routing(
        teacher_ids=("a", "b"),
        prompt_ids=("gold", "other"),
        weights=torch.tensor([[1.0, 0.0], [0.0, 0.0]]),
        confidence=torch.tensor([1.0, 0.0]),
        abstained=torch.tensor([False, True]),
    )

    def ask(known: RolloutBatch, given: Routing) -> Evidence:
        raise AssertionError("a forward for nothing")

    found, metrics = Conditioning(resolver=EXACT, answers=lambda prompts: batch)(batch, routing, [1.0, 1.0], ask=ask)
    assert found is routing
    assert metrics == {}
