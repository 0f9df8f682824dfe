"""Token gates: weights per trained token, within the teachers that the router let through."""

from __future__ import annotations

from typing import ClassVar

from jaxtyping import Float
from torch import Tensor

from moteach.routing.context import GateContext
from moteach.types import Support


class PromptGate:
    """Repeats the router's weights of a row on each of its tokens: routing per prompt, no token-level choice.

    Args:
        trace: Write a row a token into `routing.parquet`.
    """

    needs: ClassVar[frozenset[str]] = frozenset()
    supports: ClassVar[frozenset[Support]] = frozenset({"full", "topk", "sampled"})
    per_token: ClassVar[bool] = False

    def __init__(self, *, trace: bool = False) -> None:
        self.trace = trace

    def weights(self, context: GateContext) -> Float[Tensor, "packed teacher"]:
        """Broadcasts row weights to packed tokens."""
        return context.prior
