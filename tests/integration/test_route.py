"""`moteach route` from the command line to its files, and a run without labels."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from integration_runs import rows, train

from moteach.cli.main import main
from moteach.testing import TinyWorld

OFFLINE = ("router.encoder=ngrams", "router.cache=null")


def route(*arguments: str) -> int:
    return main(["route", *arguments])


def write(path: Path, lines: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(path)


@pytest.fixture
def labelled(tmp_path: Path) -> str:
    """Five prompts that experts claim, of which one has a wrong label, two of a domain that nobody claims."""
    return write(
        tmp_path / "labelled.jsonl",
        [
            {"prompt": "11+13=", "domain": "math"},
            {"prompt": "22-10=", "teacher_id": "math"},
            {"prompt": 'rev("zq")', "domain": "code"},
            {"prompt": [{"role": "user", "content": "A31 C35 B91?A"}], "domain": "search"},
            {"prompt": "14+13=", "domain": "code"},
            {"prompt": "Who wrote this poem about the sea?", "domain": "law"},
            {"prompt": "Name the capital of a country.", "domain": "law"},
            {"prompt": "nobody says whose"},
        ],
    )


@pytest.mark.parametrize("router", ["embedding_prototype", "embedding_knn", "classifier"])
def test_fit_explain_and_eval(router: str, labelled: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, out = tmp_path / "run", tmp_path / "out.json"
    assert route("fit", f"router={router}", *OFFLINE, f"run_dir={run}", f"out={out}") == 0
    assert json.loads(out.read_text())["held_out_accuracy"] > 0.95
    assert (run / "router" / "router.safetensors").is_file()
    saved = (f"router={router}", "router.cache=null", f"router.path={run / 'router'}")

    assert route("explain", "11+13=", *saved, "nearest=3", f"out={out}") == 0
    report = json.loads(out.read_text())
    assert report["weights"] == {"math": 1.0, "code": 0.0, "search": 0.0}
    assert report["abstains"] is False
    assert [row["experts"] for row in report["rows"]] == [["math"]] * 3
    assert "nearest exemplars" in capsys.readouterr().out

    assert route("eval", *saved, f"prompts={labelled}", f"out={out}") == 0
    report = json.loads(out.read_text())
    assert report["accuracy"] == pytest.approx(0.8)
    assert 0 < report["ece"] < 1 and 0 <= report["aurc"] < 1  # noqa: PT018
    assert report["contingency"]["code"] == {"math": 1, "code": 1, "search": 0}
    assert {row["label"]: row["prompts"] for row in report["rows"]} == {"math": 2, "code": 2, "search": 1, "law": 2}
    assert report["ood_auroc"]["similarity"] == 1.0
    assert report["regret"] == pytest.approx(0.2), "hard routes, one of five wrong"
    assert report["prompts_per_second"] > 0 < report["seconds_to_fit"]
    assert report["command"].startswith("moteach route eval")


def test_abstention_shows_in_the_measures(labelled: str, tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    assert route("eval", *OFFLINE, "router.min_similarity=0.4", f"prompts={labelled}", f"out={out}") == 0
    report = json.loads(out.read_text())
    assert report["coverage"] == 1.0
    assert report["abstained_outside"] == 1.0


def test_regret_counts_the_weight_that_others_get_and_abstentions_whole(labelled: str, tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    found = {}
    for name, words in {"soft": ["router.weighting=soft"], "none": ["router.min_similarity=2"]}.items():
        assert route("eval", *OFFLINE, *words, f"prompts={labelled}", f"out={out}") == 0
        found[name] = json.loads(out.read_text())
    assert 0.2 < found["soft"]["regret"] < 1
    assert found["none"]["coverage"] == 0.0
    assert found["none"]["regret"] == 1.0


def test_references_frame_the_accuracy(tmp_path: Path) -> None:
    """On the arena's held-out prompts: chance, what is learned, the label."""
    found = {}
    for router in ("random", "embedding_knn", "oracle"):
        out = tmp_path / f"{router}.json"
        extra = OFFLINE if router == "embedding_knn" else ()
        assert route("eval", f"router={router}", *extra, "data.evaluation_size=60", f"out={out}") == 0
        found[router] = json.loads(out.read_text())["accuracy"]
    assert found["oracle"] == 1.0
    assert found["random"] < 0.5 < 0.95 < found["embedding_knn"]


