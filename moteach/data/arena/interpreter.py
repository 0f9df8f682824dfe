r"""A mini-language of one-expression programs: the code half of the arena.

A program is an expression; running it prints its value. Grammar (no spaces, nothing else is accepted):

    expression := word | name "(" expression ")"
    word       := '"' letter* '"'
    name       := rev | sort | rot | upper | lower | first | last

`rev` reverses, `sort` orders letters by code point, `rot` moves the first letter to the end, `upper` and `lower` change
case, `first` and `last` keep one letter. Programs are parsed here, never handed to Python.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from types import MappingProxyType

from moteach.errors import DataError, nearest

MAX_DEPTH = 16
"""Deepest nesting of calls that is accepted."""

FUNCTIONS: Mapping[str, Callable[[str], str]] = MappingProxyType(
    {
        "rev": lambda word: word[::-1],
        "sort": lambda word: "".join(sorted(word)),
        "rot": lambda word: word[1:] + word[:1],
        "upper": str.upper,
        "lower": str.lower,
        "first": lambda word: word[:1],
        "last": lambda word: word[-1:],
    }
)
"""The functions of the language: each maps a word to a word."""

_WORD = re.compile(r'"([A-Za-z]*)"')
_CALL = re.compile(r"([a-z]+)\(")


def apply_function(name: str, word: str) -> str:
    """Applies one function of the language to a word.

    Raises:
        DataError: When the language has no such function.
    """
    if name not in FUNCTIONS:
        raise DataError(f"expected a function of the arena language, got {name!r}; {nearest(name, FUNCTIONS)}")
    return FUNCTIONS[name](word)


def run_program(source: str) -> str:
    """Returns what a program prints.

    Example: `run_program('rev(sort("dbca"))')` is `"dcba"`.

    Raises:
        DataError: When the program is malformed, calls an unknown function or nests deeper than `MAX_DEPTH`.
    """
    names: list[str] = []
    position = 0
    while (call := _CALL.match(source, position)) is not None:
        names.append(call.group(1))
        position = call.end()
    if len(names) > MAX_DEPTH:
        raise DataError(f"expected at most {MAX_DEPTH} nested calls, got {len(names)}")
    word = _WORD.match(source, position)
    if word is None:
        raise DataError(f"expected a quoted word of letters at column {position} of the program {source!r}")
    if source[word.end() :] != ")" * len(names):
        raise DataError(f"expected {len(names)} closing brackets and the end after column {word.end()} of {source!r}")
    value = word.group(1)
    for name in reversed(names):
        value = apply_function(name, value)
    return value
