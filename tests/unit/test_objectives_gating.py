from __future__ import annotations

import math

import pytest
import torch

from moteach.objectives.gating import LOGPROB, WEIGHT, gate_metrics, trace_of
from moteach.types import Prompt, Rollout, RolloutBatch, Routing


def batch() -> tuple[RolloutBatch, Routing]:
    rows = [
        Rollout(
            prompt=Prompt(prompt_id=str(row), text="x", token_ids=(1,)),
            sample=0,
            completion_ids=(2,) * length,
            rollout_logprobs=(-1.0,) * length,
            finished=True,
            student_version=0,
        )
        for row, length in enumerate((4, 2, 2))
    ]
    weights = torch.tensor([[0.5, 0.5], [0.5, 0.5], [0.0, 0.0]])
    routing = Routing(
        teacher_ids=("a", "b"),
        prompt_ids=("0", "1", "2"),
        weights=weights,
        confidence=weights.amax(1),
        abstained=weights.sum(1) == 0,
    )
    return RolloutBatch.from_rollouts(rows, pad_id=0), routing


def test_metrics_of_a_gate_by_hand() -> None:
    """Row 0: a, a, b, nobody; row 1: b, a; row 2 was given to nobody."""
    rollouts, routing = batch()
    stats = {
        f"{WEIGHT}a": torch.tensor([1.0, 0.75, 0.25, 0.0, 0.0, 1.0, 0.0, 0.0]),
        f"{WEIGHT}b": torch.tensor([0.0, 0.25, 0.75, 0.0, 1.0, 0.0, 0.0, 0.0]),
    }
    found = gate_metrics(rollouts, routing, stats)
    mixed = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    assert found == {
        "routing/switch_rate": pytest.approx(2 / 3),
        "routing/gate_entropy": pytest.approx(2 * mixed / 5),
        "routing/gate_abstain": pytest.approx(1 / 6),
        "routing/gate_load/a": pytest.approx(3 / 8),
        "routing/gate_load/b": pytest.approx(2 / 8),
    }


def test_a_gate_that_repeats_the_router_has_no_more_than_a_switch_rate_of_zero() -> None:
    assert gate_metrics(*batch(), {}) == {"routing/switch_rate": 0.0}


def test_a_trace_needs_weights_and_logprobs() -> None:
    _, routing = batch()
    column = torch.arange(8.0)
    weights = {f"{WEIGHT}a": column, f"{WEIGHT}b": -column}
    assert trace_of(weights, routing) is None
    trace = trace_of({**weights, f"{LOGPROB}a": column + 1, f"{LOGPROB}b": column + 2}, routing)
    assert trace is not None
    assert torch.equal(trace.weights, torch.stack([column, -column], dim=1))
    assert torch.equal(trace.logprobs, torch.stack([column + 1, column + 2], dim=1))
