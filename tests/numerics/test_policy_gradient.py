"""The objectives' gradients by enumeration: one position, five tokens, every completion the student could write."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from moteach.conflict.base import resolve
from moteach.conflict.pools import Geometric, Linear
from moteach.conflict.select import Select
from moteach.divergences.full import JSD, ForwardKL, ReverseKL
from moteach.errors import ConfigError, RoutingError
from moteach.objectives.base import Scored
from moteach.objectives.divergence import DivergenceObjective
from moteach.objectives.policy_gradient import PolicyGradientObjective
from moteach.routing.token import PromptGate
from moteach.types import Evidence, Head, LossOutput, Prompt, Rollout, RolloutBatch, Routing, TeacherEvidence

VOCAB, HIDDEN = 5, 3
STUDENT = torch.tensor([0.9, 0.2, -0.4, -1.1, 0.3])
TEACHER = torch.tensor([-1.5, 1.2, 0.4, -0.2, -0.9])
OTHER = torch.tensor([0.1, -1.0, 1.6, 0.5, -0.3])


class Unigram(nn.Module):
    """The same logits at every position."""

    def __init__(self) -> None:
        super().__init__()
        self.logits = nn.Parameter(STUDENT.clone())

    def forward(self, rollouts: RolloutBatch, loss: Callable[[Tensor, Head], LossOutput]) -> LossOutput:
        return loss(torch.ones(rollouts.num_tokens, 1), Head(weight=self.logits.unsqueeze(1)))


class Bigram(nn.Module):
    """Hidden states that depend on the token before, and a head of its own."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.embedding = nn.Parameter(torch.randn(VOCAB, HIDDEN, generator=generator))
        self.head = nn.Parameter(torch.randn(VOCAB, HIDDEN, generator=generator))

    def forward(self, rollouts: RolloutBatch, loss: Callable[[Tensor, Head], LossOutput]) -> LossOutput:
        return loss(rollouts.pack(self.embedding[rollouts.input_ids]), Head(weight=self.head))


def batch(completions: Sequence[Sequence[int]], sampler_logits: Tensor = STUDENT) -> RolloutBatch:
    logprobs = sampler_logits.log_softmax(-1)
    rollouts = [
        Rollout(
            prompt=Prompt(prompt_id=f"p{i}", text="x", token_ids=(0,)),
            sample=0,
            completion_ids=tuple(ids),
            rollout_logprobs=tuple(float(logprobs[token]) for token in ids),
            finished=True,
            student_version=0,
        )
        for i, ids in enumerate(completions)
    ]
    return RolloutBatch.from_rollouts(rollouts, pad_id=0)


def routing(rollouts: RolloutBatch, *weights: float) -> Routing:
    rows = torch.tensor(weights).expand(len(rollouts), -1)
    return Routing(
        teacher_ids=tuple(f"t{i}" for i in range(len(weights))),
        prompt_ids=tuple(rollout.prompt.prompt_id for rollout in rollouts.rollouts),
        weights=rows,
        confidence=rows.amax(dim=1),
        abstained=rows.sum(dim=1) == 0,
    )


def sampled(rollouts: RolloutBatch, *teachers: Tensor) -> Evidence:
    tokens = torch.arange(rollouts.num_tokens)
    entries = tuple(
        TeacherEvidence(
            teacher_id=f"t{i}",
            support="sampled",
            tokens=tokens,
            sampled_logprobs=logits.log_softmax(-1)[rollouts.token_targets],
        )
        for i, logits in enumerate(teachers)
    )
    return Evidence(teachers=entries, num_tokens=rollouts.num_tokens)


def policy(**arguments: Any) -> PolicyGradientObjective:
    parts = {"gate": PromptGate(), "resolver": Select(), "divergence": ReverseKL()}
    return PolicyGradientObjective(**{**parts, **arguments})


