"""The fused loss: a scalar from hidden states and a head whose gradient is made in the *forward* pass, chunk by chunk.

`backward` only scales what `forward` made (as Liger's fused linear losses do, arXiv 2410.10989), so no `[packed, vocab]`
tensor outlives its chunk. What a chunk is compared with is the business of a `Job`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

from moteach.divergences.projection import HeadGradient, project, through_softcap
from moteach.errors import TrainingError
from moteach.types import Head


@dataclass(frozen=True, kw_only=True, slots=True)
class ChunkedOutput:
    """A loss and what was seen on the way."""

    loss: Float[Tensor, ""]
    """sum_t token_weights_t * D_t, with the pool's own token weight inside; not divided by anything."""
    stats: dict[str, Float[Tensor, " packed"]]
    """Detached per-token values by name, nats where nothing else is said: `divergence`, `student_entropy` and what the
    job adds; and `abstained`, which is 1.0 at tokens without a target, where the others are 0.0."""
    num_abstained: int
    """Tokens without a target; leave them out of a mean."""


@dataclass(kw_only=True, slots=True)
class EvaluatedChunk:
    """One chunk of tokens, compared with its target."""

    tokens: Int[Tensor, " token"]
    """Packed indices."""
    hidden: Float[Tensor, "token hidden"]
    capped_logits: Float[Tensor, "token vocab"] | None
    """The student's logits, kept only where the softcap's derivative needs them."""
    value: Float[Tensor, " token"]
    gradient: Float[Tensor, "token vocab"]
    """Derivative of the value with respect to the student's logits over its temperature; may be overwritten."""
    token_weight: Float[Tensor, " token"] | None
    """The pool's factor on the loss of each token; None stands for one."""
    stats: dict[str, Float[Tensor, " token"]]


@dataclass(kw_only=True, slots=True)
class StudentChunk:
    """The student's side of one chunk."""

    logprobs: Float[Tensor, "token vocab"]
    capped_logits: Float[Tensor, "token vocab"] | None
    """The logits, kept only where the softcap's derivative needs them."""


@runtime_checkable
class Job(Protocol):
    """What the fused loss is of: a head, a temperature, and chunks compared with their targets."""

    @property
    def head(self) -> Head:
        """The student's head, detached."""

    @property
    def student_temperature(self) -> float:
        """Divides the student's logits."""

    @property
    def stat_names(self) -> tuple[str, ...]:
        """Names in `EvaluatedChunk.stats`."""

    @property
    def abstained(self) -> Bool[Tensor, " packed"]:
        """Tokens without a target."""

    def chunks(self, student_hidden: Tensor) -> Iterator[EvaluatedChunk]:
        """Evaluates the taught tokens, each in exactly one chunk."""


def fused_loss(
    job: Job, student_hidden: Float[Tensor, "packed hidden"], head: Head, token_weights: Float[Tensor, " packed"]
) -> ChunkedOutput:
    """Computes sum_t token_weights_t * value_t of a job, differentiable in the hidden states and the head.

    Where autograd is off, or neither of them requires a gradient, none is kept.

    Args:
        job: The chunks.
        student_hidden: States that predict the trained tokens, in packed order.
        head: The student's head, live.
        token_weights: Factor on each token's loss; a token of weight zero is switched off, whatever its value.

    Returns:
        The loss and the per-token statistics of the job.
    """
    inputs = (student_hidden, head.weight, head.bias)
    wanted = tuple(torch.is_grad_enabled() and tensor is not None and tensor.requires_grad for tensor in inputs)
    loss, *values = _FusedLoss.apply(*inputs, token_weights.detach(), job, wanted)  # type: ignore[no-untyped-call]
    stats = dict(zip(job.stat_names, values, strict=True))
    stats["abstained"] = job.abstained.to(loss.dtype)
    return ChunkedOutput(loss=loss, stats=stats, num_abstained=int(job.abstained.sum()))