def test_prompts_among_the_exemplars_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path / "p.jsonl", [{"prompt": " 34+25=", "domain": "math"}])
    assert route("eval", *OFFLINE, f"prompts={path}") == 2
    assert "among its exemplars" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "expected an action, got nothing"),
        (("fti",), "did you mean 'fit'"),
        (("explain",), "expected the text of a prompt"),
        (("explain", "x", *OFFLINE, "nearest=0"), "nearest: expected at least 1"),
        (("fit", "router=label"), "learns from exemplars, got LabelRouter"),
        (("explain", "x", "router=random"), "has nothing to show"),
        (("eval", *OFFLINE, "prompts=nowhere.jsonl"), "expected a JSONL file"),
        (("eval", "router=embedding_nkn"), "did you mean 'embedding_knn'"),
        (("eval", *OFFLINE, "router.weighting=sharp"), "one of hard, top_m, soft"),
        (("eval", *OFFLINE, "router.path=nowhere"), "moteach route fit"),
        (("eval", "router.encoder=package:nowhere"), "pip install"),
        (("eval", *OFFLINE, "+promts=x"), "did you mean 'prompts'"),
    ],
)
def test_wrong_words_get_one_line(arguments: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert route(*arguments) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_a_file_without_known_labels_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path / "p.jsonl", [{"prompt": "x", "domain": "law"}])
    assert route("eval", *OFFLINE, f"prompts={path}") == 2
    assert "is one of code, math, search" in capsys.readouterr().err


def world_of(world: TinyWorld, folder: Path) -> list[str]:
    """The tiny world's cards, with exemplars."""
    folder.mkdir()
    for card in world.cards.glob("*.yaml"):
        name = card.stem
        texts = [f"{name * 2} {number}" for number in range(6)]
        write(folder / f"{name}.jsonl", [{"prompt": text} for text in texts])
        said = card.read_text().replace("./weights", str(world.cards / "weights"))
        (folder / card.name).write_text(f"{said.rstrip()}\nexemplars: {name}.jsonl\n")
    return [
        f"expert_path=[{folder}]" if override.startswith("expert_path=") else override for override in world.overrides
    ]


def test_a_run_that_reads_no_labels_finds_the_teachers(world: TinyWorld, tmp_path: Path) -> None:
    overrides = world_of(world, tmp_path / "cards")
    run = train(tmp_path / "run", *overrides, "router=classifier", *OFFLINE)
    routed = rows(run, "routing")
    assert routed
    assert all(sum(row["weights"].values()) == pytest.approx(1.0) for row in routed)
    assert [row["teacher"] for row in routed] == [row["domain"] for row in routed]
    # Exemplars that are all told apart when held out, so all prompts are as sure as can be; which is not certain.
    (confidence,) = {row["confidence"] for row in routed}
    assert 0.9 < confidence < 1.0


def test_held_out_prompts_among_the_exemplars_end_a_run_before_it_starts(
    world: TinyWorld, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    overrides = world_of(world, tmp_path / "cards")
    leaks = [json.loads(line) for line in world.prompts.read_text().splitlines()]
    write(tmp_path / "cards" / "alpha.jsonl", [row for row in leaks if row["domain"] == "alpha"])
    run = tmp_path / "run"
    assert main(["train", *overrides, "router=embedding_knn", *OFFLINE, f"run_dir={run}"]) == 2
    assert "among its exemplars" in capsys.readouterr().err
    assert not run.exists()
