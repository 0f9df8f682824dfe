from __future__ import annotations

import json
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from integration_runs import command, environment, metrics, rows, snapshot, student_bytes, train

from moteach.cli.main import main
from moteach.testing import TinyWorld, tiny_model, write_tiny_world
from moteach.trainer import Trainer

EVERY, STEPS = 8, 24
TIMINGS = ("time/", "step_time")


def killed_when(arguments: Sequence[str], cwd: Path, moment: Callable[[], bool]) -> None:
    """Starts a run and kills it at a moment, which still holds when the process can do nothing more.

    The process is stopped first: a moment that has passed by then is waited for again.
    """
    with (cwd / "killed.log").open("ab") as log:
        process = subprocess.Popen(command("train", *arguments), cwd=cwd, env=environment(), stdout=log, stderr=log)
        try:
            deadline = time.monotonic() + 120
            while True:
                assert process.poll() is None, (cwd / "killed.log").read_text()
                assert time.monotonic() < deadline
                if not moment():
                    time.sleep(0.0005)
                    continue
                process.send_signal(signal.SIGSTOP)
                if moment():
                    break
                process.send_signal(signal.SIGCONT)
        finally:
            process.kill()
            process.wait()
    assert process.returncode == -signal.SIGKILL


def steps_logged(run: Path) -> int:
    """Whole lines of `metrics.jsonl`."""
    path = run / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def checkpoints(run: Path) -> list[int]:
    """Steps of the complete checkpoints, ascending."""
    return sorted(int(path.name.removeprefix("step-")) for path in (run / "checkpoints").glob("step-*"))


def half_written(run: Path) -> list[int]:
    """Steps of the checkpoints that are being written."""
    return [int(path.name.removeprefix(".tmp-step-")) for path in (run / "checkpoints").glob(".tmp-step-*")]


def untimed(run: Path) -> list[dict[str, float]]:
    return [{key: value for key, value in line.items() if not key.startswith(TIMINGS)} for line in metrics(run)]


def test_run_killed_three_times_ends_bitwise_as_the_uninterrupted_one(world: TinyWorld, tmp_path: Path) -> None:
    longer = [f"max_steps={STEPS}", f"checkpoint.every_steps={EVERY}", "rollout.max_new_tokens=24"]
    arguments = [*world.overrides, *longer]
    reference, run = tmp_path / "reference", tmp_path / "run"
    train(reference, *arguments)
    same = [*arguments, f"run_dir={run}"]

    # Right after a step was logged comes the generation of the next one; there is no checkpoint to go back to.
    killed_when(same, tmp_path, lambda: 3 <= steps_logged(run) < EVERY)
    assert not checkpoints(run)

    # A checkpoint is complete, the steps after it are lost.
    killed_when(same, tmp_path, lambda: steps_logged(run) > max(checkpoints(run), default=STEPS) + 1)
    assert checkpoints(run)

    # A checkpoint is half written; the one before it is the one to go back to.
    killed_when(same, tmp_path, lambda: bool(half_written(run)))
    assert half_written(run) == [steps_logged(run)] == [checkpoints(run)[-1] + EVERY]

    train(run, *arguments)
    assert student_bytes(run) == student_bytes(reference)
    assert [line["step"] for line in metrics(run)] == list(range(1, STEPS + 1))
    assert untimed(run) == untimed(reference)
    for table in ("routing", "rollouts"):
        assert rows(run, table) == rows(reference, table)
    assert (run / "summary.json").read_bytes() == (reference / "summary.json").read_bytes()
    assert {path.name for path in run.rglob("*")} == {path.name for path in reference.rglob("*")}


def interrupted(run: Path, world: TinyWorld) -> Path:
    """Starts a run of four steps with a checkpoint at each and stops it, as Ctrl-C does, when step 4 is to be written."""
    record = Trainer.record

    def stop_at_four(self: Trainer, step: int, *values: Any) -> None:
        if step == 4:
            raise KeyboardInterrupt
        record(self, step, *values)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "record", stop_at_four)
        every = ["checkpoint.every_steps=1", "checkpoint.keep_last=4"]
        assert main(["train", *world.overrides, *every, f"run_dir={run}"]) == 130
    shutil.rmtree(run / "checkpoints" / "step-000003")
    return run


