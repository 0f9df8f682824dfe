from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import moteach.divergences.components as components
import moteach.divergences.full as full
from moteach.divergences.base import (
    ClosedFormDivergence,
    Divergence,
    PointwiseDivergence,
    autograd_value_and_gradient,
    value_and_gradient,
)
from moteach.divergences.full import JSD, ForwardKL, ReverseKL, jsd
from moteach.divergences.generators import GENERATORS, Generator
from moteach.divergences.terms import scaled_expm1, shielded, total
from moteach.errors import ConfigError, UnknownChoiceError

INF = math.inf


@pytest.mark.parametrize("beta", [0.0, 1.0, -0.1, 1.5, float("nan")])
def test_jsd_refuses_the_ends_and_names_the_alternatives(beta: float):
    with pytest.raises(ConfigError, match=r"0 < beta < 1 .*divergence=forward_kl.*divergence=reverse_kl"):
        JSD(beta=beta)
    with pytest.raises(ConfigError, match="0 < beta < 1"):
        jsd(torch.zeros(3), torch.zeros(3), beta=beta)


@pytest.mark.parametrize(
    ("name", "arguments", "remedy"),
    [
        ("SkewForwardKL", {"alpha": 0.0}, "divergence=forward_kl"),
        ("SkewForwardKL", {"alpha": 1.0}, "0 < alpha < 1"),
        ("SkewReverseKL", {"alpha": 0.0}, "divergence=reverse_kl"),
        ("SkewReverseKL", {"alpha": math.nan}, "0 < alpha < 1"),
        ("AdaptiveKL", {"head_mass": 0.0}, "divergence=forward_kl or divergence=reverse_kl"),
        ("AdaptiveKL", {"head_mass": 1.0}, "0 < head_mass < 1"),
        ("AlphaBeta", {"alpha": INF, "beta": 1.0}, "finite alpha and beta"),
        ("AlphaBeta", {"alpha": 1.0, "beta": math.nan}, "finite alpha and beta"),
        ("Renyi", {"order": 0.0}, "order=1 is reverse_kl"),
        ("Renyi", {"order": -1.0}, "finite order > 0"),
        ("Renyi", {"order": INF}, "finite order > 0"),
    ],
)
def test_a_parameter_out_of_range_is_refused_by_class_and_function(name: str, arguments: dict, remedy: str):
    with pytest.raises(ConfigError, match=remedy):
        getattr(components, name)(**arguments)
    with pytest.raises(ConfigError, match=remedy):
        getattr(full, getattr(components, name).name)(torch.zeros(3), torch.zeros(3), **arguments)


def test_an_unknown_generator_is_refused_with_the_nearest():
    with pytest.raises(UnknownChoiceError, match="did you mean 'squared_hellinger'"):
        components.FDivergence(generator="hellinger_squared")
    with pytest.raises(UnknownChoiceError, match="generator=Generator"):
        full.f_divergence(torch.zeros(3), torch.zeros(3), generator="mine")


@pytest.mark.parametrize(
    "function",
    [
        lambda log_u, log_c: log_c.exp() * log_u.exp(),  # f(1) = 1
        lambda log_u, log_c: log_c.exp() * log_u,  # concave
        lambda log_u, log_c: -log_c.exp() * log_u.expm1().square(),
        lambda log_u, log_c: log_u * math.nan,
    ],
)
def test_what_is_no_generator_is_refused(function):
    with pytest.raises(ConfigError, match=r"convex generator with f\(1\) = 0, got 'bad'"):
        Generator(name="bad", function=function, at_zero=0.0, recession=0.0)


@pytest.mark.parametrize("temperature", [0.0, -1.0, INF, math.nan])
@pytest.mark.parametrize("side", ["student_temperature", "teacher_temperature"])
def test_a_temperature_that_is_not_positive_is_refused(temperature: float, side: str):
    for function, arguments in (
        (full.reverse_kl, {}),
        (full.forward_kl, {}),
        (full.jsd, {"beta": 0.5}),
        (full.total_variation, {}),
        (full.skew_forward_kl, {}),
        (full.skew_reverse_kl, {}),
        (full.adaptive_kl, {}),
        (full.todi, {}),
        (full.alpha_beta, {"alpha": 0.2, "beta": 0.7}),
        (full.renyi, {"order": 0.5}),
        (full.f_divergence, {"generator": "jeffreys"}),
    ):
        with pytest.raises(ConfigError, match="finite temperature above 0"):
            function(torch.zeros(3), torch.zeros(3), **{side: temperature}, **arguments)


