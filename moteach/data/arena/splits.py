"""Which arena texts are trained on and which are held out, decided by the text itself.

No seed, size or recipe can make the splits overlap: a text is in the split that its hash says.
"""

from __future__ import annotations

import hashlib
from random import Random
from typing import Literal

from moteach.data.arena.families import Family
from moteach.errors import DataError

Split = Literal["train", "validation", "evaluation"]

_BUCKETS = 100
_EVALUATION_BUCKETS = 15
_VALIDATION_BUCKETS = 5
_MAX_DRAWS = 1000


def split_of(text: str) -> Split:
    """Says which split a prompt text belongs to: 15 % evaluation, 5 % validation (stop rules), 80 % train.

    The bucket is `sha256(text without whitespace, case folded) mod 100`: the same on every machine and for every seed.
    """
    normalised = "".join(text.split()).casefold()
    bucket = int.from_bytes(hashlib.sha256(normalised.encode()).digest()[:8], "big") % _BUCKETS
    if bucket < _EVALUATION_BUCKETS:
        return "evaluation"
    return "validation" if bucket < _EVALUATION_BUCKETS + _VALIDATION_BUCKETS else "train"


def draw_text(family: Family, rng: Random, *, split: Split) -> str:
    """Draws a prompt text of a family that belongs to a split.

    Raises:
        DataError: When the family has (next to) no text in this split.
    """
    for _ in range(_MAX_DRAWS):
        text = family.draw(rng)
        if split_of(text) == split:
            return text
    raise DataError(
        f"expected a text of family {family.name!r} in split {split!r}, got none in {_MAX_DRAWS} draws; "
        "the family has too few different texts for a held-out split: widen what it draws"
    )


def draw_distinct(family: Family, count: int, *, split: Split, seed: int | str = 0) -> list[str]:
    """Draws `count` different texts of a family from a split, in a fixed order for a fixed seed.

    Raises:
        DataError: When the family does not have that many texts.
    """
    rng = Random(f"{seed}/{family.name}/{split}")
    texts: dict[str, None] = {}
    for _ in range(count * 20):
        if len(texts) == count:
            break
        texts[draw_text(family, rng, split=split)] = None
    if len(texts) < count:
        raise DataError(
            f"expected {count} different {split} texts of family {family.name!r}, found {len(texts)}; "
            f"a smaller set would be measured more coarsely than asked for: ask for at most {len(texts)} per family"
        )
    return list(texts)
