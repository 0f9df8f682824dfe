"""Runs whose router hears teachers or learns from rewards: what is logged, and that they resume to the same bits."""

from __future__ import annotations

import math
import shutil
from pathlib import Path

import pytest
from integration_runs import metrics, rows, student_bytes, train

from moteach.cli.main import main
from moteach.testing import TinyWorld

SMALL = ["eval=none", "sampler.prompts_per_step=12", "data.train_size=60", "data.evaluation_size=6", "tracker=[jsonl]"]


def test_a_router_that_learns_online_resumes_bitwise(tmp_path: Path) -> None:
    arguments = [*SMALL, "router=learned", "router.ask_every=2", "max_steps=5", "optim.schedule=constant"]
    whole = train(tmp_path / "whole", *arguments)
    part = train(tmp_path / "part", *arguments, "checkpoint.every_steps=3", "checkpoint.keep_last=9")
    shutil.rmtree(part / "checkpoints" / "step-000005")
    (part / "summary.json").unlink()
    train(part, *arguments, "checkpoint.every_steps=3", "checkpoint.keep_last=9")
    assert student_bytes(part) == student_bytes(whole)
    assert len({str(row["weights"]) for row in rows(whole, "routing")}) > 1
    for line, other in zip(metrics(whole), metrics(part), strict=True):
        for key in (
            "loss",
            "routing/entropy",
            "routing/abstain",
            *(f"routing/load/{n}" for n in ("math", "code", "search")),
        ):
            assert math.isfinite(line[key])
            assert line[key] == other[key]


@pytest.mark.parametrize("support", [["support=full"], ["support=sampled", "objective=policy_gradient"]])
def test_the_likelihood_router_trains(support: list[str], world: TinyWorld, tmp_path: Path) -> None:
    run = train(tmp_path / "run", *world.overrides, "eval=none", "max_steps=2", "router=likelihood", *support)
    for line in metrics(run):
        assert math.isfinite(line["loss"])
        assert line["routing/load/alpha"] + line["routing/load/beta"] + line["routing/abstain"] == pytest.approx(1.0)


def test_a_router_that_learns_from_rewards_refuses_prompts_without_a_verifier(
    world: TinyWorld, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", *world.overrides, "router=learned", f"run_dir={tmp_path / 'run'}"]) == 2
    assert "'verifier'" in capsys.readouterr().err
