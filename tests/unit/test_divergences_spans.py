from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from moteach.divergences.spans import ends_of, share_logprobs, spans_of
from moteach.errors import ConfigError

lengths = st.lists(st.integers(0, 4), min_size=0, max_size=12)


@st.composite
def two_cuts(draw: st.DrawFn) -> tuple[list[int], list[int]]:
    """Two ways to cut the same number of bytes, the second perhaps only of a beginning of them."""
    mine = draw(lengths)
    total = sum(mine)
    cuts = draw(st.sets(st.integers(1, total))) if total else set()
    if draw(st.booleans()) and total:
        cuts |= {total}
    ends = sorted(cuts)
    return mine, [end - start for start, end in zip([0, *ends], ends, strict=False)]


def values(count: int, seed: int, *, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return -torch.rand(count, generator=generator, dtype=dtype) * 5 - 1e-3


def by_hand(mine: list[int], theirs: list[int], own: list[float], said: list[float]) -> list[float]:
    """The definition, one byte at a time: walk both, close a span wherever both end, split it in proportion."""
    found: list[float] = []
    place = other = at = there = 0
    open_mine: list[float] = []
    open_theirs: list[float] = []
    while place < len(mine):
        at += mine[place]
        open_mine.append(own[place])
        place += 1
        while other < len(theirs) and there + theirs[other] <= at:
            there += theirs[other]
            open_theirs.append(said[other])
            other += 1
        more = place < len(mine) and mine[place] == 0  # a token of no bytes belongs to the span that ends there
        if there == at and open_theirs and not more:
            mass, total = math.fsum(open_mine), math.fsum(open_theirs)
            found += [total * value / mass for value in open_mine]
            open_mine, open_theirs = [], []
    return found


@settings(deadline=None)
@given(two_cuts(), st.integers(0, 10**6))
def test_the_shares_are_those_of_the_definition(cuts: tuple[list[int], list[int]], seed: int) -> None:
    mine, theirs = cuts
    own, said = values(len(mine), seed), values(len(theirs), seed + 1)
    shared = share_logprobs(own, said, spans_of(ends_of(mine), ends_of(theirs)))
    expected = by_hand(mine, theirs, own.tolist(), said.tolist())
    assert len(shared) == len(expected)
    torch.testing.assert_close(shared, torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=1e-12)


@settings(deadline=None)
@given(two_cuts(), st.integers(0, 10**6))
def test_each_span_keeps_the_sum_of_the_teacher(cuts: tuple[list[int], list[int]], seed: int) -> None:
    mine, theirs = cuts
    own, said = values(len(mine), seed), values(len(theirs), seed + 1)
    spans = spans_of(ends_of(mine), ends_of(theirs))
    shared = share_logprobs(own, said, spans)
    for span in range(spans.count):
        total = said[spans.teacher == span].sum()
        assert float(shared[spans.student[: len(shared)] == span].sum() - total) == pytest.approx(0, abs=1e-11)
    assert bool((shared <= 0).all())


@settings(deadline=None)
@given(lengths.map(lambda found: [size + 1 for size in found]), st.integers(0, 10**6))
def test_equal_tokenizers_change_no_bit(sizes: list[int], seed: int) -> None:
    said = values(len(sizes), seed, dtype=torch.float32)
    spans = spans_of(ends_of(sizes), ends_of(sizes))
    assert spans.count == len(sizes)
    shared = share_logprobs(values(len(sizes), seed + 1, dtype=torch.float32), said, spans)
    assert torch.equal(shared.float(), said)


@settings(deadline=None)
@given(two_cuts(), st.integers(0, 10**6), st.data())
def test_a_likelier_token_of_the_teacher_lowers_no_share(
    cuts: tuple[list[int], list[int]], seed: int, data: st.DataObject
) -> None:
    mine, theirs = cuts
    if not theirs:
        return
    own, said = values(len(mine), seed), values(len(theirs), seed + 1)
    better = said.clone()
    better[data.draw(st.integers(0, len(theirs) - 1))] /= 2
    spans = spans_of(ends_of(mine), ends_of(theirs))
    assert bool((share_logprobs(own, better, spans) >= share_logprobs(own, said, spans)).all())


def test_a_span_is_the_smallest_piece_that_both_end() -> None:
    """`ab|cd|e` against `a|bcd|e|f`: `abcd` and `e` are common, what follows is not graded."""
    spans = spans_of(torch.tensor([2, 4, 5, 7]), torch.tensor([1, 4, 5, 6]))
    assert spans.count == 2
    assert spans.student.tolist() == [0, 0, 1, 2]
    assert spans.teacher.tolist() == [0, 0, 1, 2]
    own, said = torch.tensor([-1.0, -3.0, -0.5, -9.0]), torch.tensor([-2.0, -6.0, -0.25, -9.0])
    assert share_logprobs(own, said, spans).tolist() == [-2.0, -6.0, -0.25]


def test_a_span_of_which_the_student_is_certain_is_shared_equally() -> None:
    spans = spans_of(torch.tensor([1, 2]), torch.tensor([2]))
    assert share_logprobs(torch.zeros(2), torch.tensor([-3.0]), spans).tolist() == [-1.5, -1.5]


def test_descending_offsets_are_refused() -> None:
    with pytest.raises(ConfigError, match="ascending byte offsets of the teacher"):
        spans_of(torch.tensor([1, 2]), torch.tensor([2, 1]))
