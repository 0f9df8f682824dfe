from __future__ import annotations

import json
from pathlib import Path

import pytest
from integration_runs import metrics, moteach, rows, student_bytes, student_tensors
from omegaconf import OmegaConf

import moteach as moteach_package
from moteach.cli.main import main
from moteach.testing import TinyWorld

SHORT = ("max_steps=2", "eval=none")


def test_sweep_makes_a_run_folder_a_job(world: TinyWorld, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["train", *world.overrides, *SHORT, "--multirun", "seed=0,1"]) == 0
    first, second = sorted(path.parent for path in tmp_path.glob("runs/*/summary.json"))
    assert [OmegaConf.load(run / "config.yaml").seed for run in (first, second)] == [0, 1]
    assert student_bytes(first) != student_bytes(second)
    assert [len(metrics(run)) for run in (first, second)] == [2, 2]
    assert {path.name for path in tmp_path.iterdir()} == {"runs"}


def test_seed_of_a_sweep_trains_as_it_does_alone(
    world: TinyWorld, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["train", "-m", *world.overrides, *SHORT, "seed=5,3", "run_dir=sweep/${seed}"]) == 0
    assert main(["train", *world.overrides, *SHORT, "seed=3", "run_dir=alone"]) == 0
    assert student_bytes(tmp_path / "sweep" / "3") == student_bytes(tmp_path / "alone")


def test_failed_job_of_a_sweep_ends_with_code_two_after_the_others(
    world: TinyWorld, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    sweep = ["max_steps=0,2", "eval=none", "run_dir=sweep/${max_steps}"]
    assert main(["train", "--multirun", *world.overrides, *sweep]) == 2
    assert "max_steps: expected at least 1, got 0" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "sweep").iterdir()] == ["2"]


@pytest.mark.parametrize("where", ["first", "middle", "last"])
def test_cfg_prints_the_config_and_runs_nothing(
    world: TinyWorld, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], where: str
) -> None:
    monkeypatch.chdir(tmp_path)
    overrides = [*world.overrides, "divergence=jsd", "divergence.beta=0.25"]
    place = {"first": 0, "middle": 3, "last": len(overrides)}[where]
    assert main(["train", *overrides[:place], "--cfg", "job", *overrides[place:]]) == 0
    cfg = OmegaConf.create(capsys.readouterr().out)
    assert cfg.divergence.beta == 0.25
    assert list(cfg.experts) == ["alpha", "beta"]
    assert not list(tmp_path.iterdir())


