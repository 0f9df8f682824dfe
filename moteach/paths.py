"""Where the shipped `conf/` and `experts/` folders are, in a checkout and in an installed wheel."""

from __future__ import annotations

from pathlib import Path

from moteach.errors import MissingFileError

_PACKAGE = Path(__file__).resolve().parent


def _shipped(name: str) -> Path:
    for candidate in (_PACKAGE / "_bundled" / name, _PACKAGE.parent / name):
        if candidate.is_dir():
            return candidate
    raise MissingFileError(
        f"the shipped folder '{name}' is neither in {_PACKAGE / '_bundled'} nor in {_PACKAGE.parent}; "
        "the installation is incomplete: reinstall moteach"
    )


def conf_dir() -> Path:
    """Returns the folder of Hydra config groups that ships with moteach."""
    return _shipped("conf")


def experts_dir() -> Path:
    """Returns the folder of expert cards (and their weights) that ships with moteach."""
    return _shipped("experts")
