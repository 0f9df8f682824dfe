from __future__ import annotations

import copy
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.errors import ConfigCompositionException, MissingConfigException
from omegaconf import OmegaConf

import moteach.catalogue.registry as registry
from moteach.catalogue.registry import card_files, read_catalogue, register_with_hydra, scan_catalogue
from moteach.catalogue.spec import ExpertSpec
from moteach.errors import ExpertCardError, MissingFileError, UnknownChoiceError


@dataclass
class TypedRoot:
    seed: int = 0
    experts: dict[str, ExpertSpec] = field(default_factory=dict)


@dataclass
class OpenRoot:
    seed: int = 0
    experts: Any = field(default_factory=dict)


@pytest.fixture(autouse=True)
def shipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A shipped folder of its own, so that the tests do not depend on which experts ship."""
    folder = tmp_path / "shipped"
    folder.mkdir()
    for name in ("math", "code", "search"):
        (folder / f"{name}.yaml").write_text(f"model: org/{name}\ndomains: [{name}]\n")
    monkeypatch.setattr(registry, "experts_dir", lambda: folder)
    monkeypatch.delenv("MOTEACH_EXPERTS", raising=False)
    return folder


@pytest.fixture
def store() -> Iterator[ConfigStore]:
    """Hydra's store, with what these tests put there taken out again; the rest belongs to Hydra's own plugins."""
    instance = ConfigStore.instance()
    before = {key: copy.deepcopy(instance.repo[key]) for key in ("experts", "schema.yaml") if key in instance.repo}
    yield instance
    for key in ("experts", "schema.yaml"):
        instance.repo.pop(key, None)
    instance.repo.update(before)


def cards(folder: Path, **texts: str) -> Path:
    folder.mkdir(exist_ok=True)
    for name, text in texts.items():
        (folder / f"{name}.yaml").write_text(text)
    return folder


def test_the_shipped_experts_are_read_by_name_in_order() -> None:
    catalogue = read_catalogue()
    assert list(catalogue) == ["code", "math", "search"]
    assert catalogue["math"] == ExpertSpec(name="math", model="org/math", domains=["math"])


def test_experts_come_from_the_environment_and_from_arguments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one = cards(tmp_path / "one", law="model: o/law\n")
    two = cards(tmp_path / "two", tax="model: o/tax\n")
    three = cards(tmp_path / "three", bio="model: o/bio\n")
    monkeypatch.setenv("MOTEACH_EXPERTS", f"{one}{os.pathsep}{two}")
    catalogue = scan_catalogue([three])
    assert {"law", "tax", "bio", "math"} <= set(catalogue.experts)
    assert catalogue.sources["tax"] == two / "tax.yaml"
    assert not catalogue.errors


def test_experts_come_from_installed_packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    site = tmp_path / "site"
    package = cards(tmp_path / "site", other="x: 1\n") / "law_experts_pkg"
    cards(package, law="model: o/law\n")
    (package / "__init__.py").write_text(
        "from pathlib import Path\nMORE = Path(__file__).parent / 'more'\ndef folder():\n    return str(MORE) + '2'\n"
    )
    cards(package / "more", tax="model: o/tax\n")
    cards(package / "more2", bio="model: o/bio\n")
    info = site / "law_experts-1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: law-experts\nVersion: 1\n")
    (info / "entry_points.txt").write_text(
        "[moteach.experts]\nlaw = law_experts_pkg\ntax = law_experts_pkg:MORE\nbio = law_experts_pkg:folder\nbad = "
        "no_such_pkg_at_all\n"
    )
    monkeypatch.syspath_prepend(str(site))
    try:
        catalogue = scan_catalogue()
    finally:
        sys.modules.pop("law_experts_pkg", None)
    assert {"law", "tax", "bio"} <= set(catalogue.experts)
    assert [type(error) for error in catalogue.errors] == [ExpertCardError]
    assert "'bad = no_such_pkg_at_all'" in str(catalogue.errors[0])


def test_a_second_card_of_a_name_is_refused_naming_both_files(tmp_path: Path, shipped: Path) -> None:
    other = cards(tmp_path / "other", math="model: org/other-math\ndomains: [math]\n")
    with pytest.raises(ExpertCardError, match=r"one card for the name 'math'.*differs in model") as caught:
        read_catalogue([other])
    assert str(other / "math.yaml") in str(caught.value)
    assert str(shipped / "math.yaml") in str(caught.value)


def test_the_same_card_twice_is_fine(tmp_path: Path, shipped: Path) -> None:
    other = cards(tmp_path / "other", math=(shipped / "math.yaml").read_text())
    assert read_catalogue([other, shipped])["math"].model == "org/math"


def test_equal_text_whose_relative_weights_differ_is_not_the_same_card(tmp_path: Path) -> None:
    folders = [cards(tmp_path / name, law="model: ./weights\n") for name in ("one", "two")]
    for folder in folders:
        (folder / "weights").mkdir()
    with pytest.raises(ExpertCardError, match="differs in model"):
        read_catalogue(folders)


def test_a_folder_that_does_not_exist_is_named_with_its_origin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(MissingFileError, match="from expert_path"):
        read_catalogue([tmp_path / "nowhere"])
    monkeypatch.setenv("MOTEACH_EXPERTS", str(tmp_path / "gone"))
    with pytest.raises(MissingFileError, match=r"gone.*MOTEACH_EXPERTS"):
        read_catalogue()


def test_a_scan_keeps_the_good_cards_beside_the_problems(tmp_path: Path) -> None:
    folder = cards(tmp_path / "mine", law="modle: o/law\nwieght: 1\n", tax="model: o/tax\n")
    catalogue = scan_catalogue([folder])
    assert {"math", "tax"} <= set(catalogue.experts)
    assert "law" not in catalogue.experts
    assert [str(error).split(": ")[0] for error in catalogue.errors] == [f"{folder}/law.yaml:1", f"{folder}/law.yaml:2"]
    with pytest.raises(ExpertCardError, match=r"law\.yaml:1"):
        read_catalogue([folder])


def test_an_unknown_expert_is_answered_with_the_nearest() -> None:
    with pytest.raises(UnknownChoiceError, match="did you mean 'math'"):
        scan_catalogue().get("mth")


def test_only_yaml_files_of_the_folder_itself_are_cards(tmp_path: Path) -> None:
    folder = cards(tmp_path / "mine", law="model: o/law\n")
    (folder / "tax.yml").write_text("model: o/tax\n")
    (folder / ".hidden.yaml").write_text("nonsense")
    (folder / "README.md").write_text("nonsense")
    cards(folder / "sub", bio="nonsense")
    assert [path.name for path in card_files(folder)] == ["law.yaml", "tax.yml"]


@pytest.fixture(params=[TypedRoot, OpenRoot])
def conf(request: pytest.FixtureRequest, tmp_path: Path, store: ConfigStore) -> Iterator[None]:
    store.store(name="schema", node=request.param)
    folder = tmp_path / "conf"
    folder.mkdir()
    # the schema and _self_ come first: the other order leaves schema-less options unchecked
    (folder / "train.yaml").write_text(
        "defaults:\n  - schema\n  - _self_\n  - experts: [math, code, search]\nseed: 3\n"
    )
    with initialize_config_dir(str(folder), version_base="1.3"):
        yield


def composed(*overrides: str) -> dict[str, ExpertSpec]:
    return OmegaConf.to_object(compose("train", list(overrides)).experts)  # type: ignore[return-value]


@pytest.mark.usefixtures("conf")
def test_experts_of_a_private_folder_are_selected_and_overridden(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MOTEACH_EXPERTS", str(cards(tmp_path / "mine", law="model: o/law\ndomains: [law]\n")))
    register_with_hydra(read_catalogue())
    assert list(composed()) == ["math", "code", "search"]
    chosen = composed("experts=[math,code,law]", "experts.law.weight=0.5")
    assert list(chosen) == ["math", "code", "law"]
    assert chosen["law"] == ExpertSpec(name="law", model="o/law", domains=["law"], weight=0.5)
    assert chosen["math"].weight == 1.0
    assert composed("experts=[law]", "experts.law.domains=[a,b]")["law"].domains == ["a", "b"]


@pytest.mark.usefixtures("conf")
def test_wrong_types_and_keys_fail_when_the_configuration_is_composed() -> None:
    register_with_hydra(read_catalogue())
    with pytest.raises(ConfigCompositionException) as caught:
        compose("train", ["experts.math.weight=abc"])
    assert "'abc' of type 'str' could not be converted to Float" in str(caught.value.__cause__)
    with pytest.raises(ConfigCompositionException) as caught:
        compose("train", ["experts.math.wieght=2"])
    assert "Key 'wieght' not in 'ExpertSpec'" in str(caught.value.__cause__)
    with pytest.raises(MissingConfigException, match="experts/mth"):
        compose("train", ["experts=[mth]"])
    with pytest.raises(ExpertCardError, match="at least 0"):
        composed("experts.math.weight=-1")


@pytest.mark.usefixtures("conf")
def test_a_recipe_can_be_given_and_changed_on_the_command_line(tmp_path: Path) -> None:
    folder = cards(tmp_path / "mine", law="model: o/law\nrecipe: {steps: 3, data: {path: x}}\n")
    register_with_hydra(read_catalogue([folder]))
    chosen = composed("experts=[law,math]", "experts.law.recipe.steps=5", "+experts.math.recipe.steps=7")
    assert chosen["law"].recipe == {"steps": 5, "data": {"path": "x"}}
    assert chosen["math"].recipe == {"steps": 7}


@pytest.mark.usefixtures("conf")
def test_registering_again_forgets_experts_that_are_gone() -> None:
    catalogue = read_catalogue()
    register_with_hydra({**catalogue, "law": ExpertSpec(name="law", model="o/law")})
    assert "law" in composed("experts=[law]")
    register_with_hydra(catalogue)
    with pytest.raises(MissingConfigException, match="experts/law"):
        compose("train", ["experts=[law]"])


def test_reading_the_catalogue_does_not_import_hydra_or_torch() -> None:
    import subprocess

    code = (
        "import sys; from moteach.catalogue.registry import scan_catalogue; scan_catalogue();"
        "print(sorted({'hydra', 'omegaconf', 'transformers', 'torch'} & set(sys.modules)))"
    )
    root = Path(registry.__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
