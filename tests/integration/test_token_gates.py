from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from integration_runs import metrics, student_bytes, train

from moteach.checkpoint import Checkpoints
from moteach.cli.main import main
from moteach.testing import TinyWorld
from moteach.trainer import Trainer

SOFT = ["router=uniform", "conflict=linear", "eval=none"]


def untimed(run: Path) -> list[dict[str, Any]]:
    return [
        {key: value for key, value in line.items() if not key.startswith(("time/", "step_time"))}
        for line in metrics(run)
    ]


@pytest.fixture(scope="module")
def learned(world: TinyWorld, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of four steps with a gate that learns, uninterrupted; nobody writes into it."""
    return train(tmp_path_factory.mktemp("learned") / "run", *world.overrides, *SOFT, "gate=learned")


def test_a_gate_that_learns_goes_on_bitwise_after_a_crash(world: TinyWorld, learned: Path, tmp_path: Path) -> None:
    record = Trainer.record

    def stop_at_three(self: Trainer, step: int, *values: Any) -> None:
        if step == 3:
            raise KeyboardInterrupt
        record(self, step, *values)

    same = [*world.overrides, *SOFT, "gate=learned", "checkpoint.every_steps=1"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "record", stop_at_three)
        assert main(["train", *same, f"run_dir={tmp_path / 'run'}"]) == 130
    run = train(tmp_path / "run", *same)
    assert student_bytes(run) == student_bytes(learned)
    assert untimed(run) == untimed(learned)
    assert metrics(run)[-1]["gate/tokens"] > 0
    left, right = (Checkpoints(folder / "checkpoints").load(4)[0]["gate"] for folder in (run, learned))
    assert left.keys() == right.keys()
    assert any(name.startswith("optimizer.") for name in left)
    assert all(bool((left[name] == right[name]).all()) for name in left)


def test_micro_batches_and_a_trace_change_nothing_but_what_is_written(
    world: TinyWorld, tmp_path: Path, learned: Path
) -> None:
    traced = train(tmp_path / "traced", *world.overrides, *SOFT, "gate=learned", "gate.trace=true")
    assert student_bytes(traced) == student_bytes(learned)
    table = pq.read_table(traced / "routing.parquet")
    assert table.column_names[7:] == ["sample", "position", "token", "token_id", "teacher_logprobs", "disagreement"]
    rows = table.to_pylist()
    tokens = [row for row in rows if row["position"] is not None]
    prompts = [row for row in rows if row["position"] is None]
    assert len(prompts) == len(pq.read_table(learned / "routing.parquet"))
    assert len(tokens) == sum(line["num_tokens"] for line in metrics(traced))
    assert all(row["token_id"] is None and row["teacher_logprobs"] is None for row in prompts)
    for row in tokens:
        said = list(row["teacher_logprobs"].values())
        assert row["disagreement"] == pytest.approx(max(said) - min(said), abs=1e-5)
        assert sum(row["weights"].values()) == pytest.approx(1.0, abs=1e-5)
        assert row["weights"][row["teacher"]] == row["confidence"] == max(row["weights"].values())
    completions = pq.read_table(traced / "rollouts.parquet").to_pylist()
    first = [row["token_id"] for row in tokens if row["step"] == 1 and row["prompt_id"] == completions[0]["prompt_id"]]
    assert first == completions[0]["completion_ids"]


def test_the_metrics_say_what_the_gate_did(world: TinyWorld, tmp_path: Path, finished: Path) -> None:
    run = train(tmp_path / "run", *world.overrides, *SOFT, "gate=confidence", "gate.hard=true", "max_steps=2")
    line = metrics(run)[-1]
    assert line["routing/gate_entropy"] == 0.0
    assert line["routing/gate_abstain"] == 0.0
    assert line["routing/gate_load/alpha"] + line["routing/gate_load/beta"] == pytest.approx(1.0)
    assert 0.0 < line["routing/switch_rate"] < 1.0
    plain = metrics(finished)[-1]
    assert plain["routing/switch_rate"] == 0.0
    assert not [key for key in plain if key.startswith("routing/gate")]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["gate=confidence", "support=sampled", "objective=policy_gradient"], "reads whole distributions"),
        (["gate=switch_penalty", "gate.inner=confidense"], "did you mean 'confidence'"),
        (["gate=switch_penalty", "gate.inner=switch_penalty"], "composes another one"),
        (["gate=switch_penalty", "gate.inner_arguments={temprature:1.0}"], "did you mean 'temperature'"),
        (["gate=confidence", "gate.temperature=0"], r"gate.temperature: expected a finite number above 0"),
        (["gate=trust", "gate.sharpness=-1"], "gate.sharpness"),
        (["gate=expert_align"], "reference"),
    ],
)
def test_what_cannot_work_is_refused_in_one_line(
    world: TinyWorld, tmp_path: Path, overrides: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    assert main(["train", *world.overrides, "router=uniform", *overrides, f"run_dir={tmp_path / 'run'}"]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert message in lines[0]
    assert not (tmp_path / "run").exists()


def test_explain_shows_a_traced_run_by_the_teacher_of_each_token(
    world: TinyWorld, tmp_path: Path, finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = train(tmp_path / "run", *world.overrides, *SOFT, "gate=confidence", "gate.trace=true", "max_steps=2")
    capsys.readouterr()
    out = tmp_path / "out.json"
    assert main(["route", "explain", f"run={run}", "nearest=1", f"out={out}"]) == 0
    said = capsys.readouterr().out
    shown = json.loads(out.read_text())["rows"]
    assert sorted(row["domain"] for row in shown) == ["alpha", "beta"]
    rows = [row for row in pq.read_table(run / "routing.parquet").to_pylist() if row["position"] is not None]
    for entry in shown:
        own = [row for row in rows if row["step"] == 2 and row["prompt_id"] == entry["prompt_id"]]
        assert entry["teachers"] == [row["teacher"] for row in own]
        assert f"{entry['prompt_id']}  " in said
    assert main(["route", "explain", f"run={finished}"]) == 2
    assert "gate.trace=true" in capsys.readouterr().err


def test_explain_lets_the_student_of_a_run_answer_a_new_prompt_and_writes_nothing_into_the_run(
    world: TinyWorld, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = train(tmp_path / "run", *world.overrides, *SOFT, "gate=confidence", "max_steps=2")
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    capsys.readouterr()
    out = tmp_path / "out.json"
    assert main(["route", "explain", "a=b", f"run={run}", f"out={out}"]) == 0
    (entry,) = json.loads(out.read_text())["rows"]
    assert entry["prompt_id"] == "explained"
    assert len(entry["tokens"]) == len(entry["weights"]) > 0
    for weights, teacher in zip(entry["weights"], entry["teachers"], strict=True):
        assert sum(weights.values()) == pytest.approx(1.0)
        assert teacher == max(weights, key=weights.__getitem__)
        assert 0.5 <= weights[teacher] < 1.0, "soft: the gate weighs, the router would have given halves"
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*")} == before
    assert main(["route", "explain", "a=b", f"run={tmp_path}"]) == 2
    assert "config.yaml" in capsys.readouterr().err
