from __future__ import annotations

import math
import pickle
from dataclasses import replace
from functools import partial
from typing import Any, Literal

import pytest
import torch
from torch import Tensor

from moteach.errors import ConfigError, DeadTeacherError, TeacherUnavailableError, UnsupportedCombinationError
from moteach.teachers.failover import Failover, FailurePolicy, check_alive
from moteach.teachers.pool import TeacherPool
from moteach.teachers.reuse import ReusingTeachers
from moteach.types import Head, Prompt, Rollout, RolloutBatch, Routing, Support, TeacherEvidence

VOCAB, HIDDEN = 11, 6
NAMES = ("alpha", "beta", "gamma")
WEIGHTS = [[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.5, 0.5, 0.0], [0.0, 0.25, 0.75], [0.0, 0.0, 0.0], [0.0, 0.0, 1.0]]
Kind = Literal["alive", "uniform", "nan", "frozen", "frozen head", "down"]
BAD: tuple[Kind, ...] = ("uniform", "nan", "frozen", "frozen head", "down")


class Scorer:
    """A teacher over eleven tokens that is alive, or bad in one way; it remembers whom it was asked about."""

    supports: frozenset[Support] = frozenset({"full", "topk", "sampled"})

    def __init__(self, teacher_id: str, kind: Kind = "alive") -> None:
        self.teacher_id = teacher_id
        self.kind = kind
        self.asked: list[list[str]] = []
        generator = torch.Generator().manual_seed(len(teacher_id))
        self.embedding = torch.randn(VOCAB, HIDDEN, generator=generator)
        self.weight = torch.randn(VOCAB, HIDDEN, generator=generator)
        self.bias = torch.randn(VOCAB, generator=generator)

    def score(self, rollouts: RolloutBatch, *, support: Support, k: int | None = None) -> TeacherEvidence:
        self.asked.append([rollout.prompt.prompt_id for rollout in rollouts.rollouts])
        if self.kind == "down":
            raise TeacherUnavailableError("no answer")
        head = Head(weight=self.weight, bias=self.bias)
        hidden = rollouts.pack(self.embedding[rollouts.input_ids])
        if self.kind == "uniform":
            head = Head(weight=torch.zeros_like(self.weight))
        if self.kind == "frozen head":
            head = Head(weight=torch.zeros_like(self.weight), bias=self.bias)
        if self.kind == "frozen":
            hidden = hidden[:1].expand_as(hidden).clone()
        if self.kind == "nan":
            hidden = hidden * math.nan
        logits: Tensor = hidden @ head.weight.T + (0 if head.bias is None else head.bias)
        logprobs = logits.log_softmax(dim=-1)
        values, ids = logprobs.topk(k or 1)
        return TeacherEvidence(
            teacher_id=self.teacher_id,
            support=support,
            tokens=torch.arange(rollouts.num_tokens),
            hidden=hidden if support == "full" else None,
            head=head if support == "full" else None,
            topk_ids=ids if support == "topk" else None,
            topk_logprobs=values if support == "topk" else None,
            sampled_logprobs=None
            if support == "full"
            else logprobs.gather(1, rollouts.token_targets.unsqueeze(1)).squeeze(1),
        )


def batch() -> RolloutBatch:
    generator = torch.Generator().manual_seed(5)
    rows = [
        Rollout(
            prompt=Prompt(prompt_id=f"p{row}", text="", token_ids=(row,)),
            sample=0,
            completion_ids=tuple(torch.randint(0, VOCAB, (30 + row,), generator=generator).tolist()),
            rollout_logprobs=(-1.0,) * (30 + row),
            finished=True,
            student_version=0,
        )
        for row in range(len(WEIGHTS))
    ]
    return RolloutBatch.from_rollouts(rows, pad_id=0)


def routing() -> Routing:
    weights = torch.tensor(WEIGHTS)
    return Routing(
        teacher_ids=NAMES,
        prompt_ids=tuple(f"p{row}" for row in range(len(WEIGHTS))),
        weights=weights,
        confidence=weights.amax(dim=1),
        abstained=weights.sum(dim=1) == 0,
    )


def pool(**kinds: Kind) -> TeacherPool:
    return TeacherPool([Scorer(name, kinds.get(name, "alive")) for name in NAMES])


def of(policy: str) -> Failover:
    return Failover(policy=FailurePolicy.parse(policy, experts=NAMES))


SUPPORTS: list[dict[str, Any]] = [{"support": "full"}, {"support": "topk", "k": 4}, {"support": "sampled"}]


@pytest.mark.parametrize("asked", SUPPORTS, ids=lambda asked: asked["support"])
@pytest.mark.parametrize("kind", BAD)
def test_a_bad_teacher_stops_the_run_unless_it_is_told_otherwise(kind: Kind, asked: dict[str, Any]) -> None:
    with pytest.raises((DeadTeacherError, TeacherUnavailableError)):
        Failover().score(pool(beta=kind), batch(), routing(), **asked)


