from __future__ import annotations

import re
from pathlib import Path

import pytest

from moteach.catalogue.cards import inspect_card, read_card
from moteach.catalogue.spec import ExpertSpec
from moteach.errors import ExpertCardError, MoteachError


def card(folder: Path, text: str, name: str = "law.yaml") -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "weights" / "law").mkdir(parents=True)
    (tmp_path / "exemplars").mkdir()
    (tmp_path / "exemplars" / "law.jsonl").write_text("{}\n")
    return tmp_path


def test_a_card_becomes_a_spec_named_after_its_file_with_paths_next_to_the_card(folder: Path) -> None:
    spec = read_card(
        card(
            folder,
            "model: weights/law\ndomains: [law, tax]\nexemplars: exemplars/law.jsonl\nweight: 2\nreference: o/base\n",
        )
    )
    assert spec == ExpertSpec(
        name="law",
        model=str(folder / "weights" / "law"),
        domains=["law", "tax"],
        exemplars=str(folder / "exemplars" / "law.jsonl"),
        weight=2.0,
        reference="o/base",
    )
    assert isinstance(spec.weight, float)
    assert spec.weights == str(folder / "weights" / "law")


def test_paths_do_not_depend_on_the_working_directory(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = card(folder, "model: weights/law\n")
    monkeypatch.chdir(folder / "exemplars")
    assert read_card(path).model == str(folder / "weights" / "law")


def test_a_hub_id_is_kept_as_it_is_with_its_revision(folder: Path) -> None:
    spec = read_card(card(folder, f"model: org/name-7B\nrevision: {'a' * 40}\n"))
    assert (spec.model, spec.revision) == ("org/name-7B", "a" * 40)


def test_a_folder_that_exists_wins_over_a_hub_id_of_the_same_form(folder: Path) -> None:
    assert read_card(card(folder, "model: weights/law\n")).model == str(folder / "weights" / "law")


def test_an_adapter_and_its_base_are_both_resolved(folder: Path) -> None:
    spec = read_card(card(folder, "adapter: weights/law\nbase: org/base\n"))
    assert (spec.adapter, spec.base, spec.weights) == (
        str(folder / "weights/law"),
        "org/base",
        str(folder / "weights/law"),
    )


def test_a_recipe_with_output_names_the_folder_it_will_write_even_before_it_exists(folder: Path) -> None:
    spec = read_card(card(folder, "recipe:\n  output: weights/new\n  steps: 3\n"))
    assert spec.recipe == {"output": str(folder / "weights/new"), "steps": 3}
    assert spec.weights == str(folder / "weights/new")


def test_a_recipe_without_output_may_record_how_the_model_was_made(folder: Path) -> None:
    spec = read_card(card(folder, "model: weights/law\nrecipe: {steps: 3}\n"))
    assert spec.weights == spec.model
    assert spec.recipe == {"steps": 3}


WRONG = {
    "unknown key": ("model: o/m\n\ndomans: [law]\n", 3, r"got 'domans'; did you mean 'domains'"),
    "domains not a list": (
        "model: o/m\ndomains: law\n",
        2,
        r"expected a list of text for 'domains', got text \('law'\); write",
    ),
    "yaml 1.1 boolean in domains": (
        "model: o/m\ndomains: [law, no]\n",
        2,
        r"got the item true or false \(False\); quote it",
    ),
    "weight not a number": ("model: o/m\nweight: heavy\n", 2, r"expected a number for 'weight', got text \('heavy'\)"),
    "weight is a boolean": ("model: o/m\nweight: yes\n", 2, r"expected a number for 'weight', got true or false"),
    "weight empty": ("model: o/m\nweight:\n", 2, r"expected a number for 'weight', got nothing"),
    "weight negative": ("model: o/m\nweight: -1\n", 2, r"at least 0 for 'weight', got -1"),
    "weight infinite": ("model: o/m\nweight: .inf\n", 2, r"finite number .* for 'weight', got inf"),
    "revision read as a number": (
        "model: o/m\nrevision: 1234567\n",
        2,
        r"expected text for 'revision', got .*1234567.*quote it",
    ),
    "dtype": ("model: o/m\ndtype: float33\n", 2, r"got 'float33'; did you mean 'float32'"),
    "same domain twice": ("model: o/m\ndomains: [a, a]\n", 2, r"different, non-empty labels"),
    "duplicate key": (
        "model: o/m\nweight: 1\nweight: 2\n",
        3,
        r"each key once, got 'weight' again \(first on line 2\)",
    ),
    "duplicate key inside": ("model: o/m\nrecipe:\n  a: 1\n  a: 2\n", 4, r"each key once, got 'recipe.a' again"),
    "instantiation": ("_target_: os.system\nmodel: o/m\n", 1, r"got '_target_'; a card never instantiates anything"),
    "instantiation inside": (
        "model: o/m\nrecipe:\n  optim:\n    _target_: os.system\n",
        4,
        r"got 'recipe.optim._target_'",
    ),
    "interpolation": ("model: ${oc.env:HOME}/m\n", 1, r"got the interpolation"),
    "python tag": (
        "model: o/m\ndescription: !!python/object/apply:os.getcwd []\n",
        2,
        r"expected a plain value for 'description'",
    ),
    "alias": ("model: o/m\nrecipe:\n  a: &x [1]\n  b: *x\n", 4, r"got the alias '\*x'"),
    "invalid YAML": ("model: [o/m\ndomains: x: y\n", 2, r"expected valid YAML, got"),
    "empty": ("", 1, r"got an empty file"),
    "only a comment": ("# model\n", 1, r"got an empty file"),
    "a list": ("- model: o/m\n", 1, r"expected a mapping 'key: value', got a list"),
    "no weights": ("domains: [law]\n", 1, r"expected weights: .*got none of them"),
    "recipe without output": ("recipe: {steps: 3}\n", 1, r"got a recipe without 'output'"),
    "two places": ("model: o/m\nadapter: o/a\n", 2, r"weights from one place, got 'model' and 'adapter'"),
    "model and trained output": ("model: o/m\nrecipe: {output: x}\n", 2, r"got 'model' and 'recipe.output'"),
    "adapter without base": ("adapter: o/a\n", 1, r"expected 'base:'"),
    "base without adapter": ("model: o/m\nbase: o/b\n", 2, r"expected 'adapter:' beside 'base'"),
    "missing local model": ("model: ./wieghts/law\n", 1, r"existing folder at .*; did you mean 'weights'"),
    "typo below a folder that exists": ("model: weights/lwa\n", 1, r"existing folder .*; did you mean 'law'"),
    "missing absolute model": ("model: /nowhere/at/all\n", 1, r"existing folder at /nowhere/at/all"),
    "neither folder nor hub id": (
        "model: lawmodel\n",
        1,
        r"a folder .* or a hub id 'org/name' for 'model', got 'lawmodel'",
    ),
    "model is a file": ("model: exemplars/law.jsonl\n", 1, r"folder of a saved model"),
    "empty model": ("model: ''\n", 1, r"expected weights"),
    "missing exemplars": (
        "model: o/m\nexemplars: exemplars/lwa.jsonl\n",
        2,
        r"existing file .*did you mean 'law.jsonl'",
    ),
    "revision of a folder": ("model: weights/law\nrevision: abc\n", 2, r"'revision' only with a hub id"),
    "another name": ("name: tax\nmodel: o/m\n", 1, r"expected the name of the file, 'law', got 'tax'"),
}


@pytest.mark.parametrize("case", WRONG)
def test_each_problem_is_one_error_with_file_and_line(folder: Path, case: str) -> None:
    text, line, message = WRONG[case]
    path = card(folder, text)
    reading = inspect_card(path)
    assert reading.spec is None
    assert len(reading.errors) == 1, reading.errors
    assert str(reading.errors[0]).startswith(f"{path}:{line}: expected ")
    assert re.search(message, str(reading.errors[0]))
    with pytest.raises(ExpertCardError):
        read_card(path)


def test_several_problems_are_all_collected(folder: Path) -> None:
    errors = inspect_card(card(folder, "modle: o/m\nweight: heavy\ndomains: law\n")).errors
    assert [int(str(error).split(":")[1]) for error in errors] == [1, 2, 3]


@pytest.mark.parametrize("name", ["Law.yaml", "la w.yaml", "-law.yaml", "law.old.yaml", "..yaml"])
def test_a_file_name_that_is_no_name_is_refused(folder: Path, name: str) -> None:
    with pytest.raises(ExpertCardError, match="expected a name of lower-case letters"):
        read_card(card(folder, "model: o/m\n", name))


def test_bytes_that_are_no_text_and_huge_files_are_refused(folder: Path) -> None:
    path = folder / "law.yaml"
    path.write_bytes(b"model: \xff\xfe\n")
    with pytest.raises(ExpertCardError, match="UTF-8"):
        read_card(path)
    path.write_text("#" * 300_000)
    with pytest.raises(ExpertCardError, match="at most 256 KiB"):
        read_card(path)
    path.write_text("[" * 20_000)
    with pytest.raises(ExpertCardError, match="nested at most 16 deep"):
        read_card(path)


def test_an_expert_made_in_code_is_checked_as_well() -> None:
    with pytest.raises(MoteachError, match=r"expert 'law': .*at least 0"):
        ExpertSpec(name="law", model="o/m", weight=-0.5)
    with pytest.raises(ExpertCardError, match="one place"):
        ExpertSpec(name="law", model="o/m", adapter="o/a", base="o/b")
    with pytest.raises(ExpertCardError, match="lower-case"):
        ExpertSpec(name="../law", model="o/m")
