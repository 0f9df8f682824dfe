"""Who teaches each token and what they say together: the gate and the resolver, applied to evidence of each support."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from moteach.conflict.base import Resolver
from moteach.divergences.base import Divergence
from moteach.divergences.chunked import OF_WRITTEN
from moteach.divergences.disagreement import OF_TEACHERS
from moteach.divergences.logprobs import chunked_token_stats
from moteach.divergences.measure import OF_TOP1, OF_TOPK, measure
from moteach.errors import RoutingError
from moteach.objectives.base import Scored, gate_columns
from moteach.routing.base import Gate
from moteach.routing.context import GateContext
from moteach.types import Evidence, Head, TeacherEvidence

FULL_STATS = frozenset(
    {"divergence", "student_entropy", "target_entropy", "neg_log_z", *OF_TOPK, *OF_TOP1, *OF_TEACHERS, *OF_WRITTEN}
)
"""What can be measured where teachers give their whole distribution."""
SAMPLED_STATS = frozenset({*OF_WRITTEN, "student_entropy"})
"""What can be measured where teachers give the logprob of the written token."""


@dataclass(frozen=True, kw_only=True, slots=True)
class WrittenTarget:
    """What the resolved teacher gives the token the student wrote."""

    logprobs: Float[Tensor, " packed"]
    """Zero where nobody teaches."""
    taught: Bool[Tensor, " packed"]


@dataclass(frozen=True, kw_only=True, slots=True)
class TopKTarget:
    """The likeliest tokens of the teacher that was selected at each token."""

    ids: Int[Tensor, "packed k"]
    logprobs: Float[Tensor, "packed k"]
    taught: Bool[Tensor, " packed"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Teaching:
    """A gate and a resolver."""

    gate: Gate
    resolver: Resolver

    @property
    def needs(self) -> frozenset[str]:
        """What the gate and the resolver need beside the teachers; `references` where one of them compares with origins."""
        needs = self.resolver.needs | frozenset(getattr(self.gate, "needs", frozenset()))
        return needs | {"references"} if "reference_logprobs" in needs else needs

    def weights(self, scored: Scored) -> Float[Tensor, "packed scored_teacher"]:
        """Weights of the teachers that scored something, at each token.

        Raises:
            RoutingError: The gate gives weight to a teacher that was not asked.
        """
        weights = scored.gate_weights
        if weights is None:
            weights = self.gate.weights(GateContext(rollouts=scored.rollouts, routing=scored.routing))
        return gate_columns(weights, scored.routing, scored.evidence)

    def taught(self, scored: Scored) -> Bool[Tensor, " packed"]:
        """True for the tokens to which some teacher has weight."""
        return self.weights(scored).sum(dim=1) > 0

    def written(self, scored: Scored) -> WrittenTarget:
        """Resolves what the teachers say about the written tokens (support `sampled`).

        Raises:
            RoutingError: A teacher gave no logprob of the written tokens.
        """
        weights = self.weights(scored)
        taught = weights.sum(dim=1) > 0
        logprobs = torch.zeros(len(taught))
        if bool(taught.any()):
            given = _sampled_columns(scored.evidence)[taught]
            logprobs[taught] = self.resolver.resolve_sampled(given, weights[taught])
        return WrittenTarget(logprobs=logprobs, taught=taught)

    def topk(self, scored: Scored, *, k: int) -> TopKTarget:
        """Takes the k likeliest tokens of the teacher with the largest weight (support `topk`); ties: the first one.

        Raises:
            RoutingError: A teacher gave no top-k, or fewer than k entries.
        """
        weights = self.weights(scored)
        total = scored.evidence.num_tokens
        ids = torch.zeros((total, k), dtype=torch.long)
        logprobs = torch.full((total, k), float("-inf"))
        taught = weights.sum(dim=1) > 0
        chosen = weights.argmax(dim=1) if weights.shape[1] else torch.zeros(total, dtype=torch.long)
        for column, entry in enumerate(scored.evidence.teachers):
            given_ids, given = _topk_of(entry, k)
            mine = (taught & (chosen == column))[entry.tokens]
            ids[entry.tokens[mine]] = given_ids[mine, :k]
            logprobs[entry.tokens[mine]] = given[mine, :k].float()
        return TopKTarget(ids=ids, logprobs=logprobs, taught=taught)

    def measure_full(
        self,
        hidden: Float[Tensor, "packed hidden"],
        head: Head,
        scored: Scored,
        *,
        divergence: Divergence,
        chunk_size: int,
        wanted: frozenset[str],
        student_temperature: float = 1.0,
        teacher_temperature: float = 1.0,
    ) -> dict[str, Float[Tensor, " packed"]]:
        """Measures the tokens against the pooled distribution (support `full`), see `moteach.divergences.measure`."""
        return measure(
            student_hidden=hidden.detach(),
            student_head=head,
            teachers=scored.evidence.teachers,
            weights=self.weights(scored),
            divergence=divergence,
            resolver=self.resolver,
            chunk_size=chunk_size,
            student_temperature=student_temperature,
            teacher_temperature=teacher_temperature,
            targets=scored.rollouts.token_targets,
            wanted=wanted,
        )

    @torch.no_grad()
    def measure_written(
        self, hidden: Float[Tensor, "packed hidden"], head: Head, scored: Scored, *, chunk_size: int
    ) -> dict[str, Float[Tensor, " packed"]]:
        """Measures the written tokens against the resolved teachers (support `sampled`, or `topk` which brings it)."""
        target = self.written(scored)
        seen = chunked_token_stats(hidden.detach(), head, scored.rollouts.token_targets, chunk_size=chunk_size)
        logprobs = torch.where(target.taught, target.logprobs.to(seen.logprobs.dtype), seen.logprobs)
        return {
            "student_logprobs": seen.logprobs,
            "student_entropy": seen.entropy,
            "target_logprobs": logprobs,
            "log_ratio": logprobs - seen.logprobs,
            "abstained": (~target.taught).to(seen.logprobs.dtype),
        }


def _topk_of(entry: TeacherEvidence, k: int) -> tuple[Tensor, Tensor]:
    if entry.topk_ids is None or entry.topk_logprobs is None:
        raise RoutingError(
            f"the teacher '{entry.teacher_id}' gave no top-k entries; expected evidence of support topk, got "
            f"{entry.support}. Set support=topk"
        )
    if entry.topk_ids.shape[1] < k:
        raise RoutingError(
            f"the teacher '{entry.teacher_id}' gave {entry.topk_ids.shape[1]} entries a token, expected {k}; set "
            f"support.k={k}"
        )
    return entry.topk_ids, entry.topk_logprobs


def _sampled_columns(evidence: Evidence) -> Float[Tensor, "packed scored_teacher"]:
    """Spreads each teacher's logprobs over the packed axis; -inf where it scored nothing, which a zero weight hides."""
    columns = torch.full((evidence.num_tokens, len(evidence.teachers)), float("-inf"))
    for index, entry in enumerate(evidence.teachers):
        if entry.sampled_logprobs is None:
            raise RoutingError(
                f"the teacher '{entry.teacher_id}' gave no logprob of the written tokens; expected evidence of support "
                f"sampled, got {entry.support}. Set support=sampled"
            )
        columns[entry.tokens, index] = entry.sampled_logprobs.float()
    return columns
