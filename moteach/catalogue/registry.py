"""The catalogue: every expert card that can be found, and its registration with Hydra.

Cards are looked for in the shipped `experts/`, in the folders of the environment variable `MOTEACH_EXPERTS`, in the
folders given as argument (`expert_path=[...]` on the command line) and in installed packages that declare an entry
point of the group `moteach.experts`. One name stands for one expert: two cards of the same name are refused unless
they say the same.
"""

from __future__ import annotations

import importlib.metadata
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from moteach.catalogue.cards import inspect_card
from moteach.catalogue.spec import ExpertSpec
from moteach.errors import ExpertCardError, MissingFileError, MoteachError, UnknownChoiceError, nearest
from moteach.paths import experts_dir

ENVIRONMENT = "MOTEACH_EXPERTS"
ENTRY_POINTS = "moteach.experts"
_PROVIDER = "moteach.catalogue"


@dataclass(frozen=True, kw_only=True)
class Catalogue:
    """Everything a scan found, problems included.

    `sources` gives the card each expert was read from, `folders` where was looked, in order.
    """

    experts: Mapping[str, ExpertSpec]
    sources: Mapping[str, Path]
    folders: tuple[Path, ...]
    errors: tuple[MoteachError, ...] = ()

    def get(self, name: str) -> ExpertSpec:
        """Returns one expert.

        Raises:
            UnknownChoiceError: No card has this name.
        """
        if name not in self.experts:
            raise UnknownChoiceError(f"expected the name of an expert, got '{name}'; {nearest(name, self.experts)}")
        return self.experts[name]


def read_catalogue(extra: Sequence[Path] = ()) -> dict[str, ExpertSpec]:
    """Reads every expert card, by name.

    Args:
        extra: Folders to read beside the shipped one, the environment's and those of installed packages.

    Raises:
        ExpertCardError: A card is wrong (`file:line: expected ..., got ...`), or two cards share a name.
        MissingFileError: A folder that was named does not exist.
    """
    catalogue = scan_catalogue(extra)
    if catalogue.errors:
        raise catalogue.errors[0]
    return dict(catalogue.experts)


def scan_catalogue(extra: Sequence[Path] = ()) -> Catalogue:
    """Reads every expert card and collects the problems instead of raising the first; what `experts list` shows."""
    errors: list[MoteachError] = []
    folders = _folders(extra, errors)
    experts: dict[str, ExpertSpec] = {}
    sources: dict[str, Path] = {}
    for folder in folders:
        for path in card_files(folder):
            reading = inspect_card(path)
            errors += reading.errors
            if reading.spec is None:
                continue
            name = reading.spec.name
            if name in experts and experts[name] != reading.spec:
                errors.append(_duplicate(sources[name], path, experts[name], reading.spec))
            elif name not in experts:
                experts[name], sources[name] = reading.spec, path
    return Catalogue(
        experts=dict(sorted(experts.items())), sources=sources, folders=tuple(folders), errors=tuple(errors)
    )


def card_files(folder: Path) -> list[Path]:
    """Lists the cards of a folder: its `.yaml` and `.yml` files, sub-folders and hidden files left out."""
    return sorted(
        path
        for path in folder.iterdir()
        if path.suffix in (".yaml", ".yml") and path.is_file() and not path.name.startswith(".")
    )


def _duplicate(first: Path, second: Path, one: ExpertSpec, other: ExpertSpec) -> ExpertCardError:
    differing = [item.name for item in fields(ExpertSpec) if getattr(one, item.name) != getattr(other, item.name)]
    return ExpertCardError(
        f"{second}:1: expected one card for the name '{first.stem}', got a second one that differs in "
        f"{', '.join(differing)} (the first is {first}); rename one of the two files"
    )


def _folders(extra: Sequence[Path], errors: list[MoteachError]) -> list[Path]:
    """Lists the folders to read, each once, noting those that do not exist."""
    found: list[Path] = []
    named = [(Path(text), ENVIRONMENT) for text in os.environ.get(ENVIRONMENT, "").split(os.pathsep) if text.strip()]
    named += [(Path(path), "expert_path") for path in extra]
    for path, origin in [(experts_dir(), "the installation"), *named, *_packaged(errors)]:
        folder = path.expanduser().resolve()
        if not folder.is_dir():
            kind = "a file; name the folder it is in" if folder.is_file() else "nothing there"
            errors.append(
                MissingFileError(f"expected a folder of expert cards at {folder} (from {origin}), got {kind}")
            )
        elif folder not in found:
            found.append(folder)
    return found


def _packaged(errors: list[MoteachError]) -> list[tuple[Path, str]]:
    """Lists the folders that installed packages declare."""
    found: list[tuple[Path, str]] = []
    points: Iterable[importlib.metadata.EntryPoint] = importlib.metadata.entry_points(group=ENTRY_POINTS)
    for point in sorted(points, key=lambda point: (point.name, point.value)):
        origin = f"the entry point '{point.name} = {point.value}'"
        try:
            found.append((_folder_of(point.load()), origin))
        except Exception as error:  # whatever somebody else's package raises must name that package
            errors.append(
                ExpertCardError(
                    f"expected a package, a path or a function that returns a path from {origin} of group "
                    f"'{ENTRY_POINTS}', got {type(error).__name__}: {error}"
                )
            )
    return found


def _folder_of(value: Any) -> Path:
    """The folder an entry point stands for: that of a module, or a path, or what a function returns."""
    if isinstance(value, str | os.PathLike):
        return Path(value)
    if callable(value):
        return Path(value())
    if getattr(value, "__file__", None):
        return Path(value.__file__).parent
    if getattr(value, "__path__", None):  # a package without __init__.py
        return Path(next(iter(value.__path__)))
    raise TypeError(f"an object of type {type(value).__name__}")


def register_with_hydra(catalogue: Mapping[str, ExpertSpec]) -> None:
    """Makes every expert an option of the config group `experts`, stored at `experts.<name>`.

    The nodes are structured, so that `experts.math.weight=abc` and `experts.math.wieght=2` fail when the
    configuration is composed. Experts of an earlier call that are no longer in the catalogue are forgotten.
    """
    from hydra.core.config_store import ConfigStore

    store = ConfigStore.instance()
    options = store.repo.get("experts", {})
    for option in [key for key, node in options.items() if getattr(node, "provider", None) == _PROVIDER]:
        del options[option]
    for name, spec in catalogue.items():
        store.store(group="experts", name=name, node=spec, package=f"experts.{name}", provider=_PROVIDER)
