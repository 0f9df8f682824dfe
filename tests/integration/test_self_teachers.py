"""Runs whose teacher is the student itself: as it was, averaged, or told the answer."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from integration_runs import metrics, rows, student_bytes, train

from moteach.cli.main import main
from moteach.testing import TinyWorld, write_tiny_world


@pytest.fixture(scope="module")
def selves(tmp_path_factory: pytest.TempPathFactory) -> TinyWorld:
    """A world in which the student teaches domain beta itself, by three cards."""
    world = write_tiny_world(tmp_path_factory.mktemp("selves"))
    for name, text in {
        "was": "student: snapshot\nsnapshot_steps: [0, 2]\n",
        "mean": "student: ema\ndecay: 0.5\n",
        "told": "student: live\ncontext: '{answer} {prompt}'\n",
    }.items():
        (world.cards / f"{name}.yaml").write_text(f"{text}domains: [beta]\n")
    kept = [word for word in world.overrides if not word.startswith("experts=")]
    return replace(world, overrides=[*kept, "eval=none"])


@pytest.mark.parametrize("name", ["was", "mean", "told"])
@pytest.mark.parametrize("support", ["full", "sampled"])
def test_the_student_teaches_itself(name: str, support: str, selves: TinyWorld, tmp_path: Path) -> None:
    more = [] if support == "full" else ["support=sampled", "objective=policy_gradient"]
    run = train(tmp_path / "run", *selves.overrides, f"experts=[alpha,{name}]", *more)
    assert {row["teacher"] for row in rows(run, "routing") if row["domain"] == "beta"} == {name}
    first, *later = (line["divergence/beta"] for line in metrics(run))
    if name == "told":
        assert abs(first) > 1e-3
    else:
        assert first == pytest.approx(0.0, abs=1e-6), "at the first step the student is what it was"
        assert any(abs(value) > 1e-6 for value in later)


@pytest.mark.parametrize("name", ["was", "mean"])
def test_what_the_student_was_survives_an_interruption(name: str, selves: TinyWorld, tmp_path: Path) -> None:
    arguments = [*selves.overrides, f"experts=[alpha,{name}]", "max_steps=6", "optim.schedule=constant"]
    arguments += ["checkpoint.keep_last=9"]
    whole = train(tmp_path / "whole", *arguments)
    part = train(tmp_path / "part", *arguments, "checkpoint.every_steps=3")
    shutil.rmtree(part / "checkpoints" / "step-000006")
    (part / "summary.json").unlink()
    train(part, *arguments, "checkpoint.every_steps=3")
    assert student_bytes(part) == student_bytes(whole)
    assert [line["divergence/beta"] for line in metrics(part)] == [line["divergence/beta"] for line in metrics(whole)]


def test_the_teacher_of_a_run_with_evaluation_is_not_measured_before_it(
    selves: TinyWorld, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    kept = [word for word in selves.overrides if word != "eval=none"]
    train(tmp_path / "run", *kept, "experts=[alpha,was]")
    assert "since it is the student or told more: was" in capsys.readouterr().out
    assert (
        main(
            [
                "experts",
                "check",
                *[w for w in kept if w.startswith(("student", "data", "expert_path"))],
                "experts=[was]",
            ]
        )
        == 0
    )
    assert "the student itself (snapshot)" in capsys.readouterr().out


def test_the_student_needs_no_alignment(selves: TinyWorld, tmp_path: Path) -> None:
    arguments = [
        *selves.overrides,
        "experts=[alpha,was]",
        "support=sampled",
        "objective=policy_gradient",
        "max_steps=2",
    ]
    plain = train(tmp_path / "plain", *arguments)
    aligned = train(tmp_path / "aligned", *arguments, "alignment=bytes")
    assert student_bytes(plain) == student_bytes(aligned)


def test_prompts_without_an_answer_end_the_run_before_it_starts(
    selves: TinyWorld, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(f'{{"prompt": "{i}+1=", "domain": "beta"}}\n' for i in range(60)))
    arguments = [*selves.overrides, "experts=[told]", f"data.path={prompts}", f"run_dir={tmp_path / 'run'}"]
    assert main(["train", *arguments]) == 2
    assert "Add the column 'answer'" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
