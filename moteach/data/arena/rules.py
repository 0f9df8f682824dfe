"""What is right in the arena: the reference completion of a prompt, worked out from its text alone.

Seven forms of text are understood:

    12+30=                  two numbers and `+` or `-`                                   42
    rev("dbca")             a program of `interpreter`                                   acbd
    zom 37 RUB ti?num       documents, and what to find in them (`num` or `cap`)         37
    A37 C80 B52?B           tagged documents, and a tag                                  52
    A37 C80 BA?B            a document that is the tag of another: follow it             A37
    A37 B52?A+B             two look-ups, then arithmetic                                A37+B52=89
    Adbca Befgh?rev(A)      a look-up, then a program                                    Adbca>acbd

The reference is a sequence of steps, each of one kind (`search`, `math`, `code`): the kind names the expert that is
right about it. The answer a prompt asks for is all steps joined.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from moteach.data.arena.interpreter import apply_function, run_program
from moteach.errors import DataError

_SUM = re.compile(r"(\d+)([+-])(\d+)")
_TAGS = re.compile(r"([A-Z])([+-])([A-Z])")
_APPLY = re.compile(r"([a-z]+)\(([A-Z])\)")
_SOUGHT: Mapping[str, re.Pattern[str]] = MappingProxyType({"num": re.compile(r"\d+"), "cap": re.compile(r"[A-Z]{3,}")})
_TAGGED = re.compile(r"([A-Z])(\d+|[a-z]+|[A-Z])")


@dataclass(frozen=True, kw_only=True, slots=True)
class Step:
    """A part of a reference completion that one expert is right about."""

    kind: str
    """Domain of that expert: `search`, `math` or `code`."""
    text: str


def solve(text: str) -> tuple[Step, ...]:
    """Returns the reference completion of an arena prompt as steps.

    Example: `solve("A37 B52?A+B")` is a `search` step `A37+B52=` and a `math` step `89`.

    Args:
        text: Prompt text in one of the forms of this module.

    Raises:
        DataError: When the text has none of the forms, or asks for a name that no document holds.
    """
    documents, asks, question = text.partition("?")
    if asks:
        return _answer(question, documents.split(" "))
    if text.endswith("="):
        return (Step(kind="math", text=_arithmetic(text[:-1])),)
    return (Step(kind="code", text=run_program(text)),)


def completion_of(text: str) -> str:
    """Returns the reference completion of an arena prompt: the texts of `solve`, joined."""
    return "".join(step.text for step in solve(text))


def _arithmetic(expression: str) -> str:
    match = _SUM.fullmatch(expression)
    if match is None:
        raise DataError(f"expected two numbers joined by + or -, got {expression!r}")
    left, right = int(match.group(1)), int(match.group(3))
    return str(left + right if match.group(2) == "+" else left - right)


def _answer(question: str, documents: list[str]) -> tuple[Step, ...]:
    if question in _SOUGHT:
        return (Step(kind="search", text=_find(_SOUGHT[question], documents, question)),)
    tagged: dict[str, str] = {}
    for document in documents:
        if (match := _TAGGED.fullmatch(document)) is not None:
            tagged[match.group(1)] = match.group(2)
    if len(question) == 1:
        value = _lookup(tagged, question)
        hop = _lookup(tagged, value) if value.isupper() else ""
        return (Step(kind="search", text=value + hop),)
    if (match := _APPLY.fullmatch(question)) is not None:
        function, tag = match.groups()
        word = _lookup(tagged, tag)
        return Step(kind="search", text=f"{tag}{word}>"), Step(kind="code", text=apply_function(function, word))
    if (match := _TAGS.fullmatch(question)) is not None:
        left, operator, right = match.groups()
        first, second = _lookup(tagged, left), _lookup(tagged, right)
        looked_up = Step(kind="search", text=f"{left}{first}{operator}{right}{second}=")
        return looked_up, Step(kind="math", text=_arithmetic(f"{first}{operator}{second}"))
    raise DataError(f"expected a question `num`, `cap`, `A`, `A+B`, `A-B` or `function(A)`, got {question!r}")


def _find(pattern: re.Pattern[str], documents: list[str], question: str) -> str:
    found = [document for document in documents if pattern.fullmatch(document)]
    if len(found) != 1:
        raise DataError(f"expected one document that answers {question!r}, found {len(found)} in {documents}")
    return found[0]


def _lookup(tagged: Mapping[str, str], tag: str) -> str:
    if tag not in tagged:
        raise DataError(f"the question asks for {tag!r} and the documents are tagged {sorted(tagged)}")
    return tagged[tag]
