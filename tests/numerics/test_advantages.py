"""Advantages: hand-computed examples, and expected gradients by enumeration of every completion."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from moteach.divergences.advantages import (
    discounted_to_go,
    group_advantages,
    importance_weights,
    kl_baseline_advantages,
    power_reward,
    ppo_surrogate,
    shape_log_ratio,
)
from moteach.errors import ConfigError

F64 = torch.float64
NAN, INF = math.nan, math.inf
CLOSE = {"rtol": 1e-11, "atol": 1e-14}


def tensor(*values: float) -> Tensor:
    return torch.tensor(values, dtype=F64)


@dataclass
class TwoSteps:
    """A student that writes two of four tokens, the second depending on the first; every completion is a row."""

    z1: Tensor
    z2: Tensor
    q1: Tensor
    q2: Tensor

    @property
    def p1(self) -> Tensor:
        return self.z1.log_softmax(-1)

    @property
    def p2(self) -> Tensor:
        return self.z2.log_softmax(-1)

    @property
    def probability(self) -> Tensor:
        return (self.p1[:, None] + self.p2).exp()

    def divergences(self) -> tuple[Tensor, Tensor]:
        """Reverse KL at the first position, and at the second after each first token."""
        first = (self.p1.exp() * (self.p1 - self.q1)).sum()
        return first, (self.p2.exp() * (self.p2 - self.q2)).sum(-1)

    def sequence_divergence(self) -> Tensor:
        log_ratio = (self.p1 - self.q1)[:, None] + self.p2 - self.q2
        return (self.probability * log_ratio).sum()

    def packed(self, first: Tensor, second: Tensor) -> Tensor:
        """Per-token values of all sixteen completions, one row after the other."""
        return torch.stack([first.expand(4, 4), second.expand(4, 4)], dim=-1).flatten()

    @property
    def rows(self) -> Tensor:
        return torch.arange(16).repeat_interleave(2)

    def gradient(self, value: Tensor) -> Tensor:
        grads = torch.autograd.grad(value, (self.z1, self.z2), allow_unused=True, retain_graph=True)
        zeros = (torch.zeros_like(self.z1), torch.zeros_like(self.z2))
        return torch.cat([(g if g is not None else z).flatten() for g, z in zip(grads, zeros, strict=True)])

    def return_gradient(self, advantages: Tensor) -> Tensor:
        """E over completions of sum_t A_t grad log p(y_t)."""
        logprobs = self.packed(self.p1[:, None], self.p2)
        weight = self.probability.detach().flatten().repeat_interleave(2)
        return self.gradient((weight * advantages.detach() * logprobs).sum())


@pytest.fixture
def two_steps() -> TwoSteps:
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=F64) * 1.3

    return TwoSteps(
        z1=draw(4).requires_grad_(),
        z2=draw(4, 4).requires_grad_(),
        q1=draw(4).log_softmax(-1),
        q2=draw(4, 4).log_softmax(-1),
    )


def log_ratios(toy: TwoSteps) -> Tensor:
    return toy.packed((toy.q1 - toy.p1)[:, None], toy.q2 - toy.p2)


def token_gradient(toy: TwoSteps) -> Tensor:
    """The gradient of each position's divergence on prefixes that are held fixed."""
    first, second = toy.divergences()
    return toy.gradient(first + (toy.p1.exp().detach() * second).sum())


def test_a_whole_distribution_divergence_as_an_advantage_is_noise_at_discount_zero(two_steps: TwoSteps):
    first, second = two_steps.divergences()
    rewards = -two_steps.packed(first, second[:, None])
    advantages = discounted_to_go(rewards, two_steps.rows, discount=0.0)
    assert two_steps.return_gradient(advantages).abs().max() < 1e-15
    assert advantages.abs().min() > 0.1
    with_credit = discounted_to_go(rewards, two_steps.rows, discount=1.0)
    assert two_steps.return_gradient(with_credit).norm() > 0.02


def test_future_credit_and_the_back_propagated_divergence_add_up_to_the_sequence_gradient(two_steps: TwoSteps):
    first, second = two_steps.divergences()
    rewards = -two_steps.packed(first, second[:, None])
    credit = two_steps.return_gradient(discounted_to_go(rewards, two_steps.rows, discount=1.0))
    exact = two_steps.gradient(two_steps.sequence_divergence())
    torch.testing.assert_close(token_gradient(two_steps) - credit, exact, **CLOSE)


