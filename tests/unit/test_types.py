from __future__ import annotations

from dataclasses import FrozenInstanceError

import pytest
import torch

from moteach.types import Evidence, Head, Prompt, Rollout, RolloutBatch, Routing, TeacherEvidence


def rollout(name: str, prompt: tuple[int, ...], completion: tuple[int, ...]) -> Rollout:
    return Rollout(
        prompt=Prompt(prompt_id=name, text=name, token_ids=prompt),
        sample=0,
        completion_ids=completion,
        rollout_logprobs=tuple(-0.5 - i for i in range(len(completion))),
        finished=True,
        student_version=0,
    )


def batch() -> RolloutBatch:
    return RolloutBatch.from_rollouts(
        [rollout("a", (5,), (6, 7, 8)), rollout("b", (9, 10, 11, 12), (13,)), rollout("c", (14, 15), (16, 17))],
        pad_id=0,
    )


def test_rows_are_prompt_completion_padding() -> None:
    made = batch()
    assert len(made) == 3
    assert made.input_ids.tolist() == [[5, 6, 7, 8, 0], [9, 10, 11, 12, 13], [14, 15, 16, 17, 0]]
    assert made.attention_mask.sum(dim=1).tolist() == [4, 5, 4]
    assert made.loss_mask.nonzero().tolist() == [[0, 1], [0, 2], [0, 3], [1, 4], [2, 2], [2, 3]]
    assert made.rollout_logprobs[0].tolist() == [0.0, -0.5, -1.5, -2.5, 0.0]
    assert not made.rollout_logprobs[~made.loss_mask].any()


def test_packed_order_is_rows_then_positions() -> None:
    made = batch()
    assert made.num_tokens == 6
    assert made.token_rows.tolist() == [0, 0, 0, 1, 2, 2]
    assert made.token_targets.tolist() == [6, 7, 8, 13, 16, 17]
    assert made.rollout_logprobs[made.loss_mask].tolist() == [-0.5, -1.5, -2.5, -0.5, -0.5, -1.5]


def test_pack_takes_the_position_before_the_token() -> None:
    made = batch()
    position = torch.arange(5.0).expand(3, 5)
    assert made.pack(position).tolist() == [0.0, 1.0, 2.0, 3.0, 1.0, 2.0]
    row = torch.arange(3.0)[:, None, None].expand(3, 5, 2)
    assert made.pack(row).tolist() == [[0, 0], [0, 0], [0, 0], [1, 1], [2, 2], [2, 2]]


def test_an_empty_batch_has_no_tokens() -> None:
    made = RolloutBatch.from_rollouts([], pad_id=0)
    assert (len(made), made.num_tokens, made.input_ids.shape) == (0, 0, (0, 0))


def test_select_trims_to_the_longest_kept_sequence() -> None:
    made = batch().select([2, 0])
    assert [r.prompt.prompt_id for r in made.rollouts] == ["c", "a"]
    assert made.input_ids.tolist() == [[14, 15, 16, 17], [5, 6, 7, 8]]
    assert made.attention_mask.shape == made.loss_mask.shape == made.rollout_logprobs.shape == (2, 4)
    assert made.token_targets.tolist() == [16, 17, 6, 7, 8]
    assert batch().select([]).num_tokens == 0


def evidence() -> Evidence:
    """Two teachers of different hidden size; alpha scored rows a and c, beta rows b and c."""
    return Evidence(
        teachers=(
            TeacherEvidence(
                teacher_id="alpha",
                support="full",
                tokens=torch.tensor([0, 1, 2, 4, 5]),
                hidden=torch.tensor([[0.0], [1.0], [2.0], [4.0], [5.0]]),
                head=Head(weight=torch.ones(3, 1)),
            ),
            TeacherEvidence(
                teacher_id="beta",
                support="topk",
                tokens=torch.tensor([3, 4, 5]),
                topk_ids=torch.tensor([[3, 1], [4, 1], [5, 1]]),
                topk_logprobs=torch.tensor([[-3.0, -9.0], [-4.0, -9.0], [-5.0, -9.0]]),
                sampled_logprobs=torch.tensor([-3.0, -4.0, -5.0]),
            ),
        ),
        num_tokens=6,
    )


def test_evidence_is_renumbered_for_the_kept_tokens() -> None:
    kept = torch.tensor([False, False, False, True, True, True])
    chosen = evidence().select(kept)
    assert chosen.num_tokens == 3
    alpha, beta = chosen.teachers
    assert alpha.tokens.tolist() == [1, 2]
    assert alpha.hidden is not None
    assert alpha.hidden.tolist() == [[4.0], [5.0]]
    assert alpha.head is not None
    assert alpha.sampled_logprobs is None
    assert beta.tokens.tolist() == [0, 1, 2]
    assert beta.topk_ids is not None
    assert beta.topk_ids[:, 0].tolist() == [3, 4, 5]
    assert beta.sampled_logprobs is not None
    assert beta.sampled_logprobs.tolist() == [-3.0, -4.0, -5.0]


def test_a_teacher_without_a_kept_token_is_dropped() -> None:
    chosen = evidence().select(torch.tensor([True, False, True, False, False, False]))
    assert [entry.teacher_id for entry in chosen.teachers] == ["alpha"]
    assert chosen.teachers[0].tokens.tolist() == [0, 1]
    assert chosen.teachers[0].hidden is not None
    assert chosen.teachers[0].hidden.tolist() == [[0.0], [2.0]]
    assert chosen.of("alpha") is chosen.teachers[0]
    assert chosen.of("beta") is None


def routing() -> Routing:
    return Routing(
        teacher_ids=("alpha", "beta"),
        prompt_ids=("a", "b", "c"),
        weights=torch.tensor([[1.0, 0.0], [0.25, 0.75], [0.0, 0.0]]),
        confidence=torch.tensor([1.0, 0.75, 0.0]),
        abstained=torch.tensor([False, False, True]),
    )


def test_rows_of_a_teacher_are_those_with_a_weight() -> None:
    assert routing().rows_of("alpha").tolist() == [0, 1]
    assert routing().rows_of("beta").tolist() == [1]


def test_routing_is_selected_row_by_row() -> None:
    chosen = routing().select([2, 1])
    assert chosen.prompt_ids == ("c", "b")
    assert chosen.weights.tolist() == [[0.0, 0.0], [0.25, 0.75]]
    assert chosen.confidence.tolist() == [0.0, 0.75]
    assert chosen.abstained.tolist() == [True, False]


def test_data_cannot_be_changed_in_place() -> None:
    with pytest.raises(FrozenInstanceError):
        routing().teacher_ids = ("gamma",)  # type: ignore[misc]
