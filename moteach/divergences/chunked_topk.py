"""The kernel for teachers that say only their k likeliest tokens: one target a token, ids and logprobs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from moteach.divergences.full import entropy
from moteach.divergences.fused import ChunkedOutput, EvaluatedChunk, detached, fused_loss, student_chunk
from moteach.divergences.topk import TopK
from moteach.errors import ConfigError
from moteach.types import Head


@dataclass(frozen=True, kw_only=True)
class TopKJob:
    """The constants of one call."""

    head: Head
    ids: Int[Tensor, "packed k"]
    logprobs: Float[Tensor, "packed k"]
    taught: Bool[Tensor, " packed"]
    divergence: TopK
    chunk_size: int
    student_temperature: float
    targets: Int[Tensor, " packed"] | None

    @property
    def stat_names(self) -> tuple[str, ...]:
        """The student's mass on the support always comes with a top-k value, which may be blind to its leaking."""
        names = ("divergence", "student_entropy", "student_mass", "teacher_mass")
        return names if self.targets is None else (*names, "student_logprobs")

    @property
    def abstained(self) -> Bool[Tensor, " packed"]:
        """Tokens without a teacher."""
        return ~self.taught

    def chunks(self, student_hidden: Tensor) -> Iterator[EvaluatedChunk]:
        """Compares one chunk after the other."""
        for tokens in torch.split(self.taught.nonzero(as_tuple=True)[0], self.chunk_size):
            if len(tokens):
                yield self._evaluate(student_hidden, tokens)

    def _evaluate(self, student_hidden: Tensor, tokens: Tensor) -> EvaluatedChunk:
        hidden = student_hidden.index_select(0, tokens)
        student = student_chunk(hidden, self.head, self.student_temperature)
        logprobs = self.logprobs.index_select(0, tokens).to(student.logprobs.dtype)
        seen = self.divergence.evaluate_on(student.logprobs, self.ids.index_select(0, tokens), logprobs)
        stats = {
            "divergence": seen.value,
            "student_entropy": entropy(student.logprobs),
            "student_mass": seen.student_mass,
            "teacher_mass": seen.teacher_mass,
        }
        if self.targets is not None:
            written = self.targets.index_select(0, tokens).unsqueeze(-1)
            stats["student_logprobs"] = student.logprobs.gather(-1, written).squeeze(-1)
        return EvaluatedChunk(
            tokens=tokens,
            hidden=hidden,
            capped_logits=student.capped_logits,
            value=seen.value,
            gradient=seen.gradient,
            token_weight=None,
            stats=stats,
        )


def chunked_topk_divergence(
    *,
    student_hidden: Float[Tensor, "packed hidden"],
    student_head: Head,
    ids: Int[Tensor, "packed k"],
    teacher_logprobs: Float[Tensor, "packed k"],
    taught: Bool[Tensor, " packed"],
    token_weights: Float[Tensor, " packed"],
    divergence: TopK,
    chunk_size: int,
    student_temperature: float = 1.0,
    targets: Int[Tensor, " packed"] | None = None,
) -> ChunkedOutput:
    """Computes sum_t token_weights_t * D(student_t, teacher_t) read on the teacher's own k tokens.

    Args:
        student_hidden: States that predict the trained tokens, in packed order.
        student_head: The student's head.
        ids: The teacher's likeliest tokens at each position.
        teacher_logprobs: Their logprobs, normalised over the whole vocabulary (they need not sum to one here).
        taught: True where a teacher answered; the other rows of `ids` are not read.
        token_weights: Factor on each token's loss.
        divergence: What is minimised, with its source and truncation.
        chunk_size: Tokens projected at once.
        student_temperature: Divides the student's logits; the teacher's were fixed when it sent them.
        targets: The tokens the student wrote, for their logprobs.

    Returns:
        The loss, and `divergence`, `student_entropy`, `student_mass` and `teacher_mass` of each token; with `targets` also
        `student_logprobs`.

    Raises:
        ConfigError: `chunk_size` or `student_temperature` is not positive.
        UnsupportedCombinationError: The divergence reads tokens that the teacher said nothing about.
    """
    if chunk_size < 1:
        raise ConfigError(f"expected chunk_size >= 1, got {chunk_size}; it is the number of tokens projected at once")
    if not student_temperature > 0.0:
        raise ConfigError(f"expected student_temperature > 0, got {student_temperature}; it divides the logits")
    job = TopKJob(
        head=detached(student_head),
        ids=ids,
        logprobs=teacher_logprobs,
        taught=taught,
        divergence=divergence,
        chunk_size=chunk_size,
        student_temperature=student_temperature,
        targets=targets,
    )
    return fused_loss(job, student_hidden, student_head, token_weights)
