from __future__ import annotations

import pytest
import torch

from moteach.divergences.base import (
    ClosedFormDivergence,
    Divergence,
    autograd_value_and_gradient,
    value_and_gradient,
)
from moteach.divergences.full import JSD, ForwardKL, ReverseKL, jsd
from moteach.errors import ConfigError


@pytest.mark.parametrize("beta", [0.0, 1.0, -0.1, 1.5, float("nan")])
def test_jsd_refuses_the_ends_and_names_the_alternatives(beta: float):
    with pytest.raises(ConfigError, match=r"0 < beta < 1 .*divergence=forward_kl.*divergence=reverse_kl"):
        JSD(beta=beta)
    with pytest.raises(ConfigError, match="0 < beta < 1"):
        jsd(torch.zeros(3), torch.zeros(3), beta=beta)


def test_components_are_frozen_and_compare_by_value():
    assert JSD(beta=0.3) == JSD(beta=0.3) != JSD(beta=0.4)
    with pytest.raises(AttributeError):
        JSD(beta=0.3).beta = 0.4  # type: ignore[misc]


@pytest.mark.parametrize("divergence", [ReverseKL(), ForwardKL(), JSD()], ids=lambda d: d.name)
def test_members_satisfy_the_protocol_with_a_closed_form(divergence: Divergence):
    assert isinstance(divergence, ClosedFormDivergence)
    assert divergence.supports == frozenset({"full"})


class Squared:
    """Not a divergence anybody wants; it has no closed form."""

    name = "squared"
    supports = frozenset({"full"})

    def __call__(self, student_logits: torch.Tensor, teacher_logits: torch.Tensor) -> torch.Tensor:
        return (student_logits.softmax(-1) - teacher_logits.softmax(-1)).square().sum(-1)


def test_a_divergence_without_a_closed_form_is_differentiated():
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(3, 5, generator=generator, dtype=torch.float64).requires_grad_()
    q = torch.randn(3, 5, generator=generator, dtype=torch.float64)
    assert isinstance(Squared(), Divergence)
    assert not isinstance(Squared(), ClosedFormDivergence)
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

        def __call__(self, student_logits: torch.Tensor, teacher_logits: torch.Tensor) -> torch.Tensor:
            raise AssertionError("autograd was used")

        def value_and_gradient(self, student_logprobs: torch.Tensor, teacher_logprobs: torch.Tensor):
            return student_logprobs.sum(-1), student_logprobs

    value, _ = value_and_gradient(Loud(), torch.ones(2, 3), torch.ones(2, 3))
    assert value.tolist() == [3.0, 3.0]
    with pytest.raises(AssertionError, match="autograd was used"):
        autograd_value_and_gradient(Loud(), torch.ones(2, 3), torch.ones(2, 3))
