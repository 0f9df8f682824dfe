"""Arms of the benchmarks that train students, read from YAML: a name and the overrides it stands for."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

import yaml

from moteach.errors import ConfigError, MissingFileError, UnknownChoiceError, nearest

Arms = dict[str, tuple[str, ...]]


def read_arms(path: Path) -> Arms:
    """Reads a table of arms.

    Raises:
        MissingFileError: There is no such file.
        ConfigError: It is not a mapping from names to lists of overrides.
    """
    return _arms(_read(path), path)


def read_parts(path: Path) -> dict[str, Arms]:
    """Reads several tables of arms, by part of the benchmark.

    Raises:
        MissingFileError: There is no such file.
        ConfigError: It is not a mapping from parts to tables.
    """
    found = _read(path)
    return {str(part): _arms(table, path) for part, table in found.items()}


def _read(path: Path) -> Mapping[object, object]:
    if not path.is_file():
        raise MissingFileError(f"arms: expected a file of arms, found none at {path}")
    found = yaml.safe_load(path.read_text(encoding="utf-8"))
    if not isinstance(found, Mapping):
        raise ConfigError(f"{path}: expected a mapping, got {type(found).__name__}; nothing would be compared")
    return found


def _arms(found: object, path: Path) -> Arms:
    arms: Arms = {}
    for name, overrides in found.items() if isinstance(found, Mapping) else [("?", found)]:
        if not isinstance(overrides, list) or not all(isinstance(text, str) and "=" in text for text in overrides):
            raise ConfigError(
                f"{path}: expected 'name: [key=value, ...]', got '{name}: {overrides}'; the arm would be the default run"
            )
        arms[str(name)] = tuple(overrides)
    return arms


def chosen(word: str, given: str | None, known: Collection[str]) -> list[str]:
    """Splits `a,b` or `[a,b]`; everything that is known where nothing was given.

    Raises:
        UnknownChoiceError: A name is not known.
    """
    if given is None:
        return list(known)
    names = [name.strip() for name in given.strip("[]").split(",") if name.strip()]
    for name in names:
        if name not in known:
            raise UnknownChoiceError(f"{word}: there is no '{name}'; {nearest(name, known)}")
    return names


def numbers(word: str, given: str | None, default: Sequence[int]) -> list[int]:
    """Splits `0,1,2` or `[0,1,2]` into whole numbers.

    Raises:
        ConfigError: One is not a whole number.
    """
    if given is None:
        return list(default)
    texts = [text.strip() for text in given.strip("[]").split(",") if text.strip()]
    if not texts or not all(text.isdecimal() for text in texts):
        raise ConfigError(f"{word}: expected whole numbers such as 0,1,2, got '{given}'")
    return [int(text) for text in texts]
