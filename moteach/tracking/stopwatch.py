"""How long each part of a step took."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field


@dataclass
class Stopwatch:
    """Seconds spent in each part of a step."""

    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def __call__(self, part: str) -> Iterator[None]:
        """Adds the time of the block to `part`."""
        begin = time.perf_counter()
        yield
        self.seconds[part] = self.seconds.get(part, 0.0) + time.perf_counter() - begin

    def lap(self) -> dict[str, float]:
        """Returns `time/<part>` and `step_time` since the last lap, and starts over."""
        metrics = {f"time/{part}": value for part, value in self.seconds.items()}
        metrics["step_time"] = sum(self.seconds.values())
        self.seconds.clear()
        return metrics
