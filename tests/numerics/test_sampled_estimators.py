"""Sampled estimators: values by quadrature, expected gradients by writing every token the student could write."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from moteach.divergences.sampled import estimator_loss, estimator_reward, k1, k2, k3, topk_sampled_tail
from moteach.errors import ConfigError, UnsupportedCombinationError

F64 = torch.float64
INF = math.inf
ESTIMATORS = {"k1": k1, "k2": k2, "k3": k3}
CLOSE = {"rtol": 1e-11, "atol": 1e-14}


def logits() -> tuple[Tensor, Tensor]:
    z = torch.tensor([0.9, 0.2, -0.4, -1.1, 0.3], dtype=F64, requires_grad=True)
    return z, torch.tensor([-1.5, 1.2, 0.4, -0.2, -0.9], dtype=F64).log_softmax(-1)


def toy() -> tuple[Tensor, Tensor]:
    """Twelve tokens whose reverse KL is .9959."""
    generator = np.random.default_rng(0)
    z, q = (torch.tensor(1.5 * generator.standard_normal(12)) for _ in range(2))
    return z.requires_grad_(), q.log_softmax(-1)


def gradient_of(value: Tensor, z: Tensor) -> Tensor:
    return torch.autograd.grad(value, z, retain_graph=True)[0]


def reverse(z: Tensor, q: Tensor) -> Tensor:
    p = z.log_softmax(-1)
    return (p.exp() * (p - q)).sum()


def forward(z: Tensor, q: Tensor) -> Tensor:
    return (q.exp() * (q - z.log_softmax(-1))).sum()


def expected_loss_gradient(estimator: Callable[[Tensor, Tensor], Tensor], z: Tensor, q: Tensor) -> Tensor:
    p = z.log_softmax(-1)
    return gradient_of((p.exp().detach() * estimator(p, q)).sum(), z)


def expected_return_gradient(reward: Tensor, z: Tensor) -> Tensor:
    p = z.log_softmax(-1)
    return gradient_of((p.exp().detach() * reward.detach() * p).sum(), z)


@pytest.mark.parametrize(
    ("mu", "divergence", "biases", "deviations"),
    [(0.1, 0.005, (0.0, 0.0025, 0.0), (20.0, 1.418, 1.417)), (1.0, 0.5, (0.0, 0.25, 0.0), (2.0, 1.732, 1.695))],
)
def test_schulmans_table_by_quadrature(mu: float, divergence: float, biases, deviations):
    x = torch.linspace(mu - 14, mu + 14, 200_001, dtype=F64)
    log_p, log_q = (-0.5 * (x - mean) ** 2 - 0.5 * math.log(2 * math.pi) for mean in (mu, 0.0))
    weight = log_p.exp() * (x[1] - x[0])
    assert divergence == pytest.approx(mu**2 / 2)
    for estimator, bias, deviation in zip(ESTIMATORS.values(), biases, deviations, strict=True):
        value = estimator(log_p, log_q)
        mean = (weight * value).sum()
        std = (weight * (value - mean) ** 2).sum().sqrt()
        assert ((mean - divergence) / divergence).item() == pytest.approx(bias, abs=1e-7)
        assert (std / divergence).item() == pytest.approx(deviation, abs=6e-4)
    assert 2 / mu == pytest.approx(deviations[0])
    assert mu**2 / 4 == pytest.approx(biases[1])


def test_k1_and_k3_have_the_mean_of_reverse_kl_and_k2_has_not():
    z, q = logits()
    p = z.log_softmax(-1)
    means = {name: (p.exp() * estimator(p, q)).sum() for name, estimator in ESTIMATORS.items()}
    torch.testing.assert_close(means["k1"], reverse(z, q), **CLOSE)
    torch.testing.assert_close(means["k3"], reverse(z, q), **CLOSE)
    assert (means["k2"] - reverse(z, q)).abs() > 0.1
    assert (k3(p, q) >= 0).all()
    assert (k1(p, q) < 0).any()


def test_as_a_loss_k1_teaches_nothing_k2_reverse_kl_and_k3_forward_kl():
    z, q = logits()
    assert expected_loss_gradient(k1, z, q).abs().max() < 1e-15
    torch.testing.assert_close(expected_loss_gradient(k2, z, q), gradient_of(reverse(z, q), z), **CLOSE)
    torch.testing.assert_close(expected_loss_gradient(k3, z, q), gradient_of(forward(z, q), z), **CLOSE)
    assert (gradient_of(reverse(z, q), z) - gradient_of(forward(z, q), z)).norm() > 0.1


def test_back_propagating_k1_pushes_every_written_token_down():
    z, q = logits()
    for token in range(5):
        step = gradient_of(k1(z.log_softmax(-1)[token], q[token]), z)
        assert -step[token] < 0


def test_as_a_reward_only_k1_has_the_gradient_of_reverse_kl():
    z, q = logits()
    p = z.log_softmax(-1)
    reverse_gradient, forward_gradient = gradient_of(reverse(z, q), z), gradient_of(forward(z, q), z)
    torch.testing.assert_close(expected_return_gradient(estimator_reward("k1")(p, q), z), -reverse_gradient, **CLOSE)
    torch.testing.assert_close(expected_return_gradient(-k3(p, q), z), -reverse_gradient + forward_gradient, **CLOSE)
    k2_mean = gradient_of((p.exp() * k2(p, q)).sum(), z)
    torch.testing.assert_close(expected_return_gradient(-k2(p, q), z), -k2_mean + reverse_gradient, **CLOSE)
    for wrong in (k2, k3):
        assert (expected_return_gradient(-wrong(p, q), z) + reverse_gradient).norm() > 0.1


def test_estimators_keep_the_shape_and_tell_an_excluded_token_apart_from_nan():
    p = torch.tensor([[-0.1, -2.0], [-3.0, -0.5]], dtype=F64)
    q = torch.tensor([[-0.2, -INF], [-1.0, -0.5]], dtype=F64)
    for estimator in ESTIMATORS.values():
        value = estimator(p, q)
        assert value.shape == p.shape
        assert value[0, 1] == INF
        assert value[1, 1] == 0
    assert k3(p, q)[1, 0].item() == pytest.approx(math.exp(2.0) - 1 - 2.0, rel=1e-12)


def test_k1_is_refused_as_a_loss_and_the_others_as_a_reward():
    with pytest.raises(UnsupportedCombinationError, match=r"zero.*policy_gradient"):
        estimator_loss("k1")
    with pytest.raises(UnsupportedCombinationError, match=r"k2: .*punished"):
        estimator_reward("k2")
    with pytest.raises(UnsupportedCombinationError, match=r"k3: .*forward KL with the wrong sign"):
        estimator_reward("k3")
    assert estimator_loss("k2") is k2
    assert estimator_loss("k3") is k3


def test_the_reward_is_the_log_ratio_and_a_constant():
    z, q = logits()
    reward = estimator_reward("k1")(z.log_softmax(-1), q)
    torch.testing.assert_close(reward, q - z.detach().log_softmax(-1), **CLOSE)
    assert not reward.requires_grad


@pytest.mark.parametrize("choose", [estimator_loss, estimator_reward])
def test_an_unknown_estimator_is_refused_with_the_known_ones(choose):
    unchecked = getattr(choose, "__wrapped__", choose)
    with pytest.raises((ConfigError, TypeError)):
        choose("k4")
    with pytest.raises(ConfigError, match="k1, k2, k3"):
        unchecked("k4")


def written_in_turn(z: Tensor, q: Tensor, ids: Tensor, **extra: Tensor):
    """The estimate for each token that could have been written, and the student's probabilities."""
    vocab = len(q)
    p = z.log_softmax(-1).expand(vocab, -1)
    return topk_sampled_tail(p, q.expand(vocab, -1), ids.expand(vocab, -1), torch.arange(vocab), **extra)


