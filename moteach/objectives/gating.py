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
from moteach.types import Head, Routing

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
