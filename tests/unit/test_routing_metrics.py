from __future__ import annotations

import math

import pytest
import torch

from moteach.routing.metrics import routing_metrics
from moteach.types import Routing


def routing(rows: list[list[float]]) -> Routing:
    weights = torch.tensor(rows).reshape(len(rows), 2)
    return Routing(
        teacher_ids=("a", "b"),
        prompt_ids=tuple(str(i) for i in range(len(rows))),
        weights=weights,
        confidence=weights.amax(dim=1) if rows else torch.zeros(0),
        abstained=weights.sum(dim=1) == 0,
    )


def test_entropy_load_and_abstentions_are_means_over_rows() -> None:
    metrics = routing_metrics(routing([[1.0, 0.0], [0.5, 0.5], [0.25, 0.75], [0.0, 0.0]]))
    mixed = -(0.25 * math.log(0.25) + 0.75 * math.log(0.75))
    assert metrics["routing/entropy"] == pytest.approx((math.log(2) + mixed) / 4)
    assert metrics["routing/abstain"] == 0.25
    assert metrics["routing/load/a"] == pytest.approx(1.75 / 4)
    assert metrics["routing/load/b"] == pytest.approx(1.25 / 4)


def test_hard_routing_has_no_entropy() -> None:
    assert routing_metrics(routing([[1.0, 0.0], [0.0, 1.0]]))["routing/entropy"] == 0.0


def test_no_rows_give_no_metrics() -> None:
    assert routing_metrics(routing([])) == {}
