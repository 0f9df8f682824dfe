"""The top-k component: every shipped divergence in it, what is refused, and the corners of a support."""

from __future__ import annotations

import importlib
import math
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
import yaml
from torch import Tensor

from moteach.divergences.base import ClosedFormDivergence, autograd_value_and_gradient, value_and_gradient
from moteach.divergences.full import JSD, ForwardKL, ReverseKL
from moteach.divergences.topk import Source, TopK, TopKEvaluation, Truncation
from moteach.errors import ConfigError, UnsupportedCombinationError

F64 = torch.float64
OUT = -math.inf
SOURCES: tuple[Source, ...] = get_args(Source)
TRUNCATIONS: tuple[Truncation, ...] = get_args(Truncation)


def shipped() -> list[Any]:
    """Every divergence of the config group that is evaluated on a whole distribution."""
    found = []
    for path in sorted((Path(__file__).parents[2] / "conf" / "divergence").glob("*.yaml")):
        content = yaml.safe_load(path.read_text())
        module, _, name = content.pop("_target_").rpartition(".")
        if name != "TopK":
            found.append(getattr(importlib.import_module(module), name)(**content))
    return found


ALL = shipped()
SUMS = [divergence for divergence in ALL if hasattr(divergence, "terms")]
CASES = [(d, t) for d in ALL for t in TRUNCATIONS if d in SUMS or t in ("renormalise", "tail_bucket")]
IDS = [f"{d.name}-{t}" for d, t in CASES]


def pair(seed: int = 0, shape: tuple[int, ...] = (20, 11)) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    p, q = torch.randn(2, *shape, generator=generator, dtype=F64).mul(1.5).log_softmax(-1)
    return p, q


def excluding(logits: Tensor, *tokens: int) -> Tensor:
    logits = logits.clone()
    logits[..., list(tokens)] = OUT
    return logits.log_softmax(-1)


def test_it_is_a_divergence_with_its_own_gradient():
    topk = TopK(divergence=ReverseKL(), k=3)
    assert isinstance(topk, ClosedFormDivergence)
    assert topk.name == "topk"
    assert topk.supports == {"full", "topk"}
    assert (topk.source, topk.truncation) == ("teacher", "renormalise")


