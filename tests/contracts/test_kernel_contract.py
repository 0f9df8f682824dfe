"""Every divergence of the group, alone and truncated, through the chunked kernel: against autograd over whole tensors."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
import yaml
from torch import Tensor

from moteach.conflict.base import resolve
from moteach.conflict.losses import SumOfDivergences, sum_of_divergences
from moteach.conflict.pools import Geometric, Linear
from moteach.conflict.select import Select
from moteach.divergences.chunked import chunked_divergence
from moteach.divergences.chunked_topk import chunked_topk_divergence
from moteach.divergences.topk import TopK, Truncation
from moteach.errors import ConfigError, UnsupportedCombinationError
from moteach.types import Head, TeacherEvidence

FILES = sorted((Path(__file__).parents[2] / "conf" / "divergence").glob("*.yaml"))
VOCAB, HIDDEN, TOKENS = 11, 5, 9
STUDENT_TEMPERATURE, TEACHER_TEMPERATURE = 1.4, 0.7


def build(path: Path) -> Any:
    content = yaml.safe_load(path.read_text())
    module, _, name = content.pop("_target_").rpartition(".")
    return getattr(importlib.import_module(module), name)(**content)


def variants() -> list[Any]:
    """Each divergence, and each with every truncation that it is defined with."""
    found = []
    for path in FILES:
        found.append(pytest.param(build(path), id=path.stem))
        for truncation in get_args(Truncation):
            try:
                truncated = TopK(divergence=build(path), k=4, source="union", truncation=truncation)
            except UnsupportedCombinationError:
                continue
            found.append(pytest.param(truncated, id=f"{path.stem}-{truncation}"))
    return found


class Inputs:
    """Three teachers, an abstained token, a head with bias, scale and softcap; in float64."""

    def __init__(self, *, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)

        def draw(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        self.hidden = draw(TOKENS, HIDDEN).requires_grad_()
        self.head = Head(weight=draw(VOCAB, HIDDEN).requires_grad_(), bias=draw(VOCAB), scale=0.8, softcap=6.0)
        self.teachers = [
            TeacherEvidence(
                teacher_id=f"t{index}",
                support="full",
                tokens=torch.arange(TOKENS),
                hidden=draw(TOKENS, 3 + index),
                head=Head(weight=draw(VOCAB, 3 + index)),
            )
            for index in range(3)
        ]
        weights = torch.rand(TOKENS, 3, generator=generator, dtype=torch.float64) + 0.1
        self.weights = weights / weights.sum(-1, keepdim=True)
        self.weights[3] = 0.0
        self.token_weights = torch.rand(TOKENS, generator=generator, dtype=torch.float64)

    def chunked(self, divergence: Any, pool: Any, size: int) -> Any:
        return chunked_divergence(
            student_hidden=self.hidden,
            student_head=self.head,
            teachers=self.teachers,
            weights=self.weights,
            token_weights=self.token_weights,
            divergence=divergence,
            resolver=pool,
            chunk_size=size,
            student_temperature=STUDENT_TEMPERATURE,
            teacher_temperature=TEACHER_TEMPERATURE,
        )

    def whole(self, divergence: Any, pool: Any) -> tuple[Tensor, Tensor]:
        """The loss and the values, from logits of all tokens at once and autograd through everything."""
        kept = self.weights.sum(-1) > 0
        z = (self.hidden @ self.head.weight.T + self.head.bias) * self.head.scale
        student = self.head.softcap * torch.tanh(z / self.head.softcap) / STUDENT_TEMPERATURE
        said = torch.stack([(t.hidden @ t.head.weight.T / TEACHER_TEMPERATURE).log_softmax(-1) for t in self.teachers])
        values = torch.zeros(TOKENS, dtype=torch.float64)
        if getattr(pool, "aggregates", False):
            values[kept] = sum_of_divergences(divergence, student[kept], said[:, kept], self.weights[kept])
        else:
            values[kept] = divergence(student[kept], resolve(pool, said[:, kept], self.weights[kept]).logprobs)
        return (values * self.token_weights).sum(), values.detach()

    def gradients(self, loss: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(loss, (self.hidden, self.head.weight))


@pytest.fixture(
    params=[Linear(), Geometric(), Select(), SumOfDivergences()], ids=["linear", "geometric", "select", "sum"]
)
def pool(request: pytest.FixtureRequest) -> Any:
    return request.param


@pytest.mark.parametrize("divergence", variants())
def test_chunked_equals_whole_in_value_and_gradient(divergence: Any, pool: Any) -> None:
    inputs = Inputs()
    loss, values = inputs.whole(divergence, pool)
    expected = inputs.gradients(loss)
    assert max(float(gradient.abs().max()) for gradient in expected) > 1e-4
    for size in (1, 4, TOKENS):
        output = inputs.chunked(divergence, pool, size)
        torch.testing.assert_close(output.loss, loss, rtol=1e-9, atol=1e-11)
        torch.testing.assert_close(output.stats["divergence"], values, rtol=1e-9, atol=1e-11)
        for got, want in zip(inputs.gradients(output.loss), expected, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-7, atol=1e-10)
        assert output.num_abstained == 1
        assert output.stats["abstained"].nonzero().flatten().tolist() == [3]


@pytest.mark.parametrize("divergence", variants())
def test_a_token_of_weight_zero_moves_nothing_and_changes_no_other(divergence: Any) -> None:
    inputs, other = Inputs(), Inputs()
    off = [0, 5]
    for each in (inputs, other):
        each.token_weights[off] = 0.0
    with torch.no_grad():
        other.hidden[off] = 7.0
    left, right = (each.chunked(divergence, Linear(), 4) for each in (inputs, other))
    torch.testing.assert_close(left.loss, right.loss, rtol=1e-12, atol=1e-13)
    hidden, weight = inputs.gradients(left.loss)
    assert float(hidden[off].abs().max()) == 0.0
    torch.testing.assert_close(weight, other.gradients(right.loss)[1], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("divergence", variants())
def test_the_order_of_tokens_and_of_teachers_changes_nothing(divergence: Any) -> None:
    inputs = Inputs()
    straight = inputs.chunked(divergence, Geometric(), 4)
    hidden, weight = inputs.gradients(straight.loss)
    order = torch.randperm(TOKENS, generator=torch.Generator().manual_seed(5))
    shuffled = Inputs()
    shuffled.hidden = inputs.hidden.detach()[order].requires_grad_()
    shuffled.token_weights = inputs.token_weights[order]
    shuffled.weights = inputs.weights[order][:, [2, 0, 1]]
    shuffled.teachers = [
        TeacherEvidence(teacher_id=t.teacher_id, support="full", tokens=t.tokens, hidden=t.hidden[order], head=t.head)
        for t in (inputs.teachers[2], inputs.teachers[0], inputs.teachers[1])
    ]
    other = shuffled.chunked(divergence, Geometric(), 4)
    torch.testing.assert_close(other.loss, straight.loss, rtol=1e-10, atol=1e-12)
    got_hidden, got_weight = shuffled.gradients(other.loss)
    torch.testing.assert_close(got_hidden, hidden[order], rtol=1e-8, atol=1e-11)
    torch.testing.assert_close(got_weight, weight, rtol=1e-8, atol=1e-11)


@pytest.mark.parametrize("divergence", variants())
def test_a_head_and_states_in_bfloat16_stay_near_the_exact_loss(divergence: Any) -> None:
    inputs = Inputs()
    exact, _ = inputs.whole(divergence, Linear())
    hidden, head = inputs.hidden.detach().bfloat16(), inputs.head
    half = chunked_divergence(
        student_hidden=hidden,
        student_head=Head(
            weight=head.weight.detach().bfloat16(), bias=head.bias.bfloat16(), scale=head.scale, softcap=head.softcap
        ),
        teachers=inputs.teachers,
        weights=inputs.weights,
        token_weights=inputs.token_weights,
        divergence=divergence,
        resolver=Linear(),
        chunk_size=4,
        student_temperature=STUDENT_TEMPERATURE,
        teacher_temperature=TEACHER_TEMPERATURE,
    )
    assert float(half.loss) == pytest.approx(float(exact.detach()), rel=0.05, abs=0.02)


@pytest.mark.parametrize("truncation", get_args(Truncation))
@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_entries_that_were_sent_give_what_whole_distributions_give(path: Path, truncation: Any) -> None:
    try:
        divergence = TopK(divergence=build(path), k=4, source="teacher", truncation=truncation)
    except UnsupportedCombinationError:
        pytest.skip("not defined")
    inputs = Inputs()
    inputs.teachers, inputs.weights = inputs.teachers[:1], torch.ones(TOKENS, 1, dtype=torch.float64)
    inputs.weights[3] = 0.0
    expected = inputs.chunked(divergence, Select(), 4)
    teacher = inputs.teachers[0]
    logprobs = (teacher.hidden @ teacher.head.weight.T / TEACHER_TEMPERATURE).log_softmax(-1)
    values, ids = logprobs.topk(4, dim=-1)
    output = chunked_topk_divergence(
        student_hidden=inputs.hidden,
        student_head=inputs.head,
        ids=ids,
        teacher_logprobs=values,
        taught=inputs.weights[:, 0] > 0,
        token_weights=inputs.token_weights,
        divergence=divergence,
        chunk_size=4,
        student_temperature=STUDENT_TEMPERATURE,
        targets=ids[:, 1],
    )
    torch.testing.assert_close(output.loss, expected.loss, rtol=1e-9, atol=1e-11)
    for got, want in zip(inputs.gradients(output.loss), inputs.gradients(expected.loss), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-7, atol=1e-10)
    for name in ("student_mass", "teacher_mass", "student_entropy", "abstained"):
        torch.testing.assert_close(output.stats[name], expected.stats[name], rtol=1e-9, atol=1e-11)
    assert float(output.stats["student_logprobs"][0]) < 0


@pytest.mark.parametrize(("key", "value"), [("chunk_size", 0), ("student_temperature", 0.0)])
def test_meaningless_settings_of_the_top_k_kernel_are_refused(key: str, value: float) -> None:
    arguments: dict[str, Any] = {
        "student_hidden": torch.zeros(1, 2),
        "student_head": Head(weight=torch.zeros(3, 2)),
        "ids": torch.zeros(1, 1, dtype=torch.long),
        "teacher_logprobs": torch.zeros(1, 1),
        "taught": torch.ones(1, dtype=torch.bool),
        "token_weights": torch.ones(1),
        "divergence": TopK(divergence=build(FILES[0]), k=1),
        "chunk_size": 1,
    }
    with pytest.raises(ConfigError, match=f"expected {key}"):
        chunked_topk_divergence(**{**arguments, key: value})


def test_a_second_backward_without_a_kept_graph_is_an_error_and_with_one_gives_the_same() -> None:
    inputs = Inputs()
    divergence = build(next(path for path in FILES if path.stem == "reverse_kl"))
    kept = inputs.chunked(divergence, Linear(), 4).loss
    first = torch.autograd.grad(kept, (inputs.hidden, inputs.head.weight), retain_graph=True)
    second = torch.autograd.grad(2 * kept, (inputs.hidden, inputs.head.weight))
    for once, twice in zip(first, second, strict=True):
        torch.testing.assert_close(twice, 2 * once)
    with pytest.raises(ArithmeticError, match="retain_graph=True"):
        torch.autograd.grad(kept, (inputs.hidden,))