@pytest.mark.parametrize("asked", SUPPORTS, ids=lambda asked: asked["support"])
def test_good_teachers_give_what_the_pool_gives(asked: dict[str, Any]) -> None:
    expected = pool().score(batch(), routing(), **asked)
    failover = of("renormalise")
    found, after = failover.score(pool(), batch(), routing(), **asked)
    assert torch.equal(after.weights, routing().weights)
    assert [entry.teacher_id for entry in found.teachers] == [entry.teacher_id for entry in expected.teachers]
    for mine, theirs in zip(found.teachers, expected.teachers, strict=True):
        for name in ("tokens", "hidden", "topk_ids", "topk_logprobs", "sampled_logprobs"):
            left, right = getattr(mine, name), getattr(theirs, name)
            assert left is right is None or torch.equal(left, right)
    assert failover.metrics(NAMES) == {f"teacher_failures/{name}": 0.0 for name in NAMES}


EXPECTED = {
    "drop": [[1, 0, 0], [0, 0, 0], [0, 0, 0], [0, 0, 0], [0, 0, 0], [0, 0, 1]],
    "renormalise": [[1, 0, 0], [0, 0, 0], [1, 0, 0], [0, 0, 1], [0, 0, 0], [0, 0, 1]],
    "fallback:gamma": [[1, 0, 0], [0, 0, 1], [0.5, 0, 0.5], [0, 0, 1], [0, 0, 0], [0, 0, 1]],
    "fallback:alpha": [[1, 0, 0], [1, 0, 0], [1, 0, 0], [0.25, 0, 0.75], [0, 0, 0], [0, 0, 1]],
}


@pytest.mark.parametrize("asked", SUPPORTS, ids=lambda asked: asked["support"])
@pytest.mark.parametrize("policy", EXPECTED)
@pytest.mark.parametrize("kind", BAD)
def test_each_policy_gives_the_rows_of_a_bad_teacher_to_whom_it_says(
    kind: Kind, policy: str, asked: dict[str, Any]
) -> None:
    rollouts, failover = batch(), of(policy)
    evidence, after = failover.score(pool(beta=kind), rollouts, routing(), **asked)
    assert after.weights.tolist() == EXPECTED[policy]
    assert after.abstained.tolist() == [sum(row) == 0 for row in EXPECTED[policy]]
    assert failover.metrics(NAMES) == {
        "teacher_failures/alpha": 0.0,
        "teacher_failures/beta": 3.0,
        "teacher_failures/gamma": 0.0,
    }
    # every teacher scored exactly the rows it has weight in, as if it had been given them from the start
    expected = pool().score(rollouts, after, **asked)
    assert [entry.teacher_id for entry in evidence.teachers] == [entry.teacher_id for entry in expected.teachers]
    for mine, theirs in zip(evidence.teachers, expected.teachers, strict=True):
        assert torch.equal(mine.tokens, theirs.tokens)
        for name in ("hidden", "topk_logprobs", "sampled_logprobs"):
            left, right = getattr(mine, name), getattr(theirs, name)
            assert left is right is None or torch.equal(left, right)


def test_only_teachers_that_gain_rows_are_asked_again() -> None:
    teachers = {name: Scorer(name, "nan" if name == "beta" else "alive") for name in NAMES}
    of("fallback:gamma").score(TeacherPool(list(teachers.values())), batch(), routing(), support="full")
    assert teachers["alpha"].asked == [["p0", "p2"]]
    assert teachers["beta"].asked == [["p1", "p2", "p3"]]
    assert teachers["gamma"].asked == [["p3", "p5"], ["p1", "p2"]], "a row is scored once"


def test_an_expert_that_gained_rows_is_asked_about_those_alone() -> None:
    teachers = {name: Scorer(name, "nan" if name == "beta" else "alive") for name in NAMES}
    of("fallback:alpha").score(TeacherPool(list(teachers.values())), batch(), routing(), support="full")
    assert teachers["alpha"].asked == [["p0", "p2"], ["p1", "p3"]]


def test_two_bad_teachers_are_both_counted_and_what_is_left_abstains() -> None:
    failover = of("renormalise")
    evidence, after = failover.score(pool(alpha="down", beta="uniform"), batch(), routing(), support="full")
    assert after.weights[:, 2].tolist() == [0, 0, 0, 1, 0, 1]
    assert after.abstained.tolist() == [True, True, True, False, True, False]
    assert [entry.teacher_id for entry in evidence.teachers] == ["gamma"]
    assert failover.lost == {"alpha": 2, "beta": 3}
    failover.score(pool(), batch(), routing(), support="full")
    expected = {"teacher_failures/alpha": 2.0, "teacher_failures/beta": 3.0, "teacher_failures/gamma": 0.0}
    assert failover.metrics(NAMES) == expected, "a second question of the step forgot the failures of the first"
    assert set(failover.metrics(NAMES).values()) == {0.0}


def test_a_fallback_that_fails_too_stops_the_run() -> None:
    with pytest.raises(DeadTeacherError, match="gamma"):
        of("fallback:gamma").score(pool(beta="down", gamma="frozen"), batch(), routing(), support="full")


