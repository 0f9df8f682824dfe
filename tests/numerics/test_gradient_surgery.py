"""Gradient surgery: published numbers, closed forms for two teachers, and what defines the result for more."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from moteach.conflict.gradients import cagrad, mgda, mgda_weights, pcgrad, sign_vote
from moteach.errors import ConfigError

PAIR = torch.tensor([[1.0, 0.0], [-1.0, 1.0]], dtype=torch.float64)


def draw(n: int, parameters: int = 9, *, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    scale = torch.logspace(-1, 1, n, dtype=torch.float64).unsqueeze(-1)
    return scale * torch.randn(n, parameters, generator=generator, dtype=torch.float64)


def test_pcgrad_of_the_pair():
    assert pcgrad(PAIR).tolist() == [0.5, 1.5]


def test_pcgrad_leaves_agreement_alone_and_ends_opposition_of_two():
    agreeing = draw(3).abs()
    torch.testing.assert_close(pcgrad(agreeing), agreeing.sum(0))
    one, other = draw(2, seed=1)
    other = other - 2 * one
    assert one @ other < 0
    both = torch.stack([one, other])
    expected = one + other - (one @ other) * (other / other.square().sum() + one / one.square().sum())
    torch.testing.assert_close(pcgrad(both), expected)
    assert (both @ pcgrad(both) > 0).all()


def test_pcgrad_depends_on_the_order_from_three_teachers_on():
    gradients = draw(3, 3, seed=4)
    gradients[2] = -gradients[0] - gradients[1]
    drawn = {tuple(pcgrad(gradients, generator=torch.Generator().manual_seed(s)).tolist()) for s in range(20)}
    assert len(drawn) > 1
    assert tuple(pcgrad(gradients).tolist()) == tuple(pcgrad(gradients).tolist())


def test_mgda_of_the_pair():
    torch.testing.assert_close(mgda_weights(PAIR), torch.tensor([0.6, 0.4], dtype=torch.float64), rtol=0, atol=1e-14)
    torch.testing.assert_close(mgda(PAIR), torch.tensor([0.2, 0.4], dtype=torch.float64), rtol=0, atol=1e-14)


@pytest.mark.parametrize("seed", range(6))
def test_mgda_of_two_is_the_closed_form(seed: int):
    one, two = draw(2, 3, seed=seed)
    gamma = (((two - one) @ two) / (one - two).square().sum()).clamp(0, 1)
    torch.testing.assert_close(mgda_weights(torch.stack([one, two]))[0], gamma, rtol=0, atol=1e-12)


@pytest.mark.parametrize(("n", "parameters"), [(2, 9), (3, 9), (6, 9), (6, 3), (10, 4)])
def test_mgda_has_at_least_its_own_square_as_product_with_every_gradient(n: int, parameters: int):
    """This inequality, with equality where a weight is positive, is what being the nearest point of the hull means."""
    for seed in range(4):
        gradients = draw(n, parameters, seed=seed) + 0.5
        point, w = mgda(gradients), mgda_weights(gradients)
        assert (w >= 0).all()
        assert w.sum().item() == pytest.approx(1.0, abs=1e-12)
        scale = gradients.square().sum(-1).max()
        products = gradients @ point - point @ point
        assert (products > -1e-9 * scale).all()
        assert products[w > 1e-6].abs().max() < 1e-9 * scale


def test_mgda_of_opposed_gradients_is_zero():
    one = draw(1)[0]
    assert mgda(torch.stack([one, -3 * one])).abs().max() < 1e-12


@pytest.mark.parametrize("n", [2, 3, 5])
@pytest.mark.parametrize("c", [0.2, 0.5, 0.9])
def test_cagrad_reaches_the_dual_bound_inside_the_ball(n: int, c: float):
    """No feasible direction has a larger least product than the dual at any weights; ours has that of the best weights."""
    for seed in range(3):
        gradients = draw(n, seed=seed) + 0.3
        mean = gradients.mean(0)
        radius = c * mean.norm()
        direction = cagrad(gradients, c=c, rescale=False)
        assert ((direction - mean).norm() - radius).abs() < 1e-9 * radius
        worst = (gradients @ direction).min()
        generator = torch.Generator().manual_seed(seed)
        pulled = torch.rand(4000, n, generator=generator, dtype=torch.float64).log().softmax(-1) @ gradients
        dual = pulled @ mean + radius * pulled.norm(dim=-1)
        assert (dual > worst - 1e-9).all()
        noise = torch.randn(4000, 9, generator=generator, dtype=torch.float64)
        others = mean + radius * noise / noise.norm(dim=-1, keepdim=True)
        assert ((others @ gradients.T).amin(-1) < worst + 1e-9).all()
        assert (gradients @ mean).min() < worst - 1e-6
        torch.testing.assert_close(cagrad(gradients, c=c), direction / (1 + c * c))


def test_cagrad_at_its_edges():
    gradients = draw(3)
    torch.testing.assert_close(cagrad(gradients, c=0.0), gradients.mean(0))
    opposed = torch.stack([gradients[0], -3 * gradients[0]])
    # g . d = -t and 3 t for d = -t g, t in [1 - c, 1 + c]
    torch.testing.assert_close(cagrad(opposed, c=0.4, rescale=False), -0.6 * gradients[0], rtol=1e-12, atol=1e-12)
    balanced = torch.stack([gradients[0], gradients[1], -gradients[0] - gradients[1]])
    assert cagrad(balanced).abs().max() < 1e-12
    with pytest.raises(ConfigError, match="0 <= c < 1"):
        cagrad(gradients, c=1.0)


def test_sign_vote():
    gradients = torch.tensor([[1.0, 2.0, 3.0, 0.0], [2.0, -4.0, -3.0, 5.0], [6.0, -2.0, 0.0, 0.0]], dtype=torch.float64)
    torch.testing.assert_close(sign_vote(gradients), torch.tensor([3.0, -2.0, 0.0, 5 / 3], dtype=torch.float64))


@pytest.mark.parametrize("method", [pcgrad, mgda, cagrad, sign_vote])
def test_one_teacher_or_several_equal_ones_keep_their_direction(method):
    one = draw(1, seed=3)
    cosine = torch.nn.functional.cosine_similarity(method(one), one[0], dim=0)
    assert cosine.item() == pytest.approx(1.0, abs=1e-12)
    if method is not cagrad:
        torch.testing.assert_close(method(one), one[0])
    repeated = torch.nn.functional.cosine_similarity(method(one.expand(3, -1)), one[0], dim=0)
    assert repeated.item() == pytest.approx(1.0, abs=1e-12)


@pytest.mark.parametrize("method", [mgda, cagrad, sign_vote])
def test_the_order_of_teachers_does_not_matter(method):
    gradients = draw(4, seed=5)
    torch.testing.assert_close(method(gradients[[2, 0, 3, 1]]), method(gradients), rtol=1e-6, atol=1e-8)
