"""The protocols of routing and what every router shares."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from moteach.catalogue.spec import ExpertSpec
from moteach.errors import ConfigError
from moteach.routing.context import GateContext
from moteach.types import Evidence, Prompt, ReliabilityTable, RolloutBatch, Routing, Support

Ask = Callable[[RolloutBatch, Routing], Evidence]
"""Asks the teachers that a routing names about its rows; answers with the logprob of each written token (`sampled`)."""


@runtime_checkable
class Router(Protocol):
    """Decides which teachers grade which row, before any teacher is asked."""

    def bind(self, experts: Sequence[ExpertSpec]) -> None:
        """Tells the router which experts take part, in teacher order; called once before `route`."""
        ...

    def route(self, prompts: Sequence[Prompt], rollouts: RolloutBatch | None = None) -> Routing:
        """Weights the teachers of each row.

        Args:
            prompts: One prompt a row.
            rollouts: The completions of these rows, for a router that looks at them.
        """
        ...

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint must hold so that the router continues exactly."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores `state_dict`."""
        ...


@runtime_checkable
class AskingRouter(Protocol):
    """A router that wants to hear teachers before it decides; what they say is not paid for a second time."""

    @property
    def needs(self) -> frozenset[str]:
        """`evidence` where `bind_teachers` has to be called before `route`; `rewards` where prompts need a verifier."""
        ...

    def bind_teachers(self, ask: Ask) -> None:
        """Hands over how teachers are asked; called once, after `bind`."""
        ...


@runtime_checkable
class ReliabilityReader(Protocol):
    """A router that reads how often each teacher has been right; its `needs` name `reliability`."""

    def bind_reliability(self, table: ReliabilityTable) -> None:
        """Hands over the record that the run's teacher gate keeps; called once, after `bind`."""
        ...


@dataclass(frozen=True, kw_only=True)
class RoutingFeedback:
    """What came of one step's routes: the verified rewards, never the distillation loss."""

    step: int
    rollouts: RolloutBatch
    """The very batch that `route` saw."""
    routing: Routing
    rewards: tuple[float, ...]
    """Verified score of each row, NaN where there is no verifier."""


@runtime_checkable
class ObservingRouter(Protocol):
    """A router that learns while the student is trained."""

    def observe(self, feedback: RoutingFeedback) -> None:
        """Learns from one step, after its update and before the checkpoint."""
        ...


@runtime_checkable
class Gate(Protocol):
    """Weights the teachers of each trained token, within what the router let through.

    A gate decides once a step, before the loss and without a gradient: its weights are a constant of the loss, so no gate is
    trained by the distillation loss.
    """

    needs: frozenset[str]
    """What it looks at: `teachers` and `references` (their whole distributions), `student` (its hidden states and head)."""
    supports: frozenset[Support]
    """Kinds of evidence it can read."""
    per_token: bool
    """False for a gate that repeats the router's weights: nothing is measured or kept for it."""
    trace: bool
    """Whether its decisions are written, a row a token."""

    def weights(self, context: GateContext) -> Float[Tensor, "packed teacher"]:
        """Returns non-negative weights per packed token that sum to one, or are all zero where it abstains."""
        ...


def routing_of(
    experts: Sequence[ExpertSpec], prompts: Sequence[Prompt], weights: Float[Tensor, "batch teacher"]
) -> Routing:
    """Normalises raw row weights into a `Routing`; a row of zeros is an abstention.

    Confidence is the largest normalised weight of the row, and 0 where abstained.

    Raises:
        ConfigError: When a weight is negative or not finite.
    """
    if not bool(torch.isfinite(weights).all()) or bool((weights < 0).any()):
        raise ConfigError(
            "expected finite, non-negative router weights, got a negative or non-finite one; the pool of teachers would "
            "not be a distribution. Check `experts.<name>.weight`"
        )
    total = weights.sum(dim=1, keepdim=True)
    abstained = total.squeeze(1) == 0
    normalised = weights / torch.where(total == 0, torch.ones_like(total), total)
    return Routing(
        teacher_ids=tuple(expert.name for expert in experts),
        prompt_ids=tuple(prompt.prompt_id for prompt in prompts),
        weights=normalised,
        confidence=normalised.amax(dim=1) if normalised.shape[1] else torch.zeros(len(prompts)),
        abstained=abstained,
    )
