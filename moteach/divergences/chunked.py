"""The kernel: teachers' hidden states to a loss and its gradient, a chunk of tokens at a time.

For each chunk: student hidden -> logprobs; each teacher's hidden -> logprobs -> pool; divergence between the two; its
gradient, made in the *forward* pass and only scaled by `backward` (as Liger's fused linear losses do, arXiv
2410.10989). Nothing of the size `[teacher, packed, vocab]` or `[packed, vocab]` ever exists: memory above the inputs
and the gradients is O(chunk_size x vocab), whatever the number of teachers, for pools that stream. A teacher's head is
projected only for the tokens that give this teacher a positive weight, and tokens of the same teachers share chunks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from moteach.divergences.base import Divergence, Pool, PoolTarget, value_and_gradient
from moteach.divergences.full import entropy
from moteach.divergences.logprobs import TokenLogprobs, chunked_token_logprobs, chunked_token_stats
from moteach.divergences.plan import Group, Plan, full_evidence, make_plan
from moteach.divergences.projection import HeadGradient, project, through_softcap
from moteach.errors import ConfigError, UnsupportedCombinationError
from moteach.types import Head, TeacherEvidence

__all__ = [
    "ChunkedOutput",
    "TokenLogprobs",
    "chunked_divergence",
    "chunked_token_logprobs",
    "chunked_token_stats",
    "measure",
    "project",
]

_CONTEXT = frozenset({"student_logprobs"})
_STATS = ("divergence", "student_entropy", "target_entropy", "neg_log_z")


@dataclass(frozen=True, kw_only=True, slots=True)
class ChunkedOutput:
    """A loss and what was seen on the way."""

    loss: Float[Tensor, ""]
    """sum_t token_weights_t * D_t, with the pool's own token weight inside; not divided by anything."""
    stats: dict[str, Float[Tensor, " packed"]]
    """Detached, in nats: `divergence`, `student_entropy`, `target_entropy`, `neg_log_z`; and `abstained`, which is 1.0
    at tokens without a target, where the others are 0.0."""
    num_abstained: int
    """Tokens to which no teacher gave weight; leave them out of a mean."""


@dataclass(frozen=True, kw_only=True)
class _Job:
    """The constants of one call."""

    head: Head
    teachers: tuple[TeacherEvidence, ...]
    plan: Plan
    divergence: Divergence
    resolver: Pool
    temperature: float
    spread: bool = False


@dataclass(kw_only=True)
class _Chunk:
    """One chunk, evaluated."""

    tokens: Tensor
    hidden: Tensor
    capped_logits: Tensor | None
    """The student's logits, kept only where the softcap's derivative needs them."""
    student_logprobs: Tensor
    target: PoolTarget
    spread: Tensor | None


def chunked_divergence(
    *,
    student_hidden: Float[Tensor, "packed hidden"],
    student_head: Head,
    teachers: Sequence[TeacherEvidence],
    weights: Float[Tensor, "packed teacher"],
    token_weights: Float[Tensor, " packed"],
    divergence: Divergence,
    resolver: Pool,
    chunk_size: int,
    temperature: float = 1.0,
) -> ChunkedOutput:
    """Computes sum_t token_weights_t * D(student_t, target_t), differentiable in the student.

    Gradients flow to `student_hidden`, `student_head.weight` and `student_head.bias`; weights, teachers and targets are
    constants. Where autograd is off, or none of the three requires a gradient, none is computed.

    Args:
        student_hidden: States that predict the trained tokens, in packed order.
        student_head: The student's head.
        teachers: Evidence of support `full`, ragged, each with its own hidden size and head.
        weights: Weight of each teacher at each token, columns in the order of `teachers`; a row sums to one, or is all
            zero where the token has no teacher and is not trained.
        token_weights: Factor on each token's loss; the caller's normalisation belongs here.
        divergence: What is minimised.
        resolver: How several teachers become one target.
        chunk_size: Tokens projected at once.
        temperature: Divides the logits of student and teachers alike; the loss is not rescaled by its square.

    Returns:
        The loss, per-token statistics, and how many tokens had no teacher.

    Raises:
        ConfigError: `chunk_size` or `temperature` is not positive.
        UnsupportedCombinationError: Evidence is not of support `full`, or the pool needs what the kernel does not have.
        IncompatibleTeacherError: A teacher's vocabulary is not the student's.
        RoutingError: Weights are not a distribution, or name a teacher that did not score the token.
    """
    job = _make_job(student_head, teachers, weights, divergence, resolver, chunk_size, temperature)
    inputs = (student_hidden, student_head.weight, student_head.bias)
    wanted = [torch.is_grad_enabled() and tensor is not None and tensor.requires_grad for tensor in inputs]
    loss, *values = _ChunkedDivergence.apply(*inputs, token_weights.detach(), job, tuple(wanted))  # type: ignore[no-untyped-call]
    stats = dict(zip(_STATS, values, strict=True))
    stats["abstained"] = job.plan.abstained.to(stats["divergence"].dtype)
    return ChunkedOutput(loss=loss, stats=stats, num_abstained=int(job.plan.abstained.sum()))


