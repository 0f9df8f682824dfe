"""Shifts through the kernel, against the functions on plain logits; the order, the silent and what is missing."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from objective_cases import Bigram, batch, run, scored
from torch import Tensor

from moteach.conflict.base import resolve
from moteach.conflict.pools import Geometric
from moteach.conflict.shift import delta, endpoint, proxy
from moteach.conflict.shifts import Delta, Endpoint, Proxy
from moteach.divergences.full import ReverseKL, reverse_kl
from moteach.errors import ConfigError, RoutingError, UnsupportedCombinationError
from moteach.learner import Learner
from moteach.objectives.base import Scored
from moteach.objectives.divergence import DivergenceObjective
from moteach.objectives.policy_gradient import PolicyGradientObjective
from moteach.routing.token import PromptGate
from moteach.types import Evidence

ROWS = [(1, 2, 3), (2,), (3, 3, 1, 0)]
GIVEN = (0.2, 0.5, 0.3)
TEACHERS = [Bigram(seed, 1.5) for seed in (5, 6, 7)]
ORIGINS = [Bigram(seed) for seed in (15, 16, 17)]
ANCHOR = Bigram(25)


def case() -> Scored:
    """Teachers, origins in another order, and an anchor."""
    rollouts = batch(ROWS, Bigram(0).table())
    made = scored(rollouts, TEACHERS, "full", weights=GIVEN)
    origins = scored(rollouts, ORIGINS, "full", weights=GIVEN).evidence
    shuffled = Evidence(teachers=tuple(origins.teachers[i] for i in (2, 0, 1)), num_tokens=rollouts.num_tokens)
    return replace(made, references=shuffled, reference=scored(rollouts, [ANCHOR], "full").evidence)


def logits() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Of teachers, origins and anchor, and the weights, token by token."""
    rollouts = batch(ROWS, Bigram(0).table())
    before = rollouts.input_ids[:, :-1][rollouts.loss_mask[:, 1:]]
    teachers, origins = (torch.stack([m.table().detach()[before] for m in models]) for models in (TEACHERS, ORIGINS))
    return teachers, origins, ANCHOR.table().detach()[before], torch.tensor(GIVEN, dtype=torch.float64).expand(8, -1)


def expected(name: str, strength: float | None) -> Tensor:
    teachers, origins, anchor, w = logits()
    scale = 3.0 if strength is None else strength
    if name == "endpoint":
        return endpoint(anchor, teachers, scale * w)
    if name == "delta":
        return delta(anchor, teachers, origins, scale * w)
    # the weighted means of teachers and of origins are the expert and the anti-expert
    means = [torch.einsum("ktv,tk->tv", each, w) for each in (teachers, origins)]
    return proxy(anchor, *means, alpha=scale)


CASES = [
    (Delta(), "delta", None),
    (Delta(scale=0.7), "delta", 0.7),
    (Endpoint(), "endpoint", None),
    (Endpoint(scale=1.6), "endpoint", 1.6),
    (Proxy(), "proxy", 1.0),
    (Proxy(alpha=0.4), "proxy", 0.4),
]


@pytest.mark.parametrize(("resolver", "name", "strength"), CASES)
@pytest.mark.parametrize("size", [2, 64])
def test_the_kernel_compares_with_the_shifted_model(
    resolver: Any, name: str, strength: float | None, size: int
) -> None:
    student = Bigram(0)
    objective = DivergenceObjective(gate=PromptGate(), resolver=resolver, divergence=ReverseKL(), chunk_size=size)
    output, gradients = run(objective, student, case())
    rollouts = case().rollouts
    before = rollouts.input_ids[:, :-1][rollouts.loss_mask[:, 1:]]
    loss = reverse_kl((student.embedding @ student.head.T)[before], expected(name, strength)).mean()
    torch.testing.assert_close(output.loss, loss, rtol=1e-6, atol=1e-8)
    for got, want in zip(gradients, torch.autograd.grad(loss, list(student.parameters())), strict=True):
        assert want.abs().max() > 1e-2
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize(("resolver", "name", "strength"), CASES)
def test_on_plain_tensors_it_is_the_same_in_any_order(resolver: Any, name: str, strength: float | None) -> None:
    teachers, origins, anchor, w = logits()
    references = origins if "reference_logprobs" in resolver.needs else None
    target = resolve(resolver, teachers, w, references, anchor_logprobs=anchor)
    torch.testing.assert_close(target.logprobs, expected(name, strength), rtol=1e-12, atol=1e-12)
    order = [1, 2, 0]
    shuffled = None if references is None else references[order]
    other = resolve(resolver, teachers[order], w[:, order], shuffled, anchor_logprobs=anchor)
    torch.testing.assert_close(other.logprobs, target.logprobs, rtol=1e-12, atol=1e-12)
    assert (target.logprobs.exp().sum(-1) - 1).abs().max() < 1e-12
    assert (target.neg_log_z == 0).all()


