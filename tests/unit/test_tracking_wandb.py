from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import pytest

from moteach.tracking.wandb import WandbTracker


def run(run_dir: Path, steps: range, *, start: int = 0, summary: dict | None = None) -> None:
    tracker = WandbTracker(project="tests")
    config = {"seed": 3, "rollout": {"api_key": "sk-in-the-config", "url": "https://me:sk-in-the-url@host/v1"}}
    tracker.start(run_dir=run_dir, config=config, step=start)
    for step in steps:
        tracker.log(step, {"loss": step + 0.5})
    tracker.finish(summary or {})


def record(run_dir: Path, *, until: bytes) -> bytes:
    """What the one run wrote; wandb's own process may still be writing after `finish` came back."""
    deadline = time.monotonic() + 60
    while True:
        (path,) = run_dir.glob("wandb/offline-run-*/*.wandb")
        content = path.read_bytes()
        if until in content or time.monotonic() > deadline:
            return content
        time.sleep(0.1)


def test_a_run_is_written_offline_without_secrets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["moteach train", "rollout.api_key=sk-in-the-arguments"])
    summary = {"domains": {"math": {"after": 0.75, "normalised": 0.5}}, "mean": 0.5, "worst": 0.25}
    run(tmp_path, range(1, 4), summary=summary)
    content = record(tmp_path, until=b"eval/worst")
    for word in (b"loss", b"train/step", b"seed", b"eval/math/normalised", b"eval/worst"):
        assert word in content
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    leaks = [path.name for path in files if b"sk-in-the" in path.read_bytes()]
    assert leaks == []


def test_a_second_life_goes_on_in_the_same_run(tmp_path: Path) -> None:
    run(tmp_path, range(1, 6))
    first = json.loads((tmp_path / "wandb_run.json").read_text())
    assert first["sent"] == 5
    run(tmp_path, range(3, 8), start=2)
    second = json.loads((tmp_path / "wandb_run.json").read_text())
    assert second == {"id": first["id"], "sent": 7}
    names = [path.name for path in tmp_path.glob("wandb/offline-run-*/*.wandb")]
    assert set(names) == {f"run-{first['id']}.wandb"}


def test_rows_that_were_sent_are_not_sent_again(tmp_path: Path) -> None:
    class Sent:
        id = "x"

        def __init__(self) -> None:
            self.rows: list[dict] = []

        def log(self, row: dict) -> None:
            self.rows.append(row)

    run(tmp_path, range(1, 4))
    tracker = WandbTracker(project="tests", mode="disabled")
    tracker.start(run_dir=tmp_path, config={}, step=1)
    tracker._run.finish()
    tracker._run = Sent()
    for step in range(2, 6):
        tracker.log(step, {"loss": 0.0})
    assert [row["train/step"] for row in tracker._run.rows] == [4, 5]


def test_finishing_a_run_that_never_started_is_harmless() -> None:
    WandbTracker().finish({"mean": 1.0})
