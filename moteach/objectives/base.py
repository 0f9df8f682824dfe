"""The protocol of objectives, what they are given, and how per-token losses become one number."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from moteach.errors import RoutingError
from moteach.types import Evidence, Head, LossOutput, RolloutBatch, Routing, Support

Normalise = Literal["token_mean", "sequence_mean"]
"""`token_mean`: every trained token of the global batch counts alike; `sequence_mean`: every sequence counts alike, its
tokens share its weight (MiMo-V2-Flash Eq. 7). The two differ by a factor of the length, so the choice decides which domain
dominates when lengths differ between domains."""

_LOGITS_PER_CHUNK = 2**22


@dataclass(frozen=True, kw_only=True, slots=True)
class BatchSize:
    """What a mean over the global batch divides by."""

    tokens: int
    """Trained tokens."""
    sequences: int
    """Rows with a trained token."""

    @classmethod
    def of(cls, rollouts: RolloutBatch) -> BatchSize:
        """Counts a batch."""
        return cls(tokens=rollouts.num_tokens, sequences=int((rollouts.loss_mask.sum(dim=1) > 0).sum()))


@dataclass(frozen=True, kw_only=True, slots=True)
class Scored:
    """Rollouts with everything that is known about them before the student's forward."""

    rollouts: RolloutBatch
    routing: Routing
    evidence: Evidence
    base_weights: Float[Tensor, " packed"]
    """Weight of each token by the normalisation alone; sums to one over the global batch, so that micro-batches and ranks
    simply add."""
    token_weights: Float[Tensor, " packed"]
    """`base_weights` after token weights and balance between domains: what the teachers' loss is weighted with."""
    outcome_advantages: Float[Tensor, " packed"] | None = None
    """Advantage of the verified outcome at each token, already scaled; the same at every token of a completion."""
    proximal_logprobs: Float[Tensor, " packed"] | None = None
    """Logprobs of the written tokens under the student at the beginning of the step, when the step has several updates."""
    reference: Evidence | None = None
    """What the reference model says (support `full`), when the student is held near to one."""
    references: Evidence | None = None
    """What the checkpoints that the teachers were trained from say, under the teachers' names, when something needs it."""
    credit: Float[Tensor, " packed"] | None = None
    """Advantages of the written tokens for what they lead to, made from the statistics of the whole batch."""
    sequence_logprobs: Float[Tensor, "batch teacher"] | None = None
    """Each teacher's mean logprob of the completion, columns as in the routing, when the resolver needs it."""
    teacher_weights: Float[Tensor, "packed teacher"] | None = None
    """Weights of the teachers at each token, columns as in the routing, in the place of the gate's."""
    stats: Mapping[str, Float[Tensor, " packed"]] | None = None
    """What was measured on these tokens, when something needed it; spares the objective a second look."""
    gate_weights: Float[Tensor, "packed teacher"] | None = None
    """What a token gate decided, a column for each teacher of the routing; constants of the loss."""

    @classmethod
    def of(
        cls,
        rollouts: RolloutBatch,
        routing: Routing,
        evidence: Evidence,
        *,
        normalise: Normalise,
        size: BatchSize | None = None,
    ) -> Scored:
        """Weights the tokens by the normalisation and nothing else; `size` is that of the batch these rows are a part of."""
        weights = token_weights(rollouts, normalise, size=size)
        return cls(rollouts=rollouts, routing=routing, evidence=evidence, base_weights=weights, token_weights=weights)

    def select(self, rows: Sequence[int]) -> Scored:
        """Takes some rows, ascending; weights keep their scale, so that the parts of a batch add up to it."""
        kept = self.kept(rows)

        def cut(values: Tensor | None) -> Tensor | None:
            return None if values is None else values[kept]

        return replace(
            self,
            rollouts=self.rollouts.select(rows),
            routing=self.routing.select(rows),
            evidence=self.evidence.select(kept),
            base_weights=self.base_weights[kept],
            token_weights=self.token_weights[kept],
            outcome_advantages=cut(self.outcome_advantages),
            proximal_logprobs=cut(self.proximal_logprobs),
            credit=cut(self.credit),
            teacher_weights=cut(self.teacher_weights),
            reference=None if self.reference is None else self.reference.select(kept),
            sequence_logprobs=None if self.sequence_logprobs is None else self.sequence_logprobs[list(rows)],
            gate_weights=cut(self.gate_weights),
            references=None if self.references is None else self.references.select(kept),
            stats=None if self.stats is None else {name: values[kept] for name, values in self.stats.items()},
        )

    def kept(self, rows: Sequence[int]) -> Tensor:
        """True for the packed tokens of these rows."""
        return torch.isin(self.rollouts.token_rows, torch.as_tensor(list(rows), dtype=torch.long))


