"""The task families of the arena: each draws prompt texts; `rules.solve` says what is right."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from random import Random
from types import MappingProxyType

COMPOSITE = "composite"
"""Domain of the prompts that need two experts in one answer."""

TAGS = "ABCD"
"""What the documents of the look-up families are tagged with."""

_LETTERS = "abcdefghijklmnopqrstuvwxyz"


@dataclass(frozen=True, kw_only=True, slots=True)
class Family:
    """One kind of task."""

    name: str
    domain: str
    kinds: tuple[str, ...]
    """Kinds of the steps of its answers, in order."""
    draw: Callable[[Random], str]
    """Draws a prompt text."""
    auxiliary: bool = False
    """True: an easier exercise that recipes train on, and that is neither a prompt of a run nor part of its evaluation."""


def _number(rng: Random) -> int:
    return rng.randint(10, 99)


def _word(rng: Random, length: int = 4) -> str:
    return "".join(rng.sample(_LETTERS, length))


def _question(rng: Random, documents: list[str], question: str) -> str:
    rng.shuffle(documents)
    return f"{' '.join(documents)}?{question}"


def _add(rng: Random) -> str:
    return f"{_number(rng)}+{_number(rng)}="


def _subtract(rng: Random) -> str:
    small, large = sorted((_number(rng), _number(rng)))
    return f"{large}-{small}="


def _program(function: str) -> Callable[[Random], str]:
    def draw(rng: Random) -> str:
        return f'{function}("{_word(rng)}")'

    return draw


def _extract(rng: Random) -> str:
    noise = [_word(rng, rng.randint(2, 4)) for _ in range(2)]
    return _question(rng, [*noise, str(_number(rng)), _word(rng, 3).upper()], rng.choice(("num", "cap")))


def _lookup(rng: Random) -> str:
    tags = rng.sample(TAGS, 3)
    return _question(rng, [f"{tag}{_number(rng)}" for tag in tags], tags[0])


def _hop(rng: Random) -> str:
    first, target, other = rng.sample(TAGS, 3)
    return _question(rng, [f"{first}{target}", f"{target}{_number(rng)}", f"{other}{_number(rng)}"], first)


def _total(rng: Random) -> str:
    tags = rng.sample(TAGS, 2)
    return _question(rng, [f"{tag}{_number(rng)}" for tag in tags], "+".join(tags))


def _spell(rng: Random) -> str:
    tags = rng.sample(TAGS, 2)
    return _question(rng, [f"{tag}{_word(rng)}" for tag in tags], f"{rng.choice(('rev', 'sort'))}({tags[0]})")


_ALL = (
    Family(name="add", domain="math", kinds=("math",), draw=_add),
    Family(name="subtract", domain="math", kinds=("math",), draw=_subtract),
    Family(name="reverse", domain="code", kinds=("code",), draw=_program("rev")),
    Family(name="sort", domain="code", kinds=("code",), draw=_program("sort")),
    Family(name="rotate", domain="code", kinds=("code",), draw=_program("rot")),
    Family(name="extract", domain="search", kinds=("search",), draw=_extract, auxiliary=True),
    Family(name="lookup", domain="search", kinds=("search",), draw=_lookup),
    Family(name="hop", domain="search", kinds=("search",), draw=_hop),
    Family(name="total", domain=COMPOSITE, kinds=("search", "math"), draw=_total),
    Family(name="spell", domain=COMPOSITE, kinds=("search", "code"), draw=_spell),
)

FAMILIES: Mapping[str, Family] = MappingProxyType({family.name: family for family in _ALL})
"""Every family by name."""


def families_of(domain: str) -> tuple[Family, ...]:
    """Returns the families of a domain in their fixed order, auxiliary ones left out (empty for an unknown domain)."""
    return tuple(family for family in _ALL if family.domain == domain and not family.auxiliary)
