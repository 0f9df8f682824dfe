"""The linear pool of teachers that name different tokens, against the pool of their whole distributions."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from objective_cases import Bigram, batch, run, scored
from torch import Tensor

from moteach.conflict.base import resolve
from moteach.conflict.partial import likeliest, linear_bounds
from moteach.conflict.pools import Linear
from moteach.conflict.sequence import InverseCE
from moteach.divergences.full import ReverseKL
from moteach.objectives.topk import TopKObjective
from moteach.routing.token import PromptGate

TOKENS, VOCAB = 40, 12


def draw(n: int, k: int, *, seed: int = 0, scale: float = 2.0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Whole distributions, the k likeliest of each, and weights."""
    generator = torch.Generator().manual_seed(seed)
    said = torch.randn(n, TOKENS, VOCAB, generator=generator, dtype=torch.float64).mul(scale).log_softmax(-1)
    logprobs, ids = said.topk(k, dim=-1)
    weights = torch.rand(TOKENS, n, generator=generator, dtype=torch.float64) + 0.05
    return said, ids, logprobs, weights / weights.sum(-1, keepdim=True)


@given(n=st.integers(1, 4), k=st.integers(1, VOCAB), seed=st.integers(0, 10**6), scale=st.floats(0.1, 8.0))
@settings(max_examples=60, deadline=None)
def test_the_whole_pool_lies_between_the_bounds(n: int, k: int, seed: int, scale: float) -> None:
    said, ids, logprobs, w = draw(n, k, seed=seed, scale=scale)
    truth = resolve(Linear(), said, w).logprobs.exp()
    pool = linear_bounds(ids, logprobs, w)
    exact = truth.gather(-1, pool.ids)
    assert (pool.lower <= exact + 1e-12)[pool.counted].all()
    assert (exact <= pool.upper + 1e-12)[pool.counted].all()
    assert (pool.lower <= pool.midpoint + 1e-15)[pool.counted].all()
    assert (pool.midpoint <= pool.upper + 1e-15)[pool.counted].all()
    assert (pool.midpoint.masked_fill(~pool.counted, 0.0).sum(-1) <= 1 + 1e-9).all()
    union = torch.zeros(TOKENS, VOCAB, dtype=torch.bool).scatter(-1, ids.transpose(0, 1).flatten(1), True)
    found = torch.zeros(TOKENS, VOCAB, dtype=torch.long).scatter_add(-1, pool.ids, pool.counted.long())
    assert torch.equal(found, union.long())
    unseen = truth.masked_fill(union, 0.0).amax(-1)
    cap = torch.minimum(logprobs[..., -1].exp(), (1 - logprobs.exp().sum(-1)).clamp(min=1e-15))
    assert (unseen <= (w.T * cap).sum(0) + 1e-12).all()


@pytest.mark.parametrize("missing", ["lower", "midpoint"])
def test_teachers_that_name_the_same_tokens_are_pooled_exactly(missing: Any) -> None:
    said, _, _, w = draw(3, 4)
    ids = said[0].topk(4, dim=-1).indices.expand(3, -1, -1)
    # each has the same tokens on top, at other probabilities
    lifted = said.scatter_add(-1, ids, torch.full(ids.shape, 20.0, dtype=torch.float64)).log_softmax(-1)
    order = torch.stack([ids[0], ids[1].flip(-1), ids[2].roll(1, -1)])
    found, logprobs, slack = likeliest(linear_bounds(order, lifted.gather(-1, order), w), 4, missing)
    truth = resolve(Linear(), lifted, w).logprobs.gather(-1, found)
    torch.testing.assert_close(logprobs, truth, rtol=0, atol=1e-12)
    assert slack.abs().max() < 1e-12


