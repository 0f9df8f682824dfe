"""Every YAML in conf/conflict is a resolver: a new option is tested by being there."""

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

from moteach.conflict.base import Accumulator, Resolver, Target, resolve
from moteach.conflict.losses import sum_of_divergences
from moteach.conflict.select import Select
from moteach.divergences.chunked import chunked_divergence
from moteach.divergences.full import ReverseKL, reverse_kl
from moteach.errors import UnsupportedCombinationError
from moteach.types import Head, TeacherEvidence

FOLDER = Path(__file__).parents[2] / "conf" / "conflict"
FILES = sorted(FOLDER.glob("*.yaml"))
TOKENS, VOCAB = 30, 8


def build(path: Path) -> Any:
    """Makes the object a YAML describes, from its own words."""
    content = yaml.safe_load(path.read_text())
    module, _, name = content.pop("_target_").rpartition(".")
    return getattr(importlib.import_module(module), name)(**content)


POOLS = [path for path in FILES if "anchor_logprobs" not in build(path).needs]
"""Without the shifts, which two teachers of one opinion move twice as far; `tests/numerics/test_shift_runs.py` has those."""


@pytest.fixture(params=POOLS, ids=lambda path: path.stem)
def path(request: pytest.FixtureRequest) -> Path:
    return request.param


def teachers(n: int) -> Tensor:
    generator = torch.Generator().manual_seed(n)
    return torch.randn(n, TOKENS, VOCAB, generator=generator, dtype=torch.float64).mul(2).log_softmax(-1)


def weights(n: int) -> Tensor:
    generator = torch.Generator().manual_seed(100 + n)
    return torch.randn(TOKENS, n, generator=generator, dtype=torch.float64).softmax(-1)


def pool(resolver: Resolver, logprobs: Tensor, weight: Tensor) -> Target:
    """Resolves, giving the pool a student when it asks for one."""
    student = torch.linspace(-1, 1, logprobs.shape[-1], dtype=logprobs.dtype).log_softmax(-1).expand(logprobs.shape[1:])
    return resolve(resolver, logprobs, weight, **dict.fromkeys(resolver.needs, student))


def test_there_are_options():
    assert {path.stem for path in FILES} >= {
        "select", "linear", "geometric", "power", "max_peak", "entropy_weighted", "confidence_weighted", "trimmed",
        "agreement", "anchored", "mask", "consensus",
    }  # fmt: skip


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_it_is_a_resolver_named_after_its_file(path: Path):
    resolver = build(path)
    assert isinstance(resolver, Resolver)
    assert resolver.name == path.stem
    assert resolver.supports
    if not resolver.needs:
        assert isinstance(resolver.accumulator(), Accumulator)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_its_yaml_lists_every_parameter(path: Path):
    parameters = set(inspect.signature(type(build(path))).parameters)
    assert set(yaml.safe_load(path.read_text())) - {"_target_"} == parameters


@pytest.mark.parametrize("n", [1, 2, 5])
def test_its_target_is_a_distribution(path: Path, n: int):
    target = pool(build(path), teachers(n), weights(n))
    torch.testing.assert_close(
        target.logprobs.exp().sum(-1), torch.ones(TOKENS, dtype=torch.float64), rtol=0, atol=1e-12
    )
    assert (target.neg_log_z >= 0).all()
    if target.token_weight is not None:
        assert ((target.token_weight >= 0) & target.token_weight.isfinite()).all()


def test_one_teacher_alone_is_the_target(path: Path):
    target = pool(build(path), teachers(1), weights(1))
    torch.testing.assert_close(target.logprobs, teachers(1)[0], rtol=0, atol=1e-12)
    assert target.neg_log_z.abs().max() < 1e-12


def test_the_order_of_teachers_does_not_matter(path: Path):
    order = [3, 1, 4, 0, 2]
    base = pool(build(path), teachers(5), weights(5))
    shuffled = pool(build(path), teachers(5)[order], weights(5)[:, order])
    torch.testing.assert_close(shuffled.logprobs, base.logprobs, rtol=0, atol=1e-12)
    torch.testing.assert_close(shuffled.neg_log_z, base.neg_log_z, rtol=0, atol=1e-12)


def test_weights_matter(path: Path):
    one, other = weights(5), weights(5).flip(-1)
    assert not torch.allclose(
        pool(build(path), teachers(5), one).logprobs, pool(build(path), teachers(5), other).logprobs, atol=1e-2
    )


def test_sampled_logprobs_of_one_teacher_are_returned(path: Path):
    resolver = build(path)
    sampled = torch.linspace(-3, -0.1, TOKENS, dtype=torch.float64).unsqueeze(-1)
    if "sampled" in resolver.supports:
        torch.testing.assert_close(resolver.resolve_sampled(sampled, torch.ones_like(sampled)), sampled[:, 0])
    else:
        with pytest.raises(UnsupportedCombinationError, match=rf"conflict={path.stem} reads .*support=full"):
            resolver.resolve_sampled(sampled, torch.ones_like(sampled))