def test_log_ratios_to_go_have_the_sequence_gradient_and_at_discount_zero_the_token_gradient(two_steps: TwoSteps):
    rewards = log_ratios(two_steps)
    to_go = {d: discounted_to_go(rewards, two_steps.rows, discount=d) for d in (0.0, 0.5, 1.0)}
    exact = two_steps.gradient(two_steps.sequence_divergence())
    token = token_gradient(two_steps)
    torch.testing.assert_close(-two_steps.return_gradient(to_go[1.0]), exact, **CLOSE)
    torch.testing.assert_close(-two_steps.return_gradient(to_go[0.0]), token, **CLOSE)
    torch.testing.assert_close(-two_steps.return_gradient(to_go[0.5]), 0.5 * (exact + token), **CLOSE)


def test_sequence_minus_token_gradient_is_the_score_weighted_future_divergence(two_steps: TwoSteps):
    _, second = two_steps.divergences()
    p = two_steps.p1.exp().detach()
    difference = two_steps.gradient(two_steps.sequence_divergence()) - token_gradient(two_steps)
    expected = sum(p[a] * second[a].detach() * (torch.eye(4, dtype=F64)[a] - p) for a in range(4))
    torch.testing.assert_close(difference[:4], expected, **CLOSE)
    assert difference[4:].abs().max() < 1e-14
    assert expected.norm() > 0.02


def test_the_divergence_is_a_baseline_that_leaves_the_gradient_and_centres_the_advantage(two_steps: TwoSteps):
    first, second = two_steps.divergences()
    plain = log_ratios(two_steps)
    advantages = kl_baseline_advantages(plain, two_steps.packed(first, second[:, None]))
    torch.testing.assert_close(two_steps.return_gradient(advantages), two_steps.return_gradient(plain), **CLOSE)
    at_first = advantages.reshape(4, 4, 2)[:, 0, 0]
    at_second = advantages.reshape(4, 4, 2)[..., 1]
    assert (two_steps.p1.exp() * at_first).sum().abs() < 1e-15
    assert (two_steps.p2.exp() * at_second).sum(-1).abs().max() < 1e-15
    assert not advantages.requires_grad
    wrong_sign = plain - two_steps.packed(first, second[:, None])
    assert (two_steps.p1.exp() * wrong_sign.reshape(4, 4, 2)[:, 0, 0]).sum().abs() > 0.1


def test_rewards_to_go_by_hand():
    rewards, rows = tensor(1, 2, 4, 8, 16, 32), torch.tensor([0, 0, 0, 3, 7, 7])
    half = discounted_to_go(rewards, rows, discount=0.5)
    assert half.tolist() == [1 + 1 + 1, 2 + 2, 4, 8, 16 + 16, 32]
    assert discounted_to_go(rewards, rows, discount=1.0).tolist() == [7, 6, 4, 8, 48, 32]
    assert torch.equal(discounted_to_go(rewards, rows, discount=0.0), rewards)
    assert discounted_to_go(rewards[:0], rows[:0], discount=1.0).shape == (0,)


@pytest.mark.parametrize("discount", [0.3, 0.99, 1.0])
def test_rewards_to_go_of_ragged_rows_equal_a_loop(discount: float):
    generator = torch.Generator().manual_seed(1)
    lengths = [1, 17, 2, 300, 33, 64, 1, 5]
    rows = torch.repeat_interleave(torch.arange(8) * 2, torch.tensor(lengths))
    rewards = torch.randn(len(rows), generator=generator, dtype=F64) + 3.0
    expected = torch.zeros_like(rewards)
    for t in reversed(range(len(rows))):
        later = t + 1 < len(rows) and rows[t + 1] == rows[t]
        expected[t] = rewards[t] + (discount * expected[t + 1] if later else 0.0)
    torch.testing.assert_close(discounted_to_go(rewards, rows, discount=discount), expected, rtol=1e-13, atol=1e-12)


