"""A circuit breaker: a server that keeps failing is left alone for a while."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Literal

from moteach.errors import ConfigError

State = Literal["closed", "open", "half_open"]


class CircuitBreaker:
    """Counts failed calls in a row; after `failures` of them it is open for `cool_down` seconds, then lets one call try.

    closed --(`failures` in a row)--> open --(`cool_down` seconds)--> half_open --success--> closed, --failure--> open.

    Args:
        failures: Failed calls in a row that open it.
        cool_down: Seconds during which an open breaker refuses calls.
        clock: Monotonic time in seconds.

    Raises:
        ConfigError: A number is out of range.
    """

    def __init__(
        self, *, failures: int = 3, cool_down: float = 30.0, clock: Callable[[], float] = time.monotonic
    ) -> None:
        if failures < 1 or cool_down < 0:
            raise ConfigError(f"expected failures >= 1 and cool_down >= 0, got {failures} and {cool_down}")
        self._limit = failures
        self._cool_down = cool_down
        self._clock = clock
        self._failed = 0
        self._opened: float | None = None

    @property
    def state(self) -> State:
        """`closed` (calls pass), `open` (they are refused) or `half_open` (one may try)."""
        if self._opened is None:
            return "closed"
        return "half_open" if self._clock() - self._opened >= self._cool_down else "open"

    @property
    def seconds_left(self) -> float:
        """Seconds until an open breaker lets a call try; 0 when it is not open."""
        if self._opened is None:
            return 0.0
        return max(0.0, self._opened + self._cool_down - self._clock())

    def succeeded(self) -> None:
        """Notes a call that was answered."""
        self._failed, self._opened = 0, None

    def failed(self) -> None:
        """Notes a call that was not."""
        self._failed += 1
        if self._failed >= self._limit or self._opened is not None:
            self._opened = self._clock()
