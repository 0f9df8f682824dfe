"""What the pools minimise, and what is left at the minimum."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from moteach.conflict.base import resolve
from moteach.conflict.pools import Geometric, Linear
from moteach.conflict.select import Select
from moteach.divergences.full import ReverseKL, forward_kl, reverse_kl

W = torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64)


def teachers(n: int = 3, tokens: int = 4, vocab: int = 7, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, tokens, vocab, generator=generator, dtype=torch.float64).mul(2).log_softmax(-1)


def everywhere(weights: Tensor, tokens: int = 4) -> Tensor:
    return weights.expand(tokens, -1)


def kl(p: Tensor, q: Tensor) -> Tensor:
    return (p.exp() * (p - q)).sum(-1)


def test_weighted_forward_kl_is_forward_kl_to_the_linear_pool_plus_jsd():
    q, p = teachers(), teachers(1, seed=1)[0]
    linear = resolve(Linear(), q, everywhere(W)).logprobs
    residual = sum(w * kl(q_k, linear) for w, q_k in zip(W, q, strict=True))
    weighted = sum(w * forward_kl(p, q_k) for w, q_k in zip(W, q, strict=True))
    torch.testing.assert_close(weighted, forward_kl(p, linear) + residual, rtol=1e-12, atol=1e-13)
    assert (residual > 0.01).all()


def test_weighted_reverse_kl_is_reverse_kl_to_the_geometric_pool_minus_log_z():
    q, p = teachers(), teachers(1, seed=1)[0]
    target = resolve(Geometric(), q, everywhere(W))
    weighted = sum(w * reverse_kl(p, q_k) for w, q_k in zip(W, q, strict=True))
    torch.testing.assert_close(weighted, reverse_kl(p, target.logprobs) + target.neg_log_z, rtol=1e-12, atol=1e-13)
    assert (target.neg_log_z > 0.01).all()


@pytest.mark.parametrize(
    ("resolver", "objective"), [(Linear(), forward_kl), (Geometric(), reverse_kl)], ids=["linear", "geometric"]
)
def test_the_pool_is_the_minimiser_and_the_other_pool_is_not(resolver, objective):
    q = teachers()

    def value(p: Tensor) -> Tensor:
        return sum(w * objective(p, q_k) for w, q_k in zip(W, q, strict=True))

    best = resolve(resolver, q, everywhere(W)).logprobs.requires_grad_()
    (gradient,) = torch.autograd.grad(value(best).sum(), best)
    assert gradient.abs().max() < 1e-13
    other = Geometric() if resolver.name == "linear" else Linear()
    assert (value(resolve(other, q, everywhere(W)).logprobs) > value(best.detach()) + 1e-4).all()
    noise = torch.randn(best.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    assert (value(best.detach() + 0.1 * noise) > value(best.detach())).all()


def test_mean_of_reverse_kls_has_the_gradient_of_reverse_kl_to_the_product():
    q, p = teachers(), teachers(1, seed=1)[0]
    target = resolve(Geometric(), q, everywhere(W)).logprobs
    mean = sum(w * ReverseKL().value_and_gradient(p, q_k)[1] for w, q_k in zip(W, q, strict=True))
    torch.testing.assert_close(mean, ReverseKL().value_and_gradient(p, target)[1], rtol=1e-11, atol=1e-13)


def test_one_confident_teacher_vetoes_in_the_geometric_pool_only():
    q = torch.tensor([[0.97, 0.02, 0.01], [0.97, 0.02, 0.01], [1e-6, 0.6, 0.4]], dtype=torch.float64)
    q = (q / q.sum(-1, keepdim=True)).log().unsqueeze(1)
    third = torch.full((1, 3), 1 / 3, dtype=torch.float64)
    assert resolve(Geometric(), q, third).logprobs.exp()[0, 0].item() == pytest.approx(0.092, abs=5e-4)
    assert resolve(Linear(), q, third).logprobs.exp()[0, 0].item() == pytest.approx(0.647, abs=5e-4)


@pytest.mark.parametrize("w", [0.1, 0.5, 0.85])
def test_two_teacher_log_z_is_a_renyi_divergence(w: float):
    q = teachers(2)
    target = resolve(Geometric(), q, everywhere(torch.tensor([w, 1 - w], dtype=torch.float64)))
    renyi = (q[0].exp() ** w * q[1].exp() ** (1 - w)).sum(-1).log() / (w - 1)
    torch.testing.assert_close(-target.neg_log_z, -(1 - w) * renyi, rtol=1e-11, atol=1e-13)


def test_uniform_geometric_pool_is_the_softmax_of_the_mean_logits():
    logits = torch.randn(3, 4, 7, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    third = torch.full((4, 3), 1 / 3, dtype=torch.float64)
    pooled = resolve(Geometric(), logits.log_softmax(-1), third).logprobs
    torch.testing.assert_close(pooled, logits.mean(0).log_softmax(-1), rtol=1e-12, atol=1e-12)


def test_geometric_pool_is_externally_bayesian_and_linear_is_not():
    """Updating every teacher by one likelihood and then pooling equals pooling and then updating."""
    q, likelihood = teachers(), torch.linspace(-2, 1, 7, dtype=torch.float64)

    def update(logprobs: Tensor) -> Tensor:
        return (logprobs + likelihood).log_softmax(-1)

    def gap(resolver) -> float:
        before = resolve(resolver, update(q), everywhere(W)).logprobs
        return (before - update(resolve(resolver, q, everywhere(W)).logprobs)).abs().max().item()

    assert gap(Geometric()) < 1e-12
    assert gap(Linear()) > 1e-2


def test_a_pool_of_sampled_logprobs_is_exact_for_linear_and_lacks_log_z_for_geometric():
    q, weights = teachers(), everywhere(W)
    written = torch.tensor([0, 3, 6, 2])
    rows = torch.arange(4)
    sampled = q[:, rows, written].T
    linear = resolve(Linear(), q, weights).logprobs[rows, written]
    torch.testing.assert_close(Linear().resolve_sampled(sampled, weights), linear, rtol=1e-13, atol=1e-13)
    target = resolve(Geometric(), q, weights)
    short = target.logprobs[rows, written] - target.neg_log_z
    torch.testing.assert_close(Geometric().resolve_sampled(sampled, weights), short, rtol=1e-12, atol=1e-13)
    assert torch.equal(Select().resolve_sampled(sampled, weights), sampled[:, 1])


def test_dropping_log_z_from_sampled_rewards_leaves_the_expected_policy_gradient():
    """E_y[(log p - l(y)) grad log p(y)] with l unnormalised equals the gradient of reverse KL to the geometric pool."""
    q, weights = teachers(), everywhere(W)
    z = torch.randn(4, 7, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    p = z.log_softmax(-1)
    pooled = torch.stack([Geometric().resolve_sampled(q[:, :, y].T, weights) for y in range(7)], dim=-1)
    advantage = p - pooled
    score = torch.eye(7, dtype=torch.float64) - p.exp().unsqueeze(-2)
    policy_gradient = (p.exp() * advantage).unsqueeze(-1).mul(score).sum(-2)
    exact = ReverseKL().value_and_gradient(p, resolve(Geometric(), q, weights).logprobs)[1]
    torch.testing.assert_close(policy_gradient, exact, rtol=1e-11, atol=1e-13)
    assert (pooled.logsumexp(-1) < -0.01).all(), "the value is not that of a distribution"


def test_disagreement_grows_with_distance():
    q = teachers(2)
    half = everywhere(torch.tensor([0.5, 0.5], dtype=torch.float64))
    near = torch.stack([q[0], (q[0] + 0.1 * (q[1] - q[0])).log_softmax(-1)])
    assert (resolve(Geometric(), near, half).neg_log_z < resolve(Geometric(), q, half).neg_log_z).all()
    assert math.isclose(resolve(Geometric(), q[[0, 0]], half).neg_log_z.max().item(), 0.0, abs_tol=1e-14)