@pytest.mark.parametrize("k", [1, 3, 4, 11, 12])
def test_head_and_sampled_tail_have_the_value_and_the_gradient_of_reverse_kl_at_every_k(k: int):
    z, q = toy()
    weight = z.softmax(-1).detach()
    estimate = written_in_turn(z, q, q.topk(k).indices)
    torch.testing.assert_close((weight * estimate.value).sum(), reverse(z, q).detach(), **CLOSE)
    gradient = gradient_of((weight * estimate.surrogate).sum(), z)
    torch.testing.assert_close(gradient, gradient_of(reverse(z, q), z), **CLOSE)
    assert not estimate.value.requires_grad


def test_with_the_whole_vocabulary_in_the_head_nothing_is_left_to_chance():
    z, q = toy()
    estimate = written_in_turn(z, q, q.topk(12).indices)
    assert (estimate.value - reverse(z, q).detach()).abs().max() < 1e-14
    for token in range(12):
        gradient = gradient_of(estimate.surrogate[token], z)
        torch.testing.assert_close(gradient, gradient_of(reverse(z, q), z), **CLOSE)


@pytest.mark.parametrize("k", [1, 4, 11])
def test_back_propagating_the_value_itself_is_biased_by_the_gradient_of_the_mass_on_the_head(k: int):
    z, q = toy()
    p, ids = z.log_softmax(-1), q.topk(k).indices
    weight = p.exp().detach()
    in_tail = torch.ones(12, dtype=F64)
    in_tail[ids] = 0.0
    # the published form: the head differentiated as it stands, the tail sg[log p - log q] times a ratio of value one
    published = (p[ids].exp() * (p[ids] - q[ids])).sum() + in_tail * (p - q).detach() * (p - p.detach()).exp()
    torch.testing.assert_close((weight * published).sum(), reverse(z, q), **CLOSE)
    bias = gradient_of((weight * published).sum(), z) - gradient_of(reverse(z, q), z)
    mass = gradient_of(p[ids].exp().sum(), z)
    torch.testing.assert_close(bias, mass, **CLOSE)
    assert bias.norm() > 1e-3
    if k == 4:
        assert 1 - p[ids].exp().sum().item() == pytest.approx(0.412, abs=5e-4)
        assert bias.norm().item() == pytest.approx(0.191, abs=5e-4)
        assert gradient_of(reverse(z, q), z).norm().item() == pytest.approx(0.380, abs=5e-4)


