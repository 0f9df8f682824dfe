from __future__ import annotations

import pytest

from moteach.errors import ConfigError
from moteach.teachers.breaker import CircuitBreaker


def test_it_opens_after_failures_in_a_row_and_only_then() -> None:
    breaker = CircuitBreaker(failures=3, cool_down=10.0, clock=lambda: 0.0)
    for _ in range(2):
        breaker.failed()
    breaker.succeeded()
    for _ in range(2):
        breaker.failed()
    assert breaker.state == "closed"
    assert breaker.seconds_left == 0
    breaker.failed()
    assert breaker.state == "open"
    assert breaker.seconds_left == 10.0


def test_after_the_cool_down_one_call_decides() -> None:
    now = [0.0]
    breaker = CircuitBreaker(failures=1, cool_down=10.0, clock=lambda: now[0])
    breaker.failed()
    now[0] = 9.5
    assert (breaker.state, breaker.seconds_left) == ("open", 0.5)
    now[0] = 10.0
    assert breaker.state == "half_open"
    breaker.failed()
    assert (breaker.state, breaker.seconds_left) == ("open", 10.0)
    now[0] = 20.0
    breaker.succeeded()
    assert breaker.state == "closed"
    now[0] = 0.0
    assert breaker.state == "closed"


def test_numbers_out_of_range_are_refused() -> None:
    for wrong in ({"failures": 0}, {"cool_down": -1.0}):
        with pytest.raises(ConfigError, match="expected failures"):
            CircuitBreaker(**wrong)
