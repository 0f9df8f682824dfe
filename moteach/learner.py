"""One look at a batch through the student: measure, weigh the tokens, forward and backward, micro-batch by micro-batch."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import combinations
from typing import Any, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn

from moteach.conflict.surgery import Surgery
from moteach.data.base import domain_of
from moteach.distributed import Ranks, local
from moteach.divergences.disagreement import OF_TEACHERS
from moteach.divergences.logprobs import chunked_token_logprobs
from moteach.divergences.measure import OF_TOPK
from moteach.gathering import join_stats
from moteach.objectives.balance import Balance, NoBalance, apply_balance
from moteach.objectives.base import BatchSize, Objective, Scored, token_weights, tokens_per_chunk
from moteach.objectives.by_teacher import OwnGradients, joined, shares
from moteach.objectives.gating import WEIGHT, Gating, columns_of
from moteach.objectives.mix import supervised_loss
from moteach.objectives.teaching import teaching_of
from moteach.objectives.token_weights import TokenWeighting, apply_token_weights, told_by
from moteach.sharding import anchor, blank_batch, nothing
from moteach.types import Head, LossOutput, RolloutBatch, Routing, Support


@dataclass(kw_only=True)
class Learner:
    """The student with everything that turns scored rollouts into its gradient.

    Two passes where they are needed: `measure` looks at all tokens of the batch without a gradient, token weights and balance
    make the final weight of each token out of it, and the objective is differentiated with these. Where nothing asks for a
    measurement the first pass is not made, and where the batch is one micro-batch it shares the student's forward.

    Of several ranks each has its own rows. They make equally many passes through the student, because its parameters are
    gathered in each, and look at the statistics of all rows before they weigh their own.
    """

    student: nn.Module
    """The root module; called with rollouts and a loss, see `moteach.students.Student`."""
    objective: Objective
    token_weights: Sequence[TokenWeighting] = ()
    balance: Balance = field(default_factory=NoBalance)
    micro_batch_size: int | None = None
    ranks: Ranks = field(default_factory=Ranks)

    @property
    def wanted(self) -> frozenset[str]:
        """Statistics that token weights, balance and the objective's credit read."""
        return self.balance.needs.union(self.credits, *(weighting.needs for weighting in self.token_weights))

    @property
    def credits(self) -> frozenset[str]:
        """Statistics of the whole batch that the objective makes its credit of."""
        return frozenset(getattr(self.objective, "credits", frozenset()))

    @property
    def weighs(self) -> bool:
        """Whether the batch must be looked at as a whole before the loss: for weights of tokens, or for credit."""
        return bool(self.token_weights) or bool(self.credits) or not isinstance(self.balance, NoBalance)

    def loss(self, scored: Scored, *, weigh: bool = True) -> LossOutput:
        """Computes the loss of a batch, accumulating the student's gradient where autograd is on.

        Args:
            scored: Rows whose `base_weights` sum to one over the global batch.
            weigh: Apply token weights and balance; without it the tokens have the weights they came with.

        Returns:
            The detached loss and the per-token statistics of the whole batch, in its packed order; `weight` is the final
            weight of each token.
        """
        if self.surgery is not None:
            return self._operated(scored, weigh=weigh)
        return self._accumulated(self.prepared(scored), weigh=weigh)

    def _accumulated(self, scored: Scored, *, weigh: bool) -> LossOutput:
        parts = self.micro_batches(len(scored.rollouts), scored.routing)
        weigh = weigh and self.weighs
        metrics: dict[str, float] = {}
        if weigh and (len(parts) > 1 or self.ranks.size > 1):
            measured = self._measured(scored)
            scored, metrics = self._weighed(scored, measured)
            scored = replace(scored, gate_weights=columns_of(measured, scored.routing, WEIGHT))
            weigh = False
        total = torch.zeros(())
        stats: dict[str, Tensor] = {}
        for rows in parts:
            kept = scored.kept(rows)
            if not bool(kept.any()):
                self._idle()
                continue
            part = scored if len(parts) == 1 else scored.select(rows)
            output = self.student(part.rollouts, partial(self._term, scored=part, weigh=weigh))
            if output.loss.requires_grad:
                output.loss.backward()
            total = total + output.loss.detach().to(total.dtype)
            metrics |= output.metrics
            for name, values in output.token_stats.items():
                stats.setdefault(name, values.new_zeros(len(kept)))[kept] = values
        return LossOutput(loss=total, denominator=1.0, token_stats=stats, metrics=metrics)

    @property
    def surgery(self) -> Surgery | None:
        """The resolver, if it makes one update of the teachers' gradients."""
        teaching = teaching_of(self.objective)
        return teaching.resolver if teaching is not None and isinstance(teaching.resolver, Surgery) else None

    def _operated(self, scored: Scored, *, weigh: bool) -> LossOutput:
        """The loss of each teacher by itself; where autograd is on, their gradients become one update."""
        surgery, teaching = self.surgery, teaching_of(self.objective)
        assert surgery is not None, "only for a resolver that combines"
        assert teaching is not None, "only for a resolver that combines"
        metrics: dict[str, float] = {}
        if weigh and self.weighs:
            scored, metrics = self._weighed(scored, self._measured(scored))
        parts, outputs, gradients = shares(scored, teaching.weights(scored)), [], OwnGradients(self.student)
        for part in parts:
            with gradients.of(part.teacher_id):
                outputs.append(self._accumulated(part.scored, weigh=False))
        metrics |= gradients.combine(surgery.combine)
        loss, stats = joined(parts, outputs, scored.rollouts.num_tokens)
        seen = {} if scored.stats is None else scored.stats
        stats |= {name: seen[name] for name in OF_TEACHERS if name in seen}
        stats["weight"] = scored.token_weights
        return LossOutput(loss=loss, denominator=1.0, token_stats=stats, metrics=metrics)

    def prepared(self, scored: Scored) -> Scored:
        """Adds what the objective needs to know about whole completions, once a batch."""
        prepare = getattr(self.objective, "prepared", None)
        return scored if prepare is None else cast(Scored, prepare(scored))

    def supervised(self, rollouts: RolloutBatch | None, weight: float) -> float:
        """Adds the gradient of weight * cross-entropy, averaged over sequences and their tokens; returns the loss.

        Args:
            rollouts: Answers that are taught; None where the prompts of this rank have none.
            weight: Of the term.
        """
        rollouts = RolloutBatch.from_rollouts([], pad_id=0) if rollouts is None else rollouts
        total = 0.0
        size = self.size_of(rollouts)
        weights = weight * token_weights(rollouts, "sequence_mean", size=size)
        rows_of = rollouts.token_rows
        for rows in self.micro_batches(len(rollouts)):
            kept = torch.isin(rows_of, torch.tensor(rows, dtype=torch.long))
            if not bool(kept.any()):
                self._idle()
                continue
            part = rollouts.select(rows)
            output: LossOutput = self.student(part, partial(supervised_loss, rollouts=part, weights=weights[kept]))
            output.loss.backward()  # type: ignore[no-untyped-call]
            total += float(output.loss.detach())
        return float(self.ranks.sum(torch.tensor(total, dtype=torch.float64)))

    def size_of(self, rollouts: RolloutBatch) -> BatchSize:
        """Counts the rows of all ranks."""
        own = BatchSize.of(rollouts)
        tokens, sequences = self.ranks.sum(torch.tensor([own.tokens, own.sequences])).tolist()
        return BatchSize(tokens=int(tokens), sequences=int(sequences))

    @torch.no_grad()
    def proximal_logprobs(self, rollouts: RolloutBatch) -> Float[Tensor, " packed"]:
        """Logprobs of the written tokens under the student as it is now."""

        def look(hidden: Tensor, head: Head, *, part: RolloutBatch) -> LossOutput:
            size = tokens_per_chunk(None, head)
            logprobs = chunked_token_logprobs(hidden, head, part.token_targets, chunk_size=size)
            return LossOutput(loss=torch.zeros(()), denominator=1.0, token_stats={"logprobs": logprobs})

        return self._collected(rollouts, lambda rows: partial(look, part=rollouts.select(rows)))["logprobs"]

    def diagnostics(self, scored: Scored, support: Support) -> dict[str, Float[Tensor, " packed"]]:
        """Looks once more at the batch, for how the likeliest tokens of student and target compare; trains nothing.

        Args:
            scored: The batch.
            support: What the teachers gave; without their whole distribution there is nothing to compare.

        Returns:
            The statistics `OF_TOPK` of `moteach.divergences.measure` with k = 16, those that the objective can measure.
        """
        wanted = self.objective.measurable(support) & {*OF_TOPK}
        if not wanted:
            return {}
        # dropout of this look must not move the noise of the step
        with torch.random.fork_rng():
            found = self._measured(self.prepared(scored), wanted)
        return {name: found[name] for name in OF_TOPK if name in found}

    def domain_gradients(self, scored: Scored) -> dict[str, float]:
        """Norm of the loss' gradient by each domain's own rows, and the cosine between each two (one backward a domain).

        The student's gradient is left empty. Negative cosines mean that domains pull against each other (CaMOPD, arXiv
        2605.27115, argues that they matter; Open-MOPD, arXiv 2608.19098, that they do not).
        """
        domains = [domain_of(rollout.prompt) for rollout in scored.rollouts.rollouts]
        vectors: dict[str, Tensor] = {}
        for name in sorted({name for names in self.ranks.gather(domains) for name in names}):
            self.student.zero_grad(set_to_none=True)
            self.loss(scored.select([row for row, domain in enumerate(domains) if domain == name]), weigh=False)
            grads = [local(p.grad).flatten() for p in self.student.parameters() if p.grad is not None]
            if grads:
                vectors[name] = torch.cat(grads)
        self.student.zero_grad(set_to_none=True)
        norms = {name: math.sqrt(self._dot(vector, vector)) for name, vector in vectors.items()}
        found = {f"gradient_norm/{name}": norm for name, norm in norms.items()}
        for left, right in combinations(vectors, 2):
            scale = max(norms[left] * norms[right], torch.finfo(torch.float32).tiny)
            found[f"gradient_cosine/{left}/{right}"] = self._dot(vectors[left], vectors[right]) / scale
        return found

    def _dot(self, left: Tensor, right: Tensor) -> float:
        """Inner product of two gradients of which every rank holds its part."""
        return float(self.ranks.sum((left.double() * right.double()).sum()))

    def micro_batches(self, rows: int, routing: Routing | None = None) -> list[list[int]]:
        """Splits the rows of a batch into ascending groups, as many on every rank: the last ones may be empty.

        Args:
            rows: Number of rows.
            routing: Of these rows: those of one teacher then come together, so that the head of each teacher, which may lie
                on the disk, is needed by as few micro-batches as can be (DeepSeek-V4, arXiv 2606.19348, section 5.2.2).
        """
        size = self.micro_batch_size or max(rows, 1)
        order = list(range(rows))
        if routing is not None and size < rows:
            order = routing.weights.argmax(dim=1).argsort(stable=True).tolist()
        parts = [sorted(order[begin : begin + size]) for begin in range(0, rows, size)]
        return parts + [[]] * (self.ranks.most(len(parts)) - len(parts))

    def _idle(self) -> None:
        """Runs the student on nothing while other ranks still have rows, since they gather its parameters together."""
        if self.ranks.size > 1:
            output: LossOutput = self.student(blank_batch(), nothing)
            if output.loss.requires_grad:
                output.loss.backward()  # type: ignore[no-untyped-call]

    def _term(self, hidden: Float[Tensor, "packed hidden"], head: Head, *, scored: Scored, weigh: bool) -> LossOutput:
        metrics: dict[str, float] = {}
        decided: dict[str, Tensor] = {}
        if (gating := Gating.of(self.objective)) is not None:
            scored = gating.decide(hidden, head, scored)
            decided = gating.stats(hidden, head, scored)
        if weigh:
            stats = self._look(hidden, head, scored, self.wanted)
            scored, metrics = self._weighed(scored, stats)
        output = self.objective(hidden, head, scored)
        if self.ranks.size > 1:
            output = replace(output, loss=output.loss + anchor(hidden, head))
        between = {
            name: scored.stats[name] for name in OF_TEACHERS if scored.stats is not None and name in scored.stats
        }
        stats = {**between, **output.token_stats, **decided, "weight": scored.token_weights}
        return replace(output, token_stats=stats, metrics={**output.metrics, **metrics})

    def _look(self, hidden: Tensor, head: Head, scored: Scored, wanted: frozenset[str]) -> dict[str, Tensor]:
        return self.objective.measure(hidden.detach(), head, scored, wanted) if wanted else self._known(scored)

    def _known(self, scored: Scored) -> dict[str, Tensor]:
        """What needs no look at the student."""
        return {"abstained": (~self.objective.taught(scored)).to(scored.base_weights.dtype)}

    def _measured(self, scored: Scored, wanted: frozenset[str] | None = None) -> dict[str, Tensor]:
        """Measures a batch that does not fit into one micro-batch."""
        wanted, gating = self.wanted if wanted is None else wanted, Gating.of(self.objective)
        if not wanted and gating is None:
            return self._known(scored)

        def look(hidden: Tensor, head: Head, *, part: Scored) -> LossOutput:
            decided: dict[str, Tensor] = {}
            if gating is not None:
                part = gating.decide(hidden, head, part)
                decided = gating.stats(hidden, head, part)
            found = {**self._look(hidden, head, part, wanted), **decided}
            return LossOutput(loss=torch.zeros(()), denominator=1.0, token_stats=found)

        with torch.no_grad():
            return self._collected(
                scored.rollouts, lambda rows: partial(look, part=scored.select(rows)), routing=scored.routing
            )

    def _collected(
        self,
        rollouts: RolloutBatch,
        look: Callable[[Sequence[int]], Callable[[Tensor, Head], LossOutput]],
        routing: Routing | None = None,
    ) -> dict[str, Tensor]:
        stats: dict[str, Tensor] = {}
        rows_of = rollouts.token_rows
        for rows in self.micro_batches(len(rollouts), routing):
            kept = torch.isin(rows_of, torch.tensor(rows, dtype=torch.long))
            if not bool(kept.any()):
                self._idle()
                continue
            output: LossOutput = self.student(rollouts.select(rows), look(rows))
            for name, values in output.token_stats.items():
                stats.setdefault(name, values.new_zeros(len(kept)))[kept] = values
        return stats

    def _weighed(self, scored: Scored, stats: Mapping[str, Tensor]) -> tuple[Scored, dict[str, float]]:
        """Gives every token its final weight, from what was measured on the whole batch."""
        rollouts, stats, base, mine = self._of_all_ranks(scored, stats)
        weighted = apply_token_weights(self.token_weights, rollouts, stats, base)
        final = apply_balance(self.balance, rollouts, stats, weighted.weights)
        metrics = {}
        if self.token_weights:
            metrics = {"token_weights/kept": weighted.kept_fraction, "token_weights/scale": weighted.scale}
            metrics |= told_by(self.token_weights, rollouts, stats)
        credit = cast(Any, self.objective).credit(rollouts, stats)[mine] if self.credits else None
        own = {name: values[mine] for name, values in stats.items()}
        return replace(scored, token_weights=final[mine], credit=credit, stats=own or None), metrics

    def _of_all_ranks(
        self, scored: Scored, stats: Mapping[str, Tensor]
    ) -> tuple[RolloutBatch, Mapping[str, Tensor], Tensor, slice]:
        """Rows, statistics and weights of all ranks one behind the other, and where this rank's tokens lie in them."""
        if self.ranks.size == 1:
            return scored.rollouts, stats, scored.base_weights, slice(None)
        parts = self.ranks.gather((scored.rollouts.rollouts, dict(stats), scored.base_weights))
        counts = [len(part[2]) for part in parts]
        start = sum(counts[: self.ranks.rank])
        return (
            RolloutBatch.from_rollouts([rollout for part in parts for rollout in part[0]], pad_id=0),
            join_stats([part[1] for part in parts], counts),
            torch.cat([part[2] for part in parts]),
            slice(start, start + counts[self.ranks.rank]),
        )
