from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from moteach.catalogue.spec import ExpertSpec
from moteach.errors import (
    ConfigError,
    DeadTeacherError,
    RoutingError,
    UnknownChoiceError,
    UnsupportedCombinationError,
)
from moteach.teachers.base import Teacher
from moteach.teachers.hf import HFTeacher
from moteach.teachers.pool import TeacherPool, build_teachers
from moteach.testing import tiny_model
from moteach.types import Prompt, Rollout, RolloutBatch, Routing, Support, TeacherEvidence

LENGTHS = [(3, 5), (9, 1), (2, 4), (4, 7), (1, 6)]


def rollouts_of(lengths: Sequence[tuple[int, int]]) -> RolloutBatch:
    """Rollouts whose token ids are all different: row * 100 + position."""
    return RolloutBatch.from_rollouts(
        [
            Rollout(
                prompt=Prompt(prompt_id=f"p{row}", text="", token_ids=tuple(range(row * 100, row * 100 + prompt))),
                sample=0,
                completion_ids=tuple(range(row * 100 + prompt, row * 100 + prompt + completion)),
                rollout_logprobs=(-1.0,) * completion,
                finished=True,
                student_version=0,
            )
            for row, (prompt, completion) in enumerate(lengths)
        ],
        pad_id=0,
    )


def routing_of(weights: Sequence[Sequence[float]], names: Sequence[str] = ("math", "code", "law")) -> Routing:
    table = torch.tensor(weights)
    return Routing(
        teacher_ids=tuple(names),
        prompt_ids=tuple(f"p{row}" for row in range(len(weights))),
        weights=table,
        confidence=table.max(dim=1).values,
        abstained=table.sum(dim=1) == 0,
    )


class EchoTeacher:
    """Answers with the ids it was asked about, so that misplaced tokens are seen."""

    supports: frozenset[Support] = frozenset({"sampled"})

    def __init__(self, teacher_id: str) -> None:
        self.teacher_id = teacher_id
        self.asked: list[list[str]] = []
        self.value = 0.0

    def score(self, rollouts: RolloutBatch, *, support: Support, k: int | None = None) -> TeacherEvidence:
        self.asked.append([rollout.prompt.prompt_id for rollout in rollouts.rollouts])
        return TeacherEvidence(
            teacher_id=self.teacher_id,
            support=support,
            tokens=torch.arange(rollouts.num_tokens),
            sampled_logprobs=rollouts.token_targets.float() + self.value,
        )


SPLIT = [[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.5, 0.5, 0.0], [0.0, 0.0, 0.0], [1.0, 0.0, 0.0]]


def test_each_teacher_is_asked_about_its_own_rows_and_its_tokens_are_mapped_back() -> None:
    math, code, law = (EchoTeacher(name) for name in ("math", "code", "law"))
    rollouts = rollouts_of(LENGTHS)
    evidence = TeacherPool([law, code, math]).score(rollouts, routing_of(SPLIT), support="sampled")
    assert math.asked == [["p0", "p2", "p4"]]
    assert code.asked == [["p1", "p2"]]
    assert law.asked == []
    assert evidence.num_tokens == rollouts.num_tokens == 23
    assert [entry.teacher_id for entry in evidence.teachers] == ["math", "code"]
    assert evidence.of("law") is None
    for name, rows in (("math", {0, 2, 4}), ("code", {1, 2})):
        entry = evidence.of(name)
        assert entry is not None
        assert entry.tokens.tolist() == [i for i, row in enumerate(rollouts.token_rows.tolist()) if row in rows]
        assert torch.equal(entry.sampled_logprobs, rollouts.token_targets[entry.tokens].float())


def test_a_teacher_whose_rows_have_no_trained_token_is_not_called() -> None:
    math, code = EchoTeacher("math"), EchoTeacher("code")
    routing = routing_of([[1.0, 0.0], [0.0, 1.0]], ("math", "code"))
    evidence = TeacherPool([math, code]).score(rollouts_of([(2, 3), (4, 0)]), routing, support="sampled")
    assert code.asked == []
    assert [entry.teacher_id for entry in evidence.teachers] == ["math"]


def test_a_batch_that_nobody_is_asked_about_is_evidence_of_nobody() -> None:
    pool = TeacherPool([EchoTeacher("math"), EchoTeacher("code"), EchoTeacher("law")])
    said = pool.score(rollouts_of(LENGTHS), routing_of([[0.0] * 3] * len(LENGTHS)), support="sampled")
    assert said.teachers == ()
    assert said.num_tokens == rollouts_of(LENGTHS).num_tokens


