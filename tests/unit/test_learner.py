from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from moteach.conflict.pools import Geometric, Linear
from moteach.divergences.full import ReverseKL
from moteach.learner import Learner
from moteach.objectives.answers import Answers
from moteach.objectives.balance import Gap, TokenShare
from moteach.objectives.base import Scored
from moteach.objectives.divergence import DivergenceObjective
from moteach.objectives.gating import Gating
from moteach.objectives.policy_gradient import PolicyGradientObjective
from moteach.objectives.token_masks import EntropyTop, FirstTokens, Tip
from moteach.routing.novelty import NoveltyGate
from moteach.routing.token import PromptGate
from moteach.testing import tiny_prompts, tiny_tokenizer
from moteach.types import Evidence, Head, LossOutput, Prompt, Rollout, RolloutBatch, Routing, TeacherEvidence

VOCAB, HIDDEN = 9, 4
LENGTHS = (3, 1, 4, 2, 5, 2)
DOMAINS = ("math", "math", "code", "code", "code", "search")


class Student(nn.Module):
    """Counts its forwards."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.embedding = nn.Parameter(torch.randn(VOCAB, HIDDEN, generator=generator, dtype=torch.float64))
        self.head = nn.Parameter(torch.randn(VOCAB, HIDDEN, generator=generator, dtype=torch.float64))
        self.forwards = 0

    def forward(self, rollouts: RolloutBatch, loss: Any) -> LossOutput:
        self.forwards += 1
        output: LossOutput = loss(rollouts.pack(self.embedding[rollouts.input_ids]), Head(weight=self.head))
        return output


def batch() -> RolloutBatch:
    generator = torch.Generator().manual_seed(1)
    rows = [
        Rollout(
            prompt=Prompt(prompt_id=f"p{i}", text="x", token_ids=(i,), domain=domain),
            sample=0,
            completion_ids=tuple(torch.randint(0, VOCAB, (length,), generator=generator).tolist()),
            rollout_logprobs=(-2.0,) * length,
            finished=True,
            student_version=0,
        )
        for i, (length, domain) in enumerate(zip(LENGTHS, DOMAINS, strict=True))
    ]
    return RolloutBatch.from_rollouts(rows, pad_id=0)


def scored(*, normalise: Any = "token_mean", untaught: tuple[int, ...] = ()) -> Scored:
    rollouts = batch()
    entries = []
    for index in range(2):
        generator = torch.Generator().manual_seed(10 + index)
        hidden = torch.randn(rollouts.num_tokens, 3, generator=generator, dtype=torch.float64)
        head = Head(weight=torch.randn(VOCAB, 3, generator=generator, dtype=torch.float64) * 2)
        logprobs = (hidden @ head.weight.T).log_softmax(-1)
        entries.append(
            TeacherEvidence(
                teacher_id=f"t{index}", support="full", tokens=torch.arange(rollouts.num_tokens), hidden=hidden, head=head,
                sampled_logprobs=logprobs.gather(1, rollouts.token_targets.unsqueeze(1)).squeeze(1),
            )
        )  # fmt: skip
    weights = torch.tensor([[0.3, 0.7]]).repeat(len(rollouts), 1)
    weights[list(untaught)] = 0.0
    routing = Routing(
        teacher_ids=("t0", "t1"),
        prompt_ids=tuple(row.prompt.prompt_id for row in rollouts.rollouts),
        weights=weights,
        confidence=weights.amax(1),
        abstained=weights.sum(1) == 0,
    )
    said = Evidence(teachers=tuple(entries), num_tokens=rollouts.num_tokens)
    return Scored.of(rollouts, routing, said, normalise=normalise)


def learner(student: nn.Module, *, kind: Any = DivergenceObjective, **arguments: Any) -> Learner:
    objective = kind(gate=PromptGate(), resolver=Linear(), divergence=ReverseKL(), normalise="token_mean")
    return Learner(student=student, objective=objective, **arguments)  # type: ignore[arg-type]


def gradients(student: nn.Module) -> list[Tensor]:
    found = [parameter.grad.clone() for parameter in student.parameters() if parameter.grad is not None]
    student.zero_grad()
    return found


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("untaught", [(), (0, 3)])
@pytest.mark.parametrize("kind", [DivergenceObjective, PolicyGradientObjective])
@pytest.mark.parametrize(
    "choices",
    [
        {},
        {"token_weights": (Tip(rho=0.4),)},
        {"token_weights": (FirstTokens(count=2), EntropyTop(fraction=0.5)), "balance": TokenShare()},
        {"balance": Gap()},
    ],
    ids=["plain", "tip", "masks and share", "gap"],
)
def test_micro_batches_give_the_loss_gradient_and_statistics_of_the_whole_batch(
    choices: dict[str, Any], kind: Any, untaught: tuple[int, ...], size: int
) -> None:
    student, given = Student(), scored(untaught=untaught)
    whole = learner(student, kind=kind, **choices).loss(given)
    expected = gradients(student)
    parts = learner(student, kind=kind, micro_batch_size=size, **choices).loss(given)
    torch.testing.assert_close(parts.loss, whole.loss, rtol=1e-5, atol=1e-7)
    for got, want in zip(gradients(student), expected, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-7)
    assert set(parts.token_stats) == set(whole.token_stats)
    for name, values in whole.token_stats.items():
        torch.testing.assert_close(parts.token_stats[name], values, rtol=1e-5, atol=1e-6, msg=name)
    assert parts.metrics.keys() == whole.metrics.keys()


def test_the_rows_of_a_teacher_come_together_so_that_each_head_is_fetched_once() -> None:
    """A head that lies on the disk would be read again in every micro-batch: rows alternate between two teachers here."""
    student, given = Student(), scored()
    rows = len(given.rollouts)
    weights = torch.eye(2)[torch.arange(rows) % 2]
    fetched: list[str] = []
    entries = []
    for teacher, entry in enumerate(given.evidence.teachers):
        mine = given.rollouts.token_rows % 2 == teacher
        head, name = entry.head, entry.teacher_id

        def lent(head: Any = head, name: str = name) -> Head:
            fetched.append(name)
            return head

        assert entry.hidden is not None
        entries.append(
            replace(entry, tokens=entry.tokens[mine], hidden=entry.hidden[mine], head=lent, sampled_logprobs=None)
        )
    routing = replace(given.routing, weights=weights)
    said = Evidence(teachers=tuple(entries), num_tokens=given.rollouts.num_tokens)
    given = replace(given, routing=routing, evidence=said)
    whole = learner(student).loss(given)
    expected, once = gradients(student), list(fetched)
    fetched.clear()
    parts = learner(student, micro_batch_size=-(-rows // 2)).loss(given)
    assert sorted(fetched) == sorted(once)
    torch.testing.assert_close(parts.loss, whole.loss, rtol=1e-5, atol=1e-7)
    for got, want in zip(gradients(student), expected, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("size", [1, 4])
def test_the_price_of_disagreement_is_compared_over_the_whole_batch_whatever_the_micro_batches(size: int) -> None:
    student, given = Student(), scored(untaught=(1,))
    objective = DivergenceObjective(
        gate=PromptGate(), resolver=Geometric(sequence_penalty=0.5), divergence=ReverseKL(), normalise="token_mean"
    )
    whole = Learner(student=student, objective=objective).loss(given)
    expected = gradients(student)
    parts = Learner(student=student, objective=objective, micro_batch_size=size).loss(given)
    torch.testing.assert_close(parts.loss, whole.loss, rtol=1e-5, atol=1e-7)
    for got, want in zip(gradients(student), expected, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-7)
    assert float(whole.token_stats["advantages"].abs().max()) > 0.01
    blind = DivergenceObjective(gate=PromptGate(), resolver=Geometric(), divergence=ReverseKL(), normalise="token_mean")
    Learner(student=student, objective=blind).loss(given)
    assert any(not torch.allclose(got, want) for got, want in zip(gradients(student), expected, strict=True))


def test_masking_does_not_shrink_the_learning_rate() -> None:
    student, given = Student(), scored(untaught=(1,))
    output = learner(student, token_weights=(Tip(rho=0.3),)).loss(given)
    taught = output.token_stats["abstained"] == 0
    weights = output.token_stats["weight"]
    assert float(weights[taught].sum()) == pytest.approx(float(given.base_weights[taught].sum()), rel=1e-5)
    assert int((weights[taught] > 0).sum()) == -(-3 * int(taught.sum()) // 10)
    assert output.metrics["token_weights/kept"] == pytest.approx(float((weights[taught] > 0).double().mean()), rel=1e-5)
    assert output.metrics["token_weights/scale"] > 1


def test_the_measurement_shares_the_forward_of_a_batch_in_one_piece_and_has_its_own_in_several() -> None:
    student = Student()
    learner(student).loss(scored())
    assert student.forwards == 1
    learner(student, token_weights=(Tip(),)).loss(scored())
    assert student.forwards == 2
    learner(student, micro_batch_size=2).loss(scored())
    assert student.forwards == 2 + 3
    learner(student, token_weights=(Tip(),), micro_batch_size=2).loss(scored())
    assert student.forwards == 5 + 6
    # masks that need no statistic need no look at the student
    learner(student, token_weights=(FirstTokens(count=1),), micro_batch_size=2).loss(scored())
    assert student.forwards == 11 + 3


def test_evaluation_neither_weighs_nor_moves_the_state_of_the_balance() -> None:
    student, balance = Student(), Gap(reference="anchored")
    with torch.no_grad():
        output = learner(student, balance=balance, token_weights=(Tip(rho=0.1),)).loss(scored(), weigh=False)
    torch.testing.assert_close(output.token_stats["weight"], scored().base_weights)
    assert balance.state_dict() == Gap(reference="anchored").state_dict()
    learner(student, balance=balance).loss(scored())
    assert balance.state_dict() != Gap(reference="anchored").state_dict()


def test_the_gradients_of_the_domains_add_up_and_have_the_cosines_that_are_told() -> None:
    student, given = Student(), scored()
    teacher = learner(student)
    found = teacher.domain_gradients(given)
    assert all(parameter.grad is None for parameter in student.parameters())
    vectors = {}
    for name in ("code", "math", "search"):
        teacher.loss(given.select([row for row, domain in enumerate(DOMAINS) if domain == name]))
        vectors[name] = torch.cat([g.flatten() for g in gradients(student)])
        assert found[f"gradient_norm/{name}"] == pytest.approx(float(vectors[name].norm()), rel=1e-6)
    teacher.loss(given)
    total = torch.cat([g.flatten() for g in gradients(student)])
    torch.testing.assert_close(sum(vectors.values()), total, rtol=1e-6, atol=1e-9)
    for left, right in (("code", "math"), ("code", "search"), ("math", "search")):
        a, b = vectors[left], vectors[right]
        expected = float(a @ b / (a.norm() * b.norm()))
        assert found[f"gradient_cosine/{left}/{right}"] == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("size", [None, 2])
def test_the_proximal_logprobs_are_those_of_the_student_now(size: int | None) -> None:
    student, rollouts = Student(), batch()
    found = learner(student, micro_batch_size=size).proximal_logprobs(rollouts)
    states = rollouts.pack(student.embedding[rollouts.input_ids])
    expected = (states @ student.head.T).log_softmax(-1).gather(1, rollouts.token_targets.unsqueeze(1)).squeeze(1)
    torch.testing.assert_close(found, expected.detach())
    assert not found.requires_grad


@pytest.mark.parametrize("size", [None, 2])
def test_the_supervised_term_adds_the_gradient_of_the_mean_cross_entropy(size: int | None) -> None:
    student, rollouts = Student(), batch()
    value = learner(student, micro_batch_size=size).supervised(rollouts, 0.5)
    found = gradients(student)
    states = rollouts.pack(student.embedding[rollouts.input_ids])
    logprobs = (states @ student.head.T).log_softmax(-1).gather(1, rollouts.token_targets.unsqueeze(1)).squeeze(1)
    lengths = torch.tensor(LENGTHS)[rollouts.token_rows]
    expected = -0.5 * (logprobs / lengths / len(LENGTHS)).sum()
    assert value == pytest.approx(float(expected.detach()), rel=1e-6)
    for got, want in zip(found, torch.autograd.grad(expected, list(student.parameters())), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-9)


def test_a_part_of_a_batch_keeps_its_weights_and_everything_that_belongs_to_its_tokens() -> None:
    given = scored()
    count = given.rollouts.num_tokens
    given = replace(
        given,
        outcome_advantages=torch.arange(count, dtype=torch.float32),
        proximal_logprobs=-torch.arange(count, dtype=torch.float32),
        reference=given.evidence,
        stats={"divergence": torch.arange(count, dtype=torch.float64)},
    )
    rows = [1, 4]
    kept = torch.tensor([int(row) in rows for row in given.rollouts.token_rows])
    part = given.select(rows)
    assert part.base_weights.tolist() == given.base_weights[kept].tolist()
    assert part.outcome_advantages.tolist() == given.outcome_advantages[kept].tolist()
    assert part.proximal_logprobs.tolist() == given.proximal_logprobs[kept].tolist()
    assert part.stats["divergence"].tolist() == given.stats["divergence"][kept].tolist()
    assert torch.equal(part.reference.teachers[0].hidden, given.evidence.teachers[0].hidden[kept])
    assert [row.prompt.prompt_id for row in part.rollouts.rollouts] == ["p1", "p4"]


def test_answers_are_written_as_completions_with_an_end() -> None:
    tokenizer = tiny_tokenizer()
    prompts = tiny_prompts(["1+1=", "2+2=", "x"], tokenizer=tokenizer, answers=["2", "4", "y"])
    prompts[1] = replace(prompts[1], metadata={"solution": "2+2 is 4"})
    prompts[2] = replace(prompts[2], answer=None)
    rollouts = Answers(tokenizer)([*prompts, prompts[0]])
    texts = [tokenizer.decode(row.completion_ids) for row in rollouts.rollouts]
    assert texts == ["2<eos>", "2+2 is 4<eos>"]
    assert [row.prompt.prompt_id for row in rollouts.rollouts] == ["p0", "p1"]
    assert Answers(tokenizer)([prompts[2]]) is None
    assert partial(Answers(tokenizer), [])() is None


@pytest.mark.parametrize("weights", [(), (Tip(rho=0.4),), (FirstTokens(count=2),)], ids=["plain", "tip", "unmeasured"])
def test_a_token_gate_decides_once_and_alike_whatever_the_micro_batches(weights: Any) -> None:
    calls = []

    class Counting(NoveltyGate):
        def weights(self, context: Any) -> Tensor:
            calls.append(context.rollouts.num_tokens)
            return super().weights(context)

    def of(size: int | None) -> Learner:
        objective = DivergenceObjective(
            gate=Counting(k=4), resolver=Linear(), divergence=ReverseKL(), normalise="token_mean"
        )
        return Learner(student=student, objective=objective, token_weights=weights, micro_batch_size=size)

    student, given = Student(), scored(untaught=(1,))
    whole = of(None).loss(given)
    expected = gradients(student)
    assert calls == [given.rollouts.num_tokens]
    calls.clear()
    parts = of(2).loss(given)
    assert sum(calls) == given.rollouts.num_tokens
    torch.testing.assert_close(parts.loss, whole.loss, rtol=1e-5, atol=1e-7)
    for got, want in zip(gradients(student), expected, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-7)
    columns = torch.stack([whole.token_stats[f"gate_weight/t{k}"] for k in range(2)], dim=1)
    assert float(columns.std(dim=0).max()) > 0.01
    for name, values in whole.token_stats.items():
        torch.testing.assert_close(parts.token_stats[name], values, rtol=1e-5, atol=1e-6, msg=name)


@pytest.mark.parametrize("gate", [PromptGate(), NoveltyGate(k=4)], ids=["prompt", "token"])
@pytest.mark.parametrize("size", [None, 2])
def test_the_diagnostics_are_those_of_the_measurement_and_leave_the_step_alone(size: int | None, gate: Any) -> None:
    objective = DivergenceObjective(gate=gate, resolver=Linear(), divergence=ReverseKL(), normalise="token_mean")
    student, given = Student(), scored(untaught=(1,))
    made = Learner(student=student, objective=objective, micro_batch_size=size)
    noise = torch.get_rng_state()
    found = made.diagnostics(given, "full")
    assert torch.equal(torch.get_rng_state(), noise)
    assert gradients(student) == []
    assert set(found) == {
        *("topk_overlap", "target_mass_on_student_topk", "student_mass_on_target_topk", "overlap_token_advantage")
    }
    hidden = given.rollouts.pack(student.embedding[given.rollouts.input_ids]).detach()
    head = Head(weight=student.head.detach())
    decided = given
    if gate.per_token:
        gating = Gating.of(objective)
        assert gating is not None
        decided = gating.decide(hidden, head, given)
    expected = objective.measure(hidden, head, decided, frozenset(found))
    for name, values in found.items():
        torch.testing.assert_close(values, expected[name], rtol=1e-6, atol=1e-9, msg=name)
    assert float(found["overlap_token_advantage"].min()) < -1e-3


def test_without_whole_distributions_there_are_no_diagnostics() -> None:
    student = Student()
    objective = PolicyGradientObjective(
        gate=PromptGate(), resolver=Linear(), divergence=ReverseKL(), normalise="token_mean"
    )
    assert Learner(student=student, objective=objective).diagnostics(scored(), "sampled") == {}
    assert student.forwards == 0
