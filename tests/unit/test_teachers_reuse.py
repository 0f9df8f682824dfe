from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from moteach.teachers.base import Answer
from moteach.teachers.pool import TeacherPool
from moteach.teachers.reuse import ReusingTeachers
from moteach.teachers.scoring import score_with
from moteach.testing import tiny_model
from moteach.types import Prompt, Rollout, RolloutBatch, Routing, Support, TeacherEvidence

LENGTHS = [(3, 5), (9, 1), (2, 4), (4, 7), (1, 6)]
NAMES = ("math", "code")


class Counting:
    """A pool that remembers which rows each teacher was asked about."""

    def __init__(self, pool: TeacherPool) -> None:
        self.pool = pool
        self.asked: list[tuple[str, int]] = []
        self._each = pool.each
        pool.each = self.each  # type: ignore[method-assign]

    def each(self, rollouts: RolloutBatch, routing: Routing, **more: Any) -> Iterator[tuple[str, Answer]]:
        self.asked += [(name, row) for name in routing.teacher_ids for row in routing.rows_of(name).tolist()]
        return self._each(rollouts, routing, **more)


def batch() -> RolloutBatch:
    return RolloutBatch.from_rollouts(
        [
            Rollout(
                prompt=Prompt(prompt_id=f"p{row}", text="", token_ids=tuple(range(2, 2 + before))),
                sample=0,
                completion_ids=tuple((7 * row + i) % 60 + 2 for i in range(after)),
                rollout_logprobs=(-1.0,) * after,
                finished=True,
                student_version=0,
            )
            for row, (before, after) in enumerate(LENGTHS)
        ],
        pad_id=0,
    )


def routing(rows: list[list[float]]) -> Routing:
    weights = torch.tensor(rows, dtype=torch.float32)
    return Routing(
        teacher_ids=NAMES,
        prompt_ids=tuple(f"p{row}" for row in range(len(rows))),
        weights=weights,
        confidence=weights.amax(dim=1),
        abstained=weights.sum(dim=1) == 0,
    )


class Tiny:
    """A teacher with weights of its own."""

    supports: frozenset[Support] = frozenset({"full", "topk", "sampled"})

    def __init__(self, teacher_id: str, seed: int) -> None:
        self.teacher_id = teacher_id
        self.model = tiny_model(seed=seed, hidden=32, layers=1, scale=2.0)

    def score(self, rollouts: RolloutBatch, *, support: Support, k: int | None = None) -> TeacherEvidence:
        return score_with(
            self.model,
            rollouts,
            teacher_id=self.teacher_id,
            support=support,
            k=k,
            chunk_size=64,
            max_tokens_per_forward=256,
        )


def pool() -> TeacherPool:
    return TeacherPool([Tiny(name, seed + 1) for seed, name in enumerate(NAMES)])


@pytest.mark.parametrize(("support", "k"), [("full", None), ("topk", 4), ("sampled", None)])
def test_a_row_is_scored_once_and_the_answers_are_those_of_the_pool(support: Support, k: int | None) -> None:
    counting = Counting(pool())
    teachers = ReusingTeachers(counting.pool, support=support, k=k)
    rollouts = batch()
    candidates = routing([[0.5, 0.5], [1, 0], [0.5, 0.5], [0, 0], [0, 1]])
    chosen = routing([[1, 0], [0, 1], [0, 1], [1, 0], [0, 1]])
    heard = teachers.ask(rollouts, candidates)
    plain = pool()
    said = plain.score(rollouts, candidates, support="sampled")
    for name in NAMES:
        one, other = heard.of(name), said.of(name)
        assert one is not None
        assert other is not None
        assert one.support == "sampled"
        assert one.hidden is None
        assert torch.equal(one.tokens, other.tokens)
        torch.testing.assert_close(one.sampled_logprobs, other.sampled_logprobs, atol=1e-5, rtol=1e-5)
    found = teachers.score(rollouts, chosen, support=support, k=k)
    expected = plain.score(rollouts, chosen, support=support, k=k)
    for name in NAMES:
        one, other = found.of(name), expected.of(name)
        assert one is not None
        assert other is not None
        assert torch.equal(one.tokens, other.tokens)
        for field in ("hidden", "topk_logprobs", "sampled_logprobs"):
            values = getattr(other, field)
            assert (getattr(one, field) is None) == (values is None)
            if values is not None:
                torch.testing.assert_close(getattr(one, field), values, atol=1e-5, rtol=1e-5)
    assert sorted(counting.asked) == sorted(set(counting.asked))
    assert set(counting.asked) == {
        ("math", 0), ("math", 1), ("math", 2), ("math", 3), ("code", 0), ("code", 1), ("code", 2), ("code", 4),
    }  # fmt: skip


def test_another_batch_or_another_support_is_asked_anew() -> None:
    counting = Counting(pool())
    teachers = ReusingTeachers(counting.pool, support="sampled")
    everything = routing([[1, 0]] * 5)
    first, second = batch(), batch()
    teachers.ask(first, everything)
    teachers.score(second, everything, support="sampled")
    teachers.score(first, everything, support="full")
    assert len(counting.asked) == 15
    teachers.score(first, everything, support="sampled")
    assert len(counting.asked) == 15
    teachers.score(first, everything, support="sampled")
    assert len(counting.asked) == 20
    assert teachers.teacher_ids == NAMES
    assert teachers.get("code") is counting.pool.get("code")


def test_a_teacher_that_did_not_answer_is_not_asked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    kept = pool()
    whole, asked = kept.each, []

    def failing(rollouts: RolloutBatch, given: Routing, **more: Any) -> Iterator[tuple[str, Answer]]:
        asked.append(given.rows_of("code").tolist())
        return (said for said in whole(rollouts, given, **more) if said[0] != "code")

    monkeypatch.setattr(kept, "each", failing)
    teachers = ReusingTeachers(kept, support="sampled")
    rollouts, both = batch(), routing([[0.5, 0.5]] * 5)
    assert teachers.ask(rollouts, both).of("code") is None
    assert teachers.score(rollouts, both, support="sampled").of("code") is None
    assert asked == [[0, 1, 2, 3, 4], []]
