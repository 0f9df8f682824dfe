from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch

from moteach.teachers.gating import Probes, reweighted
from moteach.teachers.reliability import Reliability, ReliableTeachers, argmax_agrees
from moteach.types import Evidence, Head, Prompt, ReliabilityTable, Rollout, RolloutBatch, Routing, TeacherEvidence

VOCAB = 7
NEXT = {0: 4, 1: 5, 2: 3, 3: 6, 4: 1, 5: 0, 6: 2}
"""The token that the teacher finds likeliest after each token."""


class Nobody:
    def scores(self, teacher_id: str, prompts: Sequence[Prompt]) -> list[float]:
        return [0.0 for _ in prompts]

    def draw(self, domain: str, *, count: int, turn: int) -> list[Prompt]:
        return []


class Draws:
    """Prompts of turn 1 repeat half of turn 0; those with an even number are answered right."""

    def __init__(self) -> None:
        self.turns: list[int] = []

    def draw(self, domain: str, *, count: int, turn: int) -> list[Prompt]:
        self.turns.append(turn)
        return [
            Prompt(prompt_id=f"{domain}{index + turn * count // 2}", text="", token_ids=(1,), verifier="exact")
            for index in range(count)
        ]

    def scores(self, teacher_id: str, prompts: Sequence[Prompt]) -> list[float]:
        return [float(int(p.prompt_id[-1]) % 2 == 0) for p in prompts]


def batch(completions: Sequence[tuple[int, ...]], ids: Sequence[str] | None = None) -> RolloutBatch:
    rows = [
        Rollout(
            prompt=Prompt(
                prompt_id=ids[row] if ids else f"p{row}", text="", token_ids=(2,), domain="math", verifier="exact"
            ),
            sample=row,
            completion_ids=ids_,
            rollout_logprobs=(-1.0,) * len(ids_),
            finished=True,
            student_version=0,
        )
        for row, ids_ in enumerate(completions)
    ]
    return RolloutBatch.from_rollouts(rows, pad_id=0)


def evidence(rollouts: RolloutBatch, *, full: bool) -> Evidence:
    table = torch.full((VOCAB, VOCAB), -2.0)
    for before, after in NEXT.items():
        table[before, after] = 1.0
    states = rollouts.pack(torch.eye(VOCAB)[rollouts.input_ids])
    logprobs = (states @ table).log_softmax(dim=-1)
    values, ids = logprobs.topk(2)
    entry = TeacherEvidence(
        teacher_id="alpha",
        support="full" if full else "topk",
        tokens=torch.arange(rollouts.num_tokens),
        hidden=states if full else None,
        head=Head(weight=table.T.contiguous()) if full else None,
        topk_ids=None if full else ids,
        topk_logprobs=None if full else values,
    )
    return Evidence(teachers=(entry,), num_tokens=rollouts.num_tokens)


def routing(
    rollouts: RolloutBatch, weights: Sequence[Sequence[float]], names: Sequence[str] = ("alpha", "beta")
) -> Routing:
    table = torch.tensor(weights)
    return Routing(
        teacher_ids=tuple(names),
        prompt_ids=tuple(r.prompt.prompt_id for r in rollouts.rollouts),
        weights=table,
        confidence=table.amax(dim=1),
        abstained=table.sum(dim=1) == 0,
    )


def test_the_posterior_mean_is_that_of_a_beta_distribution() -> None:
    found = Reliability(prior_right=2.0, prior_wrong=3.0, decay=0.5)
    assert isinstance(found, ReliabilityTable)
    assert found.of("alpha", "math") == pytest.approx(0.4)
    found.observe("alpha", "math", right=6.0, wrong=1.0)
    assert found.of("alpha", "math") == pytest.approx(8 / 12)
    # independent: the mean of the density p^(a-1) (1-p)^(b-1) on a grid
    p = torch.linspace(0, 1, 100001, dtype=torch.float64)
    density = p**7 * (1 - p) ** 3
    assert found.of("alpha", "math") == pytest.approx(float((p * density).sum() / density.sum()), abs=1e-6)
    found.fade()
    assert found.of("alpha", "math") == pytest.approx((2 + 3) / (5 + 3.5))
    assert found.of("alpha", "code") == pytest.approx(0.4)
    for _ in range(60):
        found.fade()
    assert found.of("alpha", "math") == pytest.approx(0.4)
    assert list(found.metrics()) == ["reliability/alpha/math"]


GREEDY, ASIDE = (3, 6, 2), (3, 6, 1)
"""What the teacher writes after token 2, and the same but for its last token."""


@pytest.mark.parametrize("full", [True, False])
def test_agreement_is_of_every_token(full: bool) -> None:
    rollouts = batch([GREEDY, ASIDE, (), (3,), (4, 6, 2)])
    agrees = argmax_agrees(evidence(rollouts, full=full).teachers[0], rollouts)
    assert agrees is not None
    assert agrees.tolist() == [True, False, False, True, False]