def measure(
    *,
    student_hidden: Float[Tensor, "packed hidden"],
    student_head: Head,
    teachers: Sequence[TeacherEvidence],
    weights: Float[Tensor, "packed teacher"],
    divergence: Divergence,
    resolver: Pool,
    chunk_size: int,
    temperature: float = 1.0,
    k: int = 16,
) -> dict[str, Float[Tensor, " packed"]]:
    """Looks at the tokens without a loss or a gradient, through the same loop as `chunked_divergence`.

    Args:
        student_hidden: States that predict the trained tokens, in packed order.
        student_head: The student's head.
        teachers: Evidence of support `full`.
        weights: Weight of each teacher at each token.
        divergence: What is measured.
        resolver: How several teachers become one target.
        chunk_size: Tokens projected at once.
        temperature: Divides the logits of student and teachers alike.
        k: How many of the likeliest tokens `topk_overlap` compares (at most the vocabulary).

    Returns:
        The statistics of `ChunkedOutput.stats` and two more. `topk_overlap`: the share of the student's k likeliest
        tokens that are among the target's. `spread`: largest minus smallest logprob that the token's teachers give to
        the student's likeliest token, in nats, 0 where a token has fewer than two. All are 0 where abstained.

    Raises:
        ConfigError: `chunk_size`, `temperature` or `k` is not positive.
        UnsupportedCombinationError: Evidence is not of support `full`, or the pool needs what the kernel does not have.
        IncompatibleTeacherError: A teacher's vocabulary is not the student's.
        RoutingError: Weights are not a distribution, or name a teacher that did not score the token.
    """
    if k < 1:
        raise ConfigError(f"expected k >= 1 for the top-k overlap, got {k}")
    job = _make_job(student_head, teachers, weights, divergence, resolver, chunk_size, temperature, spread=True)
    k = min(k, student_head.weight.shape[0])
    stats = _empty_stats(student_hidden, student_head, (*_STATS, "topk_overlap", "spread"))

    def look(chunk: _Chunk) -> None:
        value, _ = value_and_gradient(divergence, chunk.student_logprobs, chunk.target.logprobs)
        _record(stats, chunk, value)
        mine = chunk.student_logprobs.topk(k, sorted=False).indices
        theirs = chunk.target.logprobs.topk(k, sorted=False).indices
        shared = (mine.unsqueeze(-1) == theirs.unsqueeze(-2)).any(-1).sum(-1)
        stats["topk_overlap"].index_copy_(0, chunk.tokens, shared.to(value.dtype) / k)
        if chunk.spread is not None:
            stats["spread"].index_copy_(0, chunk.tokens, chunk.spread)

    with torch.no_grad():
        _for_each_chunk(job, student_hidden.detach(), look)
    stats["abstained"] = job.plan.abstained.to(stats["divergence"].dtype)
    return stats


class _ChunkedDivergence(torch.autograd.Function):
    """Forward makes the gradients, backward scales them."""

    @staticmethod
    def forward(
        ctx: Any,
        student_hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        token_weights: Tensor,
        job: _Job,
        wanted: tuple[bool, bool, bool],
    ) -> tuple[Tensor, ...]:
        stats = _empty_stats(student_hidden, job.head, _STATS)
        loss = torch.zeros((), dtype=stats["divergence"].dtype, device=student_hidden.device)
        buffers = HeadGradient(student_hidden, job.head, wanted=wanted)

        def learn(chunk: _Chunk) -> None:
            value, gradient = value_and_gradient(job.divergence, chunk.student_logprobs, chunk.target.logprobs)
            _record(stats, chunk, value)
            factor = token_weights.index_select(0, chunk.tokens).to(value.dtype)
            if chunk.target.token_weight is not None:
                factor = factor * chunk.target.token_weight
            # a token of weight zero is switched off, even when its divergence is infinite
            loss.add_((factor * value).masked_fill_(factor == 0.0, 0.0).sum())
            if any(wanted):
                gradient = gradient.mul_((factor * (job.head.scale / job.temperature)).unsqueeze(-1))
                if chunk.capped_logits is not None and job.head.softcap is not None:
                    gradient = through_softcap(gradient, chunk.capped_logits, job.head.softcap)
                buffers.add(chunk.tokens, chunk.hidden, gradient)

        _for_each_chunk(job, student_hidden, learn)
        ctx.dtypes = (student_hidden.dtype, weight.dtype, None if bias is None else bias.dtype)
        ctx.save_for_backward(buffers.hidden, buffers.weight, buffers.bias)
        values = tuple(stats[name] for name in _STATS)
        ctx.mark_non_differentiable(*values)
        return loss, *values

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        scaled = [
            None if gradient is None else (gradient * grad_loss).to(dtype)
            for gradient, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        ]
        return *scaled, None, None, None


