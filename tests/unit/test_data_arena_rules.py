from __future__ import annotations

from random import Random

import pytest

from moteach.data.arena.families import COMPOSITE, FAMILIES, families_of
from moteach.data.arena.rules import completion_of, solve
from moteach.errors import DataError


@pytest.mark.parametrize(
    ("text", "steps"),
    [
        ("12+30=", [("math", "42")]),
        ("99+99=", [("math", "198")]),
        ("57-23=", [("math", "34")]),
        ("23-57=", [("math", "-34")]),
        ('rot("dbca")', [("code", "bcad")]),
        ("zom 37 RUB ti?num", [("search", "37")]),
        ("zom 37 RUB ti?cap", [("search", "RUB")]),
        ("A37 C80 B52?B", [("search", "52")]),
        ("A37 C80 BA?B", [("search", "A37")]),
        ("A37 C80 BA?A", [("search", "37")]),
        ("A37 B52?A+B", [("search", "A37+B52="), ("math", "89")]),
        ("A37 B52?B+A", [("search", "B52+A37="), ("math", "89")]),
        ("A37 B52?B-A", [("search", "B52-A37="), ("math", "15")]),
        ("Adbca Befgh?rev(A)", [("search", "Adbca>"), ("code", "acbd")]),
        ("Adbca Bhgfe?sort(B)", [("search", "Bhgfe>"), ("code", "efgh")]),
    ],
)
def test_a_prompt_is_solved_in_steps_of_the_right_kinds(text, steps):
    assert [(step.kind, step.text) for step in solve(text)] == steps
    assert completion_of(text) == "".join(written for _, written in steps)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "hello",
        "1+=",
        "12*30=",
        "A37 B52?C",
        "A37 BC?B",
        "A37?A+",
        "A37?A*A",
        "Aab?frob(A)",
        "ab cd?num",
        "12 34?num",
    ],
)
def test_a_text_that_is_no_arena_prompt_is_refused(text):
    with pytest.raises(DataError):
        solve(text)


@pytest.mark.parametrize("name", list(FAMILIES))
def test_every_drawn_text_is_short_and_solved_with_the_kinds_its_family_names(name):
    family = FAMILIES[name]
    rng = Random(0)
    for _ in range(200):
        text = family.draw(rng)
        steps = solve(text)
        assert tuple(step.kind for step in steps) == family.kinds
        assert all(step.text for step in steps)
        assert len(text) <= 48
        assert len(completion_of(text)) <= 12


def test_composites_need_two_experts_and_the_others_one():
    assert {len(family.kinds) for family in families_of(COMPOSITE)} == {2}
    for domain in ("math", "code", "search"):
        assert [family.kinds for family in families_of(domain)] == [(domain,)] * len(families_of(domain))
        assert len(families_of(domain)) >= 2


def test_arithmetic_agrees_with_integers_on_drawn_texts():
    rng = Random(1)
    for _ in range(200):
        left, right = FAMILIES["add"].draw(rng)[:-1].split("+")
        assert completion_of(f"{left}+{right}=") == str(int(left) + int(right))
        text = FAMILIES["subtract"].draw(rng)
        left, right = text[:-1].split("-")
        assert completion_of(text) == str(int(left) - int(right))
        assert int(left) >= int(right)