def run(objective: Any, student: nn.Module, rollouts: RolloutBatch, routes: Routing, evidence: Evidence) -> LossOutput:
    scored = Scored.of(rollouts, routes, evidence, normalise=objective.normalise)
    output: LossOutput = student(rollouts, partial(objective, scored=scored))
    if output.loss.requires_grad:
        output.loss.backward()
    return output


def expected_gradient(objective: PolicyGradientObjective, *teachers: Tensor, weights: Sequence[float]) -> Tensor:
    """Sum over the tokens the student could write of its probability times the gradient of that sample's loss."""
    total = torch.zeros(VOCAB, dtype=torch.float64)
    for token, probability in enumerate(STUDENT.double().softmax(-1)):
        student, rollouts = Unigram(), batch([[token]])
        run(objective, student, rollouts, routing(rollouts, *weights), sampled(rollouts, *teachers))
        assert student.logits.grad is not None
        total += probability * student.logits.grad.double()
    return total


def exact_gradient(divergence: Any, target_logits: Tensor) -> Tensor:
    logits = STUDENT.double().requires_grad_()
    divergence(logits.log_softmax(-1), target_logits.double().log_softmax(-1)).sum().backward()
    assert logits.grad is not None
    return logits.grad


def test_the_expected_gradient_is_that_of_the_reverse_kl() -> None:
    found = expected_gradient(policy(), TEACHER, weights=[1.0])
    torch.testing.assert_close(found, exact_gradient(ReverseKL(), TEACHER), atol=1e-6, rtol=1e-5)
    assert (found - exact_gradient(ForwardKL(), TEACHER)).abs().max() > 0.1
    logits = STUDENT.double().requires_grad_()
    ours, theirs = logits.log_softmax(-1), TEACHER.double().log_softmax(-1)
    (ours.exp() * (ours - theirs)).sum().backward()  # written out, so that the sign does not hang on ReverseKL alone
    torch.testing.assert_close(found, logits.grad, atol=1e-6, rtol=1e-5)


def test_a_step_along_the_gradient_brings_the_student_to_its_teacher() -> None:
    gradient = expected_gradient(policy(), TEACHER, weights=[1.0])
    target = TEACHER.double().log_softmax(-1)
    before = ReverseKL()(STUDENT.double().log_softmax(-1), target)
    after = ReverseKL()((STUDENT.double() - 0.1 * gradient).log_softmax(-1), target)
    assert after < before


def test_with_a_geometric_pool_it_is_the_reverse_kl_to_the_pool() -> None:
    weights = torch.tensor([0.3, 0.7], dtype=torch.float64)
    teachers = torch.stack([TEACHER, OTHER]).double().log_softmax(-1)
    pooled = resolve(Geometric(), teachers.unsqueeze(1), weights.unsqueeze(0)).logprobs[0]
    found = expected_gradient(policy(resolver=Geometric()), TEACHER, OTHER, weights=[0.3, 0.7])
    torch.testing.assert_close(found, exact_gradient(ReverseKL(), pooled), atol=1e-6, rtol=1e-5)
    linear = resolve(Linear(), teachers.unsqueeze(1), weights.unsqueeze(0)).logprobs[0]
    assert (found - exact_gradient(ReverseKL(), linear)).abs().max() > 1e-3


def test_with_a_linear_pool_it_is_the_reverse_kl_to_the_mixture() -> None:
    mixture = (0.3 * TEACHER.double().softmax(-1) + 0.7 * OTHER.double().softmax(-1)).log()
    found = expected_gradient(policy(resolver=Linear()), TEACHER, OTHER, weights=[0.3, 0.7])
    torch.testing.assert_close(found, exact_gradient(ReverseKL(), mixture), atol=1e-6, rtol=1e-5)


