"""What a piece of work adds to the process that no file could give back."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable
from pathlib import Path

_EVERY = 0.001
"""Seconds between two looks."""


def anonymous_growth(work: Callable[[], object]) -> float:
    """Largest growth of the process's anonymous memory while `work` runs, in bytes; NaN where Linux does not tell.

    `RssAnon` of `/proc/self/status`, looked at every millisecond, above what it was before. Pages of mapped files are not in
    it: they are shared with the file and are dropped without a write. What malloc kept of freed memory is given back first, or
    work that fits into it would seem to need nothing.
    """
    _trim()
    before = _anonymous()
    highest = before
    done = threading.Event()

    def look() -> None:
        nonlocal highest
        while not done.wait(_EVERY):
            highest = max(highest, _anonymous())

    thread = threading.Thread(target=look, name="moteach-anonymous", daemon=True)
    thread.start()
    try:
        work()
    finally:
        done.set()
        thread.join()
    return max(highest, _anonymous()) - before


def _trim() -> None:
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def _anonymous() -> float:
    try:
        lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    except OSError:
        return float("nan")
    return next((float(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon")), float("nan"))
