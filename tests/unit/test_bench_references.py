from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from moteach.bench import conflict, routing_students
from moteach.bench._arms_table import read_arms, read_parts
from moteach.bench._references import references, step_oracle
from moteach.cli.app import run_app
from moteach.config.validate import validate
from moteach.data.arena.rules import solve
from moteach.data.arena.source import ArenaSource
from moteach.data.arena.tokenizer import build_tokenizer


class Engine:
    """Right about the steps of one kind, from wherever the answer stands, and wrong about the others."""

    def __init__(self, kind: str, tokenizer: Any) -> None:
        self.kind, self.tokenizer = kind, tokenizer

    def generate(self, prompts: Any, *, step: int, temperature: float) -> Any:
        assert temperature == 0.0
        return SimpleNamespace(rollouts=[self.answer(prompt) for prompt in reversed(prompts)])

    def answer(self, prompt: Any) -> Any:
        written = len(prompt.token_ids) - len(prompt.text)
        parts = []
        for part in solve(prompt.text):
            text = part.text if part.kind == self.kind else "!" * len(part.text)
            parts.append(text)
        ids = self.tokenizer("".join(parts)[written:], add_special_tokens=False)["input_ids"]
        return SimpleNamespace(prompt=prompt, completion_ids=ids)


@pytest.fixture
def job() -> Any:
    tokenizer = build_tokenizer()
    prompts = ArenaSource(domains=["composite"], evaluation_size=8).load(tokenizer)
    return SimpleNamespace(
        tokenizer=tokenizer, prompts=prompts, engine_for=lambda kind: Engine(kind, tokenizer), cfg=None
    )


def test_the_step_oracle_asks_each_expert_for_its_own_step(job):
    assert step_oracle(job, {kind: kind for kind in ("math", "code", "search")}) == 1.0
    # Composites are half look-up and arithmetic, half look-up and program.
    assert step_oracle(job, {"math": "math", "code": "math", "search": "search"}) == 0.5
    assert step_oracle(job, {"math": "math", "code": "code", "search": "math"}) == 0.0


def test_references_are_measured_once(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr("moteach.cli.app.run_app", lambda *given: asked.append(given))
    for _ in range(2):
        references(["experts=[math]"], folder=tmp_path)
    references(["experts=[code]"], folder=tmp_path)
    assert len(asked) == 2


def told() -> list[tuple[str, ...]]:
    arms = read_arms(Path(conflict.__file__).with_name("conflict_arms.yaml"))
    parts = read_parts(Path(routing_students.__file__).with_name("routing_students_arms.yaml"))
    found = [(*conflict.SETTINGS, *overrides) for overrides in arms.values()]
    for part, table in parts.items():
        found += [(*routing_students.SETTINGS[part], *overrides) for overrides in table.values()]
    return found


@pytest.mark.parametrize("overrides", told(), ids=lambda overrides: ",".join(overrides[1:]))
def test_every_shipped_arm_is_a_valid_run(overrides):
    seen = []
    run_app("train", [*overrides, "tracker=[]"], lambda cfg: seen.append(validate(cfg)))
    assert len(seen) == 1
