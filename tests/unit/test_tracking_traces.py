from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import pandas as pd
import pytest
import torch

from moteach.tracking.traces import Traces
from moteach.types import Prompt, Rollout, RolloutBatch, Routing


def decode(ids: Sequence[int]) -> str:
    return " ".join(map(str, ids))


def batch(step: int) -> tuple[RolloutBatch, Routing]:
    """Prompt `a` has two samples, prompt `b` one; row `b` has no teacher."""
    rollouts = [
        Rollout(
            prompt=Prompt(prompt_id=f"{name}{step}", text=f"text {name}", token_ids=(1,), domain=domain),
            sample=sample,
            completion_ids=(step, sample),
            rollout_logprobs=(-0.5, -1.0),
            finished=sample == 0,
            student_version=step - 1,
        )
        for name, domain, sample in (("a", "math", 0), ("a", "math", 1), ("b", None, 0))
    ]
    routing = Routing(
        teacher_ids=("alpha", "beta"),
        prompt_ids=tuple(rollout.prompt.prompt_id for rollout in rollouts),
        weights=torch.tensor([[0.25, 0.75], [0.25, 0.75], [0.0, 0.0]]),
        confidence=torch.tensor([0.75, 0.75, 0.0]),
        abstained=torch.tensor([False, False, True]),
    )
    return RolloutBatch.from_rollouts(rollouts, pad_id=0), routing


def record(traces: Traces, steps: range) -> None:
    for step in steps:
        rollouts, routing = batch(step)
        traces.record(step, rollouts, routing, [1.0, 0.0, math.nan])


def begin(run_dir: Path, step: int = 0, *, completions: bool = True) -> Traces:
    traces = Traces(run_dir, decode=decode, completions=completions)
    traces.start(step)
    return traces


def values(column: pd.Series) -> list:
    return [None if pd.isna(value) else value for value in column]


def test_routing_has_a_row_a_prompt_and_says_who_taught_it(tmp_path: Path) -> None:
    traces = begin(tmp_path)
    record(traces, range(1, 3))
    traces.flush(2)
    traces.finish()
    table = pd.read_parquet(tmp_path / "routing.parquet")
    assert list(table.columns) == ["step", "prompt_id", "domain", "weights", "teacher", "confidence", "abstained"]
    assert table["step"].tolist() == [1, 1, 2, 2]
    assert table["prompt_id"].tolist() == ["a1", "b1", "a2", "b2"]
    assert values(table["domain"]) == ["math", None, "math", None]
    assert table["weights"][0] == {"alpha": 0.25, "beta": 0.75}
    assert values(table["teacher"]) == ["beta", None, "beta", None]
    assert table["confidence"].tolist() == [0.75, 0.0, 0.75, 0.0]
    assert table["abstained"].tolist() == [False, True, False, True]


def test_rollouts_have_a_row_a_completion(tmp_path: Path) -> None:
    traces = begin(tmp_path)
    record(traces, range(3, 4))
    traces.flush(3)
    traces.finish()
    table = pd.read_parquet(tmp_path / "rollouts.parquet")
    assert table["sample"].tolist() == [0, 1, 0]
    assert values(table["teacher"]) == ["beta", "beta", None]
    assert table["prompt"].tolist() == ["text a", "text a", "text b"]
    assert table["completion"].tolist() == ["3 0", "3 1", "3 0"]
    assert [list(ids) for ids in table["completion_ids"]] == [[3, 0], [3, 1], [3, 0]]
    assert [list(values) for values in table["rollout_logprobs"]] == [[-0.5, -1.0]] * 3
    assert table["finished"].tolist() == [True, False, True]
    assert table["student_version"].tolist() == [2, 2, 2]
    assert table["reward"][:2].tolist() == [1.0, 0.0]
    assert math.isnan(table["reward"][2])


def test_parts_are_joined_in_order_and_removed(tmp_path: Path) -> None:
    traces = begin(tmp_path)
    for end in (2, 4, 6):
        record(traces, range(end - 1, end + 1))
        traces.flush(end)
    assert sorted(path.name for path in (tmp_path / "traces").glob("routing-*")) == [
        "routing-000002.parquet", "routing-000004.parquet", "routing-000006.parquet",
    ]  # fmt: skip
    traces.finish()
    assert pd.read_parquet(tmp_path / "routing.parquet")["step"].unique().tolist() == [1, 2, 3, 4, 5, 6]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["rollouts.parquet", "routing.parquet"]


def test_a_resumed_run_neither_loses_nor_doubles_rows(tmp_path: Path) -> None:
    first = begin(tmp_path)
    for end in (2, 4):
        record(first, range(end - 1, end + 1))
        first.flush(end)
    record(first, range(5, 6))  # crashed before it was flushed
    (tmp_path / "traces" / "routing-000006.parquet.tmp").write_text("torn")
    second = begin(tmp_path, step=2)
    assert sorted(path.name for path in (tmp_path / "traces").iterdir()) == [
        "rollouts-000002.parquet", "routing-000002.parquet",
    ]  # fmt: skip
    record(second, range(3, 6))
    second.flush(5)
    second.finish()
    for name, per_step in (("routing", 2), ("rollouts", 3)):
        steps = pd.read_parquet(tmp_path / f"{name}.parquet")["step"]
        assert steps.value_counts().to_dict() == dict.fromkeys(range(1, 6), per_step)


def test_finishing_again_keeps_the_joined_files(tmp_path: Path) -> None:
    """A crash after the join and before the summary starts the run once more, at its last step."""
    traces = begin(tmp_path)
    record(traces, range(1, 3))
    traces.flush(2)
    traces.finish()
    again = begin(tmp_path, step=2)
    again.flush(2)
    again.finish()
    assert len(pd.read_parquet(tmp_path / "routing.parquet")) == 4
    assert not (tmp_path / "traces").exists()


def test_a_crash_while_parts_are_deleted_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    traces = begin(tmp_path)
    for end in (1, 2):
        record(traces, range(end, end + 1))
        traces.flush(end)
    calls = []

    def crash(path: Path, ignore_errors: bool = False) -> None:
        if ignore_errors:
            return
        calls.append(path)
        next(path.glob("routing-000001*")).unlink()
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("moteach.tracking.traces.shutil.rmtree", crash)
        with pytest.raises(KeyboardInterrupt):
            traces.finish()
    assert calls
    again = begin(tmp_path, step=2)
    again.finish()
    assert pd.read_parquet(tmp_path / "routing.parquet")["step"].unique().tolist() == [1, 2]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["rollouts.parquet", "routing.parquet"]


def test_completions_can_be_left_out(tmp_path: Path) -> None:
    traces = begin(tmp_path, completions=False)
    record(traces, range(1, 2))
    traces.flush(1)
    traces.finish()
    assert [path.name for path in tmp_path.iterdir()] == ["routing.parquet"]
