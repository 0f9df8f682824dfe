"""Power-mean pools and weights that come from the teachers: limits, order, minimisers and residuals."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from moteach.conflict.base import resolve
from moteach.conflict.pools import Geometric, Linear
from moteach.conflict.power import ConfidenceWeighted, EntropyWeighted, Power
from moteach.conflict.select import MaxPeak, Select
from moteach.errors import ConfigError, RoutingError, UnsupportedCombinationError

TOKENS, VOCAB = 6, 7
INF = math.inf


def teachers(n: int = 3, *, seed: int = 0, scale: float = 2.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, TOKENS, VOCAB, generator=generator, dtype=torch.float64).mul(scale).log_softmax(-1)


def weights(n: int = 3) -> Tensor:
    return torch.rand(TOKENS, n, generator=torch.Generator().manual_seed(n), dtype=torch.float64).softmax(-1)


def by_definition(q: Tensor, w: Tensor, r: float) -> tuple[Tensor, Tensor]:
    """Normalised power mean and log Z, from probabilities."""
    mean = (w.T.unsqueeze(-1) * q.exp() ** r).sum(0) ** (1 / r)
    return (mean / mean.sum(-1, keepdim=True)).log(), mean.sum(-1).log()


def alpha_divergence(q: Tensor, p: Tensor, r: float) -> Tensor:
    return (1 - (q.exp() ** r * p.exp() ** (1 - r)).sum(-1)) / (r * (1 - r))


@pytest.mark.parametrize("r", [-3.0, -0.5, 0.1, 0.5, 1.0, 2.0, 7.0])
def test_it_is_the_normalised_power_mean(r: float):
    q, w = teachers(), weights()
    target = resolve(Power(r=r), q, w)
    logprobs, log_z = by_definition(q, w, r)
    torch.testing.assert_close(target.logprobs, logprobs, rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(target.neg_log_z, -log_z, rtol=1e-11, atol=1e-12)
    assert (log_z.sign() == (0 if r == 1 else math.copysign(1, r - 1))).all() or log_z.abs().max() < 1e-12


def test_exponent_one_is_linear_and_zero_is_geometric():
    q, w = teachers(), weights()
    for r, other in ((1.0, Linear()), (0.0, Geometric())):
        mine, theirs = resolve(Power(r=r), q, w), resolve(other, q, w)
        torch.testing.assert_close(mine.logprobs, theirs.logprobs, rtol=0, atol=1e-13)
        torch.testing.assert_close(mine.neg_log_z, theirs.neg_log_z, rtol=0, atol=1e-13)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_small_exponents_tend_to_the_geometric_pool_without_loss_of_digits(dtype: torch.dtype):
    """The distance is first order in r, down to exponents where the power itself is one to the last bit."""
    q, w = teachers(), weights()
    limit = resolve(Geometric(), q, w)
    slope = (by_definition(q, w, 1e-3)[0] - limit.logprobs) / 1e-3
    for r in (1e-3, 1e-5, 1e-9, -1e-9, 1e-300 if dtype == torch.float64 else 1e-30):
        target = resolve(Power(r=r), q.to(dtype), w.to(dtype))
        bound = 30 * torch.finfo(dtype).eps + 1.1 * abs(r) * slope.abs().max().item()
        assert (target.logprobs.double() - limit.logprobs).abs().max() < bound
        assert (target.neg_log_z.double() - limit.neg_log_z).abs().max() < bound + abs(r) * 10
    exact = limit.logprobs + 1e-5 * slope
    assert (resolve(Power(r=1e-5), q, w).logprobs - exact).abs().max() < 1e-5 * 1e-3 * 20


def test_the_unnormalised_mean_grows_with_the_exponent_between_minimum_and_maximum():
    q, w = teachers(), weights()
    sampled = q.permute(1, 2, 0).reshape(-1, 3)
    rows = w.repeat_interleave(VOCAB, 0)
    ladder = [Power(r=r).resolve_sampled(sampled, rows) for r in (-30.0, -1.0, 0.0, 1e-6, 0.5, 1.0, 4.0, 30.0)]
    for low, high in itertools.pairwise(ladder):
        assert (high > low - 1e-13).all()
        assert (high - low).max() > 1e-7
    assert (ladder[0] >= sampled.amin(-1)).all()
    assert (ladder[-1] <= sampled.amax(-1)).all()
    assert (ladder[-1] - sampled.amax(-1)).abs().max() < math.log(1 / w.min()) / 30 + 1e-12


@pytest.mark.parametrize("r", [-1.0, 0.3, 0.5, 0.8, 2.0])
def test_weighted_alpha_divergence_is_that_to_the_pool_plus_a_constant(r: float):
    q, p, w = teachers(), teachers(1, seed=1)[0], weights()
    target = resolve(Power(r=r), q, w)
    z_to_r = (-r * target.neg_log_z).exp()
    weighted = (w.T * torch.stack([alpha_divergence(q_k, p, r) for q_k in q])).sum(0)
    constant = (1 - z_to_r) / (r * (1 - r))
    torch.testing.assert_close(weighted, z_to_r * alpha_divergence(target.logprobs, p, r) + constant)
    assert (constant > 1e-3).all()
    best = target.logprobs.clone().requires_grad_()
    value = (w.T * torch.stack([alpha_divergence(q_k, best.log_softmax(-1), r) for q_k in q])).sum()
    (gradient,) = torch.autograd.grad(value, best)
    assert gradient.abs().max() < 1e-13


def test_only_exponents_of_zero_and_below_let_one_teacher_veto():
    q = torch.tensor([[0.97, 0.02, 0.01], [0.97, 0.02, 0.01], [1e-6, 0.6, 0.4]], dtype=torch.float64)
    q = (q / q.sum(-1, keepdim=True)).log().unsqueeze(1)
    third = torch.full((1, 3), 1 / 3, dtype=torch.float64)
    first = {r: resolve(Power(r=r), q, third).logprobs.exp()[0, 0].item() for r in (-5.0, 0.0, 0.5, 1.0)}
    assert first[0.0] == pytest.approx(0.092, abs=5e-4)
    assert first[1.0] == pytest.approx(0.647, abs=5e-4)
    assert first[-5.0] < 1e-4
    # only the mean before normalisation is ordered in r
    assert first[0.5] == pytest.approx(0.682, abs=5e-4)
    assert first[0.5] > first[1.0]


@pytest.mark.parametrize("r", [-1.0, 0.0, 0.5, 1.0, 2.0])
def test_an_exclusion_vetoes_up_to_exponent_zero_and_dilutes_above(r: float):
    q = torch.tensor([[[0.5, 0.5, 0.0]], [[0.2, 0.2, 0.6]]], dtype=torch.float64).log()
    half = torch.tensor([[0.5, 0.5]], dtype=torch.float64)
    target = resolve(Power(r=r), q, half)
    for order in ([0, 1], [1, 0]):
        torch.testing.assert_close(resolve(Power(r=r), q[order], half).logprobs, target.logprobs, rtol=0, atol=1e-15)
    vetoed = torch.tensor([[0.5, 0.5, 0.0]], dtype=torch.float64).log()
    reference = by_definition(q, half, r)[0] if r > 0 else vetoed
    torch.testing.assert_close(target.logprobs, reference, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("r", [-2.0, 0.0])
def test_teachers_without_a_shared_token_have_no_mean_of_that_exponent(r: float):
    q = torch.tensor([[[1.0, 0.0]], [[0.0, 1.0]]]).log()
    with pytest.raises(UnsupportedCombinationError, match=r"got 1 position.*r above 0"):
        resolve(Power(r=r), q, torch.tensor([[0.5, 0.5]]))
    assert resolve(Power(r=0.5), q, torch.tensor([[0.5, 0.5]])).logprobs.exp().tolist() == [[0.5, 0.5]]


@pytest.mark.parametrize("r", [0.0, 0.4, 1.0])
def test_a_pool_of_sampled_logprobs_lacks_log_z(r: float):
    q, w, written = teachers(), weights(), torch.arange(TOKENS)
    rows = torch.arange(TOKENS)
    target = resolve(Power(r=r), q, w)
    short = target.logprobs[rows, written] - target.neg_log_z
    torch.testing.assert_close(Power(r=r).resolve_sampled(q[:, rows, written].T, w), short, rtol=1e-12, atol=1e-13)
    with pytest.raises(RoutingError):
        Power(r=r).resolve_sampled(torch.zeros(1, 2), torch.ones(1, 2))


@pytest.mark.parametrize("r", [0.0, 0.3, 1.0])
def test_entropy_weights_are_those_of_the_formula(r: float):
    q, w = teachers(), weights()
    entropies = -(q.exp() * q).sum(-1).T
    expected = w * (-entropies / 0.7).exp()
    expected = expected / expected.sum(-1, keepdim=True)
    assert (expected - w).abs().max() > 0.1
    target = resolve(EntropyWeighted(temperature=0.7, r=r), q, w)
    plain = resolve(Power(r=r), q, expected)
    torch.testing.assert_close(target.logprobs, plain.logprobs, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(target.neg_log_z, plain.neg_log_z, rtol=1e-12, atol=1e-13)


def test_entropy_weights_at_the_ends_of_the_temperature():
    q, w = teachers(), weights()
    hot = resolve(EntropyWeighted(temperature=INF, r=1.0), q, w)
    torch.testing.assert_close(hot.logprobs, resolve(Linear(), q, w).logprobs, rtol=0, atol=1e-13)
    surest = (q.exp() * q).sum(-1).argmax(0)
    cold = resolve(EntropyWeighted(temperature=1e-4, r=1.0), q, w)
    torch.testing.assert_close(cold.logprobs, q[surest, torch.arange(TOKENS)], rtol=0, atol=1e-12)


def test_confidence_weights_are_those_of_the_formula_and_end_in_the_highest_peak():
    q, w = teachers(), weights()
    expected = w * q.amax(-1).exp().T ** 1.5
    plain = resolve(Linear(), q, expected / expected.sum(-1, keepdim=True))
    target = resolve(ConfidenceWeighted(sharpness=1.5, r=1.0), q, w)
    torch.testing.assert_close(target.logprobs, plain.logprobs, rtol=1e-12, atol=1e-13)
    none = resolve(ConfidenceWeighted(sharpness=0.0, r=0.0), q, w)
    torch.testing.assert_close(none.logprobs, resolve(Geometric(), q, w).logprobs, rtol=0, atol=1e-13)
    even = torch.full_like(w, 1 / 3)
    sharp = resolve(ConfidenceWeighted(sharpness=1e5, r=1.0), q, even)
    torch.testing.assert_close(sharp.logprobs, resolve(MaxPeak(), q, even).logprobs, rtol=0, atol=1e-12)


def test_max_peak_takes_the_surest_of_its_likeliest_token_and_weights_can_overrule_it():
    q = torch.tensor([[[0.6, 0.3, 0.1]], [[0.1, 0.8, 0.1]], [[0.4, 0.3, 0.3]]], dtype=torch.float64).log()
    even = torch.full((1, 3), 1 / 3, dtype=torch.float64)
    assert torch.equal(resolve(MaxPeak(), q, even).logprobs, q[1])
    other = torch.tensor([[0.5, 0.3, 0.2]], dtype=torch.float64)
    assert torch.equal(resolve(MaxPeak(), q, other).logprobs, q[0])
    assert torch.equal(resolve(Select(), q, other.flip(-1)).logprobs, q[2])
    assert torch.equal(resolve(MaxPeak(), q[[1, 1, 0]], even).logprobs, q[1])


@pytest.mark.parametrize(
    "make",
    [
        lambda: Power(r=INF),
        lambda: Power(r=math.nan),
        lambda: EntropyWeighted(temperature=0.0),
        lambda: EntropyWeighted(r=-INF),
        lambda: ConfidenceWeighted(sharpness=-1.0),
        lambda: ConfidenceWeighted(sharpness=INF),
    ],
)
def test_meaningless_settings_are_refused(make):
    with pytest.raises(ConfigError, match=r"conflict\.\w+: expected"):
        make()
