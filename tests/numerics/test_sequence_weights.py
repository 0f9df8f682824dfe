"""Weights from the cross-entropy of whole completions, against the formula written out, on every support."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from objective_cases import Bigram, batch, run, scored
from torch import Tensor

from moteach.conflict.base import resolve
from moteach.conflict.pools import Geometric, Linear
from moteach.conflict.sequence import InverseCE, MinCE, Perplexity, tilted
from moteach.divergences.full import ReverseKL, reverse_kl
from moteach.errors import ConfigError, RoutingError
from moteach.learner import Learner
from moteach.objectives.divergence import DivergenceObjective
from moteach.objectives.mix import Mix, MixedObjective
from moteach.objectives.sampled_loss import SampledLossObjective
from moteach.objectives.sequences import sequence_logprobs
from moteach.objectives.topk import TopKObjective
from moteach.routing.token import PromptGate

ROWS = [(1, 2, 3), (2,), (3, 3, 1, 0)]
GIVEN = (0.2, 0.5, 0.3)


def cases() -> tuple[Bigram, list[Bigram], Any]:
    student = Bigram(0)
    return student, [Bigram(seed, 2.0) for seed in (5, 6, 7)], batch(ROWS, student.table())


def means(teachers: list[Bigram]) -> Tensor:
    """Mean logprob of each completion under each teacher, token by token."""
    rows = []
    for ids in ROWS:
        pairs = list(zip((0, *ids[:-1]), ids, strict=True))
        rows.append([sum(float(t.table().detach()[a, b]) for a, b in pairs) / len(pairs) for t in teachers])
    return torch.tensor(rows, dtype=torch.float64)


def softmax(row: list[float]) -> list[float]:
    powers = [math.exp(value) for value in row]
    return [power / sum(powers) for power in powers]


@pytest.mark.parametrize("support", ["full", "topk", "sampled"])
def test_the_statistic_is_the_mean_logprob_of_the_completion_on_every_support(support: Any) -> None:
    _, teachers, rollouts = cases()
    given = scored(rollouts, teachers, support, weights=GIVEN)
    found = sequence_logprobs(rollouts, given.routing, given.evidence)
    torch.testing.assert_close(found.double(), means(teachers), rtol=1e-6, atol=1e-6)


def test_a_teacher_that_scored_nothing_of_a_row_is_minus_infinite_there_and_has_no_weight() -> None:
    _, teachers, rollouts = cases()
    given = scored(rollouts, teachers, "full", weights=GIVEN)
    kept = rollouts.token_rows != 1
    entry = given.evidence.teachers[0]
    part = type(entry)(
        teacher_id="t0", support="full", tokens=entry.tokens[kept], hidden=entry.hidden[kept], head=entry.head
    )
    said = type(given.evidence)(teachers=(part, *given.evidence.teachers[1:]), num_tokens=rollouts.num_tokens)
    found = sequence_logprobs(rollouts, given.routing, said)
    assert found[1, 0] == -math.inf
    torch.testing.assert_close(found[[0, 2]].double(), means(teachers)[[0, 2]], rtol=1e-6, atol=1e-6)
    assert tilted(torch.tensor([[0.5, 0.2, 0.3]]), found[1:2], temperature=1.0)[0, 0] == 0


def test_evidence_without_hidden_states_or_logprobs_is_refused() -> None:
    _, teachers, rollouts = cases()
    given = scored(rollouts, teachers, "full", weights=GIVEN)
    entry = given.evidence.teachers[0]
    empty = type(entry)(teacher_id="t0", support="topk", tokens=entry.tokens)
    with pytest.raises(RoutingError, match=r"logprobs of the written tokens.*'t0'.*support=full or sampled"):
        sequence_logprobs(rollouts, given.routing, type(given.evidence)(teachers=(empty,), num_tokens=8))


@pytest.mark.parametrize(
    ("resolver", "pool", "temperature"),
    [(InverseCE(), Linear(), 1.0), (Perplexity(), Geometric(), 1.0), (Perplexity(temperature=0.3), Geometric(), 0.3)],
)
def test_on_full_support_the_loss_is_that_of_the_pool_with_the_tilted_weights(
    resolver: Any, pool: Any, temperature: float
) -> None:
    student, teachers, rollouts = cases()
    objective = DivergenceObjective(gate=PromptGate(), resolver=resolver, divergence=ReverseKL())
    output, gradients = run(objective, student, scored(rollouts, teachers, "full", weights=GIVEN))
    tilted = torch.tensor(
        [softmax([math.log(w) + v / temperature for w, v in zip(GIVEN, row, strict=True)]) for row in means(teachers).tolist()],
        dtype=torch.float64,
    )  # fmt: skip
    before = rollouts.input_ids[:, :-1][rollouts.loss_mask[:, 1:]]
    said = torch.stack([teacher.table()[before] for teacher in teachers])
    target = resolve(pool, said, tilted[rollouts.token_rows])
    loss = reverse_kl((student.embedding @ student.head.T)[before], target.logprobs).mean()
    torch.testing.assert_close(output.loss, loss, rtol=1e-6, atol=1e-8)
    for got, want in zip(gradients, torch.autograd.grad(loss, list(student.parameters())), strict=True):
        assert want.abs().max() > 1e-3
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-8)


def test_min_ce_takes_the_same_teacher_on_every_support_and_projects_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    student, teachers, rollouts = cases()
    best = means(teachers).argmax(1)
    assert len(set(best.tolist())) > 1, "the rows must not all have the same teacher"
    gate, resolver = PromptGate(), MinCE()
    before = rollouts.input_ids[:, :-1][rollouts.loss_mask[:, 1:]]
    said = torch.stack([teacher.table()[before] for teacher in teachers])
    chosen = said[best[rollouts.token_rows], torch.arange(len(before))]
    ours = (student.embedding @ student.head.T)[before].log_softmax(-1)

    seen: list[int] = []
    import moteach.divergences.chunked as kernel

    plain = kernel.PooledJob._teacher_logprobs
    monkeypatch.setattr(
        kernel.PooledJob, "_teacher_logprobs", lambda job, column, group: seen.extend(group.tokens) or plain(job, column, group)
    )  # fmt: skip
    full, _ = run(
        DivergenceObjective(gate=gate, resolver=resolver, divergence=ReverseKL()),
        student, scored(rollouts, teachers, "full", weights=GIVEN),
    )  # fmt: skip
    torch.testing.assert_close(full.token_stats["divergence"], reverse_kl(ours, chosen).detach(), rtol=1e-9, atol=1e-9)
    assert len(seen) == rollouts.num_tokens

    top, _ = run(
        TopKObjective(gate=gate, resolver=resolver, divergence=ReverseKL(), k=4, truncation="plain"),
        student, scored(rollouts, teachers, "topk", weights=GIVEN, k=4),
    )  # fmt: skip
    torch.testing.assert_close(top.token_stats["divergence"], full.token_stats["divergence"], rtol=1e-5, atol=1e-6)
    written, _ = run(
        SampledLossObjective(gate=gate, resolver=resolver),
        student,
        scored(rollouts, teachers, "sampled", weights=GIVEN),
    )
    ratio = (chosen - ours).gather(1, rollouts.token_targets.unsqueeze(1)).squeeze(1).detach()
    torch.testing.assert_close(written.token_stats["log_ratio"], ratio, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("resolver", [MinCE(), InverseCE(), Perplexity(temperature=0.5)])
def test_weights_are_a_distribution_over_the_teachers_that_had_any(resolver: Any) -> None:
    generator = torch.Generator().manual_seed(0)
    weights = torch.rand(40, 4, generator=generator, dtype=torch.float64) * (
        torch.rand(40, 4, generator=generator) < 0.6
    )
    weights[0] = 0.0
    weights = weights / weights.sum(-1, keepdim=True).clamp(min=1e-30)
    said = torch.randn(40, 4, generator=generator, dtype=torch.float64) * 5 - 9
    said[weights == 0] = math.nan
    said[1] = -math.inf
    found = resolver.reweigh(weights, said)
    taught = weights.sum(-1) > 0
    torch.testing.assert_close(found.sum(-1), taught.double(), rtol=0, atol=1e-12)
    assert (found[weights == 0] == 0).all()
    assert (found >= 0).all()
    order = [2, 0, 3, 1]
    torch.testing.assert_close(
        resolver.reweigh(weights[2:, order], said[2:, order]), found[2:][:, order], rtol=0, atol=1e-12
    )


def test_the_ends_of_the_temperature_are_the_given_weights_and_min_ce() -> None:
    weights, said = torch.tensor([[0.2, 0.5, 0.3]]), torch.tensor([[-3.0, -4.0, -1.0]])
    torch.testing.assert_close(tilted(weights, said, temperature=math.inf), weights)
    assert tilted(weights, said, temperature=1e-30).tolist() == MinCE().reweigh(weights, said).tolist()
    excluded = torch.full_like(said, -math.inf)
    torch.testing.assert_close(tilted(weights, excluded, temperature=1.0), weights)
    with pytest.raises(ConfigError, match=r"conflict\.temperature: .*conflict=min_ce"):
        Perplexity(temperature=0.0)


def test_micro_batches_change_nothing_and_the_statistic_is_made_once(monkeypatch: pytest.MonkeyPatch) -> None:
    import moteach.objectives.teaching as teaching

    student, teachers, rollouts = cases()
    given = scored(rollouts, teachers, "full", weights=GIVEN)
    calls: list[int] = []
    plain = teaching.sequence_logprobs
    monkeypatch.setattr(teaching, "sequence_logprobs", lambda *args: calls.append(1) or plain(*args))
    objective = MixedObjective(
        DivergenceObjective(gate=PromptGate(), resolver=InverseCE(), divergence=ReverseKL()), Mix()
    )
    found = []
    for size in (None, 1):
        student.zero_grad()
        output = Learner(student=student, objective=objective, micro_batch_size=size).loss(given)
        found.append((output, [parameter.grad.clone() for parameter in student.parameters()]))
    assert len(calls) == 2
    torch.testing.assert_close(found[1][0].loss, found[0][0].loss)
    for one, other in zip(found[0][1], found[1][1], strict=True):
        torch.testing.assert_close(other, one)
