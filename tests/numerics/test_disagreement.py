"""How far teachers are from each other, as pure functions."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from moteach.conflict.base import resolve
from moteach.conflict.diagnostics import (
    argmax_disagreement,
    generalised_jsd,
    mean_pairwise_jsd,
    pairwise_jsd,
    spread,
)
from moteach.conflict.pools import Linear

TOKENS, VOCAB = 5, 6
INF = math.inf


def teachers(n: int = 4, *, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, TOKENS, VOCAB, generator=generator, dtype=torch.float64).mul(2).log_softmax(-1)


def weights(n: int = 4) -> Tensor:
    return torch.rand(TOKENS, n, generator=torch.Generator().manual_seed(n), dtype=torch.float64).mul(2).softmax(-1)


def js(p: Tensor, q: Tensor) -> Tensor:
    middle = ((p.exp() + q.exp()) / 2).log()
    return (p.exp() * (p - middle) + q.exp() * (q - middle)).sum(-1) / 2


def test_the_matrix_of_pairs_is_the_jensen_shannon_divergence():
    q = teachers()
    matrix = pairwise_jsd(q)
    assert matrix.shape == (TOKENS, 4, 4)
    for i in range(4):
        for j in range(4):
            expected = js(q[i], q[j]) if i != j else torch.zeros(TOKENS, dtype=torch.float64)
            torch.testing.assert_close(matrix[:, i, j], expected, rtol=1e-12, atol=1e-15)
    pairs = [js(q[i], q[j]) for i in range(4) for j in range(i)]
    torch.testing.assert_close(mean_pairwise_jsd(q), torch.stack(pairs).mean(0), rtol=1e-12, atol=0)


def test_teachers_that_exclude_each_other_are_ln_2_apart():
    q = torch.tensor([[[1.0, 0.0]], [[0.0, 1.0]]], dtype=torch.float64).log()
    assert mean_pairwise_jsd(q).item() == pytest.approx(math.log(2), abs=1e-15)
    assert argmax_disagreement(q).item() == 1.0
    uneven = torch.tensor([[0.3, 0.7]], dtype=torch.float64)
    assert generalised_jsd(q, uneven).item() == pytest.approx(-0.3 * math.log(0.3) - 0.7 * math.log(0.7), abs=1e-15)


def test_the_generalised_jsd_is_what_remains_of_the_weighted_forward_kl_at_the_linear_pool():
    q, w = teachers(), weights()
    linear = resolve(Linear(), q, w).logprobs
    remains = sum(w[:, k] * (q[k].exp() * (q[k] - linear)).sum(-1) for k in range(4))
    torch.testing.assert_close(generalised_jsd(q, w), remains, rtol=1e-12, atol=1e-14)
    entropies = -(q.exp() * q).sum(-1)
    as_entropies = -(linear.exp() * linear).sum(-1) - (w.T * entropies).sum(0)
    torch.testing.assert_close(generalised_jsd(q, w), as_entropies, rtol=1e-11, atol=1e-14)
    half = torch.full((TOKENS, 2), 0.5, dtype=torch.float64)
    torch.testing.assert_close(generalised_jsd(q[:2], half), js(q[0], q[1]), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("said", [-INF, math.nan])
def test_a_teacher_of_weight_zero_is_not_read(said: float):
    q, w = teachers(), weights()
    q[1, 2] = said
    w[2, 1] = 0.0
    w = w / w.sum(-1, keepdim=True)
    kept = [0, 2, 3]
    torch.testing.assert_close(
        generalised_jsd(q, w)[2], generalised_jsd(q[kept], w[:, kept])[2], rtol=1e-12, atol=1e-15
    )
    assert generalised_jsd(q, w).isfinite().all()


def test_argmax_disagreement_is_a_share_of_pairs():
    ids = torch.tensor([[0, 0, 0], [0, 0, 1], [0, 1, 2]])
    q = torch.nn.functional.one_hot(ids.T, 3).double()
    torch.testing.assert_close(argmax_disagreement(q), torch.tensor([0.0, 2 / 3, 1.0], dtype=torch.float64))


def test_spread_is_on_the_likeliest_token_of_the_student():
    q, student = teachers(), teachers(1, seed=7)[0]
    likeliest = student.argmax(-1)
    said = torch.stack([q[k, torch.arange(TOKENS), likeliest] for k in range(4)])
    torch.testing.assert_close(spread(q, student), said.amax(0) - said.amin(0))
    q[:, 0, likeliest[0]] = -INF
    q[1, 1, likeliest[1]] = -INF
    assert spread(q, student)[:2].tolist() == [0.0, INF]


def test_one_teacher_or_equal_ones_do_not_disagree():
    one, student = teachers(1), teachers(1, seed=7)[0]
    for q in (one, one.expand(3, -1, -1)):
        w = torch.full((TOKENS, len(q)), 1 / len(q), dtype=torch.float64)
        for value in (mean_pairwise_jsd(q), argmax_disagreement(q), spread(q, student), generalised_jsd(q, w)):
            assert value.shape == (TOKENS,)
            assert value.abs().max() < 1e-14
