"""Every YAML in conf/teacher_gate is a gate of teachers: a new option is tested by being there."""

from __future__ import annotations

import inspect
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from moteach.config.build import build
from moteach.config.validate import check_component, is_configurable
from moteach.errors import ConfigError
from moteach.teachers.gating import TeacherGate
from moteach.types import Evidence, Prompt, Rollout, RolloutBatch, Routing, TeacherEvidence

FILES = sorted((Path(__file__).parents[2] / "conf" / "teacher_gate").glob("*.yaml"))
TEACHERS = ("good", "bad", "other")
WEIGHTS = [
    [1.0, 0.0, 0.0],
    [0.0, 1.0, 0.0],
    [0.25, 0.75, 0.0],
    [0.0, 0.0, 0.0],
    [0.0, 1.0, 0.0],
    [0.3, 0.3, 0.4],
]
DOMAINS = ("math", "math", "code", "math", "law", "math")
UNVERIFIABLE = 4
"""Row whose prompt has no verifier; the bad teacher has all its weight."""


def prompt(name: str, domain: str, verifier: str | None = "exact") -> Prompt:
    return Prompt(prompt_id=name, text=name, token_ids=(1, 2), domain=domain, verifier=verifier, answer="x")


PROMPTS = [prompt(f"p{row}", d, None if row == UNVERIFIABLE else "exact") for row, d in enumerate(DOMAINS)]


