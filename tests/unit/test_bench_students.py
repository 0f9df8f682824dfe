from __future__ import annotations

import json
from pathlib import Path

import pytest

from moteach.bench import _students, conflict, routing_students
from moteach.bench._arms_table import chosen, numbers, read_arms, read_parts
from moteach.bench._conflict_table import notes
from moteach.bench._students import Cell, normalised, over_seeds, trained
from moteach.cli.bench import benchmarks
from moteach.cli.main import main
from moteach.errors import ConfigError, UnknownChoiceError

BEFORE = {"math": 0.5, "code": 0.4, "search": 0.2}
TEACHERS = {name: {"math": 0.9, "code": 0.8, "search": 1.0} for name in ("math", "code", "search")}


def result(score: float, *, seconds: float = 10.0, source: str = "c") -> dict[str, object]:
    accuracy = {name: BEFORE[name] + score * (TEACHERS[name][name] - BEFORE[name]) for name in BEFORE}
    return {"steps": 5, "cpu_seconds": seconds, "accuracy": accuracy, "source": source}


def test_a_cell_is_trained_once_and_a_failed_one_again(tmp_path, monkeypatch):
    asked: list[Cell] = []

    def train(cell: Cell) -> dict[str, object]:
        asked.append(cell)
        return {"error": "no"} if cell.seed == 1 else result(0.5)

    monkeypatch.setattr(_students, "train_cell", train)
    cells = [Cell(overrides=("a=1",), seed=seed, steps=3) for seed in (0, 1, 2)]
    first = trained(cells, folder=tmp_path, workers=1)
    assert ["error" in found for found in first] == [False, True, False]
    assert trained(cells, folder=tmp_path, workers=1) == first
    assert [cell.seed for cell in asked] == [0, 1, 2, 1]


def test_the_key_depends_on_everything_that_was_asked():
    base = {"overrides": ("a=1",), "seed": 0, "steps": 3}
    others = [{"overrides": ("a=2",)}, {"seed": 1}, {"steps": 4}, {"seconds": 2.0}, {"extra_domains": ("composite",)}]
    keys = {Cell(**(base | other)).key for other in [{}, *others]}
    assert len(keys) == 6


def test_normalised_scores_and_their_spread():
    scores = normalised({"math": 0.7}, {"math": 0.5}, {"math": 0.9})
    assert scores["math"] == pytest.approx(0.5)
    seen = over_seeds([{"mean": 0.2}, {"mean": 0.6}], ("mean",))
    assert seen["mean"] == pytest.approx(0.4)
    assert seen["mean_spread"] == pytest.approx(0.08**0.5)
    assert over_seeds([{"mean": 0.2}], ("mean",))["mean_spread"] == 0.0


def test_what_cannot_be_trained_is_said_in_one_line():
    assert "conflikt" in _students.train_cell(Cell(overrides=("conflikt=linear",), seed=0, steps=1))["error"]


@pytest.mark.slow
def test_a_cell_trains_a_student_and_measures_it():
    small = ("data.evaluation_size=6", "sampler.prompts_per_step=4")
    found = _students.train_cell(Cell(overrides=small, seed=0, steps=1))
    assert set(found["accuracy"]) == {"math", "code", "search"}
    assert found["steps"] == 1
    assert found["cpu_seconds"] > 0


def test_arms_are_names_and_overrides(tmp_path):
    shipped = read_arms(Path(conflict.__file__).with_name("conflict_arms.yaml"))
    assert shipped[conflict.REFERENCE] == ("router=label", "conflict=select")
    assert all("router=uniform" in told for name, told in shipped.items() if name != conflict.REFERENCE)
    parts = read_parts(Path(routing_students.__file__).with_name("routing_students_arms.yaml"))
    assert set(parts) == set(routing_students.SETTINGS)
    wrong = tmp_path / "arms.yaml"
    wrong.write_text("linear: conflict=linear\n")
    with pytest.raises(ConfigError, match="the arm would be the default run"):
        read_arms(wrong)


def test_lists_on_the_command_line():
    assert chosen("arms", "[a,b]", ("a", "b", "c")) == ["a", "b"]
    assert numbers("seeds", "3,4", (0,)) == [3, 4]
    with pytest.raises(UnknownChoiceError, match="arms"):
        chosen("arms", "d", ("a",))
    with pytest.raises(ConfigError, match="whole numbers"):
        numbers("seeds", "one", (0,))