def test_stale_samples_are_reweighted_to_the_same_gradient() -> None:
    """Samples of an older student, inside the ratio bounds: the importance ratio makes up for it exactly."""
    older = STUDENT + torch.tensor([0.1, -0.1, 0.05, 0.0, -0.2])
    total = torch.zeros(VOCAB, dtype=torch.float64)
    for token, probability in enumerate(older.double().softmax(-1)):
        student, rollouts = Unigram(), batch([[token]], sampler_logits=older)
        run(policy(), student, rollouts, routing(rollouts, 1.0), sampled(rollouts, TEACHER))
        assert student.logits.grad is not None
        total += probability * student.logits.grad.double()
    torch.testing.assert_close(total, exact_gradient(ReverseKL(), TEACHER), atol=1e-6, rtol=1e-5)


def test_tokens_outside_the_ratio_bounds_are_masked() -> None:
    rollouts = batch([[1, 2, 3, 4]])
    shift = torch.tensor([0.0, 0.0, 0.7, -0.8, 0.6])  # trainer over sampler: 1, 0.497, 2.226, 0.549
    changed = rollouts.rollout_logprobs.clone()
    changed[0, 1:] += shift[1:]
    rollouts = replace(rollouts, rollout_logprobs=changed)
    student = Unigram()
    output = run(policy(), student, rollouts, routing(rollouts, 1.0), sampled(rollouts, TEACHER))
    assert output.token_stats["importance_ratio"].tolist() == pytest.approx([1.0, 0.4966, 2.2255, 0.5488], abs=1e-3)
    assert output.token_stats["masked"].tolist() == [0.0, 1.0, 1.0, 0.0]

    log = STUDENT.double().requires_grad_()
    ours, theirs = log.log_softmax(-1), TEACHER.double().log_softmax(-1)
    advantages = (theirs - ours).detach()
    terms = [advantages[1] * ours[1], torch.tensor(-0.6).double().exp() * advantages[4] * ours[4]]
    (-torch.stack(terms).sum() / 4).backward()
    torch.testing.assert_close(student.logits.grad, log.grad.float(), atol=1e-6, rtol=1e-5)


def test_a_batch_outside_the_bounds_moves_nothing() -> None:
    rollouts = batch([[1, 2]])
    rollouts = replace(rollouts, rollout_logprobs=rollouts.rollout_logprobs - rollouts.loss_mask * 5.0)
    student = Unigram()
    run(policy(), student, rollouts, routing(rollouts, 1.0), sampled(rollouts, TEACHER))
    assert student.logits.grad is not None
    assert not student.logits.grad.any()


