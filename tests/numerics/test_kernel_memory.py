"""Peak memory of the kernel, from every allocation and release that torch's CPU allocator reports."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from moteach.bench.memory import peak_bytes as peak
from moteach.conflict.pools import Geometric, Linear
from moteach.conflict.power import Power
from moteach.conflict.select import Select
from moteach.conflict.trust import Trimmed
from moteach.divergences.chunked import chunked_divergence, chunked_token_logprobs
from moteach.divergences.full import JSD, ForwardKL, ReverseKL
from moteach.divergences.measure import measure
from moteach.types import Head, TeacherEvidence

VOCAB, HIDDEN, TOKENS, CHUNK = 4096, 8, 96, 16
SLAB = CHUNK * VOCAB * 4
"""Bytes of one `[chunk vocab]` tensor."""
GRADIENTS = VOCAB * HIDDEN * 4 + TOKENS * HIDDEN * 4


def job(
    n: int, *, chunk_size: int = CHUNK, resolver=None, divergence=None, spread: bool = False
) -> Callable[[], object]:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(TOKENS, HIDDEN, generator=generator).requires_grad_()
    weight = torch.randn(VOCAB, HIDDEN, generator=generator).requires_grad_()
    teachers = [
        TeacherEvidence(
            teacher_id=f"t{k}",
            support="full",
            tokens=torch.arange(TOKENS),
            hidden=torch.randn(TOKENS, HIDDEN, generator=generator),
            head=Head(weight=torch.randn(VOCAB, HIDDEN, generator=generator)),
        )
        for k in range(n)
    ]
    common = {
        "student_hidden": hidden,
        "student_head": Head(weight=weight),
        "teachers": teachers,
        "weights": torch.rand(TOKENS, n, generator=generator).softmax(-1),
        "divergence": divergence or ReverseKL(),
        "resolver": resolver or Linear(),
        "chunk_size": chunk_size,
    }
    if spread:
        return lambda: measure(**common)
    return lambda: chunked_divergence(**common, token_weights=torch.full((TOKENS,), 1 / TOKENS))


@pytest.mark.parametrize(
    ("resolver", "divergence"),
    [(Linear(), ReverseKL()), (Geometric(), ForwardKL()), (Select(), ReverseKL()), (Linear(), JSD())],
    ids=lambda member: member.name,
)
def test_memory_does_not_grow_with_the_number_of_teachers(resolver, divergence):
    one, five = (peak(job(n, resolver=resolver, divergence=divergence)) for n in (1, 5))
    assert five < 1.2 * one


def test_pools_that_merge_or_compare_teachers_stay_within_a_few_chunks():
    """Holding all teachers takes smaller chunks, not more memory."""
    for pool in (Power(r=0.5), Trimmed()):
        small, large = (peak(job(n, resolver=pool)) - GRADIENTS for n in (2, 5))
        assert large < 1.2 * small
        assert large < 10 * SLAB


def test_memory_is_a_few_chunks_and_far_below_one_full_vocabulary_tensor():
    used = peak(job(5))
    assert SLAB < used - GRADIENTS < 6 * SLAB
    assert used < TOKENS * VOCAB * 4


def test_memory_grows_with_the_chunk():
    """The instrument can see a slab: a chunk four times as large needs about four times as much."""
    small, large = peak(job(2, chunk_size=CHUNK)), peak(job(2, chunk_size=4 * CHUNK))
    assert 3.0 < (large - GRADIENTS) / (small - GRADIENTS) < 5.0


def test_measuring_needs_no_gradient_buffers():
    assert peak(job(5, spread=True)) < peak(job(5))


def test_token_logprobs_never_hold_more_than_a_few_chunks_forward_and_backward():
    hidden = torch.randn(TOKENS, HIDDEN).requires_grad_()
    weight = torch.randn(VOCAB, HIDDEN).requires_grad_()
    targets = torch.zeros(TOKENS, dtype=torch.long)

    def work() -> None:
        chunked_token_logprobs(hidden, Head(weight=weight), targets, chunk_size=CHUNK).sum().backward()

    assert peak(work) - GRADIENTS < 4 * SLAB
