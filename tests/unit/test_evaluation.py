from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytest

from moteach.evaluation.runner import DomainScore, evaluate, grade_rollouts
from moteach.evaluation.tasks import chosen_prompts, normalised_score, summarise
from moteach.types import Prompt, Rollout, RolloutBatch


class FakeEngine:
    """Writes `answers[prompt_id]`, one character a token; an answer that ends in `~` was cut."""

    def __init__(self, answers: dict[str, str]) -> None:
        self.answers = answers
        self.calls: list[dict[str, Any]] = []

    def generate(
        self,
        prompts: Sequence[Prompt],
        *,
        step: int,
        group_size: int = 1,
        temperature: float | None = None,
        max_new_tokens: int | None = None,
    ) -> RolloutBatch:
        self.calls.append({"temperature": temperature, "max_new_tokens": max_new_tokens, "group_size": group_size})
        return RolloutBatch.from_rollouts([self._rollout(prompt) for prompt in prompts], pad_id=0)

    def _rollout(self, prompt: Prompt) -> Rollout:
        text = self.answers[prompt.prompt_id]
        ids = tuple(ord(character) for character in text)
        return Rollout(
            prompt=prompt,
            sample=0,
            completion_ids=ids,
            rollout_logprobs=(-1.0,) * len(ids),
            finished=not text.endswith("~"),
            student_version=0,
        )

    def sync(self, student: Any, *, version: int) -> None:
        """The answers are fixed."""


def prompt(name: str, domain: str | None, answer: str = "yes", verifier: str | None = "exact") -> Prompt:
    return Prompt(prompt_id=name, text=name, token_ids=(1,), domain=domain, answer=answer, verifier=verifier)


def decode(ids: Sequence[int]) -> str:
    return "".join(map(chr, ids))


def grade(prompt: Prompt, completion: str) -> float:
    return float(completion == prompt.answer)


def test_answers_are_greedy_and_scored_per_domain() -> None:
    engine = FakeEngine({"a": "yes", "b": "no", "c": "yes", "d": "long~"})
    prompts = [prompt("a", "math"), prompt("b", "math"), prompt("c", "code"), prompt("d", None)]
    scores = evaluate(engine, prompts, grade=grade, decode=decode, max_new_tokens=5)
    assert engine.calls == [{"temperature": 0.0, "max_new_tokens": 5, "group_size": 1}]
    assert scores == {
        "math": DomainScore(accuracy=0.5, prompts=2, mean_length=2.5, truncated=0.0),
        "code": DomainScore(accuracy=1.0, prompts=1, mean_length=3.0, truncated=0.0),
        "default": DomainScore(accuracy=0.0, prompts=1, mean_length=5.0, truncated=1.0),
    }


def test_prompts_without_a_verifier_do_not_count() -> None:
    engine = FakeEngine({"a": "yes"})
    ungraded = prompt("b", "math", verifier=None)
    scores = evaluate(engine, [ungraded, prompt("a", "math")], grade=grade, decode=decode)
    assert scores["math"].prompts == 1
    assert scores["math"].accuracy == 1.0
    assert evaluate(engine, [ungraded], grade=grade, decode=decode) == {}
    assert len(engine.calls) == 1


def test_a_rollout_without_a_verifier_scores_nan() -> None:
    engine = FakeEngine({"a": "yes", "b": "yes"})
    batch = engine.generate([prompt("a", None, verifier=None), prompt("b", None)], step=0)
    first, second = grade_rollouts(batch, grade=grade, decode=decode)
    assert math.isnan(first)
    assert second == 1.0


@pytest.mark.parametrize(
    ("before", "teacher", "after", "score"),
    [
        (0.2, 0.8, 0.2, 0.0),
        (0.2, 0.8, 0.8, 1.0),
        (0.2, 0.8, 0.5, 0.5),
        (0.2, 0.8, 0.95, 1.25),
        (0.2, 0.8, 0.05, -0.25),
        (0.5, 0.5, 0.9, None),
        (0.9, 0.5, 0.7, None),
    ],
)
def test_the_normalised_score_goes_from_the_start_to_the_teacher(
    before: float, teacher: float, after: float, score: float | None
) -> None:
    found = normalised_score(before, teacher, after)
    assert found == (None if score is None else pytest.approx(score))


def scored(accuracy: float) -> DomainScore:
    return DomainScore(accuracy=accuracy, prompts=10, mean_length=3.0, truncated=0.1)


def test_the_summary_has_mean_and_worst_over_taught_domains() -> None:
    before = {"math": scored(0.0), "code": scored(0.5), "both": scored(0.1), "easy": scored(0.9)}
    teacher = {"math": scored(1.0), "code": scored(0.9), "easy": scored(0.8)}
    after = {"math": scored(0.9), "code": scored(0.6), "both": scored(0.4), "easy": scored(0.9)}
    summary = summarise(before, teacher, after)
    assert list(summary["domains"]) == ["math", "code", "easy"]
    assert summary["domains"]["math"] == {
        "before": 0.0, "teacher": 1.0, "after": 0.9, "normalised": pytest.approx(0.9),
        "prompts": 10, "mean_length": 3.0, "truncated": 0.1,
    }  # fmt: skip
    assert summary["domains"]["easy"]["normalised"] is None
    assert summary["raw"] == {"both": {"before": 0.1, "after": 0.4, "prompts": 10}}
    assert summary["mean"] == pytest.approx((0.9 + 0.25) / 2)
    assert summary["worst"] == pytest.approx(0.25)


def test_a_summary_without_a_taught_domain_has_no_mean() -> None:
    summary = summarise({"x": scored(0.1)}, {}, {"x": scored(0.2)})
    assert (summary["domains"], summary["mean"], summary["worst"]) == ({}, None, None)


def test_prompts_are_chosen_domain_by_domain() -> None:
    prompts = [prompt("a", "math"), prompt("b", None), prompt("c", "code"), prompt("d", "math"), prompt("e", "law")]
    chosen = chosen_prompts(prompts, ["code", "math", "default"])
    assert [p.prompt_id for p in chosen] == ["c", "a", "d", "b"]
    assert [p.prompt_id for p in chosen_prompts(prompts, ["math", "code"], limit=1)] == ["a", "c"]
    assert chosen_prompts(prompts, ["poetry"]) == []