def test_the_advantage_is_clipped_on_both_sides() -> None:
    rollouts = batch([[0, 1, 2, 3, 4]])
    free = run(policy(), Unigram(), rollouts, routing(rollouts, 1.0), sampled(rollouts, TEACHER))
    clipped = run(policy(log_ratio_clip=0.5), Unigram(), rollouts, routing(rollouts, 1.0), sampled(rollouts, TEACHER))
    raw = TEACHER.log_softmax(-1) - STUDENT.log_softmax(-1)
    assert raw.min() < -0.5
    assert raw.max() > 0.5
    torch.testing.assert_close(free.token_stats["advantages"], raw, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(clipped.token_stats["advantages"], raw.clamp(-0.5, 0.5), atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(free.token_stats["divergence"], -raw, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("resolver", [Select(), Linear(), Geometric()], ids=lambda resolver: resolver.name)
def test_rows_without_a_teacher_teach_nothing_and_are_counted(resolver: Any) -> None:
    rollouts = batch([[1, 2], [3], [4]])
    routes = routing(rollouts, 1.0)
    routes = replace(routes, weights=torch.tensor([[1.0], [0.0], [1.0]]), abstained=torch.tensor([False, True, False]))
    full = sampled(rollouts, TEACHER)
    evidence = Evidence(
        teachers=(replace(full.teachers[0], tokens=torch.tensor([0, 1, 3]),
                          sampled_logprobs=full.teachers[0].sampled_logprobs[[0, 1, 3]]),),
        num_tokens=4,
    )  # fmt: skip
    student, alone = Unigram(), Unigram()
    objective = policy(resolver=resolver, normalise="token_mean")
    output = run(objective, student, rollouts, routes, evidence)
    assert output.token_stats["abstained"].tolist() == [0.0, 0.0, 1.0, 0.0]
    assert output.token_stats["advantages"][2] == 0.0
    others = batch([[1, 2], [4]])
    run(objective, alone, others, routing(others, 1.0), sampled(others, TEACHER))
    torch.testing.assert_close(student.logits.grad, alone.logits.grad * 3 / 4, atol=1e-6, rtol=1e-5)


def test_a_micro_batch_that_nobody_teaches_is_no_error() -> None:
    rollouts = batch([[1, 2]])
    student = Unigram()
    output = run(policy(), student, rollouts, routing(rollouts, 0.0), Evidence(teachers=(), num_tokens=2))
    assert float(output.loss.detach()) == 0.0
    assert output.token_stats["abstained"].tolist() == [1.0, 1.0]


def test_evidence_of_another_support_is_refused() -> None:
    rollouts = batch([[1]])
    evidence = Evidence(
        teachers=(TeacherEvidence(teacher_id="t0", support="topk", tokens=torch.tensor([0])),), num_tokens=1
    )
    with pytest.raises(RoutingError, match=r"'t0' gave no logprob.*got topk\. Set support=sampled"):
        run(policy(), Unigram(), rollouts, routing(rollouts, 1.0), evidence)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"ratio_low": 1.0}, "ratio_low < 1 < ratio_high"),
        ({"ratio_high": 1.0}, "ratio_low < 1 < ratio_high"),
        ({"ratio_low": -0.1}, "ratio_low < 1 < ratio_high"),
        ({"log_ratio_clip": 0.0}, "log_ratio_clip: expected a number above 0"),
        ({"chunk_size": 0}, "chunk_size: expected at least 1"),
    ],
)
def test_bounds_that_mask_everything_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        policy(**arguments)


def full(rollouts: RolloutBatch) -> Evidence:
    """Teacher t0 scored rows 0 and 1, t1 (another hidden size) rows 1, 2 and 3."""
    entries = []
    for index, (rows, hidden) in enumerate((((0, 1), 2), ((1, 2, 3), 4))):
        generator = torch.Generator().manual_seed(index + 1)
        tokens = torch.isin(rollouts.token_rows, torch.tensor(rows)).nonzero(as_tuple=True)[0]
        states = torch.randn(rollouts.num_tokens, hidden, generator=generator)[tokens]
        head = Head(weight=torch.randn(VOCAB, hidden, generator=generator))
        entries.append(TeacherEvidence(teacher_id=f"t{index}", support="full", tokens=tokens, hidden=states, head=head))
    return Evidence(teachers=tuple(entries), num_tokens=rollouts.num_tokens)