def _for_each_chunk(job: _Job, student_hidden: Tensor, visit: Callable[[_Chunk], None]) -> None:
    """The one loop over chunks: what a pass does with a chunk is `visit`."""
    for group in job.plan.chunks():
        visit(_evaluate(job, student_hidden, group))


def _evaluate(job: _Job, student_hidden: Tensor, group: Group) -> _Chunk:
    """Makes the student's logprobs and the pooled target of one chunk; one teacher is in memory at a time."""
    hidden = student_hidden.index_select(0, group.tokens)
    logits = project(hidden, job.head)
    capped_logits = logits if job.head.softcap is not None else None
    student_logprobs = _logprobs(logits, job.temperature, keep=capped_logits is not None)
    del logits
    watched = student_logprobs.argmax(-1, keepdim=True) if job.spread and len(group.columns) > 1 else None
    low = high = None
    pool = job.resolver.accumulator(**({"student_logprobs": student_logprobs} if job.resolver.needs else {}))
    for column in group.columns:
        teacher_hidden, teacher_head = full_evidence(job.teachers[column])
        position = job.plan.positions[column].index_select(0, group.tokens)
        teacher_logits = project(teacher_hidden.detach().index_select(0, position), teacher_head)
        logprobs = _logprobs(teacher_logits, job.temperature, keep=False).to(student_logprobs.dtype)
        del teacher_logits
        if watched is not None:
            seen = logprobs.gather(-1, watched).squeeze(-1)
            low = seen if low is None else torch.minimum(low, seen)
            high = seen if high is None else torch.maximum(high, seen)
        pool.add(logprobs, job.plan.weights[:, column].index_select(0, group.tokens).to(logprobs.dtype))
        del logprobs
    return _Chunk(
        tokens=group.tokens,
        hidden=hidden,
        capped_logits=capped_logits,
        student_logprobs=student_logprobs,
        target=pool.finish(),
        spread=None if high is None or low is None else high - low,
    )


def _logprobs(logits: Tensor, temperature: float, *, keep: bool) -> Tensor:
    if temperature != 1.0:
        logits = logits / temperature if keep else logits.div_(temperature)
    return logits.log_softmax(-1)


def _make_job(
    head: Head,
    teachers: Sequence[TeacherEvidence],
    weights: Tensor,
    divergence: Divergence,
    resolver: Pool,
    chunk_size: int,
    temperature: float,
    *,
    spread: bool = False,
) -> _Job:
    if not temperature > 0.0:
        raise ConfigError(f"expected temperature > 0, got {temperature}; it divides the logits")
    unknown = resolver.needs - _CONTEXT
    if unknown:
        raise UnsupportedCombinationError(
            f"expected a pool that needs at most {sorted(_CONTEXT)}, got one that also needs {sorted(unknown)}; the "
            "kernel does not have it"
        )
    detached = Head(
        weight=head.weight.detach(),
        bias=None if head.bias is None else head.bias.detach(),
        scale=head.scale,
        softcap=head.softcap,
    )
    plan = make_plan(teachers=teachers, weights=weights, vocab=head.weight.shape[0], chunk_size=chunk_size)
    return _Job(
        head=detached,
        teachers=tuple(teachers),
        plan=plan,
        divergence=divergence,
        resolver=resolver,
        temperature=temperature,
        spread=spread,
    )


def _empty_stats(hidden: Tensor, head: Head, names: Sequence[str]) -> dict[str, Tensor]:
    dtype = torch.float64 if head.weight.dtype == torch.float64 else torch.float32
    return {name: torch.zeros(len(hidden), dtype=dtype, device=hidden.device) for name in names}


def _record(stats: dict[str, Tensor], chunk: _Chunk, value: Tensor) -> None:
    stats["divergence"].index_copy_(0, chunk.tokens, value)
    stats["student_entropy"].index_copy_(0, chunk.tokens, entropy(chunk.student_logprobs))
    stats["target_entropy"].index_copy_(0, chunk.tokens, entropy(chunk.target.logprobs))
    stats["neg_log_z"].index_copy_(0, chunk.tokens, chunk.target.neg_log_z)