@pytest.fixture(scope="module")
def crash_site(world: TinyWorld, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that died after step 3 of 4, with checkpoints at 1 and 2. Tests work on copies."""
    return interrupted(tmp_path_factory.mktemp("crash") / "run", world)


@pytest.fixture
def crashed(crash_site: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(crash_site, tmp_path / "run"))


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """Runs `train`, which must refuse in one line; returns it."""
    capsys.readouterr()
    assert main(["train", *arguments]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    return lines[0]


@pytest.mark.parametrize("override", ["optim.lr=1e-3", "seed=1", "max_steps=5", "eval.prompts_per_domain=3"])
def test_other_settings_are_refused_by_name(
    world: TinyWorld, crashed: Path, override: str, capsys: pytest.CaptureFixture[str]
) -> None:
    before = snapshot(crashed)
    line = refused(capsys, *world.overrides, f"run_dir={crashed}", override)
    key, _, value = override.partition("=")
    assert f"{key}: was " in line
    assert str(json.loads(value)) in line
    assert snapshot(crashed) == before


def test_other_data_and_other_weights_at_the_same_place_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    private = write_tiny_world(tmp_path / "world")
    run = interrupted(tmp_path / "run", private)
    before = snapshot(run)
    other = tiny_model(seed=99, hidden=32, layers=1, head_dim=16)
    other.save_pretrained(tmp_path / "other")  # type: ignore[operator]
    changes = {
        "data (prompts)": (private.prompts, private.prompts.read_bytes().replace(b"alpha 12+5=", b"alpha 12+6=")),
        "student.model (weights)": (private.student / "model.safetensors", None),
        "experts.beta (weights)": (private.cards / "weights" / "beta" / "model.safetensors", None),
    }
    for key, (file, content) in changes.items():
        original = file.read_bytes()
        file.write_bytes(content or (tmp_path / "other" / "model.safetensors").read_bytes())
        line = refused(capsys, *private.overrides, f"run_dir={run}")
        assert f"{key}: was " in line
        assert not [other for other in changes if other != key and other in line]
        assert snapshot(run) == before
        file.write_bytes(original)
    train(run, *private.overrides)


@pytest.mark.parametrize("override", ["tracker=[]", "checkpoint.every_steps=0", "checkpoint.keep_last=1"])
def test_what_does_not_change_the_weights_may_change(
    world: TinyWorld, crashed: Path, finished: Path, override: str
) -> None:
    train(crashed, *world.overrides, override)
    assert student_bytes(crashed) == student_bytes(finished)


def test_resumed_metrics_are_cut_back_to_the_checkpoint(world: TinyWorld, crashed: Path, finished: Path) -> None:
    assert steps_logged(crashed) == 3
    with (crashed / "metrics.jsonl").open("a") as torn:
        torn.write('{"step": 4, "lo')
    train(crashed, *world.overrides)
    assert untimed(crashed) == untimed(finished)


def test_finished_run_prints_its_table_again_and_writes_nothing(
    world: TinyWorld, finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = snapshot(finished)
    capsys.readouterr()
    assert main(["train", *world.overrides, f"run_dir={finished}"]) == 0
    out = capsys.readouterr().out
    assert "finished" in out
    assert "alpha" in out
    assert "normalised" in out
    assert snapshot(finished) == before


def test_folder_with_other_files_is_refused_and_left_alone(
    world: TinyWorld, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "thesis"
    folder.mkdir()
    (folder / "chapter.txt").write_text("mine")
    before = snapshot(folder)
    assert "holds other files" in refused(capsys, *world.overrides, f"run_dir={folder}")
    assert snapshot(folder) == before


@pytest.mark.parametrize("file", ["student.safetensors", "optimizer.safetensors", "state.json", "manifest.json"])
def test_damaged_checkpoint_is_refused(
    world: TinyWorld, crashed: Path, file: str, capsys: pytest.CaptureFixture[str]
) -> None:
    damaged = crashed / "checkpoints" / "step-000002" / file
    content = bytearray(damaged.read_bytes())
    content[len(content) // 2] ^= 0xFF
    damaged.write_bytes(content)
    before = snapshot(crashed)
    assert str(damaged) in refused(capsys, *world.overrides, f"run_dir={crashed}")
    changed = {name for name, digest in snapshot(crashed).items() if before.get(name) != digest}
    assert changed <= {"config.yaml"}


def test_an_earlier_checkpoint_gives_the_same_end(world: TinyWorld, crashed: Path, finished: Path) -> None:
    shutil.rmtree(crashed / "checkpoints" / "step-000002")
    train(crashed, *world.overrides)
    assert student_bytes(crashed) == student_bytes(finished)
    assert untimed(crashed) == untimed(finished)
    assert rows(crashed, "rollouts") == rows(finished, "rollouts")
