"""Every YAML in conf/divergence is a divergence: a new option is tested by being there."""

from __future__ import annotations

import importlib
import inspect
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from moteach.divergences.base import (
    ClosedFormDivergence,
    Divergence,
    PointwiseDivergence,
    autograd_value_and_gradient,
    value_and_gradient,
)
from moteach.divergences.components import JSD, AdaptiveKL, AlphaBeta, FDivergence, Renyi, SkewForwardKL, SkewReverseKL
from moteach.divergences.generators import GENERATORS

INF = math.inf
FOLDER = Path(__file__).parents[2] / "conf" / "divergence"
FILES = sorted(FOLDER.glob("*.yaml"))
WHOLE = {"adaptive_kl", "renyi"}
"""Not a sum of terms."""
FROZEN_WEIGHTS = {"adaptive_kl", "todi"}
"""Their gradient is not that of their value."""
POWERS = [
    (1.0, 0.0), (0.0, 1.0), (0.5, 0.0), (0.0, 2.0), (0.7, -0.7), (-0.5, 0.5), (0.0, 0.0), (1.0, 1.0), (2.0, -1.0),
    (-1.0, 2.0), (0.1, -0.4), (-0.3, -0.2), (-0.2, -0.3), (1e-3, 0.5),
]  # fmt: skip
VARIANTS: list[Any] = [
    *(FDivergence(generator=name) for name in GENERATORS),
    *(AlphaBeta(alpha=alpha, beta=beta) for alpha, beta in POWERS),
    *(Renyi(order=order) for order in (0.1, 0.9, 1.0, 1.0 + 1e-7, 2.0, 5.0)),
    JSD(beta=0.1),
    JSD(beta=0.9),
    SkewForwardKL(alpha=0.6),
    SkewReverseKL(alpha=0.6),
    AdaptiveKL(head_mass=0.9),
]


def build(path: Path) -> Any:
    """Makes the object a YAML describes, from its own words."""
    content = yaml.safe_load(path.read_text())
    module, _, name = content.pop("_target_").rpartition(".")
    return getattr(importlib.import_module(module), name)(**content)


@pytest.fixture(params=FILES, ids=lambda path: path.stem)
def path(request: pytest.FixtureRequest) -> Path:
    return request.param


@pytest.fixture(params=[*FILES, *VARIANTS], ids=lambda item: item.stem if isinstance(item, Path) else repr(item))
def divergence(request: pytest.FixtureRequest) -> Any:
    return build(request.param) if isinstance(request.param, Path) else request.param


