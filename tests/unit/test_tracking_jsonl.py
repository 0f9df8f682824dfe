from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from moteach.tracking.jsonl import JsonlTracker


def write(run_dir: Path, steps: range, *, start: int = 0, life: int = 1) -> None:
    tracker = JsonlTracker()
    tracker.start(run_dir=run_dir, config={}, step=start)
    for step in steps:
        tracker.log(step, {"loss": step / 2, "life": life})
    tracker.finish({})


def rows(run_dir: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def test_one_line_a_step_with_the_step_first(tmp_path: Path) -> None:
    write(tmp_path, range(1, 4))
    assert [row["step"] for row in rows(tmp_path)] == [1, 2, 3]
    assert (tmp_path / "metrics.jsonl").read_text().startswith('{"step": 1, "loss": 0.5')


def test_a_line_is_readable_before_the_run_ends(tmp_path: Path) -> None:
    tracker = JsonlTracker()
    tracker.start(run_dir=tmp_path, config={}, step=0)
    tracker.log(1, {"loss": 1.0})
    assert rows(tmp_path) == [{"step": 1, "loss": 1.0}]
    tracker.finish({})


def test_what_json_cannot_hold_is_null(tmp_path: Path) -> None:
    tracker = JsonlTracker()
    tracker.start(run_dir=tmp_path, config={}, step=0)
    tracker.log(1, {"a": math.nan, "b": math.inf, "c": -math.inf, "d": 0.0})
    tracker.finish({})
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1, "a": null, "b": null, "c": null, "d": 0.0}\n'


def test_a_resumed_run_drops_later_rows(tmp_path: Path) -> None:
    write(tmp_path, range(1, 8))
    write(tmp_path, range(5, 7), start=4, life=2)
    assert [(row["step"], row["life"]) for row in rows(tmp_path)] == [(1, 1), (2, 1), (3, 1), (4, 1), (5, 2), (6, 2)]


@pytest.mark.parametrize("tail", ['{"step": 4, "lo', "4", '"4"', "\x00\x00\x00"])
def test_a_torn_last_line_is_dropped(tmp_path: Path, tail: str) -> None:
    write(tmp_path, range(1, 4))
    path = tmp_path / "metrics.jsonl"
    path.write_text(path.read_text() + tail)
    write(tmp_path, range(4, 6), start=3, life=2)
    assert [row["step"] for row in rows(tmp_path)] == [1, 2, 3, 4, 5]


def test_a_last_line_without_its_line_break_stays_a_line(tmp_path: Path) -> None:
    write(tmp_path, range(1, 4))
    path = tmp_path / "metrics.jsonl"
    path.write_text(path.read_text().rstrip("\n"))
    write(tmp_path, range(4, 5), start=3)
    assert [row["step"] for row in rows(tmp_path)] == [1, 2, 3, 4]


def test_a_run_from_the_start_keeps_nothing(tmp_path: Path) -> None:
    write(tmp_path, range(1, 4))
    write(tmp_path, range(1, 2), life=2)
    assert [(row["step"], row["life"]) for row in rows(tmp_path)] == [(1, 2)]


def test_finishing_twice_is_harmless_and_logging_unopened_is_a_defect(tmp_path: Path) -> None:
    tracker = JsonlTracker()
    with pytest.raises(RuntimeError, match="log before start"):
        tracker.log(1, {})
    tracker.start(run_dir=tmp_path, config={}, step=0)
    tracker.finish({})
    tracker.finish({})
