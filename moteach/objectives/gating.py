"""A token gate inside a step: it looks once, before the loss, and its decisions travel as per-token values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from moteach.objectives.base import Scored, tokens_per_chunk
from moteach.routing.base import Gate
from moteach.routing.context import GateContext
from moteach.tracking.token_rows import TokenTrace
from moteach.types import Head, RolloutBatch, Routing

WEIGHT = "gate_weight/"
"""Before a teacher's name: its weight at each token."""
LOGPROB = "gate_logprob/"
"""Before a teacher's name: the logprob it gives to the written token, NaN where it was not asked; with `gate.trace`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Gating:
    """A gate that decides per token; does nothing for one that repeats the router's weights."""

    gate: Gate

    @classmethod
    def of(cls, objective: object) -> Gating | None:
        """The gating that an objective asks for, None where the router's weights are repeated and nothing is traced."""
        gate = getattr(getattr(objective, "teaching", None), "gate", None)
        return None if gate is None or not (gate.per_token or gate.trace) else cls(gate=gate)

    @torch.no_grad()
    def decide(self, hidden: Float[Tensor, "packed hidden"], head: Head, scored: Scored) -> Scored:
        """Asks the gate, unless it has decided already; no gradient goes through it."""
        if scored.gate_weights is not None:
            return scored
        return replace(scored, gate_weights=self.gate.weights(self.context(hidden, head, scored)))

    def context(self, hidden: Float[Tensor, "packed hidden"], head: Head, scored: Scored) -> GateContext:
        """What the gate may look at."""
        detached = replace(head, weight=head.weight.detach(), bias=None if head.bias is None else head.bias.detach())
        return GateContext(
            rollouts=scored.rollouts,
            routing=scored.routing,
            evidence=scored.evidence,
            student_hidden=hidden.detach(),
            student_head=detached,
            references=scored.references,
            chunk_size=tokens_per_chunk(None, head),
        )

    def stats(self, hidden: Float[Tensor, "packed hidden"], head: Head, scored: Scored) -> dict[str, Tensor]:
        """The decisions as per-token values by name, and with `trace` what each teacher gives to the written token."""
        assert scored.gate_weights is not None
        names = scored.routing.teacher_ids
        found = {f"{WEIGHT}{name}": scored.gate_weights[:, column] for column, name in enumerate(names)}
        if self.gate.trace:
            written = self.context(hidden, head, scored).written()
            written = written.masked_fill(written == float("-inf"), float("nan"))
            found |= {f"{LOGPROB}{name}": written[:, column] for column, name in enumerate(names)}
        return found


def columns_of(
    stats: Mapping[str, Float[Tensor, " packed"]], routing: Routing, prefix: str
) -> Float[Tensor, "packed teacher"] | None:
    """Puts per-token values back side by side, in the order of the routing's teachers; None where there are none."""
    names = [f"{prefix}{name}" for name in routing.teacher_ids]
    return torch.stack([stats[name] for name in names], dim=1) if names and names[0] in stats else None


def trace_of(stats: Mapping[str, Float[Tensor, " packed"]], routing: Routing) -> TokenTrace | None:
    """What `gate.trace` writes of a step; None without it, or where no step was taken."""
    weights, logprobs = (columns_of(stats, routing, prefix) for prefix in (WEIGHT, LOGPROB))
    return None if weights is None or logprobs is None else TokenTrace(weights=weights, logprobs=logprobs)


def gate_metrics(
    rollouts: RolloutBatch, routing: Routing, stats: Mapping[str, Float[Tensor, " packed"]]
) -> dict[str, float]:
    """Summarises what a token gate decided in a step.

    Returns:
        `routing/switch_rate`: share of the pairs of neighbouring taught tokens of a completion whose heaviest teacher differs
        (0 where the router's weights are repeated); for a gate that decides, also `routing/gate_entropy` (mean over the taught
        tokens, nats), `routing/gate_load/<expert>` (mean weight over all tokens) and `routing/gate_abstain` (share of tokens
        that a teacher was let through for and that nobody teaches).
    """
    weights = columns_of(stats, routing, WEIGHT)
    if weights is None or not len(weights):
        return {"routing/switch_rate": 0.0}
    weights = weights.double()
    taught, chosen, rows = weights.sum(dim=1) > 0, weights.argmax(dim=1), rollouts.token_rows
    pairs = taught[1:] & taught[:-1] & (rows[1:] == rows[:-1])
    let_through = routing.weights[rows].sum(dim=1) > 0
    entropy = -torch.xlogy(weights, weights).sum(dim=1)[taught]
    load = weights.mean(dim=0)
    return {
        "routing/switch_rate": float((chosen[1:] != chosen[:-1])[pairs].double().sum() / max(int(pairs.sum()), 1)),
        "routing/gate_entropy": float(entropy.sum() / max(len(entropy), 1)),
        "routing/gate_abstain": float((let_through & ~taught).double().sum() / max(int(let_through.sum()), 1)),
        **{f"routing/gate_load/{name}": float(load[column]) for column, name in enumerate(routing.teacher_ids)},
    }