class Answers:
    """`good` is always right, `bad` never, `other` on every second prompt."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, str]] = []

    def scores(self, teacher_id: str, prompts: Sequence[Prompt]) -> list[float]:
        assert prompts
        assert all(p.verifier for p in prompts)
        self.asked += [(teacher_id, p.prompt_id) for p in prompts]
        every = {"good": lambda p: 1.0, "bad": lambda p: 0.0, "other": lambda p: float(int(p.prompt_id[-1]) % 2)}
        return [every[teacher_id](p) for p in prompts]

    def draw(self, domain: str, *, count: int, turn: int) -> list[Prompt]:
        return [prompt(f"{domain}-{turn}-{index}", domain) for index in range(count)]


def batch() -> RolloutBatch:
    rows = [
        Rollout(
            prompt=p,
            sample=0,
            completion_ids=(3, 4 + row),
            rollout_logprobs=(-1.0, -1.0),
            finished=True,
            student_version=0,
        )
        for row, p in enumerate(PROMPTS)
    ]
    return RolloutBatch.from_rollouts(rows, pad_id=0)


def routing() -> Routing:
    weights = torch.tensor(WEIGHTS)
    return Routing(
        teacher_ids=TEACHERS,
        prompt_ids=tuple(p.prompt_id for p in PROMPTS),
        weights=weights,
        confidence=weights.amax(dim=1),
        abstained=weights.sum(dim=1) == 0,
    )


def make(path: Path, **changes: Any) -> tuple[Any, Answers]:
    gate, answers = build({**yaml.safe_load(path.read_text()), **changes}, where="teacher_gate"), Answers()
    if gate.examines:
        gate.bind(answers)
    return gate, answers


@pytest.fixture(params=FILES, ids=lambda path: path.stem)
def path(request: pytest.FixtureRequest) -> Path:
    return request.param


@pytest.fixture(params=[file for file in FILES if file.stem != "none"], ids=lambda path: path.stem)
def examining(request: pytest.FixtureRequest) -> Path:
    return request.param


def test_there_are_options() -> None:
    assert {path.stem for path in FILES} >= {"none", "verified", "always", "reliable"}


def test_it_is_a_gate_named_after_its_file(path: Path) -> None:
    gate, _ = make(path)
    assert isinstance(gate, TeacherGate)
    assert gate.name == path.stem
    assert gate.unverified == "skip"


def test_its_yaml_lists_every_configurable_parameter_with_the_default_of_the_class(path: Path) -> None:
    gate, _ = make(path)
    content = yaml.safe_load(path.read_text())
    check_component(content, where="teacher_gate")
    constructor = vars(type(gate)).get("__init__")
    hints = inspect.get_annotations(constructor, eval_str=True) if constructor else {}
    parameters = inspect.signature(type(gate)).parameters
    assert all(parameter.kind is parameter.KEYWORD_ONLY for parameter in parameters.values())
    configurable = {name: p.default for name, p in parameters.items() if is_configurable(hints[name])}
    assert {key: value for key, value in content.items() if key != "_target_"} == configurable


def test_its_yaml_says_what_every_argument_is(path: Path) -> None:
    lines = path.read_text().splitlines()
    keys = [index for index, line in enumerate(lines) if not line.startswith(("#", "_target_")) and line.strip()]
    assert [lines[index] for index in keys if not lines[index - 1].startswith("# ")] == []


def test_rows_are_distributions_or_abstain_and_nobody_gains_a_teacher(path: Path) -> None:
    gate, _ = make(path)
    before, after = routing(), gate.admit(0, batch(), routing())
    total = after.weights.sum(dim=1)
    assert torch.equal(after.abstained, total == 0)
    torch.testing.assert_close(total[~after.abstained], torch.ones(int((~after.abstained).sum())))
    assert bool((after.weights >= 0).all())
    assert not bool(((after.weights > 0) & (before.weights == 0)).any())
    assert bool((after.confidence[after.abstained & ~before.abstained] == 0).all())
    assert (after.teacher_ids, after.prompt_ids) == (before.teacher_ids, before.prompt_ids)


def test_what_it_may_not_judge_passes_to_the_bit(path: Path) -> None:
    gate, _ = make(path)
    after = gate.admit(0, batch(), routing())
    for row in (0, 3, UNVERIFIABLE):
        assert torch.equal(after.weights[row], routing().weights[row])


def test_a_teacher_that_is_always_wrong_does_not_teach_and_is_counted(examining: Path) -> None:
    gate, _ = make(examining)
    after = gate.admit(0, batch(), routing())
    assert after.weights[:, 1].tolist() == [0.0, 0.0, 0.0, 0.0, 1.0, 0.0]
    assert after.weights[2].tolist() == [1.0, 0.0, 0.0]
    assert after.abstained.tolist() == [False, True, False, True, False, False]
    found = gate.metrics()
    assert found["teacher_gate/closed"] == 1
    assert found["teacher_gate/unverifiable"] == 1
    assert found["teacher_gate/dropped/bad"] == 3
    assert found["teacher_gate/dropped/good"] == found["teacher_gate/dropped/other"] == 0
    assert found["teacher_gate/answers"] > 0


def test_answers_are_asked_once_and_never_of_teachers_without_weight(examining: Path) -> None:
    gate, answers = make(examining)
    gate.admit(0, batch(), routing())
    first = list(answers.asked)
    assert len(set(first)) == len(first)
    assert ("other", "code") not in {(teacher, name.partition("-")[0]) for teacher, name in first}
    again = gate.admit(1, batch(), routing())
    assert answers.asked == first
    assert gate.metrics()["teacher_gate/answers"] == 0
    assert again.abstained.tolist() == [False, True, False, True, False, False]


def test_its_state_is_plain_json_and_restores_it(path: Path) -> None:
    gate, answers = make(path)
    first = gate.admit(0, batch(), routing())
    gate.observe(batch(), said(), [1.0, 0.0, float("nan"), 1.0, float("nan"), 0.0])
    other, fresh = make(path)
    other.load_state_dict(json.loads(json.dumps(gate.state_dict())))
    asked = len(answers.asked)
    expected, found = gate.admit(1, batch(), routing()), other.admit(1, batch(), routing())
    assert torch.equal(found.weights, expected.weights)
    assert fresh.asked == answers.asked[asked:]
    assert other.metrics() == gate.metrics()
    assert other.state_dict() == gate.state_dict()
    assert first.weights.shape == found.weights.shape


def said() -> Evidence:
    """What `good` says about rows 0 and 2, as top-k: it would have written row 0."""
    rollouts = batch()
    tokens = torch.isin(rollouts.token_rows, torch.tensor([0, 2])).nonzero().flatten()
    entry = TeacherEvidence(
        teacher_id="good",
        support="topk",
        tokens=tokens,
        topk_ids=torch.tensor([[3, 9], [4, 9], [3, 9], [9, 6]]),
        topk_logprobs=torch.tensor([[-0.1, -3.0]] * 4),
        sampled_logprobs=torch.zeros(4),
    )
    return Evidence(teachers=(entry,), num_tokens=rollouts.num_tokens)


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("verified", {"threshold": 1.5}),
        ("verified", {"probe_prompts": 0}),
        ("verified", {"probe_every": -1}),
        ("always", {"passing": -0.1}),
        ("reliable", {"floor": 2.0}),
        ("reliable", {"sharpness": -1.0}),
        ("reliable", {"decay": 0.0}),
        ("reliable", {"prior_wrong": 0.0}),
    ],
)
def test_senseless_arguments_are_refused(name: str, changes: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="expected"):
        make(next(file for file in FILES if file.stem == name), **changes)
