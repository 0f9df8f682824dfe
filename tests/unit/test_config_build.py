from __future__ import annotations

import sys
import types
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import EntryPoint
from typing import Any

import pytest
from omegaconf import OmegaConf

import moteach.config.build as module
from moteach.config.build import allowed_prefixes, build, constructor_parameters, resolve_target
from moteach.conflict.pools import Linear
from moteach.divergences.full import JSD
from moteach.errors import ConfigError
from moteach.objectives.divergence import DivergenceObjective
from moteach.routing.label import LabelRouter
from moteach.routing.token import PromptGate


@pytest.fixture(autouse=True)
def _fresh_prefixes() -> Iterator[None]:
    allowed_prefixes.cache_clear()
    yield
    allowed_prefixes.cache_clear()


def test_a_component_is_made_from_its_node() -> None:
    node = OmegaConf.create({"_target_": "moteach.routing.label.LabelRouter", "fallback": "math"})
    router = build(node, where="router")
    assert isinstance(router, LabelRouter)
    assert router.fallback == "math"


def test_interpolations_are_resolved() -> None:
    cfg = OmegaConf.create({"b": 0.25, "divergence": {"_target_": "moteach.divergences.full.JSD", "beta": "${b}"}})
    assert build(cfg.divergence, where="divergence") == JSD(beta=0.25)


def test_objects_are_handed_over_as_they_are_and_only_when_asked_for() -> None:
    gate, resolver, divergence = PromptGate(), Linear(), JSD(beta=0.1)
    objective = build(
        {"_target_": "moteach.objectives.divergence.DivergenceObjective", "teacher_temperature": 2.0},
        where="objective",
        gate=gate,
        resolver=resolver,
        divergence=divergence,
        nobody_takes=1,
    )
    assert isinstance(objective, DivergenceObjective)
    assert objective.teaching.gate is gate
    assert objective.teaching.resolver is resolver
    assert objective.divergence is divergence
    assert objective.teacher_temperature == 2.0


def test_what_a_constructor_refuses_is_its_own_error() -> None:
    with pytest.raises(ConfigError, match="beta"):
        build({"_target_": "moteach.divergences.full.JSD", "beta": 2.0}, where="divergence")


@pytest.mark.parametrize(
    "target",
    [
        "os.system",
        "builtins.eval",
        "functools.partial",
        "subprocess.Popen",
        "moteachevil.Thing",
        "moteach",
        "Thing",
        "",
        "hydra.utils.instantiate",
    ],
)
def test_targets_outside_the_allow_list_are_refused(target: str) -> None:
    with pytest.raises(ConfigError, match=r"router\._target_: expected a class below moteach\., got '"):
        build({"_target_": target}, where="router")


@pytest.mark.parametrize(
    "target",
    [
        "moteach.config.build.DictConfig",  # a class from elsewhere
        "moteach.config.build.lru_cache",  # a function from elsewhere
        "moteach.config.build.importlib",  # a module
        "moteach.config.build.build",  # our own, and no class
        "moteach.config.assemble.partial",  # a class that calls anything
    ],
)
def test_a_re_exported_object_is_refused(target: str) -> None:
    with pytest.raises(ConfigError, match=r"expected a class defined below moteach"):
        build({"_target_": target}, where="router")


def test_an_unknown_class_is_refused_with_the_nearest_of_its_module() -> None:
    with pytest.raises(ConfigError, match=r"has no 'LabelRoutr'; did you mean 'LabelRouter'\?") as caught:
        resolve_target("moteach.routing.label.LabelRoutr", where="router")
    assert "Prompt" not in str(caught.value)


def test_an_unknown_module_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"there is no module 'moteach\.routing\.labels'"):
        resolve_target("moteach.routing.labels.LabelRouter", where="router")


@pytest.mark.parametrize(
    "nested",
    [
        {"_target_": "os.system", "command": "true"},
        {"deep": {"_target_": "os.system"}},
        [{"_target_": "os.system"}],
        [[{"a": {"_partial_": True}}]],
        {"_args_": [1]},
    ],
)
def test_nothing_is_instantiated_inside_a_component(nested: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.system", lambda command: pytest.fail("ran code from data"))
    with pytest.raises(ConfigError, match=r"router: expected plain values, got a nested '_"):
        build({"_target_": "moteach.routing.label.LabelRouter", "fallback": nested}, where="router")


@pytest.mark.parametrize("key", ["_args_", "_partial_", "_recursive_", "_convert_"])
def test_hydras_own_keys_are_refused(key: str) -> None:
    with pytest.raises(ConfigError, match=f"expected only '_target_' and arguments, got '{key}'"):
        build({"_target_": "moteach.routing.label.LabelRouter", key: True}, where="router")


@pytest.mark.parametrize("node", [{}, {"fallback": None}, {"_target_": 3}])
def test_a_node_without_a_target_is_refused(node: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"router: expected a mapping with a '_target_'"):
        build(node, where="router")


@pytest.fixture
def acme(monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    """A package of somebody else, importable and not declared."""

    @dataclass(kw_only=True)
    class Router:
        strength: float = 1.0

    made = types.ModuleType("acme.routers")
    Router.__module__ = "acme.routers"
    made.Router = Router  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "acme", types.ModuleType("acme"))
    monkeypatch.setitem(sys.modules, "acme.routers", made)
    return made


def test_an_installed_package_declares_its_prefix(acme: types.ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    node = {"_target_": "acme.routers.Router", "strength": 2.0}
    with pytest.raises(ConfigError, match=r"entry point group 'moteach\.components'"):
        build(node, where="router")

    def points(*, group: str) -> list[EntryPoint]:
        assert group == "moteach.components"
        return [EntryPoint(name="acme", value="acme", group=group)]

    monkeypatch.setattr(module, "entry_points", points)
    allowed_prefixes.cache_clear()
    assert allowed_prefixes() == ("moteach.", "acme.")
    assert build(node, where="router") == acme.Router(strength=2.0)
    with pytest.raises(ConfigError, match=r"expected a class below moteach\., acme\."):
        build({"_target_": "acmee.routers.Router"}, where="router")


def test_open_ended_parameters_are_not_arguments() -> None:
    class Anything:
        def __init__(self, a: int, *args: int, b: int = 0, **kwargs: int) -> None: ...

    assert list(constructor_parameters(Anything)) == ["a", "b"]
