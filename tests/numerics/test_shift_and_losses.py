"""Shifts of logits, and sums of divergences beside the divergence to a pool."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from moteach.conflict.base import resolve
from moteach.conflict.losses import sum_of_divergences
from moteach.conflict.pools import Geometric, Linear
from moteach.conflict.shift import delta, endpoint, proxy
from moteach.divergences.full import forward_kl, jsd, reverse_kl
from moteach.errors import ConfigError, RoutingError, UnsupportedCombinationError

TOKENS, VOCAB = 5, 7
INF = math.inf


def draw(*shape: int, seed: int = 0) -> Tensor:
    return 2 * torch.randn(*shape, TOKENS, VOCAB, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def weights(n: int = 3) -> Tensor:
    return torch.rand(TOKENS, n, generator=torch.Generator().manual_seed(n), dtype=torch.float64).softmax(-1)


def test_delta_is_its_formula_and_blind_to_constants():
    anchor, teachers, bases, w = draw(seed=1), draw(3, seed=2), draw(3, seed=3), 2 * weights()
    z = anchor + sum(w[:, i, None] * (teachers[i] - bases[i]) for i in range(3))
    target = delta(anchor, teachers, bases, w)
    torch.testing.assert_close(target, z.log_softmax(-1), rtol=1e-12, atol=1e-12)
    shifted = delta(anchor + 5, teachers.log_softmax(-1), bases - 3, w)
    torch.testing.assert_close(shifted, target, rtol=1e-12, atol=1e-12)
    plain = delta(anchor, teachers, bases, torch.ones(TOKENS, 3, dtype=torch.float64))
    torch.testing.assert_close(delta(anchor, teachers, bases), plain, rtol=1e-13, atol=1e-13)


def test_delta_is_endpoint_when_every_base_is_the_anchor_and_not_when_one_is_another():
    anchor, teachers = draw(seed=1), draw(3, seed=2)
    bases = anchor.expand(3, -1, -1).clone()
    assert torch.equal(delta(anchor, teachers, bases), endpoint(anchor, teachers))
    bases[1] = draw(seed=4)
    assert (delta(anchor, teachers, bases) - endpoint(anchor, teachers)).abs().max() > 0.1


def test_delta_is_endpoint_also_when_the_bases_lie_on_both_sides_of_the_anchor():
    """Equal bases are sufficient, not necessary: it is the weighted sum of their distances that has to vanish."""
    anchor, teachers, apart = draw(seed=1), draw(2, seed=2), draw(seed=3)
    bases = torch.stack([anchor + apart, anchor - apart])
    torch.testing.assert_close(delta(anchor, teachers, bases), endpoint(anchor, teachers), rtol=1e-11, atol=1e-11)
    uneven = torch.tensor([0.9, 0.1], dtype=torch.float64).expand(TOKENS, -1)
    gap = delta(anchor, teachers, bases, uneven) - endpoint(anchor, teachers, uneven)
    assert gap.abs().max() > 0.1


def test_endpoint_with_weights_that_sum_to_one_is_the_geometric_pool_whatever_the_anchor():
    teachers, w = draw(3, seed=2), weights()
    pool = resolve(Geometric(), teachers.log_softmax(-1), w).logprobs
    for seed in (5, 6):
        torch.testing.assert_close(endpoint(draw(seed=seed), teachers, w), pool, rtol=1e-11, atol=1e-11)
    assert (endpoint(draw(seed=5), teachers) - pool).abs().max() > 0.1


def test_proxy_is_its_formula_at_every_strength():
    base, expert, anti = draw(seed=1), draw(seed=2), draw(seed=3)
    for alpha in (-0.7, 0.0, 1.0, 2.5):
        torch.testing.assert_close(
            proxy(base, expert, anti, alpha=alpha),
            (base + alpha * (expert - anti)).log_softmax(-1),
            rtol=1e-12,
            atol=1e-12,
        )
    torch.testing.assert_close(proxy(base, expert, base), expert.log_softmax(-1), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(proxy(base, expert, anti), delta(base, expert[None], anti[None]), rtol=1e-13, atol=1e-13)
    with pytest.raises(ConfigError, match="finite alpha"):
        proxy(base, expert, anti, alpha=INF)


def test_exclusions_stay_or_are_refused():
    anchor, teachers, bases, w = draw(seed=1), draw(2, seed=2), draw(2, seed=3), weights(2)
    teachers[0, :, 2] = bases[0, :, 2] = -INF
    teachers[1, :, 4] = -INF
    target = delta(anchor, teachers, bases, w)
    assert (target[:, 4] == -INF).all()
    assert target[:, :4].isfinite().all()
    alone = torch.tensor([1.0, 0.0], dtype=torch.float64).expand(TOKENS, -1)
    assert delta(anchor, teachers, bases, alone).isfinite().all()
    with pytest.raises(UnsupportedCombinationError, match=r"got 5 entries"):
        delta(anchor, bases, teachers, w)
    with pytest.raises(UnsupportedCombinationError):
        proxy(anchor, teachers[1], bases[1], alpha=-1.0)
    assert (proxy(anchor, bases[1], teachers[1], alpha=-1.0)[:, 4] == -INF).all()


def student() -> Tensor:
    return draw(seed=8).requires_grad_()


def test_weighted_reverse_kl_is_reverse_kl_to_the_geometric_pool_minus_log_z():
    q, w, z = draw(3, seed=2).log_softmax(-1), weights(), student()
    target = resolve(Geometric(), q, w)
    left, right = sum_of_divergences(reverse_kl, z, q, w), reverse_kl(z, target.logprobs) + target.neg_log_z
    torch.testing.assert_close(left, right, rtol=1e-12, atol=1e-12)
    assert (target.neg_log_z > 0.01).all()
    same_gradient(left, reverse_kl(z, target.logprobs), z)


def test_weighted_forward_kl_is_forward_kl_to_the_linear_pool_plus_jsd():
    q, w, z = draw(3, seed=2).log_softmax(-1), weights(), student()
    linear = resolve(Linear(), q, w).logprobs
    residual = sum(w[:, k] * (q[k].exp() * (q[k] - linear)).sum(-1) for k in range(3))
    left = sum_of_divergences(forward_kl, z, q, w)
    torch.testing.assert_close(left, forward_kl(z, linear) + residual, rtol=1e-12, atol=1e-12)
    assert (residual > 0.01).all()
    same_gradient(left, forward_kl(z, linear), z)


def same_gradient(left: Tensor, right: Tensor, z: Tensor) -> None:
    (mine,) = torch.autograd.grad(left.sum(), z, retain_graph=True)
    (theirs,) = torch.autograd.grad(right.sum(), z)
    assert theirs.abs().max() > 0.1
    torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-12)


def test_for_another_divergence_no_constant_leads_to_either_pool():
    q, w = draw(3, seed=2).log_softmax(-1), weights()

    def gap(pool, z: Tensor) -> Tensor:
        return sum_of_divergences(half, z, q, w) - half(z, resolve(pool, q, w).logprobs)

    def half(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
        return jsd(student_logits, teacher_logits, beta=0.5)

    for pool in (Linear(), Geometric()):
        assert (gap(pool, draw(seed=8)) - gap(pool, draw(seed=9))).abs().max() > 1e-2


@pytest.mark.parametrize("said", [-INF, math.nan])
def test_a_teacher_of_weight_zero_changes_neither_value_nor_gradient(said: float):
    q, w, z = draw(3, seed=2).log_softmax(-1), weights(), student()
    q[1, 0] = said
    w[0] = torch.tensor([0.6, 0.0, 0.4], dtype=torch.float64)
    expected = sum_of_divergences(reverse_kl, z, q[[0, 2]], w[:1, [0, 2]].expand(TOKENS, -1))
    value = sum_of_divergences(reverse_kl, z, q, w)
    torch.testing.assert_close(value[0], expected[0], rtol=1e-14, atol=0)
    gradient, other = (torch.autograd.grad(v[0], z, retain_graph=True)[0] for v in (value, expected))
    torch.testing.assert_close(gradient, other, rtol=1e-12, atol=1e-15)


def test_weights_that_are_not_a_distribution_are_refused():
    with pytest.raises(RoutingError):
        sum_of_divergences(reverse_kl, student(), draw(2).log_softmax(-1), torch.ones(TOKENS, 2))
