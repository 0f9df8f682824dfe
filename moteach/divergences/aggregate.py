"""Divergences of several teachers summed instead of one to a pool: the loss-space half of the kernel."""

from __future__ import annotations

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class Compared:
    """The student against one target, or the weighted sum of that over several."""

    value: Float[Tensor, " token"]
    """Nats."""
    gradient: Float[Tensor, "token vocab"]
    """Derivative of the value with respect to the student's logits."""
    masses: dict[str, Float[Tensor, " token"]]
    """Probabilities of the support, for a divergence that reads only a part of the vocabulary; else empty."""


class WeightedSum:
    """sum_k w_k of what `Compared` holds, one teacher after the other, in place; no teacher's gradient outlives the next."""

    def __init__(self) -> None:
        self._sum: Compared | None = None

    def add(self, compared: Compared, weights: Float[Tensor, " token"]) -> None:
        """Adds one teacher; owns what it is given from here on. Every token must give it a positive weight."""
        compared.gradient.mul_(weights.unsqueeze(-1))
        value = compared.value * weights
        masses = {name: mass * weights for name, mass in compared.masses.items()}
        if self._sum is None:
            self._sum = Compared(value=value, gradient=compared.gradient, masses=masses)
            return
        self._sum = Compared(
            value=self._sum.value + value,
            gradient=self._sum.gradient.add_(compared.gradient),
            masses={name: self._sum.masses[name] + mass for name, mass in masses.items()},
        )

    def finish(self) -> Compared:
        """Returns the sum; called after at least one `add`."""
        assert self._sum is not None, "finish() before add()"
        return self._sum
