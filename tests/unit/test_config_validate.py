from __future__ import annotations

import sys
import types
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, Protocol

import pytest
from omegaconf import OmegaConf
from torch import Tensor

from moteach.config.schema import OptimConfig, TrainConfig
from moteach.config.validate import check_component, check_keys, describe, is_configurable, matches, options
from moteach.errors import ConfigError

Mode = Literal["fast", "slow"]


@pytest.mark.parametrize(
    ("annotation", "good", "bad"),
    [
        (int, [0, -3], [True, 1.5, "1", None]),
        (float, [0.5, 2, float("inf")], [True, "0.5", None, float("nan")]),
        (str, ["", "x"], [1, None, ["x"]]),
        (bool, [True, False], [0, "true", None]),
        (int | None, [3, None], ["x", 2.5, True]),
        (float | str, [1, 0.5, "auto"], [None, True, []]),
        (Mode, ["fast", "slow"], ["medium", 1, None, []]),
        (Mode | None, ["fast", None], ["x"]),
        (list[str], [[], ["a"]], ["a", [1], ["a", 1], {"a": 1}, {}, None]),
        (Sequence[float], [[], [1, 0.5]], [["a"], {"a": 1}, 1]),
        (tuple[int, ...], [[1, 2]], [[1.5], 1]),
        (dict[str, int], [{}, {"a": 1}], [{"a": "x"}, {1: 1}, [], ["a"], None]),
        (Mapping[str, float | int] | None, [{"a": 0.5, "b": 1}, None], [{"a": "x"}, ["a"]]),
        (Mapping[str, list[str]], [{"a": ["b"]}], [{"a": "b"}, {"a": [1]}]),
        (list, [[], [1, "x"]], ["x", {}]),
        (dict, [{}, {"a": 1}], [[], 1]),
        (Any, [1, None, "x", {}], []),
    ],
)
def test_plain_values_are_matched_with_annotations(annotation: Any, good: list[Any], bad: list[Any]) -> None:
    assert [value for value in good if not matches(value, annotation)] == []
    assert [value for value in bad if matches(value, annotation)] == []
    assert is_configurable(annotation)


@pytest.mark.parametrize("annotation", [Tensor, Callable[[int], str], Protocol, list[Tensor], Tensor | None])
def test_objects_cannot_come_from_a_yaml(annotation: Any) -> None:
    assert not is_configurable(annotation)


@pytest.mark.parametrize(
    ("annotation", "words"),
    [
        (int, "a whole number"),
        (float | None, "a number or null"),
        (Mode, "one of fast, slow"),
        (list[str], "a list of text"),
        (Sequence[bool], "a list of true or false"),
        (dict[str, float], "a mapping of text to a number"),
        (Mapping[str, list[str]] | None, "a mapping of text to a list of text or null"),
        (Any, "a value"),
    ],
)
def test_types_are_said_in_words(annotation: Any, words: str) -> None:
    assert describe(annotation) == words


class Component:
    """A component with every kind of argument."""

    def __init__(
        self,
        *,
        needed: int,
        gate: Tensor,
        mode: Mode = "fast",
        names: Sequence[str] = (),
        shares: Mapping[str, float] | None = None,
    ) -> None: ...


class Interface(Protocol):
    """What a component of a plug-in may inherit from."""


class Inheriting(Interface):
    """Has the constructor of a protocol."""


@pytest.fixture(autouse=True)
def _component_of_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    made = types.ModuleType("moteach.of_the_test")
    for cls in (Component, Inheriting):
        monkeypatch.setattr(cls, "__module__", "moteach.of_the_test")
        setattr(made, cls.__name__, cls)
    monkeypatch.setitem(sys.modules, "moteach.of_the_test", made)


def node(**arguments: Any) -> Any:
    return OmegaConf.create({"_target_": "moteach.of_the_test.Component", **arguments})


def test_a_good_node_passes() -> None:
    check_component(node(needed=1), where="router")
    check_component(node(needed=1, mode="slow", names=["a"], shares={"a": 1}), where="router")
    check_component(OmegaConf.create({"_target_": "moteach.of_the_test.Inheriting"}), where="router")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, r"router\.needed: expected a whole number, got nothing"),
        ({"needed": "???"}, r"router\.needed: expected a whole number, got nothing; set router\.needed="),
        ({"needed": 1.5}, r"router\.needed: expected a whole number, got 1\.5"),
        ({"needed": 1, "mod": "fast"}, r"router\.mod: 'Component' has no such argument; did you mean 'mode'\?"),
        ({"needed": 1, "mode": "medium"}, r"router\.mode: expected one of fast, slow, got 'medium'"),
        ({"needed": 1, "names": "a"}, r"router\.names: expected a list of text, got 'a'"),
        ({"needed": 1, "names": {"a": 1}}, r"router\.names: expected a list of text, got \{'a': 1\}"),
        (
            {"needed": 1, "shares": ["a"]},
            r"router\.shares: expected a mapping of text to a number or null, got \['a'\]",
        ),
        ({"needed": 1, "gate": 3}, r"router\.gate: 'Component' has no such argument; .*valid choices: mode, names"),
    ],
)
def test_a_wrong_argument_is_named(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_component(node(**arguments), where="router")


@pytest.mark.parametrize("value", ["lable", None, 3, {"fallback": "x"}])
def test_what_is_no_option_is_refused_with_the_options(value: Any) -> None:
    with pytest.raises(ConfigError, match=r"router: expected one of the options of the group 'router', got .*label"):
        check_component(OmegaConf.create({"x": value}).x, where="router")


def test_options_are_the_files_of_a_group() -> None:
    assert {"label", "uniform"} <= set(options("router"))
    assert options("no_such_group") == []


def test_keys_outside_the_schema_are_refused() -> None:
    cfg = OmegaConf.structured(TrainConfig)
    check_keys(cfg)
    OmegaConf.update(cfg, "optim.lrr", 1, force_add=True)
    with pytest.raises(ConfigError, match=r"there is no key 'optim\.lrr'; in 'optim': did you mean 'lr'"):
        check_keys(cfg)
    free = OmegaConf.create({"anything": {"optim": OptimConfig}})
    check_keys(free)