@runtime_checkable
class Objective(Protocol):
    """Turns what teachers said into a loss: gate, then resolve, then divergence or advantage."""

    supports: frozenset[Support]
    """Kinds of evidence this objective is defined on."""
    normalise: Normalise

    @property
    def needs(self) -> frozenset[str]:
        """What its gate and resolver need beside the teachers: `references` and `student_logprobs` are known."""
        ...

    def check(self, support: Support, k: int | None) -> None:
        """Refuses, before anything runs, what is not defined on this evidence.

        Raises:
            UnsupportedCombinationError: Saying what would go wrong and what to choose instead.
        """
        ...

    def measurable(self, support: Support) -> frozenset[str]:
        """Names of the per-token statistics that `measure` can give on this evidence."""
        ...

    def taught(self, scored: Scored) -> Bool[Tensor, " packed"]:
        """True for the tokens that some teacher teaches; needs no look at the student."""
        ...

    def measure(
        self, hidden: Float[Tensor, "packed hidden"], head: Head, scored: Scored, wanted: frozenset[str]
    ) -> dict[str, Float[Tensor, " packed"]]:
        """Looks at the tokens without gradient; returns at least `wanted` and `abstained`."""
        ...

    def __call__(self, hidden: Float[Tensor, "packed hidden"], head: Head, scored: Scored) -> LossOutput:
        """Computes sum_t token_weights_t * loss_t inside the student's forward, differentiable in its arguments.

        Args:
            hidden: The student's states that predict the trained tokens, in packed order.
            head: Its live head.
            scored: The rows of this micro-batch.
        """
        ...


def token_weights(
    rollouts: RolloutBatch, normalise: Normalise, *, size: BatchSize | None = None
) -> Float[Tensor, " packed"]:
    """Weights that turn per-token losses into the mean that `normalise` names; they sum to one over the global batch.

    Sequences without a trained token are left out of `sequence_mean`.

    Args:
        rollouts: The rows that are here.
        normalise: The mean.
        size: Of the global batch; None: these rows are all of it.
    """
    size = BatchSize.of(rollouts) if size is None else size
    rows = rollouts.token_rows
    if normalise == "token_mean":
        return torch.full((len(rows),), 1.0 / max(size.tokens, 1))
    lengths = rollouts.loss_mask.sum(dim=1)
    return 1.0 / (lengths[rows].float() * max(size.sequences, 1))


def tokens_per_chunk(chunk_size: int | None, head: Head) -> int:
    """Tokens projected to the vocabulary at a time: `chunk_size`, or about 4 million logits (16 MiB of float32)."""
    return max(64, _LOGITS_PER_CHUNK // head.weight.shape[0]) if chunk_size is None else chunk_size


def gate_columns(
    weights: Float[Tensor, "packed teacher"], routing: Routing, evidence: Evidence
) -> Float[Tensor, "packed scored_teacher"]:
    """Keeps the gate's columns of the teachers that scored something, in the order of the evidence.

    Raises:
        RoutingError: When the gate gives weight to a teacher that was not asked.
    """
    asked = [entry.teacher_id for entry in evidence.teachers]
    for index, name in enumerate(routing.teacher_ids):
        if name not in asked and bool((weights[:, index] > 0).any()):
            raise RoutingError(
                f"the gate gives weight to the teacher '{name}', which the router did not ask; its tokens would be "
                "dropped from the loss. Let the router pass more candidates, or choose gate=prompt"
            )
    return weights[:, [routing.teacher_ids.index(name) for name in asked]]


def where_scored(
    weights: Float[Tensor, "packed scored_teacher"], evidence: Evidence
) -> Float[Tensor, "packed scored_teacher"]:
    """Gives the weight of teachers that said nothing about a token to those that did; nobody teaches it where none did.

    Only teachers that may leave tokens out (`TeacherEvidence.partial`) are looked at; without any, `weights` are returned.
    """
    partial = [column for column, entry in enumerate(evidence.teachers) if entry.partial]
    if not partial:
        return weights
    scored = torch.ones_like(weights)
    for column in partial:
        scored[:, column] = 0
        scored[evidence.teachers[column].tokens, column] = 1
    kept = weights * scored
    total = kept.sum(dim=1, keepdim=True)
    return torch.where(total > 0, kept * (weights.sum(dim=1, keepdim=True) / total.clamp(min=1e-30)), kept)
