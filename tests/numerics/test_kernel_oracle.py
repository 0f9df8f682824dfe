"""The chunked kernel against plain float64 autograd, written here from the formulas alone."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from moteach.conflict.pools import Geometric, Linear
from moteach.conflict.select import Select
from moteach.divergences.chunked import chunked_divergence, chunked_token_logprobs, chunked_token_stats
from moteach.divergences.full import JSD, ForwardKL, ReverseKL
from moteach.divergences.measure import measure
from moteach.divergences.projection import project
from moteach.errors import (
    ConfigError,
    IncompatibleTeacherError,
    MoteachError,
    RoutingError,
    UnsupportedCombinationError,
)
from moteach.types import Head, TeacherEvidence

VOCAB, HIDDEN, TOKENS = 13, 6, 11
DIVERGENCES = {"reverse_kl": ReverseKL(), "forward_kl": ForwardKL(), "jsd": JSD(beta=0.3)}
RESOLVERS = {"linear": Linear(), "geometric": Geometric(), "select": Select()}


@dataclass
class Case:
    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    scale: float
    softcap: float | None
    teachers: list[TeacherEvidence]
    weights: Tensor
    token_weights: Tensor
    student_temperature: float = 1.0
    teacher_temperature: float = 1.0

    @property
    def head(self) -> Head:
        return Head(weight=self.weight, bias=self.bias, scale=self.scale, softcap=self.softcap)


def make_case(n: int, *, seed: int = 0, fancy: bool = True, ragged: bool = False, dtype=torch.float64) -> Case:
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    weights = torch.rand(TOKENS, n, generator=generator, dtype=torch.float64) + 0.1
    if ragged:
        keep = torch.rand(TOKENS, n, generator=generator) > 0.5
        keep[torch.arange(TOKENS), torch.arange(TOKENS) % n] = True
        keep[4] = False
        weights = weights * keep
    weights = weights / weights.sum(-1, keepdim=True).clamp_min(1e-30)
    teachers = []
    for k in range(n):
        tokens = torch.arange(TOKENS)
        if ragged:
            also = torch.rand(TOKENS, generator=generator) > 0.7
            tokens = ((weights[:, k] > 0) | also).nonzero(as_tuple=True)[0]
        width = 4 + k
        teachers.append(
            TeacherEvidence(
                teacher_id=f"t{k}",
                support="full",
                tokens=tokens,
                hidden=draw(len(tokens), width),
                head=Head(
                    weight=draw(VOCAB, width),
                    bias=draw(VOCAB) if k % 2 and fancy else None,
                    scale=0.7 if fancy else 1.0,
                    softcap=3.0 if k == 2 and fancy else None,
                ),
            )
        )
    return Case(
        hidden=draw(TOKENS, HIDDEN).requires_grad_(),
        weight=draw(VOCAB, HIDDEN).requires_grad_(),
        bias=draw(VOCAB).requires_grad_() if fancy else None,
        scale=1.3 if fancy else 1.0,
        softcap=4.0 if fancy else None,
        teachers=teachers,
        weights=weights.to(dtype),
        token_weights=torch.rand(TOKENS, generator=generator, dtype=torch.float64).to(dtype),
        student_temperature=1.7 if fancy else 1.0,
        teacher_temperature=0.8 if fancy else 1.0,
    )


def oracle_logits(hidden: Tensor, head: Head) -> Tensor:
    z = hidden @ head.weight.T
    z = (z if head.bias is None else z + head.bias) * head.scale
    return z if head.softcap is None else head.softcap * torch.tanh(z / head.softcap)


def oracle_target(name: str, logprobs: list[Tensor], weights: list[float]) -> tuple[Tensor, float]:
    if name == "select":
        return logprobs[weights.index(max(weights))], 0.0
    if name == "linear":
        return sum(w * q.exp() for w, q in zip(weights, logprobs, strict=True)).log(), 0.0
    product = torch.stack([q.exp() ** w for w, q in zip(weights, logprobs, strict=True)]).prod(0)
    return (product / product.sum()).log(), -math.log(float(product.sum()))


def oracle_divergence(name: str, p: Tensor, q: Tensor) -> Tensor:
    if name == "reverse_kl":
        return (p.exp() * (p - q)).sum()
    if name == "forward_kl":
        return (q.exp() * (q - p)).sum()
    m = (0.3 * q.exp() + 0.7 * p.exp()).log()
    return 0.3 * (q.exp() * (q - m)).sum() + 0.7 * (p.exp() * (p - m)).sum()


def oracle(case: Case, divergence: str, resolver: str) -> tuple[Tensor, dict[str, Tensor]]:
    """Token by token, teacher by teacher, autograd through everything."""
    loss = torch.zeros((), dtype=torch.float64)
    stats = {k: torch.zeros(TOKENS, dtype=torch.float64) for k in ("divergence", "student_entropy", "target_entropy")}
    stats["neg_log_z"] = torch.zeros(TOKENS, dtype=torch.float64)
    student = (oracle_logits(case.hidden, case.head) / case.student_temperature).log_softmax(-1)
    for t in range(TOKENS):
        logprobs, weights = [], []
        for k, evidence in enumerate(case.teachers):
            if case.weights[t, k] > 0:
                (row,) = (evidence.tokens == t).nonzero(as_tuple=True)[0].tolist()
                logits = oracle_logits(evidence.hidden[row], evidence.head) / case.teacher_temperature
                logprobs.append(logits.log_softmax(-1).detach())
                weights.append(float(case.weights[t, k]))
        if not weights:
            continue
        target, neg_log_z = oracle_target(resolver, logprobs, weights)
        value = oracle_divergence(divergence, student[t], target)
        loss = loss + case.token_weights[t] * value
        stats["divergence"][t] = value.detach()
        stats["student_entropy"][t] = -(student[t].exp() * student[t]).sum().detach()
        stats["target_entropy"][t] = -(target.exp() * target).sum()
        stats["neg_log_z"][t] = neg_log_z
    return loss, stats


def run(case: Case, divergence, resolver, size: int, **changes):
    arguments = {
        "student_hidden": case.hidden,
        "student_head": case.head,
        "teachers": case.teachers,
        "weights": case.weights,
        "token_weights": case.token_weights,
        "divergence": divergence,
        "resolver": resolver,
        "chunk_size": size,
        "student_temperature": case.student_temperature,
        "teacher_temperature": case.teacher_temperature,
    }
    return chunked_divergence(**(arguments | changes))


def gradients(loss: Tensor, case: Case) -> list[Tensor]:
    inputs = [t for t in (case.hidden, case.weight, case.bias) if t is not None]
    return list(torch.autograd.grad(loss, inputs))


def check_against_oracle(case: Case, divergence: str, resolver: str, chunk_sizes: Sequence[int]) -> None:
    expected, stats = oracle(case, divergence, resolver)
    expected_gradients = gradients(expected, case)
    assert all(g.abs().max() > 1e-4 for g in expected_gradients)
    for chunk_size in chunk_sizes:
        output = run(case, DIVERGENCES[divergence], RESOLVERS[resolver], chunk_size)
        torch.testing.assert_close(output.loss, expected, rtol=1e-11, atol=1e-12)
        for name, values in stats.items():
            torch.testing.assert_close(output.stats[name], values, rtol=1e-10, atol=1e-12, msg=name)
            assert not output.stats[name].requires_grad
        for got, want in zip(gradients(output.loss, case), expected_gradients, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("n", [1, 2, 3, 5])
@pytest.mark.parametrize(("divergence", "resolver"), list(itertools.product(DIVERGENCES, RESOLVERS)))
def test_kernel_equals_autograd_in_float64(n: int, divergence: str, resolver: str):
    check_against_oracle(make_case(n, seed=n), divergence, resolver, (1, 3, 7, TOKENS) if n == 3 else (4, TOKENS))


@pytest.mark.parametrize(("divergence", "resolver"), list(itertools.product(DIVERGENCES, RESOLVERS)))
def test_kernel_equals_autograd_with_ragged_teachers_and_an_abstained_token(divergence: str, resolver: str):
    case = make_case(3, seed=7, ragged=True)
    assert len({tuple(row) for row in (case.weights > 0).tolist()}) > 3
    check_against_oracle(case, divergence, resolver, (1, 3, TOKENS))


@pytest.mark.parametrize("field", ["scale", "bias", "softcap", "student_temperature", "teacher_temperature"])
def test_kernel_equals_autograd_with_each_feature_of_the_head_alone(field: str):
    case, fancy = make_case(2, fancy=False), make_case(2, fancy=True)
    case = replace(case, **{field: getattr(fancy, field)})
    check_against_oracle(case, "reverse_kl", "linear", (3,))


@pytest.mark.parametrize("resolver", ["linear", "geometric"])
def test_order_of_teachers_does_not_change_loss_or_gradient(resolver: str):
    case = make_case(5, seed=3, ragged=True)
    base = run(case, ReverseKL(), RESOLVERS[resolver], 4)
    order = [3, 0, 4, 2, 1]
    shuffled = replace(case, teachers=[case.teachers[k] for k in order], weights=case.weights[:, order])
    other = run(shuffled, ReverseKL(), RESOLVERS[resolver], 4)
    torch.testing.assert_close(other.loss, base.loss, rtol=1e-12, atol=0)
    for a, b in zip(gradients(other.loss, case), gradients(base.loss, case), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("resolver", [Linear(), Geometric()], ids=lambda r: r.name)
def test_one_hot_weights_equal_select_bitwise(resolver, dtype: torch.dtype):
    case = make_case(3, dtype=dtype)
    case.weights = torch.eye(3, dtype=dtype)[torch.arange(TOKENS) % 3]
    pooled, selected = run(case, ReverseKL(), resolver, 4), run(case, ReverseKL(), Select(), 4)
    assert torch.equal(pooled.loss, selected.loss)
    assert torch.equal(pooled.stats["divergence"], selected.stats["divergence"])
    for a, b in zip(gradients(pooled.loss, case), gradients(selected.loss, case), strict=True):
        assert torch.equal(a, b)


def test_one_teacher_through_any_pool_is_that_teacher():
    case = make_case(1)
    losses = [run(case, ForwardKL(), resolver, 5).loss for resolver in RESOLVERS.values()]
    assert torch.equal(losses[0], losses[1])
    assert torch.equal(losses[0], losses[2])


def test_a_student_equal_to_its_teacher_has_neither_loss_nor_gradient():
    case = make_case(1)
    evidence = replace(case.teachers[0], hidden=case.hidden.detach(), head=case.head)
    output = run(case, ReverseKL(), Linear(), 3, teachers=[evidence], teacher_temperature=case.student_temperature)
    assert output.loss.abs() < 1e-13
    assert all(g.abs().max() < 1e-13 for g in gradients(output.loss, case))


def test_abstained_tokens_have_no_loss_and_no_gradient_and_are_counted():
    case = make_case(2)
    case.weights[[1, 8]] = 0.0
    output = run(case, ReverseKL(), Geometric(), 3)
    (grad_hidden,) = torch.autograd.grad(output.loss, case.hidden)
    assert output.num_abstained == 2
    assert output.stats["abstained"].nonzero().flatten().tolist() == [1, 8]
    assert (grad_hidden[[1, 8]] == 0).all()
    assert (output.stats["divergence"][[1, 8]] == 0).all()
    assert (grad_hidden[[0, 2, 3]].abs().sum(-1) > 0).all()


def test_all_abstained_is_a_zero_loss_that_can_be_differentiated():
    case = make_case(2)
    case.weights.zero_()
    output = run(case, ReverseKL(), Linear(), 3)
    assert output.loss.item() == 0.0
    assert output.num_abstained == TOKENS
    assert all((g == 0).all() for g in gradients(output.loss, case))


def test_a_batch_without_tokens_is_a_zero_loss():
    case = make_case(1)
    empty = [replace(case.teachers[0], tokens=torch.empty(0, dtype=torch.long), hidden=torch.empty(0, 4).double())]
    output = run(
        case, ReverseKL(), Linear(), 3, student_hidden=case.hidden[:0], teachers=empty,
        weights=case.weights[:0], token_weights=case.token_weights[:0],
    )  # fmt: skip
    assert output.loss.item() == 0.0


def test_token_weights_scale_each_token_and_zero_switches_it_off():
    case = make_case(2)
    case.token_weights[3] = 0.0
    output = run(case, JSD(beta=0.4), Linear(), 4)
    torch.testing.assert_close(output.loss, (case.token_weights * output.stats["divergence"]).sum())
    (grad_hidden,) = torch.autograd.grad(output.loss, case.hidden)
    assert (grad_hidden[3] == 0).all()
    assert output.stats["divergence"][3] > 0


def test_an_excluded_token_makes_reverse_kl_infinite_and_a_zero_token_weight_switches_it_off():
    case = make_case(1, fancy=False)
    bias = torch.zeros(VOCAB, dtype=torch.float64)
    bias[5] = -math.inf
    teacher = replace(case.teachers[0], head=Head(weight=case.teachers[0].head.weight, bias=bias))
    output = run(case, ReverseKL(), Linear(), 4, teachers=[teacher])
    assert output.loss.item() == math.inf
    assert all(torch.isfinite(g).all() for g in gradients(output.loss, case))
    silent = run(case, ReverseKL(), Linear(), 4, teachers=[teacher], token_weights=torch.zeros_like(case.token_weights))
    assert silent.loss.item() == 0.0
    forward = run(case, ForwardKL(), Linear(), 4, teachers=[teacher])
    assert math.isfinite(forward.loss.item())


def test_backward_scales_with_the_incoming_gradient_and_can_be_repeated():
    case = make_case(2)
    output = run(case, ReverseKL(), Linear(), 4)
    (once,) = torch.autograd.grad(output.loss, case.weight, retain_graph=True)
    (tripled,) = torch.autograd.grad(3.0 * output.loss, case.weight, retain_graph=True)
    (again,) = torch.autograd.grad(output.loss, case.weight)
    torch.testing.assert_close(tripled, 3.0 * once)
    assert torch.equal(once, again)


def test_only_what_requires_a_gradient_gets_one():
    case = make_case(1)
    frozen = Head(weight=case.weight.detach(), bias=None)
    output = run(case, ReverseKL(), Linear(), 4, student_head=frozen)
    (grad_hidden,) = torch.autograd.grad(output.loss, case.hidden)
    assert grad_hidden.abs().max() > 0
    with torch.no_grad():
        assert not run(case, ReverseKL(), Linear(), 4).loss.requires_grad
    assert not run(
        case, ReverseKL(), Linear(), 4, student_head=frozen, student_hidden=case.hidden.detach()
    ).loss.requires_grad


def test_heads_are_projected_only_for_tokens_that_give_the_teacher_weight(monkeypatch: pytest.MonkeyPatch):
    import moteach.divergences.chunked as chunked

    seen: dict[int, int] = {}

    def counting(hidden: Tensor, head: Head) -> Tensor:
        seen[id(head)] = seen.get(id(head), 0) + len(hidden)
        return project(hidden, head)

    monkeypatch.setattr(chunked, "project", counting)
    case = make_case(3)
    case.weights = torch.zeros(TOKENS, 3, dtype=torch.float64)
    case.weights[:7, 0] = 1.0
    case.weights[7:, 1] = 1.0
    run(case, ReverseKL(), Linear(), 2)
    assert [seen.get(id(e.head), 0) for e in case.teachers] == [7, 4, 0]


def test_float32_is_close_to_the_float64_oracle():
    exact = make_case(3, seed=2)
    single = make_case(3, seed=2, dtype=torch.float32)
    expected, _ = oracle(exact, "reverse_kl", "geometric")
    output = run(single, ReverseKL(), Geometric(), 4)
    assert output.loss.dtype == torch.float32
    torch.testing.assert_close(output.loss.double(), expected, rtol=1e-5, atol=1e-6)
    for got, want in zip(gradients(output.loss, single), gradients(expected, exact), strict=True):
        torch.testing.assert_close(got.double(), want, rtol=1e-3, atol=1e-4)


def test_bfloat16_inputs_give_float32_loss_and_gradients_in_their_own_dtype():
    case = make_case(2, dtype=torch.bfloat16)
    output = run(case, ReverseKL(), Linear(), 2)
    assert output.loss.dtype == torch.float32
    grads = gradients(output.loss, case)
    assert {g.dtype for g in grads} == {torch.bfloat16}
    single = replace(
        case, **{n: getattr(case, n).detach().float().requires_grad_() for n in ("hidden", "weight", "bias")}
    )
    for got, want in zip(grads, gradients(run(single, ReverseKL(), Linear(), TOKENS).loss, single), strict=True):
        assert torch.nn.functional.cosine_similarity(got.float().flatten(), want.flatten(), dim=0) > 0.99


def test_weight_gradients_of_many_bfloat16_chunks_do_not_stall():
    """1 + 64 * 2**-9 is 1 when it is summed in bfloat16, term by term, and 1.125 in float32."""
    tokens = 65
    token_weights = torch.full((tokens,), 2.0**-9)
    token_weights[0] = 1.0
    hidden = torch.ones(tokens, 2, dtype=torch.bfloat16)
    weight = torch.zeros(4, 2, dtype=torch.bfloat16, requires_grad=True)
    teacher_head = Head(weight=torch.tensor([[1.0, 0], [0, 0], [0, 0], [0, 0]], dtype=torch.bfloat16))
    teacher = TeacherEvidence(
        teacher_id="t", support="full", tokens=torch.arange(tokens), hidden=hidden.clone(), head=teacher_head
    )
    grads = []
    for chunk_size in (1, tokens):
        output = chunked_divergence(
            student_hidden=hidden, student_head=Head(weight=weight), teachers=[teacher], weights=torch.ones(tokens, 1),
            token_weights=token_weights, divergence=ForwardKL(), resolver=Linear(), chunk_size=chunk_size,
        )  # fmt: skip
        grads.append(torch.autograd.grad(output.loss, weight)[0].float())
    torch.testing.assert_close(grads[0], grads[1], rtol=0.01, atol=0)


def test_a_teacher_that_did_not_score_its_tokens_is_named_with_the_count():
    case = make_case(2)
    case.teachers[1] = replace(case.teachers[1], tokens=torch.arange(8), hidden=case.teachers[1].hidden[:8])
    with pytest.raises(RoutingError, match=r"teacher 't1' .*got 3 token\(s\) that it did not score"):
        run(case, ReverseKL(), Linear(), 4)


def test_weights_that_are_not_a_distribution_are_refused():
    case = make_case(2)
    case.weights[2] *= 0.5
    with pytest.raises(RoutingError, match=r"got 1 token\(s\) that are neither"):
        run(case, ReverseKL(), Linear(), 4)
    case.weights[2] = torch.tensor([1.5, -0.5])
    with pytest.raises(RoutingError, match="sum to one at each token"):
        run(case, ReverseKL(), Linear(), 4)
    case.weights[2] = math.nan
    with pytest.raises(RoutingError, match="sum to one at each token"):
        run(case, ReverseKL(), Linear(), 4)


def test_evidence_of_another_support_or_vocabulary_is_refused_by_name():
    case = make_case(2)
    sampled = TeacherEvidence(teacher_id="remote", support="sampled", tokens=torch.arange(TOKENS))
    with pytest.raises(UnsupportedCombinationError, match=r"teacher 'remote', got support=sampled"):
        run(case, ReverseKL(), Linear(), 4, teachers=[case.teachers[0], sampled])
    other = replace(case.teachers[1], head=Head(weight=torch.zeros(VOCAB + 1, 5, dtype=torch.float64)))
    with pytest.raises(
        IncompatibleTeacherError, match=f"vocabulary of {VOCAB} tokens from teacher 't1', got a head of 14"
    ):
        run(case, ReverseKL(), Linear(), 4, teachers=[case.teachers[0], other])


@pytest.mark.parametrize(
    ("key", "value"), [("chunk_size", 0), ("student_temperature", 0.0), ("teacher_temperature", -1.0)]
)
def test_meaningless_settings_are_refused(key: str, value: float):
    case = make_case(1)
    with pytest.raises(ConfigError, match=f"expected {key}"):
        run(case, ReverseKL(), Linear(), 4, **{key: value})


def test_a_pool_that_needs_what_the_kernel_lacks_is_refused():
    class Needy(Linear):
        needs = frozenset({"moon_phase"})

    with pytest.raises(UnsupportedCombinationError, match="moon_phase"):
        run(make_case(1), ReverseKL(), Needy(), 4)


def test_a_pool_may_read_the_student_and_weight_tokens():
    """The seam for pools to come: `needs` student logprobs, returns `token_weight`."""
    seen = []

    class Halving(Linear):
        needs = frozenset({"student_logprobs"})

        def accumulator(self, *, student_logprobs: Tensor):
            seen.append(student_logprobs)
            inner = Linear().accumulator()

            class Accumulator:
                add = staticmethod(inner.add)

                @staticmethod
                def finish():
                    target = inner.finish()
                    return replace(target, token_weight=torch.full_like(target.neg_log_z, 0.5))

            return Accumulator()

    case = make_case(2)
    half, whole = run(case, ReverseKL(), Halving(), TOKENS), run(case, ReverseKL(), Linear(), TOKENS)
    torch.testing.assert_close(half.loss, whole.loss / 2)
    torch.testing.assert_close(gradients(half.loss, case)[0], gradients(whole.loss, case)[0] / 2)
    torch.testing.assert_close(seen[0].exp().sum(-1), torch.ones(TOKENS, dtype=torch.float64))
    assert not seen[0].requires_grad


def test_a_divergence_without_a_closed_form_gives_the_same_gradient():
    class Plain:
        name = "plain"
        supports = frozenset({"full"})

        def __call__(self, student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
            p, q = student_logits.log_softmax(-1), teacher_logits.log_softmax(-1)
            return (p.exp() * (p - q)).sum(-1)

    case = make_case(2)
    plain, closed = run(case, Plain(), Linear(), 4), run(case, ReverseKL(), Linear(), 4)
    torch.testing.assert_close(plain.loss, closed.loss)
    for a, b in zip(gradients(plain.loss, case), gradients(closed.loss, case), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def oracle_jsd(p: Tensor, q: Tensor) -> Tensor:
    middle = ((p.exp() + q.exp()) / 2).log()
    return (p.exp() * (p - middle) + q.exp() * (q - middle)).sum() / 2


@pytest.mark.parametrize("chunk_size", [1, 4, TOKENS])
def test_measure_says_what_the_loss_pass_says_and_adds_overlap_and_spread(chunk_size: int):
    case = make_case(3, seed=5, ragged=True)
    targets = (torch.arange(TOKENS) * 5) % VOCAB
    output = run(case, ReverseKL(), Geometric(), 3, targets=targets)
    assert {"student_logprobs", "target_logprobs", "log_ratio"} <= set(output.stats)
    stats = measure(
        student_hidden=case.hidden, student_head=case.head, teachers=case.teachers, weights=case.weights,
        divergence=ReverseKL(), resolver=Geometric(), chunk_size=chunk_size, student_temperature=case.student_temperature,
        teacher_temperature=case.teacher_temperature, k=4, targets=targets,
    )  # fmt: skip
    for name, values in output.stats.items():
        torch.testing.assert_close(stats[name], values, rtol=1e-11, atol=1e-13)
    student = (oracle_logits(case.hidden, case.head) / case.student_temperature).log_softmax(-1).detach()
    for t in range(TOKENS):
        logprobs, weights = [], []
        for k, evidence in enumerate(case.teachers):
            if case.weights[t, k] > 0:
                row = int((evidence.tokens == t).nonzero())
                logprobs.append(
                    (oracle_logits(evidence.hidden[row], evidence.head) / case.teacher_temperature).log_softmax(-1)
                )
                weights.append(float(case.weights[t, k]))
        if not weights:
            assert stats["topk_overlap"][t] == stats["spread"][t] == stats["teacher_jsd"][t] == 0.0
            continue
        pairs = list(itertools.combinations(logprobs, 2))
        apart = [float(oracle_jsd(*pair)) for pair in pairs] or [0.0]
        assert float(stats["teacher_jsd"][t]) == pytest.approx(sum(apart) / len(apart), abs=1e-12)
        differ = [float(a.argmax() != b.argmax()) for a, b in pairs] or [0.0]
        assert float(stats["argmax_disagreement"][t]) == pytest.approx(sum(differ) / len(differ), abs=1e-12)
        target, _ = oracle_target("geometric", logprobs, weights)
        mine, theirs = set(student[t].topk(4).indices.tolist()), set(target.topk(4).indices.tolist())
        assert float(stats["topk_overlap"][t]) == pytest.approx(len(mine & theirs) / 4)
        said = [float(q[student[t].argmax()]) for q in logprobs]
        assert float(stats["spread"][t]) == pytest.approx(max(said) - min(said), abs=1e-12)
        mass = sum(float(target[v].exp()) for v in mine)
        assert float(stats["target_mass_on_student_topk"][t]) == pytest.approx(mass, abs=1e-12)
        given = sum(float(student[t, v].exp()) for v in theirs)
        assert float(stats["student_mass_on_target_topk"][t]) == pytest.approx(given, abs=1e-12)
        both = sorted(mine & theirs)
        p, q = student[t, both].exp(), target[both].exp()
        p, q = p / p.sum(), q / q.sum()
        advantage = sum(float(a * (b / a).log()) for a, b in zip(p, q, strict=True)) / max(len(both), 1)
        assert float(stats["overlap_token_advantage"][t]) == pytest.approx(advantage, abs=1e-12)
        likeliest = target[student[t].argmax()]
        assert int(stats["student_top1_rank"][t]) == sum(bool(value > likeliest) for value in target)
        written = int(targets[t])
        assert float(stats["student_logprobs"][t]) == pytest.approx(float(student[t, written]), abs=1e-12)
        assert float(stats["log_ratio"][t]) == pytest.approx(float(target[written] - student[t, written]), abs=1e-12)
    assert stats["spread"].max() > 0
    assert stats["student_top1_rank"].max() > 0
    assert stats["teacher_jsd"].max() > 0.01
    assert 0 < float(stats["argmax_disagreement"].mean()) < 1


def test_measure_refuses_an_empty_top_k():
    case = make_case(1)
    with pytest.raises(ConfigError, match="k >= 1"):
        measure(
            student_hidden=case.hidden, student_head=case.head, teachers=case.teachers, weights=case.weights,
            divergence=ReverseKL(), resolver=Linear(), chunk_size=4, k=0,
        )  # fmt: skip


@pytest.mark.parametrize("chunk_size", [1, 4, TOKENS])
@pytest.mark.parametrize("fancy", [False, True])
def test_token_logprobs_equal_autograd(chunk_size: int, fancy: bool):
    case = make_case(1, fancy=fancy)
    targets = torch.arange(TOKENS) % VOCAB
    advantages = torch.linspace(-1, 1, TOKENS, dtype=torch.float64)
    full = (oracle_logits(case.hidden, case.head) / case.student_temperature).log_softmax(-1)
    expected = full[torch.arange(TOKENS), targets]
    got = chunked_token_logprobs(
        case.hidden, case.head, targets, chunk_size=chunk_size, temperature=case.student_temperature
    )
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-13)
    for a, b in zip(
        gradients((got * advantages).sum(), case), gradients((expected * advantages).sum(), case), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-13)
    both = chunked_token_stats(
        case.hidden, case.head, targets, chunk_size=chunk_size, temperature=case.student_temperature
    )
    torch.testing.assert_close(both.logprobs, expected)
    torch.testing.assert_close(both.entropy, -(full.exp() * full).sum(-1).detach(), rtol=1e-12, atol=1e-13)
    assert not both.entropy.requires_grad
    with torch.no_grad():
        assert not chunked_token_logprobs(case.hidden, case.head, targets, chunk_size=chunk_size).requires_grad


def test_token_entropy_reads_an_excluded_token_as_zero():
    bias = torch.tensor([0.0, 0.0, -math.inf])
    head = Head(weight=torch.zeros(3, 2), bias=bias)
    both = chunked_token_stats(torch.zeros(1, 2), head, torch.tensor([0]), chunk_size=1)
    assert float(both.entropy) == pytest.approx(math.log(2))


@pytest.mark.parametrize(("chunk_size", "temperature", "word"), [(0, 1.0, "chunk_size"), (1, 0.0, "temperature")])
def test_token_logprobs_refuse_meaningless_settings(chunk_size: int, temperature: float, word: str):
    case = make_case(1)
    with pytest.raises(MoteachError, match=f"expected {word}"):
        chunked_token_logprobs(
            case.hidden,
            case.head,
            torch.zeros(TOKENS, dtype=torch.long),
            chunk_size=chunk_size,
            temperature=temperature,
        )


def test_autocast_does_not_lower_the_precision_of_the_kernel():
    case = make_case(2, dtype=torch.float32)
    plain = run(case, ReverseKL(), Linear(), 4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        under = run(case, ReverseKL(), Linear(), 4)
    assert torch.equal(plain.loss, under.loss)
    for a, b in zip(gradients(plain.loss, case), gradients(under.loss, case), strict=True):
        assert torch.equal(a, b)