def test_a_huge_reward_of_one_completion_leaves_no_rounding_in_another():
    rewards, rows = tensor(1e17, -1e17, 0.125, 0.5, 1e17), torch.tensor([0, 0, 1, 1, 2])
    assert discounted_to_go(rewards, rows, discount=1.0).tolist() == [0.0, -1e17, 0.625, 0.5, 1e17]
    endless = discounted_to_go(tensor(1.0, -INF, 2.0), torch.tensor([0, 0, 1]), discount=0.0)
    assert endless.tolist() == [1.0, -INF, 2.0]


def test_rewards_to_go_refuse_mixed_rows_and_growing_discounts():
    with pytest.raises(ConfigError, match="leak between completions"):
        discounted_to_go(tensor(1, 2, 3), torch.tensor([0, 1, 0]), discount=1.0)
    for discount in (-0.1, 1.01):
        with pytest.raises(ConfigError, match=r"\[0, 1\]"):
            discounted_to_go(tensor(1), torch.tensor([0]), discount=discount)


def test_group_advantages_by_hand():
    rewards = torch.tensor([[1.0, 0.0, 0.0, 1.0], [3.0, 1.0, 1.0, 1.0]], dtype=F64)
    expected = torch.tensor([[0.5, -0.5, -0.5, 0.5], [1.5, -0.5, -0.5, -0.5]], dtype=F64)
    torch.testing.assert_close(group_advantages(rewards, epsilon=0.1, normalise=False), expected, **CLOSE)
    deviations = torch.tensor([[0.5], [math.sqrt(0.75)]], dtype=F64)
    torch.testing.assert_close(group_advantages(rewards, epsilon=0.1), expected / (deviations + 0.1), **CLOSE)


def test_group_advantages_divide_by_the_deviation_of_the_group_as_a_population():
    rewards = torch.rand(5, 8, generator=torch.Generator().manual_seed(0), dtype=F64)
    expected = (rewards - rewards.mean(1, keepdim=True)) / (rewards.std(1, correction=0, keepdim=True) + 1e-4)
    torch.testing.assert_close(group_advantages(rewards), expected, rtol=1e-12, atol=1e-13)


def test_a_missing_reward_is_worth_nothing_and_leaves_the_group_alone():
    rewards = torch.tensor([[1.0, NAN, 0.0, 4.0], [NAN, NAN, NAN, NAN], [NAN, 0.7, NAN, NAN]], dtype=F64)
    for normalise in (True, False):
        advantages = group_advantages(rewards, epsilon=0.01, normalise=normalise)
        others = group_advantages(rewards[:1, [0, 2, 3]], epsilon=0.01, normalise=normalise)
        torch.testing.assert_close(advantages[:1, [0, 2, 3]], others, **CLOSE)
        assert advantages[0, 1] == 0
        assert (advantages[1:] == 0).all()


def test_equal_rewards_have_advantages_of_exactly_zero_even_where_their_mean_is_rounded():
    rewards = torch.full((1, 3), 0.1, dtype=F64)
    assert rewards.sum() / 3 != 0.1
    assert (group_advantages(rewards, epsilon=0.0) == 0).all()
    with pytest.raises(ConfigError, match="flip signs"):
        group_advantages(rewards, epsilon=-1.0)


def test_log_ratios_are_clipped_in_nats_and_then_compressed():
    x = tensor(-9.0, -0.5, 0.0, 2.0, 30.0)
    assert torch.equal(shape_log_ratio(x), x)
    assert shape_log_ratio(x, clip=5.0).tolist() == [-5.0, -0.5, 0.0, 2.0, 5.0]
    soft = [-math.log(10.0), -math.log(1.5), 0.0, math.log(3.0), math.log(31.0)]
    assert shape_log_ratio(x, shaping="soft_log").tolist() == pytest.approx(soft, rel=1e-14)
    both = [-math.log(6.0), -math.log(1.5), 0.0, math.log(3.0), math.log(6.0)]
    assert shape_log_ratio(x, shaping="soft_log", clip=5.0).tolist() == pytest.approx(both, rel=1e-14)
    with pytest.raises(ConfigError, match="above 0 nats"):
        shape_log_ratio(x, clip=0.0)


