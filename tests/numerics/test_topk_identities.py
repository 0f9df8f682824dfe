"""Truncated divergences against the formulas, a token and a set at a time, in float64 with asymmetric pairs."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from moteach.divergences.full import JSD, ForwardKL, ReverseKL
from moteach.divergences.topk import Source, TopK, Truncation

F64 = torch.float64
VOCAB, TOKENS = 9, 6
SOURCES: tuple[Source, ...] = ("teacher", "student", "union", "intersection")
TRUNCATIONS: tuple[Truncation, ...] = ("renormalise", "tail_bucket", "plain", "corrected")


def reverse_terms(p: Tensor, q: Tensor) -> Tensor:
    return p * (p / q).log()


def forward_terms(p: Tensor, q: Tensor) -> Tensor:
    return q * (q / p).log()


def jsd_terms(p: Tensor, q: Tensor) -> Tensor:
    m = 0.3 * q + 0.7 * p
    return 0.3 * q * (q / m).log() + 0.7 * p * (p / m).log()


TERMS: dict[str, tuple[object, Callable[[Tensor, Tensor], Tensor], float]] = {
    "reverse_kl": (ReverseKL(), reverse_terms, 1.0),
    "forward_kl": (ForwardKL(), forward_terms, -1.0),
    "jsd": (JSD(beta=0.3), jsd_terms, 0.0),
}


def pair(seed: int = 0, tokens: int = TOKENS, vocab: int = VOCAB) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(2, tokens, vocab, generator=generator, dtype=F64).mul(1.7).log_softmax(-1))


def toy() -> tuple[Tensor, Tensor]:
    """Twelve tokens whose reverse KL is .9959."""
    generator = np.random.default_rng(0)
    p, q = (torch.tensor(1.5 * generator.standard_normal(12)).log_softmax(-1) for _ in range(2))
    return p, q


def chosen(p: Tensor, q: Tensor, source: Source, k: int) -> list[int]:
    mine, theirs = (set(sorted(range(len(x)), key=lambda v: -float(x[v]))[:k]) for x in (p, q))
    sets = {"teacher": theirs, "student": mine, "union": mine | theirs, "intersection": mine & theirs}
    return sorted(sets[source])


def by_hand(z: Tensor, q: Tensor, support: list[int], truncation: Truncation, terms, slope: float) -> Tensor:
    """One token: probabilities, a list of ids, and the definition."""
    p = z.exp() / z.exp().sum()
    p_s, q_s = p[support], q[support]
    if truncation == "renormalise":
        return terms(p_s / p_s.sum(), q_s / q_s.sum()).sum() if support else z.sum() * 0
    if truncation == "tail_bucket":
        rest = [v for v in range(len(q)) if v not in support]
        return terms(p_s, q_s).sum() + (terms(p[rest].sum(), q[rest].sum()) if rest else 0)
    total = terms(p_s, q_s).sum()
    return total - slope * (p_s - q_s).sum() if truncation == "corrected" else total


@pytest.mark.parametrize("k", [1, 4])
@pytest.mark.parametrize("truncation", TRUNCATIONS)
@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("name", TERMS)
def test_value_gradient_and_masses_are_those_of_the_definition(name, source: Source, truncation: Truncation, k: int):
    divergence, terms, slope = TERMS[name]
    p, q = pair()
    topk = TopK(divergence=divergence, k=k, source=source, truncation=truncation)
    seen, called = topk.evaluate(p, q), topk(p + 2.0, q - 1.0)
    value, gradient = topk.value_and_gradient(p, q)
    assert torch.equal(value, seen.value)
    assert torch.equal(gradient, seen.gradient)
    for t in range(TOKENS):
        support = chosen(p[t], q[t], source, k)
        z = p[t].clone().requires_grad_()
        expected = by_hand(z, q[t].exp(), support, truncation, terms, slope)
        (slopes,) = torch.autograd.grad(expected, z)
        close = {"rtol": 1e-11, "atol": 1e-13}
        torch.testing.assert_close(seen.value[t], expected.detach(), **close)
        torch.testing.assert_close(called[t], expected.detach(), **close)
        torch.testing.assert_close(seen.gradient[t], slopes, **close)
        torch.testing.assert_close(seen.student_mass[t], p[t].exp()[support].sum(), **close)
        torch.testing.assert_close(seen.teacher_mass[t], q[t].exp()[support].sum(), **close)


@pytest.mark.parametrize("truncation", TRUNCATIONS)
@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("name", TERMS)
def test_the_differentiable_call_has_the_same_gradient(name, source: Source, truncation: Truncation):
    p, q = pair(3)
    topk = TopK(divergence=TERMS[name][0], k=3, source=source, truncation=truncation)
    leaf = p.clone().requires_grad_()
    topk(leaf, q).sum().backward()
    torch.testing.assert_close(topk.evaluate(p, q).gradient, leaf.grad, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("k", [VOCAB, 5 * VOCAB])
@pytest.mark.parametrize("truncation", TRUNCATIONS)
@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("name", TERMS)
def test_the_whole_vocabulary_is_the_full_divergence(name, source: Source, truncation: Truncation, k: int):
    divergence, terms, _ = TERMS[name]
    p, q = pair(1)
    leaf = p.clone().requires_grad_()
    probs = leaf.softmax(-1)
    full = terms(probs, q.exp()).sum(-1)
    full.sum().backward()
    seen = TopK(divergence=divergence, k=k, source=source, truncation=truncation).evaluate(p, q)
    torch.testing.assert_close(seen.value, full.detach(), rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(seen.gradient, leaf.grad, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(seen.student_mass, torch.ones(TOKENS, dtype=F64), rtol=1e-12, atol=0)


def test_known_numbers_of_a_toy_on_the_students_support():
    p, q = toy()
    assert (p.exp() * (p - q)).sum().item() == pytest.approx(0.9959, abs=5e-5)
    expected = {3: (0.499, 0.465, 0.719), 6: (0.857, 0.499, 1.067)}
    for k, numbers in expected.items():
        for truncation, number in zip(("tail_bucket", "renormalise", "plain"), numbers, strict=True):
            topk = TopK(divergence=ReverseKL(), k=k, source="student", truncation=truncation)
            assert topk.evaluate(p, q).value.item() == pytest.approx(number, abs=5e-4)


@pytest.mark.parametrize("source", ["teacher", "student", "union"])
def test_reverse_kl_splits_into_support_mass_head_and_tail(source: Source):
    p, q = pair(2)
    full = (p.exp() * (p - q)).sum(-1)
    topk = {t: TopK(divergence=ReverseKL(), k=3, source=source, truncation=t).evaluate(p, q) for t in TRUNCATIONS}
    m, n = topk["plain"].student_mass, topk["plain"].teacher_mass
    binary = m * (m / n).log() + (1 - m) * ((1 - m) / (1 - n)).log()
    tails = []
    for t in range(TOKENS):
        rest = [v for v in range(VOCAB) if v not in chosen(p[t], q[t], source, 3)]
        p_t, q_t = (side[t][rest].exp() / side[t][rest].exp().sum() for side in (p, q))
        tails.append((p_t * (p_t / q_t).log()).sum())
    tail = (1 - m) * torch.stack(tails)
    head = m * topk["renormalise"].value
    torch.testing.assert_close(full, binary + head + tail, rtol=1e-11, atol=1e-13)
    torch.testing.assert_close(topk["tail_bucket"].value, binary + head, rtol=1e-11, atol=1e-13)
    assert (tail > 1e-4).all()


@pytest.mark.parametrize("truncation", ["tail_bucket", "corrected"])
@pytest.mark.parametrize("source", ["teacher", "student"])
@pytest.mark.parametrize("name", TERMS)
def test_bounds_from_below_grow_with_the_support_up_to_the_full_divergence(name, source, truncation):
    divergence, terms, _ = TERMS[name]
    p, q = pair(4, tokens=50)
    full = terms(p.exp(), q.exp()).sum(-1)
    before = torch.zeros(50, dtype=F64)
    for k in range(1, VOCAB + 1):
        value = TopK(divergence=divergence, k=k, source=source, truncation=truncation).evaluate(p, q).value
        assert (value >= before - 1e-13).all()
        assert (value <= full + 1e-13).all()
        before = value
    torch.testing.assert_close(before, full, rtol=1e-12, atol=1e-13)


def test_a_plain_truncated_sum_may_be_negative_and_a_corrected_one_is_not():
    p, q = toy()
    plain = TopK(divergence=ReverseKL(), k=2, truncation="plain").evaluate(p, q).value.item()
    corrected = TopK(divergence=ReverseKL(), k=2, truncation="corrected").evaluate(p, q).value.item()
    assert plain == pytest.approx(-0.0715, abs=5e-5)
    assert corrected == pytest.approx(0.3659, abs=5e-5)


def agreeing_on_three() -> tuple[Tensor, Tensor]:
    """The student's three likeliest tokens have the teacher's probabilities; the others do not."""
    p, _ = toy()
    support = p.topk(3).indices
    rest = torch.tensor([v for v in range(12) if v not in support.tolist()])
    q = p.clone()
    q[rest] = p[rest.flip(0)]
    return p, q


@pytest.mark.parametrize(("name", "slope"), [("reverse_kl", 1.0), ("forward_kl", -1.0)])
def test_where_both_agree_on_the_support_the_corrected_sum_is_stationary_and_the_plain_one_moves_mass(name, slope):
    p, q = agreeing_on_three()
    assert (p.exp() * (p - q)).sum() > 0.1
    make = {t: TopK(divergence=TERMS[name][0], k=3, source="student", truncation=t) for t in ("plain", "corrected")}
    corrected, plain = make["corrected"].evaluate(p, q), make["plain"].evaluate(p, q)
    assert corrected.value.abs() < 1e-15
    assert corrected.gradient.abs().max() < 1e-15
    m, inside = plain.student_mass, torch.zeros(12, dtype=F64)
    inside[p.topk(3).indices] = 1.0
    torch.testing.assert_close(plain.gradient, slope * p.exp() * (inside - m), rtol=1e-11, atol=1e-14)
    assert plain.gradient.norm().item() == pytest.approx(0.1660, abs=5e-5)
    lower = make["plain"]((p - 0.1 * plain.gradient).log_softmax(-1), q)
    assert lower < plain.value - 1e-3


@pytest.mark.parametrize("source", SOURCES)
def test_the_corrected_gradient_is_the_part_of_reverse_kls_that_is_on_the_support(source: Source):
    p, q = pair(5)
    seen = TopK(divergence=ReverseKL(), k=3, source=source, truncation="corrected").evaluate(p, q)
    for t in range(TOKENS):
        expected = torch.zeros(VOCAB, dtype=F64)
        for v in chosen(p[t], q[t], source, 3):
            score = torch.eye(VOCAB, dtype=F64)[v] - p[t].exp()
            expected += p[t, v].exp() * (p[t, v] - q[t, v]) * score
        torch.testing.assert_close(seen.gradient[t], expected, rtol=1e-11, atol=1e-14)


def test_a_renormalised_value_is_blind_to_mass_that_leaves_the_support_and_the_masses_tell():
    head, tail = torch.tensor([0.6, 0.3, 0.1], dtype=F64), torch.tensor([0.4, 0.25, 0.2, 0.15], dtype=F64)
    m, n = 8e-5, -math.expm1(-1.72)
    p, q = torch.cat([m * head, (1 - m) * tail]).log(), torch.cat([n * head, (1 - n) * tail]).log()
    assert n > 0.8
    full = m * math.log(m / n) + (1 - m) * math.log((1 - m) / (1 - n))
    assert full == pytest.approx(1.72, abs=2e-3)
    seen = {t: TopK(divergence=ReverseKL(), k=3, truncation=t).evaluate(p, q) for t in ("renormalise", "tail_bucket")}
    assert seen["renormalise"].value.abs() < 1e-14
    assert seen["renormalise"].gradient.abs().max() < 1e-14
    assert seen["renormalise"].student_mass.item() == pytest.approx(8e-5, rel=1e-9)
    assert seen["renormalise"].teacher_mass.item() == pytest.approx(n, rel=1e-9)
    assert seen["tail_bucket"].value.item() == pytest.approx(full, rel=1e-9)
    assert seen["tail_bucket"].gradient.abs().max() > 1e-5


def test_a_tail_below_the_resolution_of_float32_is_neither_lost_nor_infinite():
    p = torch.tensor([0.0, -2.0, -20.0, -21.0, -22.0], dtype=F64).log_softmax(-1)
    q = torch.tensor([0.0, -1.0, -30.0, -32.0, -31.0], dtype=F64).log_softmax(-1)
    assert 1.0 - q.float().exp()[:2].sum() <= 0.0
    for divergence in (ReverseKL(), ForwardKL(), JSD(beta=0.3)):
        topk = TopK(divergence=divergence, k=2, truncation="tail_bucket")
        exact, seen = topk.evaluate(p, q), topk.evaluate(p.float(), q.float())
        torch.testing.assert_close(seen.value, exact.value.float(), rtol=1e-5, atol=1e-7)
        torch.testing.assert_close(seen.gradient, exact.gradient.float(), rtol=1e-4, atol=1e-7)
        sent = topk.evaluate_on(p.float(), torch.tensor([0, 1]), q.float()[:2])
        assert sent.value.isfinite()
        torch.testing.assert_close(sent.value, exact.value.float(), rtol=1e-4, atol=3e-6)
    # the gradient off the support is relative to the tail, not to one
    exact = TopK(divergence=ReverseKL(), k=2, truncation="tail_bucket").evaluate(p, q).gradient[2:]
    seen = TopK(divergence=ReverseKL(), k=2, truncation="tail_bucket").evaluate(p.float(), q.float()).gradient[2:]
    torch.testing.assert_close(seen, exact.float(), rtol=1e-4, atol=0)


def test_a_sent_mass_that_rounds_to_one_leaves_a_tail_of_the_resolution_of_its_numbers():
    p, q = torch.tensor([0.5, 0.3, 0.2]).log(), torch.tensor([0.0, -40.0, -41.0]).log_softmax(-1)
    assert q[0] == 0.0
    topk = TopK(divergence=ReverseKL(), k=1, truncation="tail_bucket")
    seen = topk.evaluate_on(p, torch.tensor([0]), q[:1])
    expected = 0.5 * math.log(0.5) + 0.5 * (math.log(0.5) - math.log(2.0**-23))
    assert seen.value.item() == pytest.approx(expected, rel=1e-5)
    assert seen.gradient.isfinite().all()
    assert seen.gradient[1].item() == pytest.approx(1.5 * seen.gradient[2].item(), rel=1e-5)
    beyond = topk.evaluate_on(p, torch.tensor([0]), q[:1] + 1e-6)
    assert beyond.value.isfinite()
    exact = topk.evaluate(p, q)
    assert exact.value.item() == pytest.approx(math.log(0.5) + 0.5 * (40 - math.log1p(math.exp(-1.0))), rel=1e-5)


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 3e-6), (torch.bfloat16, 4e-2)])
@pytest.mark.parametrize("truncation", TRUNCATIONS)
@pytest.mark.parametrize("name", TERMS)
def test_half_precision_stays_near_the_same_numbers_in_float64(name, truncation: Truncation, dtype, bound: float):
    p, q = (side.to(dtype) for side in pair(6, tokens=40, vocab=50))
    topk = TopK(divergence=TERMS[name][0], k=8, truncation=truncation)
    seen = topk.evaluate(p, q)
    ids = q.topk(8).indices
    exact = TopK(divergence=TERMS[name][0], k=8, truncation=truncation)
    # the same support for both, whatever ties rounding makes
    reference = exact.evaluate_on(p.double(), ids, q.double().gather(-1, ids))
    assert seen.value.dtype == seen.gradient.dtype == dtype
    assert (seen.value.double() - reference.value).abs().max() < bound
    assert (seen.gradient.double() - reference.gradient).abs().max() < bound
