"""The kernel: teachers' hidden states to a loss and its gradient, a chunk of tokens at a time.

For each chunk: student hidden -> logprobs; each teacher's hidden -> logprobs -> pool; divergence between the two; its
gradient, made in the forward pass (`moteach.divergences.fused`). Nothing of the size `[teacher, packed, vocab]` or
`[packed, vocab]` ever exists: memory above the inputs and the gradients is O(chunk_size x vocab), whatever the number of
teachers: pools that hold all of them get chunks that many times smaller. A teacher's head is projected only for the
tokens that give this teacher a positive weight, and tokens of the same teachers share chunks.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

from jaxtyping import Bool, Float, Int
from torch import Tensor

from moteach.divergences.aggregate import Compared, WeightedSum
from moteach.divergences.base import Divergence, Pool, PoolAccumulator, PoolTarget, value_and_gradient
from moteach.divergences.disagreement import STREAMED, Watch
from moteach.divergences.full import entropy
from moteach.divergences.fused import (
    ChunkedOutput,
    EvaluatedChunk,
    StudentChunk,
    detached,
    fused_loss,
    student_chunk,
    tempered,
)
from moteach.divergences.logprobs import TokenLogprobs, chunked_token_logprobs, chunked_token_stats
from moteach.divergences.origins import ANCHOR, REFERENCE, Origins, make_origins
from moteach.divergences.plan import Group, Plan, full_evidence, make_plan
from moteach.divergences.projection import project
from moteach.divergences.topk import TopK
from moteach.errors import ConfigError, UnsupportedCombinationError
from moteach.types import Head, TeacherEvidence

__all__ = [
    "ChunkedOutput",
    "TokenLogprobs",
    "chunked_divergence",
    "chunked_token_logprobs",
    "chunked_token_stats",
    "project",
]

_CONTEXT = frozenset({"student_logprobs", ANCHOR, REFERENCE})
_SPENT = frozenset({"sequence_logprobs", "verified_logprobs"})
"""What a pool may need that is already in the weights when the kernel gets them."""
_STATS = ("divergence", "student_entropy", "target_entropy", "neg_log_z")
_MASSES = ("student_mass", "teacher_mass")
OF_WRITTEN = ("student_logprobs", "target_logprobs", "log_ratio")
"""Statistics of the token the student wrote."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Pooled:
    """One chunk of tokens with the student and the pooled target."""

    group: Group
    hidden: Float[Tensor, "token hidden"]
    student: StudentChunk
    target: PoolTarget
    summed: Compared | None
    """The sum of the divergences to each teacher, for a resolver that aggregates; None where one to the target is meant."""
    between: dict[str, Float[Tensor, " token"]]
    """How far the teachers are from each other, by the name of the statistic; empty for a single teacher."""


