"""Smooth another gate's decisions over the tokens of a completion: changing the teacher costs something."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from moteach.errors import ConfigError
from moteach.routing.base import Gate
from moteach.routing.context import GateContext
from moteach.types import Support


class SwitchPenaltyGate:
    """Reads a completion's teachers as a chain: P(z) in proportion to prod_t p_t(z_t) exp(-cost * [z_t != z_(t-1)]).

    p_t is what the inner gate says at token t. The weights are the marginals P(z_t = k), by forward-backward, or with
    `hard` the most probable sequence, by Viterbi (ties: the first). Cost 0 gives the inner gate's weights back. Where the inner
    gate abstains it still does, and such a token says nothing about its neighbours.

    Args:
        cost: Nats of one change of teacher, at least 0.
        inner: Name of the gate that is smoothed.
        inner_arguments: Changes to its arguments.
        hard: The most probable sequence instead of the marginals.
        trace: Write a row a token into `routing.parquet`.
        gate: The gate that `inner` names.

    Raises:
        ConfigError: The cost is negative or not finite.
    """

    per_token: ClassVar[bool] = True

    def __init__(
        self,
        *,
        gate: Gate,
        cost: float = 1.0,
        inner: str = "confidence",
        inner_arguments: Mapping[str, Any] | None = None,
        hard: bool = False,
        trace: bool = False,
    ) -> None:
        if not 0 <= cost < float("inf"):
            raise ConfigError(f"gate.cost: expected a finite number of at least 0, got {cost}")
        self.gate = gate
        self.needs: frozenset[str] = gate.needs
        self.supports: frozenset[Support] = gate.supports
        self.cost = cost
        self.inner = inner
        self.inner_arguments = dict(inner_arguments or {})
        self.hard = hard
        self.trace = trace

    @torch.no_grad()
    def weights(self, context: GateContext) -> Float[Tensor, "packed teacher"]:
        """Asks the inner gate and smooths each completion."""
        given = self.gate.weights(context).double()
        mask = context.rollouts.loss_mask
        lengths = mask.sum(dim=1)
        if not len(given) or given.shape[1] == 0:
            return given.float()
        silent = given.sum(-1) == 0
        evidence = torch.where(silent.unsqueeze(-1), torch.ones_like(given), given)
        inside = torch.arange(int(lengths.max())) < lengths.unsqueeze(1)
        emissions = torch.zeros(*inside.shape, given.shape[1], dtype=torch.float64)
        emissions[inside] = evidence.log()
        found = best_path(emissions, inside, self.cost) if self.hard else marginals(emissions, inside, self.cost)
        return (found[inside] * context.candidates).masked_fill(silent.unsqueeze(-1), 0.0).float()


def marginals(
    emissions: Float[Tensor, "batch token teacher"], inside: Bool[Tensor, "batch token"], cost: float
) -> Float[Tensor, "batch token teacher"]:
    """Marginals of the chain with a price `cost` on each change, by forward-backward in log space.

    Args:
        emissions: log p_t(k); 0 outside of a sequence. Every token has a finite entry.
        inside: True for the tokens of each right-padded sequence.
        cost: Nats of a change.
    """
    steps = _transitions(emissions, cost)
    length = emissions.shape[1]
    forward = [emissions[:, 0]]
    for t in range(1, length):
        forward.append(torch.logsumexp(forward[-1].unsqueeze(-1) + steps, dim=1) + emissions[:, t])
    backward = [torch.zeros_like(emissions[:, 0])]
    for t in range(length - 1, 0, -1):
        arriving = torch.logsumexp(steps + (emissions[:, t] + backward[-1]).unsqueeze(1), dim=-1)
        # nothing comes after the last token of a shorter sequence
        backward.append(torch.where(inside[:, t].unsqueeze(-1), arriving, torch.zeros_like(arriving)))
    joint = torch.stack(forward, dim=1) + torch.stack(backward[::-1], dim=1)
    return joint.softmax(-1)


def best_path(
    emissions: Float[Tensor, "batch token teacher"], inside: Bool[Tensor, "batch token"], cost: float
) -> Float[Tensor, "batch token teacher"]:
    """Most probable sequence of the chain of `marginals`, one-hot, by Viterbi."""
    steps = _transitions(emissions, cost)
    length, teachers = emissions.shape[1], emissions.shape[2]
    best, came_from = emissions[:, 0], []
    stay = torch.arange(teachers).expand(len(emissions), teachers)
    for t in range(1, length):
        value, origin = (best.unsqueeze(-1) + steps).max(dim=1)
        here = inside[:, t].unsqueeze(-1)
        best = torch.where(here, value + emissions[:, t], best)
        came_from.append(torch.where(here, origin, stay))
    state = best.argmax(-1)
    path = [state]
    for origin in reversed(came_from):
        state = origin.gather(-1, state.unsqueeze(-1)).squeeze(-1)
        path.append(state)
    return torch.nn.functional.one_hot(torch.stack(path[::-1], dim=1), teachers).to(emissions.dtype)


def _transitions(emissions: Tensor, cost: float) -> Tensor:
    teachers = emissions.shape[-1]
    return -cost * (1.0 - torch.eye(teachers, dtype=emissions.dtype)).unsqueeze(0)