def test_names_with_a_hyphen_are_found():
    assert {"conflict", "routing-students"} <= set(benchmarks())


@pytest.fixture
def fakes(monkeypatch, tmp_path):
    """Students whose score depends on the arm, and teachers that are never opened; returns the cells that were trained."""
    asked: list[Cell] = []

    def train(cell: Cell) -> dict[str, object]:
        asked.append(cell)
        if "conflict=power" in cell.overrides:
            return {"error": "refused"}
        pooled = 0.2 if "conflict=geometric" in cell.overrides else 0.4
        score = (0.9 if "router=label" in cell.overrides else pooled) + 0.01 * cell.seed
        found = result(score)
        if "composite" in cell.extra_domains:
            found["accuracy"] = {**found["accuracy"], "composite": 0.35}  # type: ignore[dict-item]
        return found

    said = {"before": {**BEFORE, "composite": 0.05}, "teachers": TEACHERS, "step_oracle": 0.85}
    monkeypatch.setattr(_students, "train_cell", train)
    monkeypatch.setattr(conflict, "references", lambda *_, **__: said)
    monkeypatch.setattr(routing_students, "references", lambda *_, **__: said)
    monkeypatch.setattr("moteach.bench._scenarios.make_teacher", lambda *_, **__: None)
    return asked


def test_conflict_screens_on_the_tuning_faults_and_trains_the_best(fakes, tmp_path):
    out = tmp_path / "out.json"
    words = ["scenarios=clean,biased", "resolvers=linear,geometric,power", "seeds=0,1", "best=1", "steps=7"]
    assert main(["bench", "conflict", *words, f"cache={tmp_path}", f"out={out}"]) == 0
    screening, final = fakes[:8], fakes[8:]
    assert all(cell.seconds == 20 and cell.steps is None and cell.seed == 0 for cell in screening)
    assert not any("add_biased" in text for cell in screening for text in cell.overrides)
    assert all(cell.steps == 7 for cell in final)
    assert {("conflict=linear" in cell.overrides, cell.seed) for cell in final} == {
        (o, s) for o in (0, 1) for s in (0, 1)
    }
    report = json.loads(out.read_text())
    rows = {(row["scenario"], row["arm"]): row for row in report["summary"]["table"]}
    assert rows["biased", "linear"]["mean"] == pytest.approx(0.405)
    assert rows["biased", "linear"]["behind_label"] == pytest.approx(0.5)
    assert rows["clean", "label"]["per_cpu_second"] == pytest.approx(0.0905)
    told = [cell.overrides for cell in final if "router=label" in cell.overrides and "biased" in str(cell.overrides)]
    assert all("experts.add_biased.weight=0" in overrides for overrides in told)
    trained_before = len(fakes)
    assert main(["bench", "conflict", *words, f"cache={tmp_path}"]) == 0
    # Only those that failed are tried again.
    assert len(fakes) == trained_before + 2


def test_conflict_refuses_two_lengths(capsys):
    assert main(["bench", "conflict", "steps=3", "seconds=4"]) == 2
    assert "got both" in capsys.readouterr().err


def test_routing_students_normalises_composites_by_the_step_oracle(fakes, tmp_path):
    out = tmp_path / "out.json"
    words = ["parts=composite", "only=random,uniform_linear", "seeds=0,2", f"cache={tmp_path}", f"out={out}"]
    assert main(["bench", "routing-students", *words]) == 0
    rows = {row["arm"]: row for row in json.loads(out.read_text())["summary"]["composite"]["table"]}
    assert set(rows) == {"random", "uniform_linear"}
    assert rows["random"]["composite"] == pytest.approx(0.3 / 0.8)
    assert rows["random"]["composite_accuracy"] == pytest.approx(0.35)
    assert rows["uniform_linear"]["mean"] == pytest.approx(0.41)
    assert all(cell.extra_domains == ("composite",) for cell in fakes)


def test_results_of_two_sources_are_said():
    assert any("2 versions" in line for line in notes([{"source": "a"}, {"source": "b"}]))
    assert not any("versions" in line for line in notes([{"source": "a"}, {"source": "a"}]))
