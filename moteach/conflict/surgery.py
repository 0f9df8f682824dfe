"""Gradient surgery in a run: each teacher's loss has a gradient of its own, and one update is made of them.

A teacher's loss is its share of the sum, sum_t w_t w_tk loss(student_t, q_tk), on the tokens to which it has weight, whatever
the objective makes of one teacher. The updates have the scale of the gradient of the whole sum: three of the four functions of
`moteach.conflict.gradients` are means, and are multiplied by the number of teachers here. Token weights and balance that look
at a target see the linear pool.

The cost is one forward and backward a teacher, over the rows in which it teaches, and a copy of the gradient a teacher.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Protocol, runtime_checkable

from jaxtyping import Float
from torch import Tensor

from moteach.conflict.base import Accumulator
from moteach.conflict.gradients import cagrad, mgda, pcgrad, sign_vote
from moteach.conflict.pools import Linear
from moteach.errors import ConfigError
from moteach.types import Support

_ALL: frozenset[Support] = frozenset({"full", "topk", "sampled"})


@runtime_checkable
class Surgery(Protocol):
    """A resolver that makes one update of the gradients of several teachers."""

    def combine(self, gradients: Float[Tensor, "teacher parameter"]) -> Float[Tensor, " parameter"]:
        """Returns the update, on the scale of the sum of the gradients.

        Args:
            gradients: One row a teacher that took part in the batch.
        """


@dataclass(frozen=True, kw_only=True)
class PCGrad:
    """Each teacher's gradient is projected off every one that it opposes; their sum (arXiv 2001.06782).

    Teachers are taken in the order of the config instead of a random one: from three on the result depends on it.
    """

    name: ClassVar[str] = "pcgrad"
    supports: ClassVar[frozenset[Support]] = _ALL
    needs: ClassVar[frozenset[str]] = frozenset()
    streams: ClassVar[bool] = True
    aggregates: ClassVar[bool] = True

    def combine(self, gradients: Float[Tensor, "teacher parameter"]) -> Float[Tensor, " parameter"]:
        """See `moteach.conflict.gradients.pcgrad`."""
        return pcgrad(gradients)

    def accumulator(self, **context: Tensor) -> Accumulator:
        """Starts a linear pool, for statistics; it holds one distribution."""
        return Linear().accumulator()

    def resolve_sampled(
        self, sampled_logprobs: Float[Tensor, "packed teacher"], weights: Float[Tensor, "packed teacher"]
    ) -> Float[Tensor, " packed"]:
        """The linear pool's logprob of the written token, for statistics."""
        return Linear().resolve_sampled(sampled_logprobs, weights)


@dataclass(frozen=True, kw_only=True)
class MGDA:
    """The point of least norm in the convex hull of the gradients, times the number of teachers (arXiv 1810.04650).

    It lowers every teacher's loss, and stops where none can be lowered without another's rising. It leans to short gradients: a
    teacher with few tokens, or one that is nearly learned, decides the step.
    """

    name: ClassVar[str] = "mgda"
    supports: ClassVar[frozenset[Support]] = _ALL
    needs: ClassVar[frozenset[str]] = frozenset()
    streams: ClassVar[bool] = True
    aggregates: ClassVar[bool] = True

    def combine(self, gradients: Float[Tensor, "teacher parameter"]) -> Float[Tensor, " parameter"]:
        """See `moteach.conflict.gradients.mgda`."""
        return len(gradients) * mgda(gradients)

    def accumulator(self, **context: Tensor) -> Accumulator:
        """Starts a linear pool, for statistics; it holds one distribution."""
        return Linear().accumulator()

    def resolve_sampled(
        self, sampled_logprobs: Float[Tensor, "packed teacher"], weights: Float[Tensor, "packed teacher"]
    ) -> Float[Tensor, " packed"]:
        """The linear pool's logprob of the written token, for statistics."""
        return Linear().resolve_sampled(sampled_logprobs, weights)


@dataclass(frozen=True, kw_only=True)
class CAGrad:
    """Near the mean gradient, the direction that helps the worst teacher most, times their number (arXiv 2110.14048).

    Args:
        c: Radius in norms of the mean gradient, in [0, 1); 0 is the sum of the gradients.
        rescale: Divide by 1 + c^2, as the authors' code and LibMTL do; teachers that agree then move (1 + c) / (1 + c^2) times
            their sum, and 1 + c times without it.

    Raises:
        ConfigError: c is out of range.
    """

    name: ClassVar[str] = "cagrad"
    supports: ClassVar[frozenset[Support]] = _ALL
    needs: ClassVar[frozenset[str]] = frozenset()
    streams: ClassVar[bool] = True
    aggregates: ClassVar[bool] = True
    c: float = 0.5
    rescale: bool = True

    def __post_init__(self) -> None:
        if not 0 <= self.c < 1:
            raise ConfigError(
                f"conflict.c: expected a radius from 0 to below 1, got {self.c}; from 1 on the direction may vanish "
                "or point away from the mean gradient"
            )

    def combine(self, gradients: Float[Tensor, "teacher parameter"]) -> Float[Tensor, " parameter"]:
        """See `moteach.conflict.gradients.cagrad`."""
        return len(gradients) * cagrad(gradients, c=self.c, rescale=self.rescale)

    def accumulator(self, **context: Tensor) -> Accumulator:
        """Starts a linear pool, for statistics; it holds one distribution."""
        return Linear().accumulator()

    def resolve_sampled(
        self, sampled_logprobs: Float[Tensor, "packed teacher"], weights: Float[Tensor, "packed teacher"]
    ) -> Float[Tensor, " packed"]:
        """The linear pool's logprob of the written token, for statistics."""
        return Linear().resolve_sampled(sampled_logprobs, weights)


@dataclass(frozen=True, kw_only=True)
class SignVote:
    """Each teacher votes with its sign on each parameter; the sum of the gradients that won (GOVERN, arXiv 2405.03764).

    What is made of the winners is ours. A tie, as of two teachers that differ, moves nothing.
    """

    name: ClassVar[str] = "sign_vote"
    supports: ClassVar[frozenset[Support]] = _ALL
    needs: ClassVar[frozenset[str]] = frozenset()
    streams: ClassVar[bool] = True
    aggregates: ClassVar[bool] = True

    def combine(self, gradients: Float[Tensor, "teacher parameter"]) -> Float[Tensor, " parameter"]:
        """See `moteach.conflict.gradients.sign_vote`."""
        return len(gradients) * sign_vote(gradients)

    def accumulator(self, **context: Tensor) -> Accumulator:
        """Starts a linear pool, for statistics; it holds one distribution."""
        return Linear().accumulator()

    def resolve_sampled(
        self, sampled_logprobs: Float[Tensor, "packed teacher"], weights: Float[Tensor, "packed teacher"]
    ) -> Float[Tensor, " packed"]:
        """The linear pool's logprob of the written token, for statistics."""
        return Linear().resolve_sampled(sampled_logprobs, weights)