class _FusedLoss(torch.autograd.Function):
    """Forward makes the gradients, backward scales them."""

    @staticmethod
    def forward(
        ctx: Any,
        student_hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        token_weights: Tensor,
        job: Job,
        wanted: tuple[bool, bool, bool],
    ) -> tuple[Tensor, ...]:
        stats = empty_stats(student_hidden, job.head, job.stat_names)
        loss = torch.zeros((), dtype=stats_dtype(job.head), device=student_hidden.device)
        buffers = HeadGradient(student_hidden, job.head, wanted=wanted)
        for chunk in job.chunks(student_hidden):
            record(stats, chunk.tokens, chunk.stats)
            factor = token_weights.index_select(0, chunk.tokens).to(chunk.value.dtype)
            if chunk.token_weight is not None:
                factor = factor * chunk.token_weight
            # a token of weight zero is switched off, even when its divergence is infinite
            loss.add_((factor * chunk.value).masked_fill_(factor == 0.0, 0.0).sum())
            if any(wanted):
                scale = factor * (job.head.scale / job.student_temperature)
                gradient = chunk.gradient.mul_(scale.unsqueeze(-1))
                if chunk.capped_logits is not None and job.head.softcap is not None:
                    gradient = through_softcap(gradient, chunk.capped_logits, job.head.softcap)
                buffers.add(chunk.tokens, chunk.hidden, gradient)
                del gradient
            # or two chunks would be alive while the job makes the next one
            del chunk
        ctx.dtypes = (student_hidden.dtype, weight.dtype, None if bias is None else bias.dtype)
        # not save_for_backward: while the graph holds them, handing them on would copy a gradient as large as the head
        ctx.buffers = (buffers.hidden, buffers.weight, buffers.bias)
        values = tuple(stats[name] for name in job.stat_names)
        ctx.mark_non_differentiable(*values)
        return loss, *values

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        buffers = ctx.buffers
        if buffers is None:
            raise TrainingError(
                "expected one backward of a fused loss, got a second one after its gradients were handed on; pass "
                "retain_graph=True to the first"
            )
        last = not graph_is_kept()
        if last:
            ctx.buffers = None
        scaled = [
            None if gradient is None else (gradient.mul_(grad_loss) if last else gradient * grad_loss).to(dtype)
            for gradient, dtype in zip(buffers, ctx.dtypes, strict=True)
        ]
        del buffers
        return *scaled, None, None, None


def graph_is_kept() -> bool:
    """Whether the backward that is running was asked to keep the graph; True where torch does not tell."""
    ask = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", None)
    return True if ask is None else bool(ask())


def student_chunk(hidden: Float[Tensor, "token hidden"], head: Head, temperature: float) -> StudentChunk:
    """Projects one chunk of the student's states to logprobs, in place where nothing else needs the logits."""
    logits = project(hidden, head)
    capped = logits if head.softcap is not None else None
    return StudentChunk(logprobs=tempered(logits, temperature, keep=capped is not None), capped_logits=capped)


def tempered(
    logits: Float[Tensor, "token vocab"], temperature: float, *, keep: bool = False
) -> Float[Tensor, "token vocab"]:
    """log_softmax(logits / temperature); unless `keep`, `logits` may be overwritten."""
    if temperature != 1.0:
        logits = logits / temperature if keep else logits.div_(temperature)
    return logits.log_softmax(-1)


def detached(head: Head) -> Head:
    """The same head, constant."""
    bias = None if head.bias is None else head.bias.detach()
    return Head(weight=head.weight.detach(), bias=bias, scale=head.scale, softcap=head.softcap)


def stats_dtype(head: Head) -> torch.dtype:
    """float64 for a float64 head, float32 otherwise."""
    return torch.float64 if head.weight.dtype == torch.float64 else torch.float32


def empty_stats(hidden: Float[Tensor, "packed hidden"], head: Head, names: Sequence[str]) -> dict[str, Tensor]:
    """Zeros under each name."""
    return {name: torch.zeros(len(hidden), dtype=stats_dtype(head), device=hidden.device) for name in names}


def record(stats: dict[str, Tensor], tokens: Int[Tensor, " token"], values: dict[str, Tensor]) -> None:
    """Writes the values of a chunk to their places."""
    for name, value in values.items():
        stats[name].index_copy_(0, tokens, value.to(stats[name].dtype))
