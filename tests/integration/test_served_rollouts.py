"""A run whose rollouts a server writes: weights arrive after every step, and one step ahead is one step stale."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from integration_runs import metrics, rows, student_tensors, train
from safetensors.torch import load_file

from moteach.catalogue.modeling import load_causal_lm
from moteach.cli.main import main
from moteach.testing import TinyWorld

sys.path.append(str(Path(__file__).resolve().parents[1] / "contracts"))

from fake_rollouts import FakeRollouts


@pytest.fixture
def server(world: TinyWorld) -> Iterator[FakeRollouts]:
    with FakeRollouts(load_causal_lm(str(world.student)).eval()) as fake:
        yield fake


def served(world: TinyWorld, server: FakeRollouts, *more: str) -> list[str]:
    return [*world.overrides, "rollout=vllm", f"rollout.url={server.url}", "rollout.backoff=0.0", "eval=none", *more]


def versions(run: Path) -> list[set[int]]:
    found: dict[int, set[int]] = {}
    for row in rows(run, "rollouts"):
        found.setdefault(row["step"], set()).add(row["student_version"])
    return [found[step] for step in sorted(found)]


def test_in_step_every_rollout_is_the_students_own(world: TinyWorld, server: FakeRollouts, tmp_path: Path) -> None:
    run = train(tmp_path / "run", *served(world, server, "token_weights=[ratio_mask]"))
    lines = metrics(run)
    assert [line["rollouts/staleness"] for line in lines] == [0.0] * 4
    assert versions(run) == [{0}, {1}, {2}, {3}]
    assert all(line["rollouts/log_ratio_max"] < 1e-3 and line["rollouts/masked"] == 0.0 for line in lines)
    assert all(line["rollouts/sync_difference"] < 1e-3 for line in lines)
    assert all(math.isfinite(line["loss"]) for line in lines)
    # one sync before the run, one before the first step, one after each
    assert len(server.folders) == 6


def test_one_step_ahead_is_one_step_stale_and_the_ratio_is_measured(
    world: TinyWorld, server: FakeRollouts, tmp_path: Path
) -> None:
    more = (
        "rollout.async_steps=1",
        "token_weights=[ratio_mask]",
        "token_weights.ratio_mask.high=1.02",
        "optim.lr=0.01",
    )
    run = train(tmp_path / "run", *served(world, server, *more))
    lines = metrics(run)
    assert versions(run) == [{0}, {0}, {1}, {2}]
    assert [line["rollouts/staleness_max"] for line in lines] == [0.0, 1.0, 1.0, 1.0]
    assert lines[0]["rollouts/masked"] == 0.0
    assert all(line["rollouts/masked"] > 0.0 and line["rollouts/divergence_k3"] > 1e-4 for line in lines[1:])
    assert all(line["token_weights/kept"] == pytest.approx(1 - line["rollouts/masked"]) for line in lines)
    assert all(line["rollouts/ahead_missed"] == 0.0 for line in lines)


def test_prompts_are_the_same_in_step_and_ahead(world: TinyWorld, server: FakeRollouts, tmp_path: Path) -> None:
    runs = [train(tmp_path / f"run{steps}", *served(world, server, f"rollout.async_steps={steps}")) for steps in (0, 1)]
    one, other = ([(row["step"], row["prompt_id"]) for row in rows(run, "rollouts")] for run in runs)
    assert one == other


def test_a_run_goes_on_from_its_checkpoint(world: TinyWorld, server: FakeRollouts, tmp_path: Path) -> None:
    given = served(world, server, "rollout.async_steps=1", "checkpoint.every_steps=2", "optim.schedule=constant")
    broken = iter([False] * 4 + [True])
    load = server.load
    server.load = lambda folder: None if next(broken) else load(folder)  # type: ignore[method-assign]
    assert main(["train", *given, f"run_dir={tmp_path / 'run'}"]) == 2
    assert server.paused
    server.load = load  # type: ignore[method-assign]
    train(tmp_path / "run", *given)
    # the first step after the checkpoint is written by the newest weights
    assert versions(tmp_path / "run") == [{0}, {0}, {2}, {2}]


def test_a_low_rank_update_reaches_the_server_merged(world: TinyWorld, server: FakeRollouts, tmp_path: Path) -> None:
    pytest.importorskip("peft")
    run = train(tmp_path / "run", *served(world, server, "student.lora.rank=4", "optim.lr=0.01"))
    written, first = student_tensors(run), load_file(world.student / "model.safetensors")
    held = server.model.state_dict()
    for name, value in written.items():
        torch.testing.assert_close(held[name], value, rtol=0, atol=1e-6)
    assert {name for name, value in first.items() if not torch.equal(value, written[name])} == {
        name for name in first if "_proj" in name
    }
    assert versions(run) == [{0}, {1}, {2}, {3}]
    assert all(line["rollouts/sync_difference"] < 1e-3 for line in metrics(run))


def test_a_stale_server_ends_the_run_in_one_line(
    world: TinyWorld, server: FakeRollouts, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    server.loading = "keep"
    assert main(["train", *served(world, server), f"run_dir={tmp_path / 'run'}"]) == 2
    assert "completions would be written by another model" in " ".join(capsys.readouterr().err.split())


def test_steps_ahead_are_refused_in_process(
    world: TinyWorld, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", *world.overrides, "rollout.async_steps=1", f"run_dir={tmp_path / 'run'}"]) == 2
    assert "async_steps" in capsys.readouterr().err