def test_the_power_reward_is_bounded_and_tends_to_the_log_ratio():
    p, q = tensor(0.9, 0.01, 0.3, 1.0).log(), tensor(0.02, 0.7, 0.3, 1e-300).log()
    for alpha in (0.1, 0.5, 1.0, 2.0):
        reward = power_reward(p, q, alpha=alpha)
        torch.testing.assert_close(reward, q.exp() ** alpha - p.exp() ** alpha, rtol=1e-12, atol=1e-15)
        assert (reward.abs() <= 1).all()
    for alpha in (1e-4, 1e-8, 1e-12):
        limit = power_reward(p[:3], q[:3], alpha=alpha) / alpha
        # the next term is alpha (log^2 q - log^2 p) / 2
        torch.testing.assert_close(limit, (q - p)[:3], rtol=3 * alpha + 1e-13, atol=1e-13)
    with pytest.raises(ConfigError, match="alpha > 0"):
        power_reward(p, q, alpha=0.0)


def test_the_power_reward_survives_excluded_and_very_unlikely_tokens():
    p, q = torch.tensor([-INF, -1.0, -INF, -200.0, -0.0]), torch.tensor([-1.0, -INF, -INF, -0.5, -200.0])
    reward = power_reward(p, q, alpha=1.0)
    expected = torch.tensor([math.exp(-1), -math.exp(-1), 0.0, math.exp(-0.5), -1.0])
    torch.testing.assert_close(reward, expected)


def test_importance_weights_by_hand():
    ratio = tensor(0.1, 0.5, 1.0, 2.0, 2.5, INF, NAN).requires_grad_()
    weights, masked = importance_weights(ratio, mode="masked", low=0.5, high=2.0)
    assert weights.tolist() == [0.0, 0.5, 1.0, 2.0, 0.0, 0.0, 0.0]
    assert masked.tolist() == [True, False, False, False, True, True, True]
    assert not weights.requires_grad
    finite = ratio[:5]
    for mode, expected in {
        "none": [1.0, 1.0, 1.0, 1.0, 1.0],
        "clip": [0.5, 0.5, 1.0, 2.0, 2.0],
        "truncated": [0.1, 0.5, 1.0, 2.0, 2.0],
    }.items():
        weights, masked = importance_weights(finite, mode=mode, low=0.5, high=2.0)
        assert weights.tolist() == expected
        assert not masked.any()
        assert not weights.requires_grad


@pytest.mark.parametrize("bounds", [(1.1, 2.0), (0.5, 0.9), (-0.1, 2.0)])
def test_importance_bounds_that_would_change_an_on_policy_token_are_refused(bounds: tuple[float, float]):
    with pytest.raises(ConfigError, match="on-policy token has ratio 1"):
        importance_weights(tensor(1.0), mode="masked", low=bounds[0], high=bounds[1])


def test_truncated_weights_correct_the_gradient_of_another_sampler_where_nothing_is_truncated(two_steps: TwoSteps):
    student, teacher = two_steps.p1, two_steps.q1
    sampler = (0.7 * two_steps.z1.detach()).log_softmax(-1)
    ratio = (student - sampler).exp()
    weights, _ = importance_weights(ratio, mode="truncated", low=0.0, high=float(ratio.detach().max()) + 1)
    estimate = (sampler.exp() * weights * (teacher - student).detach() * student).sum()
    exact = (student.exp() * (student - teacher)).sum()
    torch.testing.assert_close(-two_steps.gradient(estimate), two_steps.gradient(exact), **CLOSE)


def test_the_ppo_surrogate_by_hand_and_its_gradient():
    ratio = tensor(0.5, 0.5, 1.0, 1.0, 1.5, 1.5).requires_grad_()
    advantages = tensor(2.0, -2.0, 2.0, -2.0, 2.0, -2.0)
    surrogate = ppo_surrogate(ratio, advantages, epsilon_low=0.2, epsilon_high=0.3)
    assert surrogate.tolist() == pytest.approx([1.0, -1.6, 2.0, -2.0, 2.6, -3.0], rel=1e-14)
    (gradient,) = torch.autograd.grad(surrogate.sum(), ratio)
    assert gradient.tolist() == [2.0, 0.0, 2.0, -2.0, 0.0, -2.0]
    with pytest.raises(ConfigError, match="ratio 1 and would be clipped"):
        ppo_surrogate(ratio, advantages, epsilon_low=0.2, epsilon_high=-0.1)