def test_by_hand() -> None:
    ids = torch.tensor([[[0, 1]], [[0, 2]]])
    logprobs = torch.tensor([[[0.6, 0.3]], [[0.5, 0.2]]], dtype=torch.float64).log()
    pool = linear_bounds(ids, logprobs, torch.tensor([[0.25, 0.75]], dtype=torch.float64))
    assert pool.ids[0, :3].tolist() == [0, 1, 2]
    assert pool.counted.tolist() == [[True, True, True, False]]
    # tails are .1 and .3, the least named .3 and .2: missing are at most .1 for the first and .2 for the second
    assert pool.lower[0, :3].tolist() == pytest.approx([0.525, 0.075, 0.15])
    assert pool.upper[0, :3].tolist() == pytest.approx([0.525, 0.075 + 0.75 * 0.2, 0.15 + 0.25 * 0.1])
    assert pool.midpoint[0, :3].tolist() == pytest.approx([0.525, 0.075 + 0.75 * 0.1, 0.15 + 0.25 * 0.05])
    ids_lower, _, slack = likeliest(pool, 2, "lower")
    assert ids_lower.tolist() == [[0, 2]]
    assert slack.tolist() == pytest.approx([0.25 * 0.1])


@pytest.mark.parametrize("said", [-math.inf, math.nan])
def test_a_teacher_of_weight_zero_names_nothing(said: float) -> None:
    _, ids, logprobs, w = draw(3, 4)
    w[:, 1] = 0.0
    w = w / w.sum(-1, keepdim=True)
    logprobs[1] = said
    heard = [0, 2]
    for left, right in zip(
        likeliest(linear_bounds(ids, logprobs, w), 4, "midpoint"),
        likeliest(linear_bounds(ids[heard], logprobs[heard], w[:, heard]), 4, "midpoint"),
        strict=True,
    ):
        torch.testing.assert_close(left, right, rtol=1e-12, atol=1e-12)


def test_the_order_of_teachers_does_not_matter() -> None:
    _, ids, logprobs, w = draw(3, 4)
    order = [2, 0, 1]
    one, other = (
        likeliest(linear_bounds(ids[list(o)], logprobs[list(o)], w[:, list(o)]), 4, "midpoint")
        for o in (range(3), order)
    )
    assert torch.equal(one[0], other[0])
    torch.testing.assert_close(one[1], other[1], rtol=0, atol=1e-12)


ROWS = [(1, 2, 3), (2,), (3, 3, 1, 0)]
TEACHERS = [Bigram(seed, 2.0) for seed in (5, 6, 7)]


def look(resolver: Any, support: Any, *, k: int, weights: Any = (0.2, 0.5, 0.3)) -> tuple[Any, list[Tensor]]:
    student = Bigram(0)
    objective = TopKObjective(
        gate=PromptGate(), resolver=resolver, divergence=ReverseKL(), k=k, truncation="tail_bucket"
    )
    rollouts = batch(ROWS, student.table())
    return run(objective, student, scored(rollouts, TEACHERS, support, weights=weights, k=k))


@pytest.mark.parametrize("resolver", [Linear(), Linear(missing="midpoint"), InverseCE()])
def test_in_an_objective_the_whole_vocabulary_as_top_k_is_the_whole_pool(resolver: Any) -> None:
    (partial, gradients), (full, others) = look(resolver, "topk", k=4), look(resolver, "full", k=4)
    torch.testing.assert_close(partial.token_stats["divergence"], full.token_stats["divergence"], rtol=1e-5, atol=1e-5)
    for one, other in zip(gradients, others, strict=True):
        assert other.abs().max() > 1e-2
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    assert partial.token_stats["topk_slack"].abs().max() < 1e-6


def test_in_an_objective_unequal_tops_report_how_much_may_be_wrong() -> None:
    output, _ = look(Linear(), "topk", k=2)
    slack = output.token_stats["topk_slack"]
    assert (slack >= 0).all()
    assert slack.max() > 0.01
    assert (output.token_stats["teacher_mass"] <= 1).all()
    alone, _ = look(Linear(), "topk", k=2, weights=(1.0, 0.0, 0.0))
    assert "topk_slack" not in alone.token_stats
