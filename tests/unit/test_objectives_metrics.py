from __future__ import annotations

import math
from dataclasses import replace

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
        "completions/repetition": (0 + 2 / 3 + 4 / 5) / 3,
        "reward/code": 0.25,
        "reward/math": 0.5,
    }


@pytest.mark.parametrize(
    ("ids", "share"),
    [
        ((1, 2, 3, 4, 5, 6, 7, 8), 0.0),
        ((1, 2, 3, 4, 9, 1, 2, 3, 4), 1 / 6),
        ((1, 2, 1, 2, 1, 2, 1, 2), 3 / 5),
        ((5, 5, 5, 5), 0.0),
    ],
)
def test_repetition_is_the_share_of_four_grams_seen_before(ids: tuple[int, ...], share: float) -> None:
    made = batch((None, len(ids), True), (None, 3, True))
    rollouts = [replace(made.rollouts[0], completion_ids=ids), made.rollouts[1]]
    metrics = rollout_metrics(RolloutBatch.from_rollouts(rollouts, pad_id=0), [1.0, 1.0])
    assert metrics["completions/repetition"] == pytest.approx(share)


def test_completions_too_short_to_repeat_have_no_repetition() -> None:
    assert "completions/repetition" not in rollout_metrics(batch((None, 3, True)), [1.0])


def test_the_entropy_gap_has_a_sign_and_skips_tokens_that_nobody_taught() -> None:
    stats = {
        "student_entropy": torch.tensor([1.0, 2.0, 90.0]),
        "target_entropy": torch.tensor([2.0, 2.5, 0.0]),
        "abstained": torch.tensor([0.0, 0.0, 1.0]),
    }
    made = batch((None, 3, True))
    assert token_metrics(made, stats)["entropy_gap"] == -0.75
    assert "entropy_gap" not in token_metrics(made, {"student_entropy": torch.ones(3)})


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
