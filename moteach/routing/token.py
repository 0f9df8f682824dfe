"""Token gates: weights per trained token, within the teachers that the router let through."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from moteach.types import RolloutBatch, Routing


class PromptGate:
    """Repeats the router's weights of a row on each of its tokens: routing per prompt, no token-level choice."""

    def weights(self, rollouts: RolloutBatch, routing: Routing) -> Float[Tensor, "packed teacher"]:
        """Broadcasts row weights to packed tokens."""
        return routing.weights.to(rollouts.input_ids.device)[rollouts.token_rows]