def test_a_routing_of_other_prompts_is_refused() -> None:
    routing = replace(routing_of(SPLIT), prompt_ids=("p0", "p2", "p1", "p3", "p4"))
    with pytest.raises(RoutingError, match="graded by the wrong teacher"):
        TeacherPool([EchoTeacher("math")]).score(rollouts_of(LENGTHS), routing, support="sampled")


def test_a_routed_teacher_that_is_not_in_the_pool_is_named() -> None:
    with pytest.raises(UnknownChoiceError, match=r"got 'math'.*did you mean 'maths'"):
        TeacherPool([EchoTeacher("maths")]).score(rollouts_of(LENGTHS), routing_of(SPLIT), support="sampled")


def test_a_support_the_teacher_does_not_offer_is_refused_before_it_is_asked() -> None:
    math = EchoTeacher("math")
    with pytest.raises(UnsupportedCombinationError, match="support=full of the teacher 'math', which offers sampled"):
        TeacherPool([math]).score(rollouts_of([(2, 3)]), routing_of([[1.0]], ("math",)), support="full")
    assert math.asked == []


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_scores_that_are_not_finite_name_the_teacher(value: float) -> None:
    math, code = EchoTeacher("math"), EchoTeacher("code")
    code.value = value
    with pytest.raises(DeadTeacherError, match="finite logprobs from the teacher 'code'"):
        TeacherPool([math, code]).score(rollouts_of(LENGTHS), routing_of(SPLIT), support="sampled")


def test_names_of_teachers_are_unique_and_there_is_at_least_one() -> None:
    with pytest.raises(ConfigError, match="each with a name of its own"):
        TeacherPool([EchoTeacher("math"), EchoTeacher("math")])
    with pytest.raises(ConfigError, match="at least one teacher"):
        TeacherPool([])
    assert TeacherPool([EchoTeacher("b"), EchoTeacher("a")]).teacher_ids == ("b", "a")


@pytest.mark.parametrize(("support", "k"), [("full", None), ("topk", 4), ("sampled", None)])
def test_a_teacher_says_the_same_in_a_pool_as_alone_on_the_whole_batch(
    tmp_path: Path, support: Support, k: int | None
) -> None:
    specs = {}
    for seed, name in enumerate(("math", "code")):
        tiny_model(seed=seed, hidden=64 if seed else 32, vocab_size=512, scale=3.0).save_pretrained(tmp_path / name)
        specs[name] = ExpertSpec(name=name, model=str(tmp_path / name))
    rollouts = rollouts_of(LENGTHS)
    routing = routing_of([row[:2] for row in SPLIT], ("math", "code"))
    pool = TeacherPool.from_experts(specs, max_tokens_per_forward=24)
    evidence = pool.score(rollouts, routing, support=support, k=k)
    for entry in evidence.teachers:
        whole = HFTeacher(teacher_id=entry.teacher_id, model=specs[entry.teacher_id].weights).score(
            rollouts, support=support, k=k
        )
        for name in ("hidden", "topk_ids", "topk_logprobs", "sampled_logprobs"):
            mine, theirs = getattr(entry, name), getattr(whole, name)
            assert (mine is None) == (theirs is None)
            if mine is not None:
                torch.testing.assert_close(mine, theirs[entry.tokens], rtol=1e-4, atol=1e-4)
    shapes = {entry.teacher_id: None if entry.hidden is None else entry.hidden.shape[1] for entry in evidence.teachers}
    assert shapes == ({"math": 32, "code": 64} if support == "full" else {"math": None, "code": None})


def test_two_experts_on_one_checkpoint_share_the_loaded_model(tmp_path: Path) -> None:
    for seed, name in enumerate(("one", "two")):
        tiny_model(seed=seed).save_pretrained(tmp_path / name)
    (tmp_path / "alias").symlink_to(tmp_path / "one")
    a, b, c, d = build_teachers(
        [
            ExpertSpec(name="a", model=str(tmp_path / "one")),
            ExpertSpec(name="b", model=str(tmp_path / "alias")),
            ExpertSpec(name="c", model=str(tmp_path / "two")),
            ExpertSpec(name="d", model=str(tmp_path / "one"), dtype="bfloat16"),
        ]
    )
    assert a.model is b.model
    assert a.model is not c.model
    assert d.model is not a.model
    assert all(isinstance(teacher, Teacher) for teacher in (a, b, c, d))