def test_importance_ratios_make_tokens_of_another_sampler_count_right():
    z, q = toy()
    p, ids = z.log_softmax(-1).detach(), q.topk(3).indices
    sampler = (0.5 * z.detach() + 0.3 * q).log_softmax(-1)
    weighted = written_in_turn(z, q, ids, importance_ratio=(p - sampler).exp())
    torch.testing.assert_close((sampler.exp() * weighted.value).sum(), reverse(z, q).detach(), **CLOSE)
    gradient = gradient_of((sampler.exp() * weighted.surrogate).sum(), z)
    torch.testing.assert_close(gradient, gradient_of(reverse(z, q), z), **CLOSE)
    plain = written_in_turn(z, q, ids)
    assert (gradient_of((sampler.exp() * plain.surrogate).sum(), z) - gradient).norm() > 1e-2


def test_excluded_tokens_give_infinity_without_gradient_or_nothing_but_never_nan():
    z = torch.tensor([[0.3, -0.2, 0.5, -INF]] * 3, dtype=F64, requires_grad=True)
    q = torch.tensor([0.1, 0.7, -INF, -INF], dtype=F64).log_softmax(-1).expand(3, -1)
    ids = torch.tensor([[0, 3], [2, 0], [0, 1]])
    estimate = topk_sampled_tail(z.log_softmax(-1), q, ids, torch.tensor([1, 0, 2]))
    assert estimate.value[0].isfinite()
    assert estimate.value[1:].tolist() == [INF, INF]
    gradient = gradient_of(estimate.surrogate.sum(), z)
    assert gradient.isfinite().all()
    assert gradient[0].abs().max() > 0.01
    assert (gradient[1:] == 0).all()


def two_steps() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = np.random.default_rng(1)
    first, second = 1.2 * generator.standard_normal((2, 4)), 1.2 * generator.standard_normal((2, 4, 4))
    p1, q1 = torch.tensor(first).log_softmax(-1)
    p2, q2 = torch.tensor(second).log_softmax(-1)
    return p1, q1, p2, q2


def test_exact_divergences_on_sampled_prefixes_are_unbiased_and_vary_less_than_sampled_log_ratios():
    p1, q1, p2, q2 = two_steps()
    weight = (p1[:, None] + p2).exp()
    monte_carlo = (p1 - q1)[:, None] + (p2 - q2)
    sequence = (weight * monte_carlo).sum()
    exact = ((p1.exp() * (p1 - q1)).sum() + (p2.exp() * (p2 - q2)).sum(-1))[:, None].expand(4, 4)

    def deviation(values: Tensor) -> float:
        return (weight * (values - sequence) ** 2).sum().sqrt().item()

    torch.testing.assert_close((weight * exact).sum(), sequence, **CLOSE)
    assert deviation(exact) < 0.5 * deviation(monte_carlo)
