"""Where weights and files named by a card are: next to the card, at an absolute path, or on the hub."""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass
from pathlib import Path

from moteach.catalogue.packaged import PACKAGE

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_COMMIT = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True, kw_only=True)
class Place:
    """A resolved location, or what was expected there instead."""

    value: str
    on_hub: bool = False
    problem: str | None = None
    remedy: str = ""


def resolve_weights(text: str, folder: Path) -> Place:
    """Says where a model, adapter, base or reference is.

    A name counts as local when it is absolute, starts with `.` or `~`, exists below `folder`, or its first part does.
    Only `org/name` that is none of these is a hub id, so that a typo in a local path is never looked up on the hub.
    `package:NAME` stays as it is until the model is opened.

    Args:
        text: What the card says.
        folder: Folder of the card, against which relative paths are resolved.
    """
    if text.startswith(PACKAGE):
        return Place(value=text)
    path = Path(text).expanduser()
    local = path if path.is_absolute() else folder / path
    if text and local.is_dir():
        return Place(value=str(local.resolve()))
    looks_local = (
        path.is_absolute() or text.startswith((".", "~")) or (folder / path.parts[0]).exists() if text else True
    )
    if not looks_local and _HUB_ID.fullmatch(text):
        return Place(value=text, on_hub=True)
    if local.is_file():
        return Place(value=text, problem="the folder of a saved model", remedy=", a file; name the folder it is in")
    if not looks_local and len(path.parts) != 2:
        problem = f"a folder (relative to {folder}) or a hub id 'org/name'"
        return Place(value=text, problem=problem, remedy=_siblings(local))
    return Place(value=text, problem=f"an existing folder at {local}", remedy=_siblings(local))


def resolve_file(text: str, folder: Path) -> Place:
    """Says where a file named by a card is; files are always local."""
    path = Path(text).expanduser()
    local = path if path.is_absolute() else folder / path
    if text and local.is_file():
        return Place(value=str(local.resolve()))
    return Place(value=text, problem=f"an existing file at {local}", remedy=_siblings(local))


def is_hub_id(text: str) -> bool:
    """Whether a resolved location is a hub repository rather than a folder."""
    return not Path(text).is_absolute() and not Path(text).exists() and _HUB_ID.fullmatch(text) is not None


def same_place(one: str, other: str) -> bool:
    """Whether two resolved locations are the same folder, hub repository or package."""
    if one == other:
        return True
    left, right = Path(one).expanduser(), Path(other).expanduser()
    return left.is_dir() and right.is_dir() and left.samefile(right)


def is_commit(revision: str | None) -> bool:
    """Whether a revision is a full commit hash, which cannot move, rather than a branch or tag."""
    return revision is not None and _COMMIT.fullmatch(revision) is not None


def _siblings(missing: Path) -> str:
    """Names what exists near a missing path: the first part that is absent, against its neighbours."""
    while not missing.parent.is_dir() and missing.parent != missing:
        missing = missing.parent
    if not missing.parent.is_dir():
        return ""
    names = sorted(entry.name for entry in missing.parent.iterdir())
    close = difflib.get_close_matches(missing.name, names, n=3, cutoff=0.5)
    return f"; did you mean {' or '.join(repr(name) for name in close)} in {missing.parent}?" if close else ""