def test_printed_config_is_the_one_that_trains(
    world: TinyWorld, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    arguments = [*world.overrides, *SHORT]
    assert main(["train", *arguments, "run_dir=first"]) == 0
    capsys.readouterr()
    assert main(["train", *arguments, "run_dir=second", "--cfg", "job"]) == 0
    printed = OmegaConf.create(capsys.readouterr().out)
    written = OmegaConf.load(tmp_path / "first" / "config.yaml")
    resolved = OmegaConf.to_container(printed, resolve=True)
    assert isinstance(resolved, dict)
    assert resolved | {"run_dir": "first"} == OmegaConf.to_container(written)


def test_experts_list_shows_every_card(world: TinyWorld, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["experts", "list", f"expert_path=[{world.cards}]"]) == 0
    out = capsys.readouterr().out
    assert "alpha" in out
    assert "beta" in out


def test_experts_check_reports_a_row_a_teacher(world: TinyWorld, tmp_path: Path) -> None:
    chosen = [override for override in world.overrides if override.startswith(("data", "student", "expert"))]
    out = tmp_path / "report.json"
    assert main(["experts", "check", *chosen, "probe_prompts=4", f"out={out}"]) == 0
    found = json.loads(out.read_text())["rows"]
    assert [row["teacher_id"] for row in found] == ["alpha", "beta"]
    for row in found:
        assert row["reverse_kl"] > 0
        assert row["probe_tokens"] > 0
        assert row["affinity"]["teacher"] < 0 > row["affinity"]["student"]
        assert {finding["name"] for finding in row["findings"] if finding["level"] == "ok"} >= {"vocabulary", "head"}


def test_student_checked_against_itself_has_no_distance(world: TinyWorld, tmp_path: Path) -> None:
    (tmp_path / "twin.yaml").write_text(f"model: {world.student}\ndomains: [alpha]\n")
    data = [override for override in world.overrides if override.startswith(("data", "student"))]
    out = tmp_path / "report.json"
    arguments = [*data, f"expert_path=[{tmp_path}]", "experts=[twin]", "probe_prompts=4", f"out={out}"]
    assert main(["experts", "check", *arguments]) == 0
    (row,) = json.loads(out.read_text())["rows"]
    assert row["reverse_kl"] == pytest.approx(0.0, abs=1e-6)
    assert row["topk_overlap"] == 1.0


@pytest.fixture
def evaluation(world: TinyWorld) -> list[str]:
    data = [override for override in world.overrides if override.startswith("data")]
    return [*data, "rollout.max_new_tokens=6"]


@pytest.mark.parametrize("named", [False, True])
def test_eval_of_a_run_gives_the_numbers_of_its_summary(
    finished: Path, evaluation: list[str], tmp_path: Path, named: bool
) -> None:
    """Data and engine settings are those of the run, whether the command line repeats them or not."""
    out = tmp_path / "report.json"
    assert main(["eval", f"run={finished}", *(evaluation if named else []), f"out={out}"]) == 0
    report = json.loads(out.read_text())
    summary = json.loads((finished / "summary.json").read_text())
    assert set(report) == {"rows", "command", "machine"}
    assert [row["domain"] for row in report["rows"]] == ["alpha", "beta"]
    for row in report["rows"]:
        own = summary["domains"][row["domain"]]
        assert (row["accuracy"], row["prompts"], row["mean_length"]) == (
            own["after"],
            own["prompts"],
            own["mean_length"],
        )
        assert (row["before"], row["teacher"]) == (own["before"], own["teacher"])
    assert f"run={finished}" in report["command"]
    assert "hydra" not in report["command"]


def test_eval_of_a_model_gives_raw_accuracy(world: TinyWorld, evaluation: list[str], tmp_path: Path) -> None:
    """The answer of a prompt is what the model itself writes, greedily; half of the answers of beta are changed."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(world.student)
    tokenizer = AutoTokenizer.from_pretrained(world.student)
    lines = [json.loads(line) for line in world.prompts.read_text().splitlines()][::4]
    for number, row in enumerate(lines):
        ids = tokenizer(row["prompt"], return_tensors="pt")["input_ids"]
        written = model.generate(ids, max_new_tokens=6, do_sample=False)[0, ids.shape[1] :]
        answer = tokenizer.decode(written, skip_special_tokens=True).strip()
        row["answer"] = answer if row["domain"] == "alpha" or number % 2 else "something else"
    held_out = tmp_path / "held_out.jsonl"
    held_out.write_text("".join(json.dumps(row) + "\n" for row in lines))
    train = tmp_path / "train.jsonl"
    train.write_text(json.dumps({"prompt": "alpha unrelated", "domain": "alpha"}) + "\n")
    out = tmp_path / "report.json"
    arguments = ["data=jsonl", f"data.path={train}", f"data.evaluation_path={held_out}", "rollout.max_new_tokens=6"]
    assert main(["eval", f"model={world.student}", *arguments, f"out={out}"]) == 0
    found = {row["domain"]: row for row in json.loads(out.read_text())["rows"]}
    wrong = sum(row["answer"] == "something else" for row in lines)
    assert found["alpha"]["accuracy"] == 1.0
    assert found["beta"]["accuracy"] == pytest.approx(1 - wrong / found["beta"]["prompts"])
    assert "before" not in found["alpha"]


def test_eval_without_held_out_prompts_is_refused(
    world: TinyWorld, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    arguments = ["data=jsonl", f"data.path={world.prompts}"]
    assert main(["eval", f"model={world.student}", *arguments, f"out={tmp_path / 'o.json'}"]) == 2
    assert "held-out" in capsys.readouterr().err
    assert not (tmp_path / "o.json").exists()


def test_module_is_the_command(finished: Path, world: TinyWorld, tmp_path: Path) -> None:
    overrides = [*world.overrides, "checkpoint.every_steps=2", "run_dir=run"]
    done = moteach("train", *overrides, cwd=tmp_path, MOTEACH_EXPERTS=str(world.cards))
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert "held-out accuracy" in done.stdout
    assert rows(tmp_path / "run", "routing") == rows(finished, "routing")
    mine, other = student_tensors(tmp_path / "run"), student_tensors(finished)
    assert max(float((mine[name] - other[name]).abs().max()) for name in mine) < 1e-5
    version = moteach("--version", cwd=tmp_path)
    assert (version.returncode, version.stdout.strip()) == (0, moteach_package.__version__)


def test_help_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    out = capsys.readouterr().out
    assert all(word in out for word in ("train", "eval", "experts", "specialize"))
    assert main([]) == 2
