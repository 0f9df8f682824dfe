from __future__ import annotations

import pytest
import torch

from moteach.errors import RoutingError
from moteach.objectives.base import gate_columns, token_weights
from moteach.types import Evidence, Prompt, Rollout, RolloutBatch, Routing, TeacherEvidence


def batch(*lengths: int) -> RolloutBatch:
    return RolloutBatch.from_rollouts(
        [
            Rollout(
                prompt=Prompt(prompt_id=str(i), text="x", token_ids=(1, 2)),
                sample=0,
                completion_ids=tuple(range(length)),
                rollout_logprobs=(-1.0,) * length,
                finished=True,
                student_version=0,
            )
            for i, length in enumerate(lengths)
        ],
        pad_id=0,
    )


def test_token_mean_weighs_every_token_alike() -> None:
    assert token_weights(batch(1, 3, 4), "token_mean").tolist() == [0.125] * 8


def test_sequence_mean_weighs_every_sequence_alike() -> None:
    made = batch(1, 4, 2)
    weights = token_weights(made, "sequence_mean")
    expected = [1 / 3] + [1 / 12] * 4 + [1 / 6] * 2
    assert weights.tolist() == pytest.approx(expected)


@pytest.mark.parametrize("normalise", ["token_mean", "sequence_mean"])
def test_weights_sum_to_one(normalise: str) -> None:
    assert float(token_weights(batch(5, 1, 9, 2), normalise).sum()) == pytest.approx(1.0)  # type: ignore[arg-type]


def test_sequences_without_a_trained_token_do_not_count() -> None:
    weights = token_weights(batch(2, 0, 1), "sequence_mean")
    assert weights.tolist() == pytest.approx([0.25, 0.25, 0.5])


@pytest.mark.parametrize("normalise", ["token_mean", "sequence_mean"])
def test_no_tokens_give_no_weights(normalise: str) -> None:
    assert token_weights(batch(0, 0), normalise).shape == (0,)  # type: ignore[arg-type]


def routing(names: tuple[str, ...]) -> Routing:
    return Routing(
        teacher_ids=names,
        prompt_ids=("0",),
        weights=torch.eye(len(names))[:1],
        confidence=torch.ones(1),
        abstained=torch.zeros(1, dtype=torch.bool),
    )


def evidence(*names: str) -> Evidence:
    entries = tuple(TeacherEvidence(teacher_id=name, support="sampled", tokens=torch.tensor([0])) for name in names)
    return Evidence(teachers=entries, num_tokens=2)


def test_columns_follow_the_order_of_the_evidence() -> None:
    weights = torch.tensor([[0.1, 0.0, 0.9], [0.3, 0.0, 0.7]])
    columns = gate_columns(weights, routing(("a", "b", "c")), evidence("c", "a"))
    assert columns.tolist() == torch.tensor([[0.9, 0.1], [0.7, 0.3]]).tolist()


def test_a_weight_for_a_teacher_that_was_not_asked_is_refused() -> None:
    weights = torch.tensor([[1.0, 0.0], [0.5, 0.5]])
    with pytest.raises(RoutingError, match=r"teacher 'b', which the router did not ask.*gate=prompt"):
        gate_columns(weights, routing(("a", "b")), evidence("a"))