def test_components_are_frozen_and_compare_by_value():
    assert JSD(beta=0.3) == JSD(beta=0.3) != JSD(beta=0.4)
    with pytest.raises(AttributeError):
        JSD(beta=0.3).beta = 0.4  # type: ignore[misc]


@pytest.mark.parametrize("name", components.__all__)
def test_members_satisfy_the_protocols(name: str):
    divergence = getattr(components, name)()
    assert isinstance(divergence, ClosedFormDivergence)
    assert divergence.supports == frozenset({"full", "topk"})
    assert isinstance(divergence, PointwiseDivergence) == (name not in ("AdaptiveKL", "Renyi"))
    assert callable(getattr(full, divergence.name))


@pytest.mark.parametrize(
    ("divergence", "slope"),
    [
        (ReverseKL(), 1.0),
        (ForwardKL(), -1.0),
        (JSD(), 0.0),
        (components.TotalVariation(), 0.0),
        (components.SkewForwardKL(alpha=0.1), -0.9),
        (components.SkewReverseKL(alpha=0.1), 0.9),
        (components.AlphaBeta(alpha=0.3, beta=0.3), 0.0),
        (components.ToDi(), 0.0),
        (components.FDivergence(generator="forward_kl"), -1.0),
        (components.FDivergence(generator="reverse_kl"), 1.0),
        (components.FDivergence(generator="jensen_shannon"), 0.0),
    ],
    ids=repr,
)
def test_the_slope_of_each_is_the_derivative_of_its_term_at_equal_probabilities(divergence, slope: float):
    assert divergence.slope == pytest.approx(slope, abs=1e-12)


def test_generators_are_registered_under_their_names_and_cannot_be_overwritten():
    assert {name: generator.name for name, generator in GENERATORS.items()} == {name: name for name in GENERATORS}
    with pytest.raises(TypeError):
        GENERATORS["mine"] = GENERATORS["jeffreys"]  # type: ignore[index]


def test_scaled_expm1_neither_overflows_nor_loses_small_differences():
    log_scale = torch.tensor([-150.0, 0.0, -5.0, -200.0])
    x = torch.tensor([140.0, 1e-8, -300.0, 0.5])
    expected = [math.exp(-10.0), 1e-8, -math.exp(-5.0), 0.0]
    assert scaled_expm1(log_scale, x).tolist() == pytest.approx(expected, rel=1e-5)


def test_an_overflowing_term_is_infinite_with_a_gradient_of_zero():
    p, q = torch.tensor([[1.0, 500.0, 2.0]], requires_grad=True), torch.zeros(1, 3)
    terms = shielded(lambda x, y: (x - y).exp() * (x - y), p, q)
    (alone,) = torch.autograd.grad(terms.masked_fill(terms.isinf(), 0.0).sum(), p, retain_graph=True)
    assert terms.isinf().tolist() == [[False, True, False]]
    assert alone.isfinite().all()
    assert alone[0, 1] == 0
    assert alone[0, 0] > 0
    value = total(terms)
    (summed,) = torch.autograd.grad(value.sum(), p)
    assert value.item() == INF
    assert (summed == 0).all()


class Squared:
    """Not a divergence anybody wants; it has no closed form."""

    name = "squared"
    supports = frozenset({"full"})

    def __call__(self, student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
        return (student_logits.softmax(-1) - teacher_logits.softmax(-1)).square().sum(-1)


def test_a_divergence_without_a_closed_form_is_differentiated():
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(3, 5, generator=generator, dtype=torch.float64).requires_grad_()
    q = torch.randn(3, 5, generator=generator, dtype=torch.float64)
    assert isinstance(Squared(), Divergence)
    assert not isinstance(Squared(), ClosedFormDivergence)
    assert not isinstance(Squared(), PointwiseDivergence)
    with torch.no_grad():
        value, gradient = value_and_gradient(Squared(), z.log_softmax(-1), q.log_softmax(-1))
    expected = Squared()(z, q)
    torch.testing.assert_close(value, expected.detach())
    torch.testing.assert_close(gradient, torch.autograd.grad(expected.sum(), z)[0])
    assert not value.requires_grad


def test_the_closed_form_is_preferred():
    class Loud:
        name = "loud"
        supports = frozenset({"full"})

        def __call__(self, student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
            raise AssertionError("autograd was used")

        def value_and_gradient(self, student_logprobs: Tensor, teacher_logprobs: Tensor):
            return student_logprobs.sum(-1), student_logprobs

    value, _ = value_and_gradient(Loud(), torch.ones(2, 3), torch.ones(2, 3))
    assert value.tolist() == [3.0, 3.0]
    with pytest.raises(AssertionError, match="autograd was used"):
        autograd_value_and_gradient(Loud(), torch.ones(2, 3), torch.ones(2, 3))
