"""How much of the teachers' weights is in memory: a budget in bytes, the longest unused given up first.

DeepSeek-V4 (arXiv 2606.19348, section 5.2.2) keeps the weights of any number of teachers in storage, loads them when they are
needed and in the background, and holds one head at a time. Here the storage is the disk of the machine.
"""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Callable, Hashable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from moteach.errors import ConfigError

_UNITS = {
    "B": 1,
    **{f"{letter}iB": 2 ** (10 * power) for power, letter in enumerate("KMGT", start=1)},
    **{f"{letter}B": 10 ** (3 * power) for power, letter in enumerate("KMGT", start=1)},
}
_BYTES = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]+)\s*")


def parse_bytes(text: str, *, where: str) -> int:
    """Reads an amount of memory: `2GiB` is 2 * 2^30 bytes, `500MB` is 500 * 10^6.

    Args:
        text: A number and a unit: B, KiB, MiB, GiB, TiB (powers of 1024), KB, MB, GB, TB (powers of 1000).
        where: Config key, for messages.

    Raises:
        ConfigError: It is not an amount, has no unit, or is zero.
    """
    match = _BYTES.fullmatch(text)
    units = {unit.lower(): size for unit, size in _UNITS.items()}
    size = None if match is None else units.get(match[2].lower())
    if match is None or size is None or float(match[1]) * size < 1:
        raise ConfigError(
            f"{where}: expected an amount of memory such as 2GiB or 500MB, got '{text}'; without a unit a budget could be "
            f"a billion times off. Units: {', '.join(_UNITS)}; null keeps everything in memory"
        )
    return int(float(match[1]) * size)


@dataclass(kw_only=True)
class _Entry:
    nbytes: int
    value: Any = None
    pending: Future[Any] | None = None


class Residency:
    """Keeps values by key within a budget of bytes; the least recently used ones are dropped and loaded again.

    Used by one thread; the loads themselves may run in another one.

    Args:
        budget: Most bytes at once.
        dropped: Called with the key of a value before it is let go.
    """

    def __init__(self, *, budget: int, dropped: Callable[[Any], None] | None = None) -> None:
        self.budget = budget
        self.peak = 0
        """Most bytes that were held, or being loaded, at once."""
        self.loads = 0
        """How many values were loaded, again or for the first time."""
        self._dropped = dropped
        self._entries: OrderedDict[Hashable, _Entry] = OrderedDict()
        self._thread: ThreadPoolExecutor | None = None

    @property
    def nbytes(self) -> int:
        """Bytes held now, those being loaded included."""
        return sum(entry.nbytes for entry in self._entries.values())

    def __contains__(self, key: Hashable) -> bool:
        return key in self._entries

    def get(self, key: Hashable, load: Callable[[], Any], *, nbytes: int) -> Any:
        """Returns the value of a key, loading it when it is not held.

        Raises:
            ConfigError: It alone is larger than the budget.
        """
        entry = self._entries.get(key)
        if entry is None:
            self._make_room(nbytes)
            entry = self._add(key, _Entry(nbytes=nbytes, value=load()))
        elif entry.pending is not None:
            pending, entry.pending = entry.pending, None
            try:
                entry.value = pending.result()
            except BaseException:
                del self._entries[key]
                raise
        self._entries.move_to_end(key)
        return entry.value

    def prefetch(self, key: Hashable, load: Callable[[], Any], *, nbytes: int) -> bool:
        """Begins to load a value in the background, when it fits beside the one that was used last.

        Returns:
            Whether it is held or on its way.
        """
        if key in self._entries:
            return True
        used = next(reversed(self._entries.values())).nbytes if self._entries else 0
        if used + nbytes > self.budget:
            return False
        self._make_room(nbytes, keep=1)
        if self._thread is None:
            self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="moteach-teachers")
        self._add(key, _Entry(nbytes=nbytes, pending=self._thread.submit(load)))
        # the value in use stays the last to go
        self._entries.move_to_end(key, last=False)
        return True

    def clear(self) -> None:
        """Lets everything go."""
        while self._entries:
            self._drop_oldest()

    def _add(self, key: Hashable, entry: _Entry) -> _Entry:
        self._entries[key] = entry
        self.loads += 1
        self.peak = max(self.peak, self.nbytes)
        return entry

    def _make_room(self, nbytes: int, *, keep: int = 0) -> None:
        if nbytes > self.budget:
            raise ConfigError(
                f"teachers.memory: expected at least the {nbytes} bytes of the largest expert, got {self.budget}; it could "
                "never be loaded. Raise it, or set teachers.memory=null to keep every expert in memory"
            )
        while len(self._entries) > keep and self.nbytes + nbytes > self.budget:
            self._drop_oldest()

    def _drop_oldest(self) -> None:
        key, entry = next(iter(self._entries.items()))
        if entry.pending is not None:
            # memory is free only when the load has ended
            entry.pending.cancel() or entry.pending.exception()
        if self._dropped is not None:
            self._dropped(key)
        del self._entries[key]
