"""Every YAML in conf/gate is a gate: a new option is tested by being there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor

from moteach.config.build import build
from moteach.types import Prompt, Rollout, RolloutBatch, Routing

FILES = sorted((Path(__file__).parents[2] / "conf" / "gate").glob("*.yaml"))


@pytest.fixture(params=FILES, ids=lambda path: path.stem)
def gate(request: pytest.FixtureRequest) -> Any:
    return build(yaml.safe_load(request.param.read_text()), where="gate")


def batch() -> RolloutBatch:
    return RolloutBatch.from_rollouts(
        [
            Rollout(
                prompt=Prompt(prompt_id=str(row), text="x", token_ids=(1,) * (row + 1)),
                sample=0,
                completion_ids=(2,) * length,
                rollout_logprobs=(-1.0,) * length,
                finished=True,
                student_version=0,
            )
            for row, length in enumerate((3, 1, 2))
        ],
        pad_id=0,
    )


def routing(weights: Tensor) -> Routing:
    return Routing(
        teacher_ids=tuple(f"t{i}" for i in range(weights.shape[1])),
        prompt_ids=("0", "1", "2"),
        weights=weights,
        confidence=weights.amax(dim=1),
        abstained=weights.sum(dim=1) == 0,
    )


def rows(count: int) -> Tensor:
    """A soft row, a hard row and a row without a teacher."""
    soft = torch.arange(1.0, count + 1)
    return torch.stack([soft / soft.sum(), torch.eye(count)[0], torch.zeros(count)])


def test_there_are_options() -> None:
    assert "prompt" in {path.stem for path in FILES}


@pytest.mark.parametrize("count", [1, 2, 5])
def test_weights_per_token_sum_to_one_or_abstain(gate: Any, count: int) -> None:
    rollouts = batch()
    weights = gate.weights(rollouts, routing(rows(count)))
    assert weights.shape == (rollouts.num_tokens, count)
    assert bool((weights >= 0).all())
    taught = torch.tensor([1.0, 1.0, 1.0, 1.0, 0.0, 0.0])
    torch.testing.assert_close(weights.sum(dim=1), taught)


def test_a_gate_stays_within_what_the_router_let_through(gate: Any) -> None:
    rollouts, given = batch(), rows(5)
    weights = gate.weights(rollouts, routing(given))
    assert not bool((weights[given[rollouts.token_rows] == 0] > 0).any())


def test_one_teacher_teaches_every_token(gate: Any) -> None:
    assert gate.weights(batch(), routing(torch.ones(3, 1))).tolist() == [[1.0]] * 6


def test_permuting_the_teachers_permutes_the_weights(gate: Any) -> None:
    rollouts, given, order = batch(), rows(5), [2, 4, 0, 3, 1]
    straight = gate.weights(rollouts, routing(given))
    permuted = gate.weights(rollouts, routing(given[:, order]))
    torch.testing.assert_close(permuted, straight[:, order])