@pytest.mark.parametrize(("divergence", "truncation"), CASES, ids=IDS)
@pytest.mark.parametrize("source", SOURCES)
def test_every_divergences_gradient_is_that_of_its_differentiable_call(divergence, truncation, source):
    p, q = pair()
    topk = TopK(divergence=divergence, k=4, source=source, truncation=truncation)
    value, gradient = topk.value_and_gradient(p, q)
    expected, slopes = autograd_value_and_gradient(topk, p, q)
    torch.testing.assert_close(value, expected, rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(gradient, slopes, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize(("divergence", "truncation"), CASES, ids=IDS)
@pytest.mark.parametrize("source", SOURCES)
def test_every_divergence_on_the_whole_vocabulary_is_itself(divergence, truncation, source):
    p, q = pair(1)
    expected, slopes = value_and_gradient(divergence, p, q)
    topk = TopK(divergence=divergence, k=11, source=source, truncation=truncation)
    seen = topk.evaluate(p, q)
    torch.testing.assert_close(seen.value, expected, rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(seen.gradient, slopes, rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(topk(p, q), expected, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("divergence", SUMS, ids=lambda d: d.name)
def test_every_corrected_sum_is_zero_and_stationary_on_equals_and_positive_elsewhere(divergence):
    p, q = pair(2)
    topk = TopK(divergence=divergence, k=4, truncation="corrected")
    equal = topk.evaluate(p, p)
    assert equal.value.abs().max() < 1e-12
    assert equal.gradient.abs().max() < 1e-12
    assert (topk.evaluate(p, q).value > 1e-6).all()


@pytest.mark.parametrize(("divergence", "truncation"), CASES, ids=IDS)
@pytest.mark.parametrize("source", SOURCES)
def test_excluded_tokens_never_make_nan_and_an_infinite_value_has_no_gradient(divergence, truncation, source):
    p, q = pair(3)
    topk = TopK(divergence=divergence, k=4, source=source, truncation=truncation)
    both, student, teacher = (0, 7), (0, 1, 7, 8), (0, 2, 3, 7)
    finite = 0
    for mine, theirs in ((both, both), (student, both), (both, teacher), (student, teacher)):
        p_out, q_out = excluding(p, *mine), excluding(q, *theirs)
        seen = topk.evaluate(p_out, q_out)
        assert not seen.value.isnan().any()
        assert seen.gradient.isfinite().all()
        assert (seen.gradient[seen.value.isinf()] == 0).all()
        assert not seen.student_mass.isnan().any()
        value, slopes = autograd_value_and_gradient(topk, p_out, q_out)
        torch.testing.assert_close(seen.value, value, rtol=1e-9, atol=1e-11)
        torch.testing.assert_close(seen.gradient, slopes, rtol=1e-9, atol=1e-11)
        finite += int(seen.value.isfinite().sum())
    assert finite >= 20


@pytest.mark.parametrize(("divergence", "truncation"), CASES, ids=IDS)
@pytest.mark.parametrize("source", ["teacher", "intersection"])
@pytest.mark.parametrize("given", [4, 6, 11])
def test_what_the_teacher_sent_is_enough_for_its_own_support(divergence, truncation, source, given):
    p, q = pair(4)
    topk = TopK(divergence=divergence, k=4, source=source, truncation=truncation)
    sent, ids = q.topk(given)
    shuffle = torch.randperm(given, generator=torch.Generator().manual_seed(0))
    seen, expected = topk.evaluate_on(p, ids[:, shuffle], sent[:, shuffle]), topk.evaluate(p, q)
    for field in ("value", "gradient", "student_mass", "teacher_mass"):
        torch.testing.assert_close(getattr(seen, field), getattr(expected, field), rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("truncation", TRUNCATIONS)
@pytest.mark.parametrize("source", ["teacher", "intersection"])
@pytest.mark.parametrize("divergence", [ReverseKL(), ForwardKL(), JSD()], ids=lambda d: d.name)
def test_a_teacher_that_sent_the_whole_vocabulary_has_no_tail(divergence, truncation, source):
    p, q = (side.float().log_softmax(-1) for side in pair(5, (200, 11)))
    topk = TopK(divergence=divergence, k=50, source=source, truncation=truncation)
    seen = topk.evaluate_on(p, torch.arange(11).expand(200, -1), q)
    expected, slopes = divergence.value_and_gradient(p, q)
    torch.testing.assert_close(seen.value, expected, rtol=1e-5, atol=2e-6)
    torch.testing.assert_close(seen.gradient, slopes, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("source", ["student", "union"])
def test_a_support_that_the_student_chose_is_refused_on_the_teachers_own_tokens(source):
    p, q = pair()
    sent, ids = q.topk(4)
    topk = TopK(divergence=ReverseKL(), k=4, source=source)
    with pytest.raises(UnsupportedCombinationError, match=rf"source={source}.*teacher or intersection"):
        topk.evaluate_on(p, ids, sent)


def test_fewer_tokens_than_k_are_refused():
    p, q = pair()
    sent, ids = q.topk(4)
    with pytest.raises(ConfigError, match=r"5 likeliest tokens, got 4.*objective\.k=4"):
        TopK(divergence=ReverseKL(), k=5).evaluate_on(p, ids, sent)


class NoSum:
    """A divergence that is not a sum over tokens."""

    name = "no_sum"
    supports = frozenset({"full"})

    def __call__(self, student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
        return (student_logits.log_softmax(-1) - teacher_logits.log_softmax(-1)).square().mean(-1).sqrt()


@pytest.mark.parametrize("truncation", ["plain", "corrected"])
def test_a_partial_sum_of_what_is_no_sum_is_refused(truncation):
    with pytest.raises(UnsupportedCombinationError, match=r"no_sum.*renormalise or tail_bucket"):
        TopK(divergence=NoSum(), k=3, truncation=truncation)


@pytest.mark.parametrize("truncation", ["renormalise", "tail_bucket"])
def test_a_divergence_without_terms_or_gradient_works_on_proper_distributions(truncation):
    p, q = pair(6)
    seen = TopK(divergence=NoSum(), k=3, truncation=truncation).evaluate(p, q)
    ids = q.topk(3).indices
    p_s, q_s = (side.gather(-1, ids).exp() for side in (p, q))
    if truncation == "tail_bucket":
        p_s, q_s = (torch.cat([side, 1 - side.sum(-1, keepdim=True)], dim=-1) for side in (p_s, q_s))
    p_s, q_s = (side / side.sum(-1, keepdim=True) for side in (p_s, q_s))
    torch.testing.assert_close(seen.value, (p_s / q_s).log().square().mean(-1).sqrt(), rtol=1e-9, atol=0)
    assert seen.gradient.abs().max() > 1e-3


def test_bad_arguments_are_refused():
    with pytest.raises(ConfigError, match="k >= 1"):
        TopK(divergence=ReverseKL(), k=0)
    with pytest.raises(UnsupportedCombinationError, match="Keep one of the two"):
        TopK(divergence=TopK(divergence=ReverseKL(), k=2), k=2)
    for key in ("source", "truncation"):
        with pytest.raises((ConfigError, TypeError), match=r"valid choices|type"):
            TopK(divergence=ReverseKL(), k=2, **{key: "teachers"})


def opposed() -> tuple[Tensor, Tensor]:
    """The student's three likeliest tokens are the teacher's three unlikeliest."""
    p = torch.tensor([3.0, 2.9, 2.8, 0.0, 0.1, 0.2], dtype=F64)
    return p.log_softmax(-1), (-p).log_softmax(-1)


@pytest.mark.parametrize("truncation", TRUNCATIONS)
def test_an_empty_intersection_is_worth_nothing(truncation):
    p, q = opposed()
    topk = TopK(divergence=ReverseKL(), k=2, source="intersection", truncation=truncation)
    sent, ids = q.topk(2)
    for seen in (topk.evaluate(p, q), topk.evaluate_on(p, ids, sent)):
        assert isinstance(seen, TopKEvaluation)
        assert seen.value == 0
        assert (seen.gradient == 0).all()
        assert seen.student_mass == seen.teacher_mass == 0
    assert topk(p, q) == 0


def test_the_union_counts_a_shared_token_once():
    p, q = pair(7)
    seen = TopK(divergence=ReverseKL(), k=4, source="union").evaluate(p, q)
    equal = TopK(divergence=ReverseKL(), k=4, source="union", truncation="tail_bucket").evaluate(p, p)
    alone = TopK(divergence=ReverseKL(), k=4, source="student").evaluate(p, p)
    torch.testing.assert_close(equal.student_mass, alone.student_mass, rtol=1e-12, atol=0)
    for t in range(20):
        ids = sorted(set(p[t].topk(4).indices.tolist()) | set(q[t].topk(4).indices.tolist()))
        assert seen.student_mass[t].item() == pytest.approx(p[t].exp()[ids].sum().item(), rel=1e-12)


def test_a_support_without_any_mass_of_one_side_cannot_be_renormalised():
    p, q = pair(8)
    out = excluding(p, *q[0].topk(3).indices.tolist())
    seen = TopK(divergence=JSD(), k=3).evaluate(out[:1], q[:1])
    assert seen.value.item() == math.inf
    assert (seen.gradient == 0).all()
    assert seen.student_mass == 0
    assert TopK(divergence=JSD(), k=3, truncation="tail_bucket").evaluate(out[:1], q[:1]).value.isfinite()


@pytest.mark.parametrize("truncation", TRUNCATIONS)
@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("shape", [(11,), (3, 11), (2, 4, 11), (0, 11)])
def test_any_leading_shape_is_taken_and_inputs_are_left_alone(truncation, source, shape):
    p, q = pair(9, shape)
    before = p.clone(), q.clone()
    topk = TopK(divergence=ReverseKL(), k=3, source=source, truncation=truncation)
    seen = topk.evaluate(p, q)
    assert seen.value.shape == seen.student_mass.shape == seen.teacher_mass.shape == shape[:-1]
    assert seen.gradient.shape == shape
    seen.gradient.fill_(7.0)
    assert torch.equal(p, before[0])
    assert torch.equal(q, before[1])
    assert topk(p, q).shape == shape[:-1]


def test_nothing_it_returns_is_part_of_a_graph():
    p, q = (side.requires_grad_() for side in pair(10))
    for truncation in TRUNCATIONS:
        for source in SOURCES:
            seen = TopK(divergence=ReverseKL(), k=3, source=source, truncation=truncation).evaluate(p, q)
            assert not any(t.requires_grad for t in (seen.value, seen.gradient, seen.student_mass, seen.teacher_mass))
