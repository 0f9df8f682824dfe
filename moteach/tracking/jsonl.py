"""`metrics.jsonl`: one JSON object a step, always readable, cut back to the checkpoint on resume."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TextIO


class JsonlTracker:
    """Appends one line per step to `run_dir/metrics.jsonl`, flushed, with `step` as its first key.

    Numbers that JSON cannot hold (NaN, infinities) are written as null.
    """

    def __init__(self) -> None:
        self._file: TextIO | None = None

    def start(self, *, run_dir: Path, config: Mapping[str, Any], step: int) -> None:
        """Opens the file and drops the lines of steps after `step`, a torn last line included."""
        del config
        path = run_dir / "metrics.jsonl"
        kept = _lines_up_to(path, step) if path.exists() else []
        temporary = path.with_suffix(".jsonl.tmp")
        temporary.write_text("".join(kept), encoding="utf-8")
        temporary.replace(path)
        self._file = path.open("a", encoding="utf-8")

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Writes one line."""
        if self._file is None:
            raise RuntimeError("log before start")
        row = {"step": step} | {key: value if math.isfinite(value) else None for key, value in metrics.items()}
        self._file.write(json.dumps(row) + "\n")
        self._file.flush()

    def finish(self, summary: Mapping[str, Any]) -> None:
        """Closes the file; the summary has its own (`summary.json`)."""
        del summary
        if self._file is not None:
            self._file.close()
            self._file = None


def _lines_up_to(path: Path, step: int) -> list[str]:
    kept = []
    with path.open(encoding="utf-8", errors="replace") as lines:
        for line in lines:
            try:
                row = json.loads(line)
            except json.JSONDecodeError:
                break
            if not isinstance(row, dict) or row["step"] > step:
                break
            kept.append(line.rstrip("\n") + "\n")
    return kept