def logprobs(seed: int, *, vocab: int = 9, dtype: torch.dtype = torch.float64, scale: float = 2.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(40, vocab, generator=generator, dtype=dtype).mul(scale).log_softmax(-1)


def gradient_through_logits(divergence: Any, student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    leaf = student.clone().requires_grad_()
    value = divergence(leaf, teacher)
    return value.detach(), torch.autograd.grad(value.sum(), leaf)[0]


def test_there_are_options():
    names = {
        "reverse_kl", "forward_kl", "jsd", "total_variation", "skew_forward_kl", "skew_reverse_kl", "adaptive_kl", "todi",
        "alpha_beta", "renyi", "f_divergence",
    }  # fmt: skip
    assert names <= {path.stem for path in FILES}


def test_it_is_a_divergence_named_after_its_file(path: Path):
    divergence = build(path)
    assert isinstance(divergence, ClosedFormDivergence)
    assert divergence.name == path.stem
    assert divergence.supports == {"full", "topk"}


def test_its_yaml_lists_every_parameter(path: Path):
    parameters = set(inspect.signature(type(build(path))).parameters)
    assert set(yaml.safe_load(path.read_text())) - {"_target_"} == parameters


def test_its_yaml_explains_every_parameter(path: Path):
    lines = path.read_text().splitlines()
    assert all(lines[i - 1].startswith("#") for i, line in enumerate(lines) if not line.startswith("#"))


def test_it_is_zero_on_equals_and_positive_otherwise(divergence: Any):
    p, q = logprobs(0), logprobs(1)
    assert divergence(p, p).abs().max() < 1e-13
    assert (divergence(p, q) > 1e-3).all()
    assert divergence(p, q).shape == (40,)


def test_its_gradient_vanishes_on_equals(divergence: Any):
    p = logprobs(0)
    assert value_and_gradient(divergence, p, p.clone())[1].abs().max() < 1e-13


entries = st.lists(st.floats(min_value=-30, max_value=30, width=32), min_size=5, max_size=5)


@settings(max_examples=60, deadline=None)
@given(p=entries, q=entries)
def test_none_is_negative_for_any_pair(p: list[float], q: list[float]):
    student, teacher = (torch.tensor([row], dtype=torch.float64).log_softmax(-1) for row in (p, q))
    for item in [*map(build, FILES), *VARIANTS]:
        value, gradient = value_and_gradient(item, student, teacher)
        size = max(1.0, float((student - teacher).abs().max()))
        assert value.item() >= -1e-12 * size, item
        assert not gradient.isnan().any(), item


def test_it_takes_any_token_axes_and_unnormalised_logits(divergence: Any):
    p, q = logprobs(0), logprobs(1)
    shaped = divergence((p + 2.0).reshape(5, 8, 9), (q - 1.0).reshape(5, 8, 9))
    torch.testing.assert_close(shaped.reshape(40), divergence(p, q), rtol=1e-10, atol=1e-13)
    assert divergence(p[0], q[0]).shape == ()


def test_it_takes_no_tokens_at_all(divergence: Any):
    value, gradient = value_and_gradient(divergence, torch.zeros(0, 9), torch.zeros(0, 9))
    assert value.shape == (0,)
    assert gradient.shape == (0, 9)


def test_its_closed_form_is_its_autograd_gradient(divergence: Any):
    p, q = logprobs(0), logprobs(1)
    before = p.clone(), q.clone()
    value, gradient = value_and_gradient(divergence, p, q)
    assert torch.equal(p, before[0])
    assert torch.equal(q, before[1])
    expected_value, expected = autograd_value_and_gradient(divergence, p, q)
    torch.testing.assert_close(value, expected_value, rtol=1e-11, atol=1e-13)
    torch.testing.assert_close(gradient, expected, rtol=1e-9, atol=1e-12)
    assert gradient.abs().max() > 1e-2
    assert (gradient.sum(-1).abs() < 1e-12 * gradient.abs().sum(-1).clamp_min(1.0)).all()


def test_its_autograd_gradient_is_the_slope_of_its_value(divergence: Any):
    if divergence.name in FROZEN_WEIGHTS:
        pytest.skip("a semi-gradient, checked with its weights frozen in tests/numerics")
    p, q = logprobs(2)[:3, :5].clone().requires_grad_(), logprobs(3)[:3, :5]
    assert torch.autograd.gradcheck(lambda z: divergence(z, q), p)


def test_a_small_step_against_its_gradient_lowers_it(divergence: Any):
    p, q = logprobs(0, scale=1.0), logprobs(1, scale=1.0)
    value, gradient = value_and_gradient(divergence, p, q)
    step = 1e-2 / gradient.abs().amax(-1, keepdim=True).clamp_min(1.0)
    assert (divergence(p - step * gradient, q) < value).all()


def test_it_works_in_float32(divergence: Any):
    p, q = logprobs(0, dtype=torch.float32), logprobs(1, dtype=torch.float32)
    value, gradient = value_and_gradient(divergence, p, q)
    assert value.dtype == gradient.dtype == torch.float32
    exact, exact_gradient = value_and_gradient(divergence, p.double(), q.double())
    torch.testing.assert_close(value.double(), exact, rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(gradient.double(), exact_gradient, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_logits_cost_only_their_own_rounding(path: Path, dtype: torch.dtype):
    """Normalised in float32, so the value is that of the rounded logits to 1e-5; the rounding itself moves it by 3 %."""
    divergence = build(path)
    generator = torch.Generator().manual_seed(4)
    p, q = (3 * torch.randn(20, 500, generator=generator, dtype=torch.float64) for _ in range(2))
    value = divergence(p.to(dtype), q.to(dtype))
    assert value.dtype == torch.float32
    torch.testing.assert_close(
        value.double(), divergence(p.to(dtype).double(), q.to(dtype).double()), rtol=1e-5, atol=1e-6
    )
    torch.testing.assert_close(value.double(), divergence(p, q), rtol=0.03, atol=0.0)
    _, gradient = gradient_through_logits(divergence, p.to(dtype), q.to(dtype))
    assert gradient.dtype == dtype
    assert gradient.isfinite().all()


def test_the_order_of_the_vocabulary_does_not_matter(divergence: Any):
    p, q = logprobs(0), logprobs(1)
    order = torch.randperm(9, generator=torch.Generator().manual_seed(0))
    value, gradient = value_and_gradient(divergence, p, q)
    permuted, permuted_gradient = value_and_gradient(divergence, p[:, order], q[:, order])
    torch.testing.assert_close(permuted, value, rtol=1e-11, atol=1e-13)
    torch.testing.assert_close(permuted_gradient, gradient[:, order], rtol=1e-9, atol=1e-12)


def test_tokens_excluded_by_both_contribute_nothing(divergence: Any):
    p, q = logprobs(0), logprobs(1)
    out = torch.full((40, 3), -INF, dtype=torch.float64)
    wide_p, wide_q = torch.cat([p, out], -1), torch.cat([q, out], -1)
    value, gradient = value_and_gradient(divergence, p, q)
    for got, got_gradient in (
        value_and_gradient(divergence, wide_p, wide_q),
        gradient_through_logits(divergence, wide_p, wide_q),
    ):
        torch.testing.assert_close(got, value, rtol=1e-11, atol=1e-13)
        torch.testing.assert_close(got_gradient[:, :9], gradient, rtol=1e-9, atol=1e-12)
        assert (got_gradient[:, 9:] == 0).all()


@pytest.mark.parametrize("side", ["student", "teacher", "each", "all"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_an_exclusion_is_never_nan_and_an_infinite_token_has_no_gradient(
    divergence: Any, side: str, dtype: torch.dtype
):
    p, q = logprobs(0).to(dtype), logprobs(1).to(dtype)
    if side in ("student", "each"):
        p[::2, 3] = -INF
    if side in ("teacher", "each"):
        q[::2, 5] = -INF
    if side == "all":
        p[::2, :4], q[::2, 4:] = -INF, -INF
    p, q = p.log_softmax(-1), q.log_softmax(-1)
    value, gradient = value_and_gradient(divergence, p, q)
    slow_value, slow = gradient_through_logits(divergence, p, q)
    assert not value.isnan().any()
    assert gradient.isfinite().all()
    assert slow.isfinite().all()
    assert (gradient[value.isinf()] == 0).all()
    assert value[1::2].isfinite().all()
    exact = dtype is torch.float64
    torch.testing.assert_close(slow_value, value, rtol=1e-10 if exact else 1e-3, atol=1e-12 if exact else 1e-4)
    torch.testing.assert_close(slow, gradient, rtol=1e-8 if exact else 1e-2, atol=1e-11 if exact else 1e-3)


@pytest.mark.parametrize("side", ["student", "teacher"])
def test_an_exclusion_is_the_limit_of_small_probabilities(divergence: Any, side: str):
    """Finite: already reached at a log-probability of -1e7. Infinite: there it still grows."""
    pair = {"student": logprobs(0, scale=1.0), "teacher": logprobs(1, scale=1.0)}
    values = []
    for depth in (-1e6, -1e7, -INF):
        pair[side][:, 2] = depth
        values.append(divergence(pair["student"], pair["teacher"]))
    before, near, limit = values
    assert limit.isinf().all() or limit.isfinite().all()
    if limit.isfinite().all():
        torch.testing.assert_close(near, limit, rtol=1e-7, atol=1e-9)
    else:
        assert ((near > 2 * before) | near.isinf()).all()


@pytest.mark.parametrize("size", [20.0, 200.0])
def test_extreme_logits_in_float32_are_never_nan(divergence: Any, size: float):
    generator = torch.Generator().manual_seed(5)
    p, q = (torch.randn(200, 7, generator=generator).sign() * size for _ in range(2))
    p[100:] *= torch.rand(100, 7, generator=generator)
    q[100:] *= torch.rand(100, 7, generator=generator)
    value, gradient = value_and_gradient(divergence, p.log_softmax(-1), q.log_softmax(-1))
    slow_value, slow = gradient_through_logits(divergence, p, q)
    exact = divergence(p.double(), q.double())
    assert not value.isnan().any()
    assert not slow_value.isnan().any()
    assert gradient.isfinite().all()
    assert slow.isfinite().all()
    assert (value >= -1e-3).all()
    q[:, 6] = -INF
    leaf_value, leaf_gradient = gradient_through_logits(divergence, p, q)
    assert not leaf_value.isnan().any()
    assert leaf_gradient.isfinite().all()
    fits = exact < 1e30
    if divergence.name == "alpha_beta" and divergence.alpha + divergence.beta < 0:
        fits = fits & value.isfinite()  # the power overflows although its product with a tiny difference would fit
    torch.testing.assert_close(value[fits].double(), exact[fits], rtol=2e-3, atol=2e-3)


def test_terms_exist_exactly_where_it_is_a_sum_of_terms(divergence: Any):
    assert isinstance(divergence, Divergence)
    assert isinstance(divergence, PointwiseDivergence) == (divergence.name not in WHOLE)


@pytest.fixture
def pointwise(divergence: Any) -> Any:
    if divergence.name in WHOLE:
        pytest.skip("not a sum of terms")
    return divergence


def test_its_terms_add_up(pointwise: Any):
    p, q = logprobs(0), logprobs(1)
    terms = pointwise.terms(p, q)
    assert terms.shape == p.shape
    torch.testing.assert_close(terms.sum(-1), pointwise(p, q), rtol=1e-11, atol=1e-13)
    corrected = terms - pointwise.slope * (p.exp() - q.exp())
    torch.testing.assert_close(corrected.sum(-1), pointwise(p, q), rtol=1e-11, atol=1e-13)


def test_a_corrected_term_is_never_negative_and_only_zero_on_equals(pointwise: Any):
    """Entry by entry, so the two need not be distributions: a truncated sum of them is a divergence."""
    generator = torch.Generator().manual_seed(6)
    p, q = (-6 * torch.rand(400, 5, generator=generator, dtype=torch.float64) for _ in range(2))
    corrected = pointwise.terms(p, q) - pointwise.slope * (p.exp() - q.exp())
    far = (p - q).abs() > 0.1
    assert (corrected >= -1e-15).all()
    assert (corrected[far] > 0).all()
    equal = p.clone().requires_grad_()
    at_equal = pointwise.terms(equal, p) - pointwise.slope * (equal.exp() - p.exp())
    assert at_equal.abs().max() < 1e-14
    assert torch.autograd.grad(at_equal.sum(), equal)[0].abs().max() < 1e-14


def test_its_terms_at_exclusions(pointwise: Any):
    p = torch.tensor([[-INF, -INF, -1.0, -2.0]], dtype=torch.float64).requires_grad_()
    q = torch.tensor([[-INF, -1.0, -INF, -0.5]], dtype=torch.float64)
    terms = pointwise.terms(p, q)
    assert terms[0, 0].item() == 0.0
    assert not terms.isnan().any()
    (gradient,) = torch.autograd.grad(terms.masked_fill(terms.isinf(), 0.0).sum(), p)
    assert gradient.isfinite().all()
