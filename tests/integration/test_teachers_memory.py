"""A run whose teachers wait on disk is the run whose teachers stay in memory."""

from __future__ import annotations

from pathlib import Path

import pytest
from integration_runs import metrics, student_bytes, train

from moteach.cli.main import main
from moteach.testing import TinyWorld


def test_a_run_ends_in_the_same_bits_whatever_the_memory_of_its_teachers(world: TinyWorld, tmp_path: Path) -> None:
    size = (world.cards / "weights" / "alpha" / "model.safetensors").stat().st_size
    kept = train(tmp_path / "kept", *world.overrides, "optim.micro_batch_size=3")
    tight = train(tmp_path / "tight", *world.overrides, "optim.micro_batch_size=3", f"teachers.memory={size}B")
    assert student_bytes(tight) == student_bytes(kept)
    rounded = train(tmp_path / "rounded", *world.overrides, "eval=none", "teachers.hidden_dtype=bfloat16")
    exact, near = (metrics(run)[0]["loss"] for run in (kept, rounded))
    assert exact != near
    assert near == pytest.approx(exact, rel=0.05)


def test_too_little_memory_for_one_teacher_ends_before_the_first_step(
    world: TinyWorld, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", *world.overrides, "teachers.memory=1KiB", f"run_dir={tmp_path / 'run'}"]) == 2
    assert "of the largest expert, got 1024" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
