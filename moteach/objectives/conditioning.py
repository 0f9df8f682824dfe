"""Conditions the routed teachers on what is known to be right about each prompt, before any of them scores the student."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from moteach.conflict.posterior import Conditioned
from moteach.distributed import ALONE, Ranks
from moteach.types import Evidence, Prompt, Rollout, RolloutBatch, Routing

FULL_REWARD = 1.0
Ask = Callable[[RolloutBatch, Routing], Evidence]
"""Asks the teachers that a routing names for the logprobs of the written tokens (`sampled`)."""


@dataclass(frozen=True, kw_only=True)
class Conditioning:
    """Lets the teachers score a right answer of each prompt, and weights them by what they give it.

    A right answer is the prompt's own where the data has one, else the first completion of the step that was verified in
    full. Prompts with neither keep the weights of the router.
    """

    resolver: Conditioned
    answers: Callable[[Sequence[Prompt]], RolloutBatch | None]
    """Writes the prompts' own answers as completions."""

    def __call__(
        self, rollouts: RolloutBatch, routing: Routing, rewards: Sequence[float], *, ask: Ask, ranks: Ranks = ALONE
    ) -> tuple[Routing, dict[str, float]]:
        """Reweights the rows of a step.

        Args:
            rollouts: What the student wrote.
            routing: Who would teach it.
            rewards: A verified score a row, NaN without a verifier.
            ask: How teachers are asked.
            ranks: The processes with a share of the step; where one asks, all do.

        Returns:
            The routing, and `posterior/known` (share of rows with a right answer), `posterior/ignorant` (share of rows that
            lost their last teacher) and `posterior/teachers` (mean number of teachers left, exp of the entropy of the weights);
            the routing itself and nothing where no row has two teachers.
        """
        weights = routing.weights
        if not ranks.any(bool(((weights > 0).sum(dim=1) > 1).any())):
            # one teacher a row is nothing to choose from, and asking it would cost a forward
            return routing, {}
        share = 0.0
        known = self._right(rollouts, rewards)
        if ranks.any(len(known) > 0):
            totals, lengths = self._scored(known, rollouts, routing, ask)
            weights = self.resolver.condition(weights, totals, lengths)
            share = float((lengths > 0).double().mean())
        closed = (weights.sum(dim=1) == 0) & ~routing.abstained
        confidence = weights.amax(dim=1)
        taught = weights[weights.sum(dim=1) > 0].double()
        left = float((-torch.xlogy(taught, taught).sum(dim=1)).exp().mean()) if len(taught) else 0.0
        metrics = {
            "posterior/known": share,
            "posterior/ignorant": float(closed.double().mean()),
            "posterior/teachers": left,
        }
        conditioned = replace(
            routing,
            weights=weights,
            abstained=routing.abstained | closed,
            confidence=confidence.masked_fill(closed, 0.0),
        )
        return conditioned, metrics

    def _right(self, rollouts: RolloutBatch, rewards: Sequence[float]) -> RolloutBatch:
        """One right completion of each prompt that has one."""
        gold = self.answers([rollout.prompt for rollout in rollouts.rollouts])
        found: dict[str, Rollout] = {} if gold is None else {row.prompt.prompt_id: row for row in gold.rollouts}
        for rollout, reward in zip(rollouts.rollouts, rewards, strict=True):
            if reward >= FULL_REWARD:
                found.setdefault(rollout.prompt.prompt_id, rollout)
        return RolloutBatch.from_rollouts(list(found.values()), pad_id=0)

    def _scored(
        self, known: RolloutBatch, rollouts: RolloutBatch, routing: Routing, ask: Ask
    ) -> tuple[Float[Tensor, "batch teacher"], Int[Tensor, " batch"]]:
        """Log-likelihood of the right answer of each row's prompt under each of its teachers, and its length."""
        place = {rollout.prompt.prompt_id: row for row, rollout in enumerate(known.rollouts)}
        wanted = torch.zeros((len(known), routing.weights.shape[1]), dtype=routing.weights.dtype)
        of_row = torch.tensor([place.get(name, -1) for name in routing.prompt_ids])
        has = of_row >= 0
        # rows of one prompt may be routed differently, by a router that looks at completions
        wanted.index_add_(0, of_row[has], routing.weights[has])
        evidence = ask(
            known,
            Routing(
                teacher_ids=routing.teacher_ids,
                prompt_ids=tuple(rollout.prompt.prompt_id for rollout in known.rollouts),
                weights=wanted,
                confidence=torch.ones(len(known)),
                abstained=wanted.sum(dim=1) == 0,
            ),
        )
        if not len(known):
            return torch.full_like(routing.weights, -math.inf), torch.zeros(len(has), dtype=torch.long)
        lengths = known.loss_mask.sum(dim=1)
        sums = torch.full(wanted.shape, -math.inf, dtype=torch.float64)
        for entry in evidence.teachers:
            assert entry.sampled_logprobs is not None, "asked for the logprobs of the written tokens"
            rows = known.token_rows[entry.tokens]
            total = torch.zeros(len(known), dtype=torch.float64)
            total.index_add_(0, rows, entry.sampled_logprobs.double().cpu())
            # the logprob of a part of an answer would make its teacher seem to know it better
            whole = (torch.bincount(rows, minlength=len(known)) == lengths) & (lengths > 0)
            sums[:, routing.teacher_ids.index(entry.teacher_id)] = total.masked_fill(~whole, -math.inf)
        totals = torch.where(has.unsqueeze(1), sums[of_row.clamp(min=0)], -math.inf)
        return totals.to(routing.weights.dtype), torch.where(has, lengths[of_row.clamp(min=0)], 0)
