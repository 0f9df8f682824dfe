from __future__ import annotations

import math

import pytest
import torch

from moteach.objectives.metrics import rollout_metrics, teacher_metrics, token_metrics
from moteach.types import Evidence, Prompt, Rollout, RolloutBatch, TeacherEvidence


def batch(*rows: tuple[str | None, int, bool]) -> RolloutBatch:
    return RolloutBatch.from_rollouts(
        [
            Rollout(
                prompt=Prompt(prompt_id=str(i), text="x", token_ids=(1,), domain=domain),
                sample=0,
                completion_ids=(2,) * length,
                rollout_logprobs=(-1.0,) * length,
                finished=finished,
                student_version=0,
            )
            for i, (domain, length, finished) in enumerate(rows)
        ],
        pad_id=0,
    )


def test_lengths_truncation_and_reward() -> None:
    made = batch(("math", 2, True), ("math", 4, False), ("code", 6, True), (None, 8, False))
    metrics = rollout_metrics(made, [1.0, 0.0, 0.25, math.nan])
    assert metrics == {
        "num_tokens": 20.0,
        "completions/mean_length": 5.0,
        "completions/min_length": 2.0,
        "completions/max_length": 8.0,
        "completions/clipped_ratio": 0.5,
        "reward/code": 0.25,
        "reward/math": 0.5,
    }


def test_a_prompt_without_a_domain_counts_as_default() -> None:
    assert rollout_metrics(batch((None, 1, True)), [0.5])["reward/default"] == 0.5


def test_every_row_needs_a_reward() -> None:
    with pytest.raises(ValueError, match="argument 2"):
        rollout_metrics(batch((None, 1, True)), [])


def test_share_of_tokens_of_each_teacher() -> None:
    entries = (
        TeacherEvidence(teacher_id="a", support="sampled", tokens=torch.arange(3)),
        TeacherEvidence(teacher_id="b", support="sampled", tokens=torch.tensor([1])),
    )
    metrics = teacher_metrics(Evidence(teachers=entries, num_tokens=4))
    assert metrics == {"teacher_token_frac/a": 0.75, "teacher_token_frac/b": 0.25}


def test_means_over_tokens_and_per_domain() -> None:
    made = batch(("math", 3, True), ("code", 1, True))
    stats = {"divergence": torch.tensor([1.0, 2.0, 3.0, 10.0]), "masked": torch.tensor([0.0, 1.0, 0.0, 0.0])}
    metrics = token_metrics(made, stats)
    assert metrics == {
        "divergence": 4.0,
        "masked": 0.25,
        "divergence/math": 2.0,
        "divergence/code": 10.0,
        "token_frac/math": 0.75,
        "token_frac/code": 0.25,
    }


def test_unknown_values_are_left_out() -> None:
    assert token_metrics(batch(("math", 1, True)), {"something": torch.tensor([1.0])}) == {}


def test_tokens_that_nobody_teaches_are_left_out_of_the_means_and_counted() -> None:
    made = batch(("math", 2, True), ("code", 1, True), ("code", 1, True))
    stats = {"divergence": torch.tensor([1.0, 3.0, 8.0, 0.0]), "abstained": torch.tensor([0.0, 0.0, 0.0, 1.0])}
    metrics = token_metrics(made, stats)
    assert metrics["abstained"] == 0.25
    assert metrics["divergence"] == 4.0
    assert metrics["divergence/code"] == 8.0


def test_a_step_nobody_teaches_has_no_divergence() -> None:
    stats = {"divergence": torch.zeros(2), "abstained": torch.ones(2)}
    assert token_metrics(batch(("math", 2, True)), stats) == {"abstained": 1.0}
