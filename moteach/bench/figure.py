"""runs=[DIR,DIR] out=FILE.svg [title=TEXT]: training curves of runs that differ in their seed, as one figure."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from moteach.bench._report import only_words
from moteach.errors import ConfigError
from moteach.report.plots import training_curves


def run(argv: Sequence[str]) -> None:
    """Runs `moteach bench figure`.

    Raises:
        ConfigError: `runs=` or `out=` is missing.
    """
    words = only_words(argv, ("runs", "out", "title"))
    runs = [part.strip().strip("'\"") for part in words.get("runs", "").strip("[]").split(",") if part.strip()]
    if not runs or "out" not in words:
        raise ConfigError("expected runs=[DIR,DIR] and out=FILE.svg, got " + (" ".join(argv) or "neither"))
    out = Path(words["out"])
    training_curves([Path(run) for run in runs], out, title=words.get("title"))
    Console().print(f"wrote {out}", highlight=False)
