from __future__ import annotations

import math

import pytest
import torch

from moteach.errors import ConfigError
from moteach.objectives.ratio_mask import RatioMask
from moteach.objectives.token_weights import TokenWeighting, apply_token_weights
from moteach.types import Prompt, Rollout, RolloutBatch


def batch(logprobs: list[float]) -> RolloutBatch:
    made = Rollout(
        prompt=Prompt(prompt_id="a", text="", token_ids=(3, 4)),
        sample=0,
        completion_ids=(5,) * len(logprobs),
        rollout_logprobs=tuple(logprobs),
        finished=True,
        student_version=0,
    )
    return RolloutBatch.from_rollouts([made], pad_id=0)


def measured(student: list[float], abstained: list[float] | None = None) -> dict[str, torch.Tensor]:
    given = torch.tensor(student, dtype=torch.float64)
    return {
        "student_logprobs": given,
        "abstained": torch.zeros_like(given) if abstained is None else torch.tensor(abstained).double(),
    }


def test_ratios_outside_the_bounds_are_masked_and_the_total_is_kept() -> None:
    rollouts = batch([-1.0] * 5)
    ratios = [0.4, 0.51, 1.0, 1.99, 2.5]
    stats = measured([-1.0 + math.log(r) for r in ratios])
    mask = RatioMask()
    assert isinstance(mask, TokenWeighting)
    assert mask.weights(rollouts, stats).tolist() == [0, 1, 1, 1, 0]
    found = apply_token_weights([mask], rollouts, stats, torch.full((5,), 0.2, dtype=torch.float64))
    assert found.weights.tolist() == pytest.approx([0, 1 / 3, 1 / 3, 1 / 3, 0])
    assert mask.metrics(rollouts, stats)["rollouts/masked"] == pytest.approx(0.4)


def test_the_student_itself_is_never_masked() -> None:
    values = [-0.1, -3.0, -9.5]
    mask = RatioMask(low=1.0, high=1.0)
    assert mask.weights(batch(values), measured(torch.tensor(values).tolist())).tolist() == [1, 1, 1]
    assert mask.metrics(batch(values), measured(torch.tensor(values).tolist())) == {
        "rollouts/log_ratio": 0.0,
        "rollouts/log_ratio_max": 0.0,
        "rollouts/divergence_k3": 0.0,
        "rollouts/masked": 0.0,
    }


def test_k3_has_the_divergence_of_the_sampler_from_the_student_as_its_expectation() -> None:
    sampler = torch.tensor([0.6, 0.25, 0.15], dtype=torch.float64)
    student = torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64)
    told = [
        RatioMask().metrics(batch([float(mu.log())]), measured([float(s.log())]))
        for mu, s in zip(sampler, student, strict=True)
    ]
    expected = float((sampler * (sampler.log() - student.log())).sum())
    other = float((student * (student.log() - sampler.log())).sum())
    found = sum(float(p) * one["rollouts/divergence_k3"] for p, one in zip(sampler, told, strict=True))
    # rollouts carry float32
    assert found == pytest.approx(expected, abs=1e-6)
    assert abs(expected - other) > 1e-2
    mean = sum(float(p) * one["rollouts/log_ratio"] for p, one in zip(sampler, told, strict=True))
    assert mean == pytest.approx(-expected, abs=1e-6)


def test_tokens_without_a_teacher_are_not_looked_at() -> None:
    rollouts = batch([-1.0, -1.0])
    told = RatioMask().metrics(rollouts, measured([-6.0, -1.5], abstained=[1.0, 0.0]))
    assert told["rollouts/log_ratio_max"] == pytest.approx(0.5)
    assert RatioMask().metrics(rollouts, measured([-6.0, -1.5], abstained=[1.0, 1.0])) == {}


@pytest.mark.parametrize("bounds", [(1.1, 2.0), (0.5, 0.9), (-0.1, 2.0)])
def test_bounds_that_would_mask_the_student_are_refused(bounds: tuple[float, float]) -> None:
    with pytest.raises(ConfigError, match="would be masked"):
        RatioMask(low=bounds[0], high=bounds[1])