@dataclass(frozen=True, kw_only=True)
class PooledJob:
    """Teachers of support `full`, pooled chunk by chunk; the constants of one call."""

    head: Head
    teachers: tuple[TeacherEvidence, ...]
    plan: Plan
    divergence: Divergence
    resolver: Pool
    student_temperature: float
    teacher_temperature: float
    targets: Int[Tensor, " packed"] | None
    origins: Origins

    @property
    def stat_names(self) -> tuple[str, ...]:
        """The masses on the support are there for a divergence that reads only a part of the vocabulary."""
        masses = _MASSES if isinstance(self.divergence, TopK) else ()
        shared = STREAMED if any(len(group.columns) > 1 for group in self.plan.groups) else ()
        return (*_STATS, *masses, *shared, *(OF_WRITTEN if self.targets is not None else ()))

    @property
    def abstained(self) -> Bool[Tensor, " packed"]:
        """Tokens to which no teacher gave weight."""
        return self.plan.abstained

    def chunks(self, student_hidden: Tensor) -> Iterator[EvaluatedChunk]:
        """Pools and compares one chunk after the other."""
        for group in self.plan.chunks(held=not self.resolver.streams):
            yield self._evaluate(student_hidden, group)

    def _evaluate(self, student_hidden: Tensor, group: Group) -> EvaluatedChunk:
        pooled = self.pool(student_hidden, group, wanted=STREAMED)
        value, gradient, stats = self.compare(pooled)
        return EvaluatedChunk(
            tokens=group.tokens,
            hidden=pooled.hidden,
            capped_logits=pooled.student.capped_logits,
            value=value,
            gradient=gradient,
            token_weight=pooled.target.token_weight,
            stats=stats,
        )

    def compare(self, pooled: Pooled) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Value, gradient and statistics of one pooled chunk."""
        student, target = pooled.student.logprobs, pooled.target.logprobs
        stats = {
            "student_entropy": entropy(student),
            "target_entropy": entropy(target),
            "neg_log_z": pooled.target.neg_log_z,
            **pooled.between,
        }
        compared = self._against(student, target) if pooled.summed is None else pooled.summed
        stats |= compared.masses
        stats["divergence"] = compared.value
        if self.targets is not None:
            written = self.targets.index_select(0, pooled.group.tokens).unsqueeze(-1)
            stats["student_logprobs"] = student.gather(-1, written).squeeze(-1)
            stats["target_logprobs"] = target.gather(-1, written).squeeze(-1)
            stats["log_ratio"] = stats["target_logprobs"] - stats["student_logprobs"]
        return compared.value, compared.gradient, stats

    def _against(self, student: Tensor, target: Tensor) -> Compared:
        if isinstance(self.divergence, TopK):
            seen = self.divergence.evaluate(student, target)
            masses = {"student_mass": seen.student_mass, "teacher_mass": seen.teacher_mass}
            return Compared(value=seen.value, gradient=seen.gradient, masses=masses)
        value, gradient = value_and_gradient(self.divergence, student, target)
        return Compared(value=value, gradient=gradient, masses={})

    def pool(self, student_hidden: Tensor, group: Group, *, wanted: Collection[str] = ()) -> Pooled:
        """Makes the student's logprobs and the pooled target of one chunk.

        One teacher is in memory at a time, unless the resolver or a `wanted` statistic of `OF_TEACHERS` compares them.
        """
        hidden = student_hidden.index_select(0, group.tokens)
        student = student_chunk(hidden, self.head, self.student_temperature)
        watch = Watch(student.logprobs, wanted) if len(group.columns) > 1 and wanted else None
        pool = self.resolver.accumulator(**self._context(student.logprobs, group))
        each = WeightedSum() if getattr(self.resolver, "aggregates", False) else None
        for column in group.columns:
            logprobs = self._teacher_logprobs(column, group).to(student.logprobs.dtype)
            if watch is not None:
                watch.add(logprobs)
            weights = self.plan.weights[:, column].index_select(0, group.tokens).to(logprobs.dtype)
            if each is not None:
                each.add(self._against(student.logprobs, logprobs), weights)
            self._add(pool, column, group, logprobs, weights)
            del logprobs
        return Pooled(
            group=group,
            hidden=hidden,
            student=student,
            target=pool.finish(),
            summed=None if each is None else each.finish(),
            between={} if watch is None else watch.finish(),
        )

    def _context(self, student: Tensor, group: Group) -> dict[str, Tensor]:
        """What the resolver needs beside the teachers."""
        found: dict[str, Tensor] = {}
        if "student_logprobs" in self.resolver.needs:
            found["student_logprobs"] = student
        if self.origins.anchor is not None and self.origins.anchor_positions is not None:
            said = self._logprobs_of(self.origins.anchor, self.origins.anchor_positions[0], group)
            found[ANCHOR] = said.to(student.dtype)
        return found

    def _add(self, pool: PoolAccumulator, column: int, group: Group, logprobs: Tensor, weights: Tensor) -> None:
        """Adds one teacher, with its origin where the resolver compares them."""
        origins = self.origins
        if not origins.references or origins.reference_positions is None:
            pool.add(logprobs, weights)
            return
        said = self._logprobs_of(origins.references[column], origins.reference_positions[column], group)
        cast(Any, pool).add(logprobs, weights, reference=said.to(logprobs.dtype))

    def _teacher_logprobs(self, column: int, group: Group) -> Tensor:
        return self._logprobs_of(self.teachers[column], self.plan.positions[column], group)

    def _logprobs_of(self, evidence: TeacherEvidence, positions: Tensor, group: Group) -> Tensor:
        hidden, head = full_evidence(evidence)
        position = positions.index_select(0, group.tokens)
        return tempered(project(hidden.detach().index_select(0, position), head), self.teacher_temperature)


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
    student_temperature: float = 1.0,
    teacher_temperature: float = 1.0,
    targets: Int[Tensor, " packed"] | None = None,
    references: Sequence[TeacherEvidence] = (),
    anchor: TeacherEvidence | None = None,
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
        student_temperature: Divides the student's logits; the loss is not rescaled by its square.
        teacher_temperature: Divides every teacher's logits, before the pool.
        targets: The tokens the student wrote, for statistics of them.
        references: What the checkpoints that the teachers were trained from say, under the teachers' names, for a resolver that
            needs `reference_logprobs`.
        anchor: What one model beside all teachers says, for a resolver that needs `anchor_logprobs`.

    Returns:
        The loss, per-token statistics, and how many tokens had no teacher. The statistics are `divergence`,
        `student_entropy`, `target_entropy`, `neg_log_z`; for a `TopK` divergence also `student_mass` and `teacher_mass` on
        its support; with `targets` also `student_logprobs`, `target_logprobs` and `log_ratio` (target minus student).

    Raises:
        ConfigError: `chunk_size` or a temperature is not positive.
        UnsupportedCombinationError: Evidence is not of support `full`, or the pool needs what the kernel does not have.
        IncompatibleTeacherError: A teacher's vocabulary is not the student's.
        RoutingError: Weights are not a distribution, or name a teacher that did not score the token.
    """
    job = make_job(
        student_head=student_head,
        teachers=teachers,
        weights=weights,
        divergence=divergence,
        resolver=resolver,
        chunk_size=chunk_size,
        student_temperature=student_temperature,
        teacher_temperature=teacher_temperature,
        targets=targets,
        references=references,
        anchor=anchor,
    )
    return fused_loss(job, student_hidden, student_head, token_weights)


