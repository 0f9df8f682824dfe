"""Identities of the divergences, in float64, with asymmetric pairs so that a swapped direction cannot pass."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from moteach.divergences.components import (
    AdaptiveKL,
    AlphaBeta,
    FDivergence,
    Renyi,
    SkewForwardKL,
    SkewReverseKL,
    ToDi,
    TotalVariation,
)
from moteach.divergences.full import JSD, ForwardKL, ReverseKL, entropy, forward_kl, jsd, reverse_kl

INF = math.inf
P = torch.tensor([0.7, 0.2, 0.1], dtype=torch.float64)
Q = torch.tensor([0.1, 0.3, 0.6], dtype=torch.float64)
ALL = [ReverseKL(), ForwardKL(), JSD(beta=0.5), JSD(beta=0.1)]


def ids(value: object) -> str:
    return f"{getattr(value, 'name', value)}{getattr(value, 'beta', '')}"


def logits(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 2


def test_reverse_kl_is_student_given_teacher():
    by_hand = 0.7 * math.log(0.7 / 0.1) + 0.2 * math.log(0.2 / 0.3) + 0.1 * math.log(0.1 / 0.6)
    assert reverse_kl(P.log(), Q.log()).item() == pytest.approx(by_hand, rel=1e-12)


def test_forward_kl_is_teacher_given_student():
    by_hand = 0.1 * math.log(0.1 / 0.7) + 0.3 * math.log(0.3 / 0.2) + 0.6 * math.log(0.6 / 0.1)
    assert forward_kl(P.log(), Q.log()).item() == pytest.approx(by_hand, rel=1e-12)
    assert abs(by_hand - reverse_kl(P.log(), Q.log()).item()) > 0.05


@pytest.mark.parametrize("beta", [0.1, 0.5, 0.8])
def test_beta_of_jsd_is_the_weight_of_the_teacher(beta: float):
    m = beta * Q + (1 - beta) * P
    by_hand = beta * (Q * (Q / m).log()).sum() + (1 - beta) * (P * (P / m).log()).sum()
    torch.testing.assert_close(jsd(P.log(), Q.log(), beta=beta), by_hand, rtol=1e-12, atol=0)
    if beta != 0.5:
        assert (jsd(Q.log(), P.log(), beta=beta) - by_hand).abs() > 1e-4


def test_logits_need_not_be_normalised():
    p, q = logits(5, 7), logits(5, 7, seed=1)
    for divergence in ALL:
        torch.testing.assert_close(divergence(p + 3.0, q - 5.0), divergence(p, q), rtol=1e-11, atol=1e-13)


def test_reverse_kl_gradient_is_p_times_log_ratio_minus_kl():
    z = logits(4, 6).requires_grad_()
    q = logits(4, 6, seed=1)
    value = reverse_kl(z, q)
    (gradient,) = torch.autograd.grad(value.sum(), z)
    p, log_ratio = z.softmax(-1), z.log_softmax(-1) - q.log_softmax(-1)
    torch.testing.assert_close(gradient, (p * (log_ratio - value.unsqueeze(-1))).detach(), rtol=1e-10, atol=1e-13)


def test_forward_kl_gradient_is_p_minus_q():
    z = logits(4, 6).requires_grad_()
    q = logits(4, 6, seed=1)
    (gradient,) = torch.autograd.grad(forward_kl(z, q).sum(), z)
    torch.testing.assert_close(gradient, (z.softmax(-1) - q.softmax(-1)).detach(), rtol=1e-10, atol=1e-13)


def test_jsd_tends_to_forward_kl_over_beta_and_to_reverse_kl_over_one_minus_beta():
    p, q = logits(8, 5), logits(8, 5, seed=1)
    small = 1e-6
    torch.testing.assert_close(jsd(p, q, beta=small) / small, forward_kl(p, q), rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(jsd(p, q, beta=1 - small) / small, reverse_kl(p, q), rtol=1e-3, atol=1e-5)


def test_symmetric_jsd_is_at_most_ln_2_and_reaches_it_on_disjoint_supports():
    far = torch.tensor([[60.0, 0.0], [0.0, 60.0]], dtype=torch.float64)
    assert (jsd(logits(64, 9) * 10, logits(64, 9, seed=1) * 10, beta=0.5) <= math.log(2) + 1e-12).all()
    assert jsd(far[0], far[1], beta=0.5).item() == pytest.approx(math.log(2), rel=1e-12)


@pytest.mark.parametrize("beta", [0.1, 0.7])
def test_jsd_is_at_most_the_entropy_of_its_weights(beta: float):
    bound = -beta * math.log(beta) - (1 - beta) * math.log(1 - beta)
    excluded = torch.tensor([[0.0, -INF], [-INF, 0.0]], dtype=torch.float64)
    assert jsd(excluded[0], excluded[1], beta=beta).item() == pytest.approx(bound, rel=1e-12)


@pytest.mark.parametrize("divergence", ALL, ids=ids)
def test_no_divergence_from_oneself_and_never_negative(divergence):
    p, q = logits(50, 9), logits(50, 9, seed=1)
    assert divergence(p, p).abs().max() < 1e-14
    assert (divergence(p, q) > 0).all()
    value, gradient = divergence.value_and_gradient(p.log_softmax(-1), p.log_softmax(-1))
    assert value.abs().max() < 1e-14
    assert gradient.abs().max() < 1e-14


@pytest.mark.parametrize("divergence", ALL, ids=ids)
def test_gradcheck(divergence):
    q = logits(3, 4, seed=1)
    assert torch.autograd.gradcheck(lambda z: divergence(z, q), logits(3, 4).requires_grad_())


def test_reverse_kl_to_a_uniform_teacher_is_log_v_minus_entropy():
    p = logits(10, 17)
    expected = math.log(17) - entropy(p.log_softmax(-1))
    torch.testing.assert_close(reverse_kl(p, torch.zeros_like(p)), expected, rtol=1e-12, atol=1e-12)


def test_a_flat_teacher_pushes_entropy_up():
    z = logits(10, 17)
    _, gradient = ReverseKL().value_and_gradient(z.log_softmax(-1), torch.full_like(z, -math.log(17)))
    assert (entropy((z - 0.1 * gradient).log_softmax(-1)) > entropy(z.log_softmax(-1))).all()


@pytest.mark.parametrize("divergence", ALL, ids=ids)
def test_a_token_excluded_by_both_contributes_nothing(divergence):
    p, q = logits(4, 6), logits(4, 6, seed=1)
    out = torch.full((4, 1), -INF, dtype=torch.float64)
    wide_p, wide_q = torch.cat([p, out], -1).requires_grad_(), torch.cat([q, out], -1)
    value = divergence(wide_p, wide_q)
    torch.testing.assert_close(value, divergence(p, q), rtol=1e-12, atol=1e-14)
    (autograd,) = torch.autograd.grad(value.sum(), wide_p)
    closed_value, closed = divergence.value_and_gradient(wide_p.detach().log_softmax(-1), wide_q.log_softmax(-1))
    assert torch.isfinite(autograd).all()
    assert (closed[:, -1] == 0).all()
    torch.testing.assert_close(closed_value, value.detach(), rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(closed, autograd, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize(
    ("divergence", "student_out", "infinite"),
    [
        (ReverseKL(), False, True),
        (ReverseKL(), True, False),
        (ForwardKL(), False, False),
        (ForwardKL(), True, True),
        (JSD(beta=0.3), False, False),
        (JSD(beta=0.3), True, False),
    ],
    ids=ids,
)
def test_an_exclusion_on_one_side_is_infinite_or_exact_and_never_nan(divergence, student_out: bool, infinite: bool):
    p, q = logits(3, 5), logits(3, 5, seed=1)
    (p if student_out else q)[1, 2] = -INF
    z = p.clone().requires_grad_()
    value = divergence(z, q)
    assert value.isinf().tolist() == [False, infinite, False]
    (autograd,) = torch.autograd.grad(value.sum(), z)
    closed_value, closed = divergence.value_and_gradient(p.log_softmax(-1), q.log_softmax(-1))
    assert torch.isfinite(closed).all()
    assert torch.isfinite(autograd).all()
    torch.testing.assert_close(closed_value, value.detach(), rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(closed, autograd, rtol=1e-10, atol=1e-13)
    if infinite:
        assert (closed[1] == 0).all()
    else:
        smoothed_p, smoothed_q = p.clamp_min(-300.0), q.clamp_min(-300.0)
        torch.testing.assert_close(value.detach(), divergence(smoothed_p, smoothed_q), rtol=1e-10, atol=1e-12)


def test_a_probability_that_underflows_is_not_mistaken_for_an_exclusion():
    """exp(-200) is 0 in float32, yet the student can write the token: the divergence to a teacher that cannot is +inf."""
    student, teacher = torch.tensor([[0.0, -200.0]]), torch.tensor([[0.0, -INF]])
    for value in (reverse_kl(student, teacher), ReverseKL().value_and_gradient(student, teacher)[0]):
        assert value.item() == INF


@pytest.mark.parametrize(
    "divergence",
    [
        *ALL, TotalVariation(), SkewForwardKL(), SkewReverseKL(), AdaptiveKL(), ToDi(), AlphaBeta(),
        AlphaBeta(alpha=-0.5, beta=-0.6), Renyi(order=0.5), Renyi(order=2.0), FDivergence(),
        FDivergence(generator="pearson_chi2"),
    ],
    ids=repr,
)  # fmt: skip
def test_a_nan_of_the_student_stays_visible(divergence):
    p = logits(2, 4)
    p[0, 1] = math.nan
    q = logits(2, 4, seed=1).log_softmax(-1)
    value, _ = divergence.value_and_gradient(p.log_softmax(-1), q)
    assert value.isnan().tolist() == [True, False]
    assert divergence(p, q).isnan().tolist() == [True, False]


@pytest.mark.parametrize("divergence", ALL, ids=ids)
def test_closed_forms_do_not_touch_their_inputs(divergence):
    p, q = logits(3, 5).log_softmax(-1), logits(3, 5, seed=1).log_softmax(-1)
    before = p.clone(), q.clone()
    divergence.value_and_gradient(p, q)
    assert torch.equal(p, before[0])
    assert torch.equal(q, before[1])


def test_entropy_of_uniform_certain_and_excluded():
    uniform = torch.zeros(8, dtype=torch.float64).log_softmax(-1)
    certain = torch.tensor([0.0, -INF, -INF], dtype=torch.float64)
    assert entropy(uniform).item() == pytest.approx(math.log(8))
    assert entropy(certain).item() == 0.0
