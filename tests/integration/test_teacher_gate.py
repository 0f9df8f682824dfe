"""Whole runs with bad teachers: each policy and each gate, and that what they learned survives an interruption."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from integration_runs import metrics, rows, student_bytes, train
from transformers import AutoModelForCausalLM

from moteach.cli.main import main
from moteach.evaluation.examiner import TeacherExaminer
from moteach.testing import TinyWorld, write_tiny_world
from moteach.trainer import Trainer

QUICK = ["eval=none", "router=label"]


def spoil(folder: Path, kind: str) -> None:
    """Makes a saved model bad in one way; it still loads, and its logits are finite."""
    model: Any = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        if kind == "uniform":
            model.lm_head.weight.zero_()
        elif kind == "frozen":
            # all tokens are read alike, so that nothing of the context is left; the head is untied to keep its opinion
            table = model.model.embed_tokens.weight
            model.config.tie_word_embeddings = False
            model.lm_head.weight = torch.nn.Parameter(table.clone())
            table.copy_(table[1:2].clone().expand_as(table))
    model.save_pretrained(folder)


def bad_world(folder: Path, kind: str) -> TinyWorld:
    world = write_tiny_world(folder)
    spoil(world.cards / "weights" / "beta", kind)
    return world


def test_a_dead_teacher_stops_the_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    world = bad_world(tmp_path / "world", "frozen")
    assert main(["train", *world.overrides, *QUICK, f"run_dir={tmp_path / 'run'}"]) == 2
    assert "'beta', got the same distribution in every context" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("kind", "policy"), [("uniform", "drop"), ("frozen", "renormalise"), ("uniform", "fallback:alpha")]
)
def test_a_run_goes_on_without_a_dead_teacher_and_counts_its_rows(kind: str, policy: str, tmp_path: Path) -> None:
    world = bad_world(tmp_path / "world", kind)
    run = train(tmp_path / "run", *world.overrides, *QUICK, f"teachers.on_failure={policy}")
    routed = rows(run, "routing")
    assert {row["domain"] for row in routed} == {"alpha", "beta"}
    for line in metrics(run):
        mine = [row for row in routed if row["step"] == line["step"]]
        of_beta = [row for row in mine if row["domain"] == "beta"]
        assert line["teacher_failures/beta"] == len(of_beta) > 0
        assert line["teacher_failures/alpha"] == 0
        assert "teacher_token_frac/beta" not in line
        expected = {"alpha"} if policy == "fallback:alpha" else {None}
        assert {row["teacher"] for row in of_beta} == expected
        assert {row["teacher"] for row in mine if row["domain"] == "alpha"} == {"alpha"}


@pytest.fixture
def graded(world: TinyWorld, monkeypatch: pytest.MonkeyPatch) -> TinyWorld:
    """A world whose verifiers call every answer right in domain alpha, and none in domain beta."""

    def grade(prompt: Any, completion: str) -> float:
        return float(prompt.domain == "alpha")

    monkeypatch.setattr("moteach.config.assemble.grade_prompt", grade)
    return replace(world, overrides=[*world.overrides, *QUICK])


GATES = {
    "verified": ["teacher_gate=verified", "teacher_gate.probe_prompts=3"],
    "always": ["teacher_gate=always"],
    "reliable": ["teacher_gate=reliable", "teacher_gate.probe_prompts=9", "teacher_gate.probe_every=2"],
}


@pytest.mark.parametrize("name", GATES)
def test_a_teacher_whose_own_answers_are_wrong_does_not_teach(name: str, graded: TinyWorld, tmp_path: Path) -> None:
    run = train(tmp_path / "run", *graded.overrides, *GATES[name])
    routed = rows(run, "routing")
    for line in metrics(run):
        of_beta = [row for row in routed if row["step"] == line["step"] and row["domain"] == "beta"]
        assert line["teacher_gate/dropped/beta"] == line["teacher_gate/closed"] == len(of_beta) > 0
        assert line["teacher_gate/dropped/alpha"] == line["teacher_gate/unverifiable"] == 0
        assert {row["teacher"] for row in of_beta} == {None}
        assert "teacher_token_frac/beta" not in line
        assert line["teacher_token_frac/alpha"] == pytest.approx(1 - line["abstained"])
    if name == "verified":
        assert metrics(run)[-1]["teacher_gate/accuracy/alpha/alpha"] == 1
        assert metrics(run)[-1]["teacher_gate/accuracy/beta/beta"] == 0
        assert [line["teacher_gate/answers"] for line in metrics(run)] == [6, 0, 0, 0]
    if name == "reliable":
        assert metrics(run)[-1]["reliability/alpha/alpha"] > 0.8
        assert metrics(run)[-1]["reliability/beta/beta"] < 0.2


def test_teachers_that_are_all_right_change_nothing(world: TinyWorld, graded: TinyWorld, tmp_path: Path) -> None:
    plain = train(tmp_path / "plain", *graded.overrides)
    gated = train(tmp_path / "gated", *graded.overrides, "teacher_gate=always", "teacher_gate.passing=0")
    assert student_bytes(plain) == student_bytes(gated)


def test_prompts_without_a_verifier_are_refused_before_the_run(
    world: TinyWorld, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prompts = tmp_path / "prompts.jsonl"
    lines = [json.loads(line) for line in world.prompts.read_text().splitlines()]
    prompts.write_text("".join(json.dumps({key: line[key] for key in ("prompt", "domain")}) + "\n" for line in lines))
    arguments = [*world.overrides, *QUICK, "teacher_gate=always", f"data.path={prompts}"]
    assert main(["train", *arguments, f"run_dir={tmp_path / 'run'}"]) == 2
    assert "column 'verifier'" in capsys.readouterr().err


def test_outcome_for_rows_without_a_teacher_needs_an_outcome(
    world: TinyWorld, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["teacher_gate=always", "teacher_gate.unverified=outcome", f"run_dir={tmp_path / 'run'}"]
    assert main(["train", *world.overrides, *QUICK, *arguments]) == 2
    assert "mix.outcome" in capsys.readouterr().err


def test_rows_without_a_teacher_alone_learn_from_the_outcome(
    graded: TinyWorld, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # the student's completions of a prompt differ in score; teachers are judged by `graded` through the examiner
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []
    original = Trainer.scored

    def watched(self: Trainer, rollouts: Any, routing: Any, evidence: Any, rewards: Any) -> Any:
        varied = [float(rollout.sample % 2) for rollout in rollouts.rollouts]
        scored = original(self, rollouts, routing, evidence, varied)
        seen.append((routing.abstained[rollouts.token_rows], scored.outcome_advantages))
        return scored

    monkeypatch.setattr(Trainer, "scored", watched)
    arguments = ["teacher_gate=always", "mix.outcome=0.5", "group_size=2"]
    train(tmp_path / "never_blended", *graded.overrides, *arguments, "teacher_gate.unverified=outcome")
    assert len(seen) == 4
    for closed, advantages in seen:
        assert bool(closed.any())
        assert not bool(closed.all())
        assert bool((advantages[closed] != 0).all())
        assert bool((advantages[~closed] == 0).all())
    seen.clear()
    train(tmp_path / "blended", *graded.overrides, *arguments)
    assert all(bool((advantages != 0).all()) for _, advantages in seen)


@pytest.mark.parametrize("name", GATES)
def test_what_a_gate_learned_survives_an_interruption(name: str, graded: TinyWorld, tmp_path: Path) -> None:
    arguments = [*graded.overrides, *GATES[name], "max_steps=8", "optim.schedule=constant", "checkpoint.keep_last=9"]
    whole = train(tmp_path / "whole", *arguments)
    part = train(tmp_path / "part", *arguments, "checkpoint.every_steps=5")
    shutil.rmtree(part / "checkpoints" / "step-000008")
    (part / "summary.json").unlink()
    train(part, *arguments, "checkpoint.every_steps=5")
    assert student_bytes(part) == student_bytes(whole)
    for left, right in zip(metrics(part), metrics(whole), strict=True):
        gates = {key for key in right if key.startswith(("teacher_gate/", "reliability/"))}
        assert {key: left[key] for key in gates} == {key: right[key] for key in gates}
        assert gates


def test_a_router_reads_the_record_of_the_teachers_and_leaves_those_that_are_wrong(
    world: TinyWorld, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def scores(self: TeacherExaminer, teacher_id: str, prompts: Any) -> list[float]:
        return [float(teacher_id == "alpha" or prompt.domain == "beta") for prompt in prompts]

    monkeypatch.setattr(TeacherExaminer, "scores", scores)
    arguments = [*world.overrides, "eval=none", "router=reliability", "conflict=linear"]
    run = train(
        tmp_path / "run", *arguments, "teacher_gate=reliable", "teacher_gate.sharpness=0", "teacher_gate.floor=0"
    )
    found = {(row["step"] > 1, row["domain"]): row["weights"] for row in rows(run, "routing")}
    assert found[False, "alpha"] == found[False, "beta"] == {"alpha": 0.5, "beta": 0.5}, "nobody has a record yet"
    assert found[True, "alpha"] == {"alpha": 1.0, "beta": 0.0}
    assert found[True, "beta"] == {"alpha": 0.5, "beta": 0.5}, "as good as each other"
    assert main(["train", *arguments, f"run_dir={tmp_path / 'refused'}"]) == 2
    assert "Set teacher_gate=reliable" in capsys.readouterr().err
    assert not (tmp_path / "refused").exists()
