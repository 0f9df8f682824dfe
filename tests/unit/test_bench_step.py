from __future__ import annotations

import json
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from moteach.bench._floor import FloorStep
from moteach.bench._interleave import Pair
from moteach.bench.step import PARTS, different_work, summarise, table_rows
from moteach.cli.main import main
from moteach.testing import write_tiny_world


def pair(scale: float, *, tokens: int = 100, floor_tokens: int = 50) -> Pair:
    seconds = {"generate": 4.0, "route": 1.0, "score": 2.0, "update": 3.0, "record": 0.5, "other": 0.5}
    floor = FloorStep(seconds={"generate": 2.0, "score": 2.5, "update": 0.5}, tokens=floor_tokens, loss=1.0)
    return Pair(seconds={k: scale * v for k, v in seconds.items()}, total=scale * 11.0, tokens=tokens, floor=floor)


def test_rows_report_medians_and_compare_only_the_same_work():
    rows = {row["part"]: row for row in table_rows([pair(1.0), pair(2.0), pair(9.0)])}
    assert rows["generate"]["moteach_ms"] == 8000.0
    assert rows["generate"]["moteach_min_ms"] == 4000.0
    assert rows["generate"]["ratio"] == 4.0
    assert rows["generate"]["share"] == pytest.approx(8 / 22)
    assert rows["score"]["ratio"] is None
    assert rows["update"]["floor_ms"] == 500.0
    assert rows["score + update"]["ratio"] == pytest.approx(10 / 3)
    assert rows["route"]["floor_ms"] is None
    assert rows["total"]["ratio"] == pytest.approx(22 / 5)
    assert rows["total"]["share"] == 1.0


def test_the_ratio_per_token_accounts_for_different_lengths():
    summary = summarise([pair(1.0)])
    assert summary["ratio"] == pytest.approx(11 / 5)
    assert summary["ratio_per_token"] == pytest.approx((11 / 100) / (5 / 50))
    assert summary["tokens_per_second"] == pytest.approx(100 / 11)


def test_choices_that_the_floor_does_not_follow_are_named():
    cfg = OmegaConf.create(
        {
            "router": {"_target_": "moteach.routing.label.UniformRouter"},
            "objective": {"_target_": "moteach.objectives.divergence.DivergenceObjective", "student_temperature": 1.0},
            "divergence": {"_target_": "moteach.divergences.full.ReverseKL"},
            "rollout": {"temperature": 1.0, "top_p": 0.9, "top_k": 0},
            "optim": {"micro_batch_size": None, "updates_per_step": 1},
            "balance": {"_target_": "moteach.objectives.balance.TokenShare"},
            "token_weights": {},
            "mix": {"outcome": 0.0, "reference": 0.5, "supervised": 0.0},
        }
    )
    assert different_work(cfg, merged=True) == [
        "several teachers per prompt",
        "router._target_=moteach.routing.label.UniformRouter",
        "rollout.top_p=0.9",
        "balance._target_=moteach.objectives.balance.TokenShare",
        "mix.reference=0.5",
    ]


def test_the_benchmark_measures_both_arms_on_any_config_of_train(tmp_path, capsys):
    world = write_tiny_world(tmp_path / "world")
    out = tmp_path / "step.json"
    argv = ["bench", "step", *world.overrides, "steps=2", "warmup=1", f"out={out}"]
    assert main(argv) == 0
    report = json.loads(out.read_text())
    rows = {row["part"]: row for row in report["rows"]}
    assert set(rows) == {*PARTS, "score + update", "total"}
    assert rows["total"]["moteach_ms"] > max(rows[part]["moteach_ms"] for part in PARTS)
    assert rows["total"]["floor_ms"] > max(rows[part]["floor_ms"] for part in ("generate", "score", "update"))
    summary = report["summary"]
    assert (summary["steps"], summary["warmup"], summary["different_work"]) == (2, 1, [])
    assert 8 <= summary["tokens_per_step"] <= 48
    assert 8 <= summary["floor_tokens_per_step"] <= 48
    assert min(summary[key] for key in ("peak_tensors_mib", "floor_peak_tensors_mib", "peak_rss_mib")) > 0
    assert report["command"].startswith("moteach bench step data=jsonl")
    assert "torch" in report["machine"]
    assert "score + update" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["stpe"], "did you mean 'step'"),
        (["step", "steps=0"], "at least 1, got '0'"),
        (["step", "warmup=x"], "got 'x'"),
        (["memory", "otu=x"], "did you mean 'out'"),
        (["figure", "out=x.svg"], r"runs=[DIR,DIR]"),
        (["_floor"], "valid choices: conflict, divergence, experts, figure, memory, routing, routing-students, step"),
    ],
)
def test_what_cannot_be_run_is_one_line_and_code_2(argv, message, capsys):
    assert main(["bench", *argv]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_a_wrong_override_of_train_is_named(tmp_path, capsys):
    world = write_tiny_world(tmp_path / "world")
    assert main(["bench", "step", *world.overrides, "max_stpes=3"]) == 2
    assert "did you mean 'max_steps'" in capsys.readouterr().err


def test_without_a_name_the_benchmarks_are_listed(capsys):
    assert main(["bench"]) == 0
    listed = capsys.readouterr().out
    names = [line.split()[0] for line in listed.splitlines() if line.startswith("  ")]
    folder = Path(__file__).parents[2] / "moteach" / "bench"
    assert names == sorted(path.stem.replace("_", "-") for path in folder.glob("[!_]*.py"))
