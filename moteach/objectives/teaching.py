"""Who teaches each token and what they say together: the gate and the resolver, applied to evidence of each support."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from moteach.conflict.base import Resolver
from moteach.conflict.sequence import SEQUENCE_LOGPROBS, SequenceWeighted
from moteach.divergences.base import Divergence
from moteach.divergences.chunked import OF_WRITTEN
from moteach.divergences.disagreement import OF_TEACHERS
from moteach.divergences.logprobs import chunked_token_stats
from moteach.divergences.measure import OF_TOP1, OF_TOPK, measure
from moteach.divergences.origins import ANCHOR, REFERENCE
from moteach.errors import RoutingError
from moteach.objectives.base import Scored, gate_columns, where_scored
from moteach.objectives.sequences import sequence_logprobs
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
    """The likeliest tokens of the teacher that was selected at each token, or of the pool of several."""

    ids: Int[Tensor, "packed k"]
    logprobs: Float[Tensor, "packed k"]
    taught: Bool[Tensor, " packed"]
    slack: Float[Tensor, " packed"] | None = None
    """Most probability of these entries that may be wrong, as teachers named different tokens; None where none were pooled."""


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
        """Weights of the teachers that scored something, at each token; a resolver of whole completions has changed them.

        Raises:
            RoutingError: The gate gives weight to a teacher that was not asked.
        """
        if scored.teacher_weights is not None:
            return where_scored(gate_columns(scored.teacher_weights, scored.routing, scored.evidence), scored.evidence)
        gated = scored.gate_weights
        if gated is None:
            gated = self.gate.weights(GateContext(rollouts=scored.rollouts, routing=scored.routing))
        weights = where_scored(gate_columns(gated, scored.routing, scored.evidence), scored.evidence)
        return self._reweighed(weights, scored) if SEQUENCE_LOGPROBS in self.resolver.needs else weights

    def prepared(self, scored: Scored) -> Scored:
        """Adds what the resolver reads of whole completions, once for all that follows; nothing where it reads nothing."""
        if SEQUENCE_LOGPROBS not in self.resolver.needs or scored.sequence_logprobs is not None:
            return scored
        found = sequence_logprobs(scored.rollouts, scored.routing, scored.evidence)
        return replace(scored, sequence_logprobs=found)

    def beside(self, scored: Scored) -> dict[str, Any]:
        """What the kernel needs beside the teachers: their origins and the anchor, for a resolver that compares with them."""
        found: dict[str, Any] = {}
        if REFERENCE in self.resolver.needs and scored.references is not None:
            found["references"] = scored.references.teachers
        if ANCHOR in self.resolver.needs and scored.reference is not None:
            found["anchor"] = next(iter(scored.reference.teachers), None)
        return found

    def _reweighed(self, weights: Tensor, scored: Scored) -> Tensor:
        assert isinstance(self.resolver, SequenceWeighted), "sequence statistics without a use for them"
        given = self.prepared(scored).sequence_logprobs
        assert given is not None, "prepared() makes them"
        columns = [scored.routing.teacher_ids.index(entry.teacher_id) for entry in scored.evidence.teachers]
        return self.resolver.reweigh(weights, given[scored.rollouts.token_rows][:, columns])

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

        Where several have weight and the resolver pools partial distributions, those of the pool.

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
        shared = (weights > 0).sum(dim=1) > 1
        pool = getattr(self.resolver, "resolve_topk", None)
        if pool is None or not bool(shared.any()):
            return TopKTarget(ids=ids, logprobs=logprobs, taught=taught)
        slack = torch.zeros(total)
        all_ids, all_logprobs = _topk_columns(scored.evidence, k)
        pooled, values, width = pool(all_ids[:, shared], all_logprobs[:, shared], weights[shared], k)
        ids[shared], logprobs[shared], slack[shared] = pooled, values.float(), width.float()
        return TopKTarget(ids=ids, logprobs=logprobs, taught=taught, slack=slack)

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
            **self.beside(scored),
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


def teaching_of(objective: Any) -> Teaching | None:
    """The gate and the resolver of an objective, also of one inside a mixture; None where it has none."""
    found = getattr(getattr(objective, "main", objective), "teaching", None)
    return found if isinstance(found, Teaching) else None


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


def _topk_columns(evidence: Evidence, k: int) -> tuple[Tensor, Tensor]:
    """Spreads each teacher's entries over the packed axis; where it scored nothing a zero weight hides it."""
    given = [_topk_of(entry, k) for entry in evidence.teachers]
    width = min(ids.shape[1] for ids, _ in given)
    # distinct ids also where nothing was scored
    ids = torch.arange(width).expand(len(given), evidence.num_tokens, width).clone()
    logprobs = torch.full((len(given), evidence.num_tokens, width), float("-inf"))
    for column, (entry, (own_ids, own)) in enumerate(zip(evidence.teachers, given, strict=True)):
        ids[column, entry.tokens] = own_ids[:, :width]
        logprobs[column, entry.tokens] = own[:, :width].float()
    return ids, logprobs


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