@pytest.mark.parametrize("asked", SUPPORTS, ids=lambda asked: asked["support"])
@pytest.mark.parametrize("kind", BAD)
def test_a_teacher_that_fails_while_a_router_asks_says_nothing_and_the_others_are_asked_once(
    kind: Kind, asked: dict[str, Any]
) -> None:
    scorers = {name: Scorer(name, kind if name == "beta" else "alive") for name in NAMES}
    teachers = ReusingTeachers(TeacherPool(list(scorers.values())), **asked)
    rollouts, failover = batch(), of("renormalise")
    heard = failover.ask(teachers, rollouts, routing())
    assert [entry.teacher_id for entry in heard.teachers] == ["alpha", "gamma"]
    assert {entry.support for entry in heard.teachers} == {"sampled"}
    chosen = replace(routing(), weights=torch.tensor(EXPECTED["renormalise"], dtype=torch.float32))
    found, after = failover.score(teachers, rollouts, chosen, **asked)
    assert torch.equal(after.weights, chosen.weights)
    for mine, theirs in zip(found.teachers, pool().score(rollouts, chosen, **asked).teachers, strict=True):
        assert torch.equal(mine.tokens, theirs.tokens)
        for name in ("hidden", "topk_logprobs", "sampled_logprobs"):
            left, right = getattr(mine, name), getattr(theirs, name)
            assert left is right is None or torch.equal(left, right)
    assert scorers["alpha"].asked == [["p0", "p2"]]
    assert scorers["gamma"].asked == [["p3", "p5"]]
    assert failover.metrics(NAMES)["teacher_failures/beta"] == 3


def test_the_next_teacher_is_prepared_while_one_scores_whatever_the_policy() -> None:
    for policy in ("stop", "drop"):
        scorers, prepared = [Scorer(name) for name in NAMES], []
        for scorer in scorers:
            scorer.prepare = partial(prepared.append, scorer.teacher_id)  # type: ignore[attr-defined]
        of(policy).score(TeacherPool(scorers), batch(), routing(), support="full")
        assert prepared == ["beta", "gamma"]


def test_a_fallback_that_fails_while_a_router_asks_stops_the_run_and_so_does_anyone_without_a_policy() -> None:
    for policy, kinds in (("fallback:gamma", {"gamma": "nan"}), ("stop", {"beta": "down"})):
        teachers = ReusingTeachers(pool(**kinds), support="full")  # type: ignore[arg-type]
        with pytest.raises((DeadTeacherError, TeacherUnavailableError)):
            of(policy).ask(teachers, batch(), routing())


def test_what_a_router_heard_is_not_asked_again_when_a_teacher_dies_in_between() -> None:
    scorers = {name: Scorer(name) for name in NAMES}
    teachers = ReusingTeachers(TeacherPool(list(scorers.values())), support="full")
    rollouts, failover = batch(), of("fallback:gamma")
    failover.ask(teachers, rollouts, replace(routing(), weights=torch.tensor([[1.0, 0.0, 1.0]] * len(WEIGHTS))))
    scorers["beta"].kind = "down"
    _, after = failover.score(teachers, rollouts, routing(), support="full")
    assert after.weights.tolist() == EXPECTED["fallback:gamma"]
    everything = [f"p{row}" for row in range(len(WEIGHTS))]
    assert [scorers[name].asked for name in NAMES] == [[everything], [["p1", "p2", "p3"]], [everything]]


def test_other_errors_are_not_failures_of_a_teacher() -> None:
    teacher = Scorer("alpha")
    teacher.supports = frozenset({"sampled"})
    with pytest.raises(UnsupportedCombinationError):
        of("drop").score(TeacherPool([teacher, Scorer("beta"), Scorer("gamma")]), batch(), routing(), support="full")


@pytest.mark.parametrize("text", ["", "ignore", "fallback", "fallback:", "fallback:delta", "drop:alpha"])
def test_other_policies_are_refused(text: str) -> None:
    with pytest.raises(ConfigError, match=r"teachers\.on_failure"):
        FailurePolicy.parse(text, experts=NAMES)


@pytest.mark.parametrize("asked", SUPPORTS, ids=lambda asked: asked["support"])
def test_a_few_equal_contexts_are_no_proof(asked: dict[str, Any]) -> None:
    rows = [
        Rollout(
            prompt=Prompt(prompt_id="p", text="", token_ids=(3,)),
            sample=0,
            completion_ids=(3,) * 12,
            rollout_logprobs=(-1.0,) * 12,
            finished=False,
            student_version=0,
        )
    ]
    rollouts = RolloutBatch.from_rollouts(rows, pad_id=0)
    check_alive(Scorer("alpha").score(rollouts, **asked), rollouts)


def test_a_certain_teacher_is_alive() -> None:
    rollouts = batch()
    certain = TeacherEvidence(
        teacher_id="alpha",
        support="sampled",
        tokens=torch.arange(rollouts.num_tokens),
        sampled_logprobs=torch.zeros(rollouts.num_tokens),
    )
    check_alive(certain, rollouts)


def test_an_unavailable_teacher_is_a_connection_error_that_can_be_sent_between_processes() -> None:
    error = pickle.loads(pickle.dumps(TeacherUnavailableError("gone")))
    assert isinstance(error, ConnectionError)
    assert str(error) == "gone"