def make_job(
    *,
    student_head: Head,
    teachers: Sequence[TeacherEvidence],
    weights: Float[Tensor, "packed teacher"],
    divergence: Divergence,
    resolver: Pool,
    chunk_size: int,
    student_temperature: float = 1.0,
    teacher_temperature: float = 1.0,
    targets: Int[Tensor, " packed"] | None = None,
    references: Sequence[TeacherEvidence] = (),
    anchor: TeacherEvidence | None = None,
) -> PooledJob:
    """Checks the arguments of `chunked_divergence` and plans its chunks; raises what that raises."""
    for name, temperature in (("student", student_temperature), ("teacher", teacher_temperature)):
        if not temperature > 0.0:
            raise ConfigError(f"expected {name}_temperature > 0, got {temperature}; it divides the logits")
    unknown = resolver.needs - _CONTEXT - _SPENT
    if unknown:
        raise UnsupportedCombinationError(
            f"expected a pool that needs at most {sorted(_CONTEXT)}, got one that also needs {sorted(unknown)}; the "
            "kernel does not have it"
        )
    vocab = student_head.weight.shape[0]
    plan = make_plan(teachers=teachers, weights=weights, vocab=vocab, chunk_size=chunk_size)
    return PooledJob(
        head=detached(student_head),
        teachers=tuple(teachers),
        plan=plan,
        divergence=divergence,
        resolver=resolver,
        student_temperature=student_temperature,
        teacher_temperature=teacher_temperature,
        targets=targets,
        origins=make_origins(
            needs=resolver.needs, teachers=teachers, references=references, anchor=anchor, plan=plan, vocab=vocab
        ),
    )