def test_identical_teachers_return_that_teacher(path: Path):
    target = pool(build(path), teachers(1).expand(4, -1, -1), weights(4))
    torch.testing.assert_close(target.logprobs, teachers(1)[0], rtol=0, atol=1e-12)
    assert target.neg_log_z.abs().max() < 1e-12
    if target.token_weight is not None:
        torch.testing.assert_close(target.token_weight, torch.ones_like(target.token_weight), rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_one_hot_weights_select_bitwise_beside_mixed_ones(path: Path, dtype: torch.dtype):
    q, w = teachers(3).to(dtype), weights(3).to(dtype)
    hot = torch.arange(TOKENS) % 4
    w[hot < 3] = torch.eye(3, dtype=dtype)[hot[hot < 3]]
    target, chosen = pool(build(path), q, w), pool(Select(), q, w)
    assert torch.equal(target.logprobs[hot < 3], chosen.logprobs[hot < 3])
    assert (target.neg_log_z[hot < 3] == 0).all()


def test_float32_stays_near_float64_for_sharp_teachers(path: Path):
    generator = torch.Generator().manual_seed(11)
    q = torch.randn(3, 20, 500, generator=generator, dtype=torch.float64).mul(6).log_softmax(-1)
    w = torch.rand(20, 3, generator=generator, dtype=torch.float64).softmax(-1)
    exact, rounded = pool(build(path), q, w), pool(build(path), q.float(), w.float())
    assert rounded.logprobs.dtype == torch.float32
    torch.testing.assert_close(rounded.logprobs.double(), exact.logprobs, rtol=1e-5, atol=2e-5)
    torch.testing.assert_close(rounded.neg_log_z.double(), exact.neg_log_z, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("said", [-math.inf, math.nan])
def test_a_zero_weight_silences_whatever_a_teacher_says(path: Path, said: float):
    q, w = teachers(4), weights(4)
    q[0, ::2], q[2] = said, said
    w[::2, 0], w[:, 2] = 0.0, 0.0
    w = w / w.sum(-1, keepdim=True)
    target = pool(build(path), q, w)
    for rows, heard in ((slice(0, None, 2), [1, 3]), (slice(1, None, 2), [0, 1, 3])):
        expected = pool(build(path), q[heard, rows], w[rows][:, heard])
        assert not expected.logprobs.isnan().any()
        torch.testing.assert_close(target.logprobs[rows], expected.logprobs, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(target.neg_log_z[rows], expected.neg_log_z, rtol=1e-12, atol=1e-12)
        if target.token_weight is not None:
            assert expected.token_weight is not None
            torch.testing.assert_close(target.token_weight[rows], expected.token_weight, rtol=1e-12, atol=1e-12)


def test_its_inputs_are_left_alone(path: Path):
    q, w = teachers(3).requires_grad_(), weights(3)
    before = q.detach().clone(), w.clone()
    target = pool(build(path), q, w)
    assert not target.logprobs.requires_grad
    assert torch.equal(q, before[0])
    assert torch.equal(w, before[1])


@given(data=st.data())
@settings(max_examples=25, deadline=None)
def test_any_teachers_that_share_a_token_have_a_target_that_sums_to_one(data: st.DataObject):
    path = data.draw(st.sampled_from(POOLS))
    n, vocab = data.draw(st.integers(1, 4)), data.draw(st.integers(2, 6))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 10**6)))
    z = torch.randn(n, 3, vocab, generator=generator, dtype=torch.float64) * data.draw(st.floats(0.01, 40.0))
    excluded = torch.rand(n, 3, vocab, generator=generator) < data.draw(st.floats(0.0, 0.6))
    excluded[..., 0] = False
    w = torch.rand(3, n, generator=generator, dtype=torch.float64) * (torch.rand(3, n, generator=generator) < 0.7)
    w[:, 0] += 1e-9
    target = pool(build(path), z.masked_fill(excluded, -math.inf).log_softmax(-1), w / w.sum(-1, keepdim=True))
    assert not target.logprobs.isnan().any()
    assert (target.logprobs.exp().sum(-1) - 1).abs().max() < 1e-9


@pytest.mark.parametrize("size", [1, 4, 64])
def test_the_kernel_gives_what_the_plain_pool_gives(path: Path, size: int):
    """Chunks, teachers that scored different tokens, and tokens of different sets of teachers change nothing."""
    resolver, generator = build(path), torch.Generator().manual_seed(3)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    hidden, head = draw(TOKENS, 4).requires_grad_(), Head(weight=draw(VOCAB, 4).requires_grad_())
    w = weights(4) * (torch.rand(TOKENS, 4, generator=generator) < 0.7)
    w[5] = 0.0
    w = w / w.sum(-1, keepdim=True).clamp(min=1e-30)
    evidence, said = [], torch.full((4, TOKENS, VOCAB), math.nan, dtype=torch.float64)
    for index in range(4):
        tokens = w[:, index].nonzero().flatten()
        states, own = draw(len(tokens), 3), Head(weight=2 * draw(VOCAB, 3))
        said[index, tokens] = (states @ own.weight.T).log_softmax(-1)
        evidence.append(TeacherEvidence(teacher_id=f"t{index}", support="full", tokens=tokens, hidden=states, head=own))
    token_weights = torch.rand(TOKENS, generator=generator, dtype=torch.float64)
    output = chunked_divergence(
        student_hidden=hidden, student_head=head, teachers=evidence, weights=w, token_weights=token_weights,
        divergence=ReverseKL(), resolver=resolver, chunk_size=size,
    )  # fmt: skip
    kept = w.sum(-1) > 0
    student = (hidden @ head.weight.T)[kept]
    target = resolve(
        resolver, said[:, kept], w[kept], **dict.fromkeys(resolver.needs, student.detach().log_softmax(-1))
    )
    factor = token_weights[kept] if target.token_weight is None else token_weights[kept] * target.token_weight
    values = reverse_kl(student, target.logprobs)
    if getattr(resolver, "aggregates", False):
        values = sum_of_divergences(reverse_kl, student, said[:, kept], w[kept])
    loss = (values * factor).sum()
    torch.testing.assert_close(output.loss, loss, rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(output.stats["neg_log_z"][kept], target.neg_log_z, rtol=1e-11, atol=1e-12)
    inputs = (hidden, head.weight)
    for got, want in zip(torch.autograd.grad(output.loss, inputs), torch.autograd.grad(loss, inputs), strict=True):
        assert want.abs().max() > 1e-3
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-11)
