"""`moteach bench NAME`: finds the benchmark and hands it the rest of the command line."""

from __future__ import annotations

import ast
import importlib
from collections.abc import Sequence
from pathlib import Path

from moteach.errors import UnknownChoiceError, nearest

_FOLDER = Path(__file__).resolve().parent.parent / "bench"


def run(argv: Sequence[str]) -> None:
    """Runs one benchmark, or lists them when none is named.

    Raises:
        UnknownChoiceError: There is no benchmark of this name.
    """
    known = benchmarks()
    if not argv or argv[0] in ("-h", "--help", "help"):
        print("usage: moteach bench NAME [overrides] [out=FILE.json]\n")
        for name, about in known.items():
            print(f"  {name:<17} {about}")
        return
    name, rest = argv[0], argv[1:]
    if name not in known:
        raise UnknownChoiceError(f"there is no benchmark '{name}'; {nearest(name, known)}")
    importlib.import_module(f"moteach.bench.{name.replace('-', '_')}").run(rest)


def benchmarks() -> dict[str, str]:
    """Returns the name and the description of every benchmark, read from the files without importing them."""
    found = {}
    for path in sorted(_FOLDER.glob("*.py")):
        if not path.stem.startswith("_"):
            docstring = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
            found[path.stem.replace("_", "-")] = docstring.partition("\n")[0].rstrip(".")
    return found
