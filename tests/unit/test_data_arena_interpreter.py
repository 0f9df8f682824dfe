from __future__ import annotations

import pytest

from moteach.data.arena.interpreter import MAX_DEPTH, apply_function, run_program
from moteach.errors import DataError


@pytest.mark.parametrize(
    ("program", "printed"),
    [
        ('rev("dbca")', "acbd"),
        ('sort("dbca")', "abcd"),
        ('sort("bAa")', "Aab"),
        ('rot("dbca")', "bcad"),
        ('rot("")', ""),
        ('upper("dBca")', "DBCA"),
        ('lower("DbCA")', "dbca"),
        ('first("dbca")', "d"),
        ('last("dbca")', "a"),
        ('last("")', ""),
        ('"dbca"', "dbca"),
        ('rev(sort("dbca"))', "dcba"),
        ('sort(rev("dbca"))', "abcd"),
        ('upper(rot(rev("dbca")))', "CBDA"),
    ],
)
def test_a_program_prints_the_value_of_its_expression(program, printed):
    assert run_program(program) == printed


@pytest.mark.parametrize(
    "program",
    [
        "",
        "rev",
        "rev()",
        'rev("ab"',
        'rev("ab"))',
        'rev "ab"',
        'rev("a1")',
        'rev("ab") ',
        "rev('ab')",
        '"ab"+"cd"',
        'rev("ab")\n',
    ],
)
def test_a_malformed_program_is_refused(program):
    with pytest.raises(DataError, match="expected"):
        run_program(program)


def test_an_unknown_function_is_refused_with_the_nearest_one():
    with pytest.raises(DataError, match="did you mean 'sort'"):
        run_program('sorted("dbca")')
    with pytest.raises(DataError, match="function"):
        apply_function("__import__", "os")


def test_nesting_is_limited():
    deepest = "rev(" * MAX_DEPTH + '"ab"' + ")" * MAX_DEPTH
    assert run_program(deepest) == "ab"
    with pytest.raises(DataError, match=f"at most {MAX_DEPTH} nested"):
        run_program(f"rev({deepest})")