@pytest.mark.parametrize("normalise", ["token_mean", "sequence_mean"])
@pytest.mark.parametrize("kind", ["divergence", "policy_gradient"])
@pytest.mark.parametrize("rows", [[[0], [1], [2], [3]], [[0, 1], [2, 3]], [[0, 1, 2], [3]]])
def test_micro_batches_add_up_to_the_whole_batch(kind: str, normalise: Any, rows: list[list[int]]) -> None:
    rollouts = batch([[1, 2, 3, 4, 0, 1], [2], [4, 4, 1], [3, 0]])
    routes = replace(routing(rollouts, 0.5, 0.5), weights=torch.tensor([[1.0, 0], [0.25, 0.75], [0, 1], [0, 1]]))
    if kind == "divergence":
        evidence = full(rollouts)
        objective: Any = DivergenceObjective(
            gate=PromptGate(), resolver=Geometric(), divergence=JSD(beta=0.3), normalise=normalise, chunk_size=2
        )
    else:
        evidence = sampled(rollouts, TEACHER, OTHER)
        objective = policy(resolver=Geometric(), normalise=normalise, ratio_low=0.01, ratio_high=100.0)
    scored = Scored.of(rollouts, routes, evidence, normalise=normalise)
    whole = Bigram()
    expected = whole(rollouts, partial(objective, scored=scored))
    expected.loss.backward()

    parts = Bigram()
    loss, stats = torch.zeros(()), []
    for group in rows:
        part = scored.select(group)
        output = parts(part.rollouts, partial(objective, scored=part))
        output.loss.backward()
        loss = loss + output.loss.detach()
        stats.append(output.token_stats["divergence"])
    torch.testing.assert_close(loss, expected.loss.detach(), atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(torch.cat(stats), expected.token_stats["divergence"], atol=1e-6, rtol=1e-5)
    for name, parameter in parts.named_parameters():
        torch.testing.assert_close(parameter.grad, whole.get_parameter(name).grad, atol=1e-6, rtol=1e-5)


def test_the_two_normalisations_differ_when_lengths_do() -> None:
    rollouts = batch([[1, 2, 3, 4, 0, 1], [2]])
    losses = [
        float(
            run(policy(normalise=n), Bigram(), rollouts, routing(rollouts, 1.0), sampled(rollouts, TEACHER)).loss.data
        )
        for n in ("token_mean", "sequence_mean")
    ]
    assert abs(losses[0] - losses[1]) > 0.01


def test_the_divergence_objective_is_the_weighted_mean_of_its_divergence() -> None:
    rollouts = batch([[1, 2], [3]])
    student, head = Bigram(), torch.randn(VOCAB, 2, generator=torch.Generator().manual_seed(5))
    states = torch.randn(3, 2, generator=torch.Generator().manual_seed(6))
    entry = TeacherEvidence(
        teacher_id="t0", support="full", tokens=torch.arange(3), hidden=states, head=Head(weight=head)
    )
    for student_temperature, teacher_temperature in ((1.0, 1.0), (2.0, 1.0), (1.0, 2.0)):
        objective = DivergenceObjective(
            gate=PromptGate(),
            resolver=Select(),
            divergence=ReverseKL(),
            normalise="sequence_mean",
            student_temperature=student_temperature,
            teacher_temperature=teacher_temperature,
        )
        evidence = Evidence(teachers=(entry,), num_tokens=3)
        output = run(objective, student, rollouts, routing(rollouts, 1.0), evidence)
        hidden = rollouts.pack(student.embedding[rollouts.input_ids]).detach().double()
        ours = (hidden @ student.head.detach().double().T / student_temperature).log_softmax(-1)
        theirs = (states.double() @ head.double().T / teacher_temperature).log_softmax(-1)
        per_token = (ours.exp() * (ours - theirs)).sum(-1)
        expected = per_token @ torch.tensor([0.25, 0.25, 0.5]).double()
        assert float(output.loss) == pytest.approx(float(expected), rel=1e-5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"chunk_size": 0}, "chunk_size"),
        ({"student_temperature": 0.0}, "student_temperature"),
        ({"teacher_temperature": -1.0}, "teacher_temperature"),
        ({"discount": 1.5}, "discount"),
    ],
)
def test_a_divergence_objective_of_nothing_is_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        DivergenceObjective(gate=PromptGate(), resolver=Select(), divergence=ReverseKL(), **arguments)


def test_a_micro_batch_that_nobody_teaches_has_no_divergence() -> None:
    rollouts = batch([[1, 2]])
    objective = DivergenceObjective(gate=PromptGate(), resolver=Geometric(), divergence=ReverseKL())
    output = run(objective, Bigram(), rollouts, routing(rollouts, 0.0), Evidence(teachers=(), num_tokens=2))
    assert float(output.loss.detach()) == 0.0
    assert output.token_stats["abstained"].tolist() == [1.0, 1.0]