def test_endpoint_at_scale_one_is_the_geometric_pool_whatever_the_anchor() -> None:
    teachers, _, anchor, w = logits()
    target = resolve(Endpoint(scale=1.0), teachers, w, anchor_logprobs=anchor)
    torch.testing.assert_close(target.logprobs, resolve(Geometric(), teachers, w).logprobs, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("resolver", [Delta(), Proxy()])
def test_a_teacher_alone_whose_origin_is_the_anchor_is_the_target(resolver: Any) -> None:
    teachers, _, anchor, _ = logits()
    one = torch.ones(8, 1, dtype=torch.float64)
    target = resolve(resolver, teachers[:1], one, anchor.unsqueeze(0), anchor_logprobs=anchor)
    torch.testing.assert_close(target.logprobs, teachers[0], rtol=1e-12, atol=1e-12)


def test_two_teachers_that_learned_the_same_move_delta_twice_as_far_and_proxy_once() -> None:
    teachers, origins, anchor, _ = logits()
    pair, from_one = teachers[[0, 0]], origins[[0, 0]]
    half = torch.full((8, 2), 0.5, dtype=torch.float64)
    twice = resolve(Delta(), pair, half, from_one, anchor_logprobs=anchor).logprobs
    once = resolve(Proxy(), pair, half, from_one, anchor_logprobs=anchor).logprobs
    shift = teachers[0] - origins[0]
    torch.testing.assert_close(twice, (anchor + 2 * shift).log_softmax(-1), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(once, (anchor + shift).log_softmax(-1), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("said", [-math.inf, math.nan])
def test_a_teacher_of_weight_zero_is_silent_and_not_counted(said: float) -> None:
    teachers, origins, anchor, w = logits()
    heard = [0, 2]
    w = w.clone()
    w[:, 1] = 0.0
    w = w / w.sum(-1, keepdim=True)
    teachers[1], origins[1] = said, said
    target = resolve(Delta(), teachers, w, origins, anchor_logprobs=anchor)
    other = resolve(Delta(), teachers[heard], w[:, heard], origins[heard], anchor_logprobs=anchor)
    assert target.logprobs.isfinite().all()
    torch.testing.assert_close(target.logprobs, other.logprobs, rtol=1e-12, atol=1e-12)


def test_an_origin_that_excludes_what_its_teacher_says_is_refused() -> None:
    teachers, origins, anchor, w = logits()
    origins[1, :, 2] = -math.inf
    with pytest.raises(UnsupportedCombinationError, match=r"expected a shift from a model"):
        resolve(Delta(), teachers, w, origins, anchor_logprobs=anchor)


def test_the_policy_gradient_reads_the_shifted_model_too() -> None:
    objective = PolicyGradientObjective(gate=PromptGate(), resolver=Delta(), divergence=ReverseKL())
    output, _ = run(objective, Bigram(0), case())
    rollouts = case().rollouts
    before = rollouts.input_ids[:, :-1][rollouts.loss_mask[:, 1:]]
    gap = expected("delta", None) - Bigram(0).table().detach()[before]
    ratio = gap.gather(1, rollouts.token_targets.unsqueeze(1)).squeeze(1)
    torch.testing.assert_close(output.token_stats["log_ratio"].double(), ratio, rtol=1e-5, atol=1e-6)


def test_micro_batches_change_nothing() -> None:
    objective = DivergenceObjective(gate=PromptGate(), resolver=Delta(), divergence=ReverseKL())
    found = []
    for size in (None, 1):
        student = Bigram(0)
        Learner(student=student, objective=objective, micro_batch_size=size).loss(case())
        found.append([parameter.grad for parameter in student.parameters()])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(other, one)


def test_what_is_missing_is_refused_by_name() -> None:
    objective = DivergenceObjective(gate=PromptGate(), resolver=Delta(), divergence=ReverseKL())
    full = case()
    with pytest.raises(UnsupportedCombinationError, match=r"what the anchor says.*conflict=geometric"):
        run(objective, Bigram(0), replace(full, reference=None))
    kept = full.references
    assert kept is not None
    fewer = Evidence(teachers=kept.teachers[1:], num_tokens=kept.num_tokens)
    with pytest.raises(UnsupportedCombinationError, match=r"checkpoint says that t2 was trained from"):
        run(objective, Bigram(0), replace(full, references=fewer))
    entry = kept.teachers[0]
    short = replace(entry, tokens=entry.tokens[1:], hidden=entry.hidden[1:])
    with pytest.raises(RoutingError, match=r"teacher 't2' to have scored every token"):
        run(objective, Bigram(0), replace(full, references=replace(kept, teachers=(short, *kept.teachers[1:]))))


@pytest.mark.parametrize("make", [lambda v: Delta(scale=v), lambda v: Endpoint(scale=v), lambda v: Proxy(alpha=v)])
@pytest.mark.parametrize("value", [0.0, -1.0, math.inf])
def test_a_strength_that_is_none_is_refused(make: Any, value: float) -> None:
    with pytest.raises(ConfigError, match=r"conflict\.(scale|alpha): expected a finite factor above 0"):
        make(value)