def test_a_row_that_was_scored_in_part_is_no_agreement() -> None:
    rollouts = batch([GREEDY, GREEDY])
    whole = evidence(rollouts, full=False)
    part = whole.select(torch.tensor([True] * 6)).teachers[0]
    assert argmax_agrees(part, rollouts) is not None
    kept = torch.tensor([0, 1, 3, 4, 5])
    assert part.topk_ids is not None
    assert part.topk_logprobs is not None
    cut = replace(part, tokens=kept, topk_ids=part.topk_ids[kept], topk_logprobs=part.topk_logprobs[kept])
    agrees = argmax_agrees(cut, rollouts)
    assert agrees is not None
    assert agrees.tolist() == [False, True]


@pytest.mark.parametrize("unique", [False, True])
def test_training_shows_for_free_who_is_right(unique: bool) -> None:
    gate = ReliableTeachers(unique_answers=unique, decay=1.0)
    rollouts = batch([GREEDY, GREEDY, GREEDY, ASIDE, ASIDE, ASIDE])
    nan = float("nan")
    gate.observe(rollouts, evidence(rollouts, full=True), [1.0, 0.0, nan, 1.0, 0.0, nan])
    wrong = 2 if unique else 1
    assert gate.reliability.of("alpha", "math") == pytest.approx((1 + 1) / (2 + 1 + wrong))


def test_a_prompt_counts_once_a_step_and_its_own_answer_before_others() -> None:
    gate = ReliableTeachers(unique_answers=True, decay=1.0)
    rollouts = batch([ASIDE, GREEDY, GREEDY, ASIDE], ids=["p", "p", "p", "p"])
    gate.observe(rollouts, evidence(rollouts, full=True), [1.0, 1.0, 1.0, 1.0])
    assert gate.reliability.of("alpha", "math") == pytest.approx(2 / 3)


def test_nothing_is_learned_for_free_where_the_likeliest_token_is_unknown_or_nobody_asked() -> None:
    rollouts = batch([GREEDY])
    only = TeacherEvidence(
        teacher_id="alpha", support="sampled", tokens=torch.arange(3), sampled_logprobs=torch.zeros(3)
    )
    gate = ReliableTeachers()
    gate.observe(rollouts, Evidence(teachers=(only,), num_tokens=3), [1.0])
    off = ReliableTeachers(free=False)
    off.observe(rollouts, evidence(rollouts, full=True), [1.0])
    assert gate.reliability.metrics() == off.reliability.metrics() == {}


def test_weights_are_multiplied_by_reliability_to_the_sharpness_and_the_floor_drops() -> None:
    gate = ReliableTeachers(sharpness=2.0, floor=0.3, decay=1.0)
    gate.bind(Nobody())
    gate.reliability.observe("alpha", "math", right=8.0, wrong=1.0)
    gate.reliability.observe("beta", "math", right=3.0, wrong=4.0)
    rollouts = batch([GREEDY, ASIDE])
    found = gate.admit(0, rollouts, routing(rollouts, [[0.5, 0.5], [0.2, 0.8]]))
    alpha, beta = (9 / 11) ** 2, (4 / 9) ** 2
    expected = [[alpha / (alpha + beta), beta / (alpha + beta)], [0.2 * alpha, 0.8 * beta]]
    expected[1] = [value / sum(expected[1]) for value in expected[1]]
    torch.testing.assert_close(found.weights, torch.tensor(expected))
    gate.reliability.observe("beta", "math", wrong=10.0)
    assert gate.admit(1, rollouts, routing(rollouts, [[0.5, 0.5], [0.2, 0.8]])).weights.tolist() == [[1, 0], [1, 0]]


def test_probes_come_in_turns_and_a_prompt_counts_once() -> None:
    probes, draws = Probes(count=6, every=10), Draws()
    probes.verdicts.examiner = draws
    assert probes.update(0, "alpha", "math") == [1.0, 0.0, 1.0, 0.0, 1.0, 0.0]
    assert probes.update(9, "alpha", "math") == []
    assert probes.update(10, "alpha", "math") == [1.0, 0.0, 1.0]
    assert draws.turns == [0, 1]
    assert probes.accuracy("alpha", "math", passing=1.0) == pytest.approx(5 / 9)
    assert probes.accuracy("alpha", "code", passing=1.0) is None
    once = Probes(count=2, every=0)
    once.verdicts.examiner = draws
    assert once.update(0, "alpha", "math") == [1.0, 0.0]
    assert once.update(10**6, "alpha", "math") == []


def test_rows_that_nothing_happens_to_keep_every_bit() -> None:
    rollouts = batch([GREEDY, GREEDY, GREEDY])
    before = routing(rollouts, [[0.1, 0.7], [0.3, 0.7], [0.4, 0.6]])
    after = reweighted(before, torch.tensor([[1.0, 1.0], [1.0, 0.0], [0.0, 0.0]]))
    assert torch.equal(after.weights[0], before.weights[0])
    assert after.weights[1:].tolist() == [[1.0, 0.0], [0.0, 0.0]]
    assert after.abstained.tolist() == [False, False, True]
    assert after.confidence.tolist() == pytest.approx([0.7, 0.7, 0.0])
