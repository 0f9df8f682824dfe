"""One look at a batch through the student: measure, weigh the tokens, forward and backward, micro-batch by micro-batch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import combinations
from typing import Any, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn

from moteach.data.base import domain_of
from moteach.divergences.disagreement import OF_TEACHERS
from moteach.divergences.logprobs import chunked_token_logprobs
from moteach.objectives.balance import Balance, NoBalance, apply_balance
from moteach.objectives.base import Objective, Scored, token_weights, tokens_per_chunk
from moteach.objectives.gating import WEIGHT, Gating, columns_of
from moteach.objectives.mix import supervised_loss
from moteach.objectives.token_weights import TokenWeighting, apply_token_weights
from moteach.types import Head, LossOutput, RolloutBatch


@dataclass(kw_only=True)
class Learner:
    """The student with everything that turns scored rollouts into its gradient.

    Two passes where they are needed: `measure` looks at all tokens of the batch without a gradient, token weights and balance
    make the final weight of each token out of it, and the objective is differentiated with these. Where nothing asks for a
    measurement the first pass is not made, and where the batch is one micro-batch it shares the student's forward.
    """

    student: nn.Module
    """The root module; called with rollouts and a loss, see `moteach.students.Student`."""
    objective: Objective
    token_weights: Sequence[TokenWeighting] = ()
    balance: Balance = field(default_factory=NoBalance)
    micro_batch_size: int | None = None

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
        parts = self.micro_batches(len(scored.rollouts))
        weigh = weigh and self.weighs
        metrics: dict[str, float] = {}
        if weigh and len(parts) > 1:
            measured = self._measured(scored)
            scored, metrics = self._weighed(scored, measured)
            scored = replace(scored, gate_weights=columns_of(measured, scored.routing, WEIGHT))
            weigh = False
        total = torch.zeros(())
        stats: dict[str, Tensor] = {}
        for rows in parts:
            kept = scored.kept(rows)
            if not bool(kept.any()):
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

    def supervised(self, rollouts: RolloutBatch, weight: float) -> float:
        """Adds the gradient of weight * cross-entropy, averaged over sequences and their tokens; returns the loss."""
        total = 0.0
        weights = weight * token_weights(rollouts, "sequence_mean")
        rows_of = rollouts.token_rows
        for rows in self.micro_batches(len(rollouts)):
            kept = (rows_of >= rows.start) & (rows_of < rows.stop)
            part = rollouts.select(rows)
            output: LossOutput = self.student(part, partial(supervised_loss, rollouts=part, weights=weights[kept]))
            output.loss.backward()  # type: ignore[no-untyped-call]
            total += float(output.loss.detach())
        return total

    @torch.no_grad()
    def proximal_logprobs(self, rollouts: RolloutBatch) -> Float[Tensor, " packed"]:
        """Logprobs of the written tokens under the student as it is now."""

        def look(hidden: Tensor, head: Head, *, part: RolloutBatch) -> LossOutput:
            size = tokens_per_chunk(None, head)
            logprobs = chunked_token_logprobs(hidden, head, part.token_targets, chunk_size=size)
            return LossOutput(loss=torch.zeros(()), denominator=1.0, token_stats={"logprobs": logprobs})

        return self._collected(rollouts, lambda rows: partial(look, part=rollouts.select(rows)))["logprobs"]

    def domain_gradients(self, scored: Scored) -> dict[str, float]:
        """Norm of the loss' gradient by each domain's own rows, and the cosine between each two (one backward a domain).

        The student's gradient is left empty. Negative cosines mean that domains pull against each other (CaMOPD, arXiv
        2605.27115, argues that they matter; Open-MOPD, arXiv 2608.19098, that they do not).
        """
        domains = [domain_of(rollout.prompt) for rollout in scored.rollouts.rollouts]
        vectors: dict[str, Tensor] = {}
        for name in sorted(set(domains)):
            self.student.zero_grad(set_to_none=True)
            self.loss(scored.select([row for row, domain in enumerate(domains) if domain == name]), weigh=False)
            grads = [p.grad.flatten() for p in self.student.parameters() if p.grad is not None]
            if grads:
                vectors[name] = torch.cat(grads)
        self.student.zero_grad(set_to_none=True)
        found = {f"gradient_norm/{name}": float(vector.norm()) for name, vector in vectors.items()}
        for left, right in combinations(vectors, 2):
            cosine = torch.nn.functional.cosine_similarity(vectors[left], vectors[right], dim=0)
            found[f"gradient_cosine/{left}/{right}"] = float(cosine)
        return found

    def micro_batches(self, rows: int) -> list[range]:
        """Splits the rows of a batch into consecutive ranges."""
        size = self.micro_batch_size or max(rows, 1)
        return [range(begin, min(begin + size, rows)) for begin in range(0, rows, size)]

    def _term(self, hidden: Float[Tensor, "packed hidden"], head: Head, *, scored: Scored, weigh: bool) -> LossOutput:
        metrics: dict[str, float] = {}
        decided: dict[str, Tensor] = {}
        if (gating := Gating.of(self.objective)) is not None:
            scored = gating.decide(hidden, head, scored)
            decided = gating.stats(hidden, head, scored)
        if weigh:
            stats = self._look(hidden, head, scored) if self.wanted else self._known(scored)
            scored, metrics = self._weighed(scored, stats)
        output = self.objective(hidden, head, scored)
        between = {
            name: scored.stats[name] for name in OF_TEACHERS if scored.stats is not None and name in scored.stats
        }
        stats = {**between, **output.token_stats, **decided, "weight": scored.token_weights}
        return replace(output, token_stats=stats, metrics={**output.metrics, **metrics})

    def _look(self, hidden: Tensor, head: Head, scored: Scored) -> dict[str, Tensor]:
        return self.objective.measure(hidden.detach(), head, scored, self.wanted)

    def _known(self, scored: Scored) -> dict[str, Tensor]:
        """What needs no look at the student."""
        return {"abstained": (~self.objective.taught(scored)).to(scored.base_weights.dtype)}

    def _measured(self, scored: Scored) -> dict[str, Tensor]:
        """Measures a batch that does not fit into one micro-batch."""
        gating = Gating.of(self.objective)
        if not self.wanted and gating is None:
            return self._known(scored)

        def look(hidden: Tensor, head: Head, *, part: Scored) -> LossOutput:
            decided: dict[str, Tensor] = {}
            if gating is not None:
                part = gating.decide(hidden, head, part)
                decided = gating.stats(hidden, head, part)
            found = {**(self._look(hidden, head, part) if self.wanted else self._known(part)), **decided}
            return LossOutput(loss=torch.zeros(()), denominator=1.0, token_stats=found)

        with torch.no_grad():
            return self._collected(scored.rollouts, lambda rows: partial(look, part=scored.select(rows)))

    def _collected(
        self, rollouts: RolloutBatch, look: Callable[[range], Callable[[Tensor, Head], LossOutput]]
    ) -> dict[str, Tensor]:
        stats: dict[str, Tensor] = {}
        rows_of = rollouts.token_rows
        for rows in self.micro_batches(len(rollouts)):
            kept = (rows_of >= rows.start) & (rows_of < rows.stop)
            if not bool(kept.any()):
                continue
            output: LossOutput = self.student(rollouts.select(rows), look(rows))
            for name, values in output.token_stats.items():
                stats.setdefault(name, values.new_zeros(len(kept)))[kept] = values
        return stats

    def _weighed(self, scored: Scored, stats: Mapping[str, Tensor]) -> tuple[Scored, dict[str, float]]:
        """Gives every token its final weight, from what was measured on the whole batch."""
        weighted = apply_token_weights(self.token_weights, scored.rollouts, stats, scored.base_weights)
        final = apply_balance(self.balance, scored.rollouts, stats, weighted.weights)
        metrics = {}
        if self.token_weights:
            metrics = {"token_weights/kept": weighted.kept_fraction, "token_weights/scale": weighted.scale}
        credit = cast(Any, self.objective).credit(scored.rollouts, stats) if self.credits else None
        return replace(scored, token_weights=final, credit=credit, stats=stats or None), metrics
