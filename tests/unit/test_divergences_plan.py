from __future__ import annotations

import pytest
import torch

from moteach.divergences.plan import make_plan
from moteach.errors import RoutingError
from moteach.types import Head, TeacherEvidence


def evidence(name: str, tokens: list[int]) -> TeacherEvidence:
    return TeacherEvidence(
        teacher_id=name,
        support="full",
        tokens=torch.tensor(tokens),
        hidden=torch.zeros(len(tokens), 2),
        head=Head(weight=torch.zeros(5, 2)),
    )


W = torch.tensor([[1.0, 0.0], [0.5, 0.5], [0.0, 0.0], [1.0, 0.0], [0.0, 1.0], [1.0, 0.0]])


def plan(chunk_size: int = 2):
    teachers = [evidence("a", [0, 1, 3, 5]), evidence("b", [1, 4])]
    return make_plan(teachers=teachers, weights=W, vocab=5, chunk_size=chunk_size)


def test_tokens_are_grouped_by_the_set_of_their_teachers():
    groups = {group.columns: group.tokens.tolist() for group in plan().groups}
    assert groups == {(0,): [0, 3, 5], (1,): [4], (0, 1): [1]}
    assert plan().abstained.tolist() == [False, False, True, False, False, False]


def test_chunks_whose_teachers_are_all_held_are_that_many_times_smaller():
    teachers = [evidence(name, [0, 1, 2, 3, 4, 5, 6]) for name in "abc"]
    third = torch.full((7, 3), 1 / 3, dtype=torch.float64)
    for size, lengths in ((6, [2, 2, 2, 1]), (2, [1] * 7)):
        made = make_plan(teachers=teachers, weights=third, vocab=5, chunk_size=size)
        assert [len(chunk.tokens) for chunk in made.chunks(held=True)] == lengths
    assert [len(chunk.tokens) for chunk in made.chunks()] == [2, 2, 2, 1]


def test_chunks_hold_one_group_and_at_most_chunk_size_tokens():
    chunks = [(chunk.columns, chunk.tokens.tolist()) for chunk in plan(2).chunks()]
    assert sorted(chunks) == [((0,), [0, 3]), ((0,), [5]), ((0, 1), [1]), ((1,), [4])]


def test_positions_find_a_token_in_the_evidence_of_each_teacher():
    assert plan().positions.tolist() == [[0, 1, -1, 2, -1, 3], [-1, 0, -1, -1, 1, -1]]


def test_weights_are_normalised_and_one_hot_ones_stay_exact():
    weights = torch.tensor([[0.3301, 0.6709], [1.0, 0.0]])
    made = make_plan(teachers=[evidence("a", [0, 1]), evidence("b", [0, 1])], weights=weights, vocab=5, chunk_size=1)
    assert made.weights.sum(-1).tolist() == pytest.approx([1.0, 1.0], abs=1e-15)
    assert made.weights[1].tolist() == [1.0, 0.0]


def test_more_teachers_than_bits_are_grouped_too():
    n = 70
    weights = torch.zeros(4, n)
    weights[0, 0] = weights[1, 69] = weights[2, 69] = 1.0
    weights[3, [5, 69]] = 0.5
    teachers = [evidence(f"t{k}", [0, 1, 2, 3]) for k in range(n)]
    groups = make_plan(teachers=teachers, weights=weights, vocab=5, chunk_size=4).groups
    assert {group.columns: group.tokens.tolist() for group in groups} == {(0,): [0], (69,): [1, 2], (5, 69): [3]}


def test_columns_and_hidden_states_must_match_the_teachers():
    with pytest.raises(RoutingError, match="one column of weights for each of the 1 teachers, got 2"):
        make_plan(teachers=[evidence("a", [0])], weights=W, vocab=5, chunk_size=1)
    broken = evidence("a", [0, 1])
    object.__setattr__(broken, "hidden", torch.zeros(3, 2))  # what reaches the kernel when nothing checks shapes
    with pytest.raises(RoutingError, match=r"the 2 tokens that teacher 'a' scored, got 3"):
        make_plan(teachers=[broken], weights=torch.ones(2, 1), vocab=5, chunk_size=1)


def test_a_missing_score_is_an_error_with_the_name_and_the_count():
    with pytest.raises(RoutingError, match=r"teacher 'b' .* 2 token\(s\) that it did not score"):
        make_plan(
            teachers=[evidence("a", [0, 1, 2]), evidence("b", [2])],
            weights=torch.full((3, 2), 0.5),
            vocab=5,
            chunk_size=1,
        )
