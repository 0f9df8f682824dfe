from __future__ import annotations

import inspect
import pickle

import pytest

import moteach.errors as errors
from moteach.errors import MoteachError, nearest

KINDS = [
    kind
    for _, kind in inspect.getmembers(errors, inspect.isclass)
    if issubclass(kind, MoteachError) and kind is not MoteachError
]


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_an_error_is_also_the_standard_one_and_survives_pickling(kind: type[MoteachError]) -> None:
    assert any(base.__module__ == "builtins" and base is not Exception for base in kind.__bases__)
    copy = pickle.loads(pickle.dumps(kind("what was wrong")))
    assert type(copy) is kind
    assert str(copy) == "what was wrong"


def test_the_nearest_choice_comes_first() -> None:
    assert nearest("mth", ["search", "math", "code"]) == "did you mean 'math'? (valid choices: code, math, search)"


def test_without_a_near_choice_all_are_listed() -> None:
    assert nearest("zzz", ["b", "a", "a"]) == "valid choices: a, b"
    assert nearest("zzz", []) == "valid choices: none"


def test_many_choices_do_not_flood_the_line() -> None:
    many = [f"file_{i:02}.jsonl" for i in range(99)]
    found = nearest("promts.jsonl", [*many, "prompts.jsonl"])
    assert found.startswith("did you mean 'prompts.jsonl'")
    assert "valid choices" not in found
    assert len(found) < 100
    far = nearest("qqq", many)
    assert far == "valid choices: file_00.jsonl, file_01.jsonl, file_02.jsonl, ... (99 in all)"


def test_twenty_choices_are_still_listed() -> None:
    assert nearest("qqq", [f"c{i:02}" for i in range(20)]).endswith("c18, c19")
