"""What a conflict resolver is: a *pool* that turns the distributions of several teachers into one target.

Writing one takes a class with `name`, `supports`, `needs`, `streams`, `accumulator` and `resolve_sampled`. A target is
a constant of the optimisation: no gradient flows into it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from moteach.errors import ConfigError, RoutingError, UnsupportedCombinationError
from moteach.types import Support

SUM_TOLERANCE = 5e-3
"""How far the weights of a token may be from summing to one: rounding in bfloat16, not a forgotten teacher."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Target:
    """The one distribution that the student is compared with."""

    logprobs: Float[Tensor, "*token vocab"]
    """Normalised over the vocabulary."""
    token_weight: Float[Tensor, "*token"] | None
    """Factor on the loss of each token, for pools that trust some tokens less; None stands for one."""
    neg_log_z: Float[Tensor, "*token"]
    """-log of the normaliser of the pool, in nats: how much the teachers disagree; zero for pools without one, and negative
    only for power means of an exponent above one, whose mass exceeds one."""


@runtime_checkable
class Accumulator(Protocol):
    """Takes the teachers of a chunk of tokens one at a time."""

    def add(self, teacher_logprobs: Float[Tensor, "token vocab"], weights: Float[Tensor, " token"]) -> None:
        """Adds one teacher; a resolver that needs `reference_logprobs` also takes those of its origin, as `reference`.

        The accumulator owns `teacher_logprobs` from here on and may overwrite it: give it a copy to keep yours.
        A weight of zero means that this teacher says nothing about that token, whatever its logprobs are.
        """

    def finish(self) -> Target:
        """Returns the target of the chunk; called once, after at least one `add`."""


@runtime_checkable
class Resolver(Protocol):
    """A pool of teacher distributions. Weights are non-negative and sum to one for each token."""

    @property
    def name(self) -> str:
        """The name it has in `conf/conflict`."""

    @property
    def supports(self) -> frozenset[Support]:
        """The supports on which it is defined; its docstring says in which sense."""

    @property
    def needs(self) -> frozenset[str]:
        """What `accumulator` must be given beside the teachers, for instance `student_logprobs`."""

    @property
    def streams(self) -> bool:
        """Whether an accumulator holds one distribution or two, however many teachers are added.

        The kernel gives pools that hold all teachers chunks that many times smaller.
        """

    def accumulator(self, **context: Tensor) -> Accumulator:
        """Starts the pool of one chunk of tokens; `context` holds what `needs` names, not to be modified."""

    def resolve_sampled(
        self, sampled_logprobs: Float[Tensor, "packed teacher"], weights: Float[Tensor, "packed teacher"]
    ) -> Float[Tensor, " packed"]:
        """Returns the pooled logprob of the token the student wrote, from what each teacher gives it."""


def resolve(
    resolver: Resolver,
    teacher_logprobs: Float[Tensor, "teacher *token vocab"],
    weights: Float[Tensor, "*token teacher"],
    references: Float[Tensor, "teacher *token vocab"] | None = None,
    **context: Float[Tensor, "*token vocab"],
) -> Target:
    """Pools plain tensors; the library entry point.

    Args:
        resolver: The pool.
        teacher_logprobs: Normalised logprobs of each teacher; not modified.
        weights: Weight of each teacher at each token, non-negative, summing to one.
        references: Logprobs of the checkpoint each teacher was trained from, for a resolver that needs `reference_logprobs`.
        **context: What else `resolver.needs` names.

    Returns:
        The target, detached, with the token axes of the input.

    Raises:
        RoutingError: The weights of some token are negative, not finite, or do not sum to one.
    """
    check_weights(weights)
    shape, vocab = teacher_logprobs.shape[1:-1], teacher_logprobs.shape[-1]
    flat_weights = weights.reshape(-1, weights.shape[-1])
    with torch.no_grad():
        pool = resolver.accumulator(**{name: value.reshape(-1, vocab) for name, value in context.items()})
        for column, logprobs in enumerate(teacher_logprobs):
            copy = logprobs.detach().reshape(-1, vocab).clone()
            beside: dict[str, Any] = {}
            if references is not None:
                beside["reference"] = references[column].detach().reshape(-1, vocab)
            pool.add(copy, flat_weights[:, column].to(copy.dtype), **beside)
        target = pool.finish()
    return Target(
        logprobs=target.logprobs.reshape(*shape, vocab),
        token_weight=None if target.token_weight is None else target.token_weight.reshape(shape),
        neg_log_z=target.neg_log_z.reshape(shape),
    )


def check_weights(weights: Float[Tensor, "*token teacher"]) -> None:
    """Refuses weights that are not a distribution over teachers at each token.

    Args:
        weights: Weight of each teacher at each token.

    Raises:
        RoutingError: The weights of some token are negative, not finite, or do not sum to one.
    """
    sums = weights.sum(-1)
    bad = ~(((sums - 1.0).abs() <= SUM_TOLERANCE) & (weights >= 0.0).all(-1))
    if bool(bad.any()):
        worst = weights[bad][0].tolist()
        raise RoutingError(
            f"expected non-negative teacher weights that sum to one at each token, got {int(bad.sum())} token(s) that "
            f"do not, the first being {worst}; their target would not be a distribution. Leave out abstained tokens "
            "(all weights zero) and renormalise when a teacher failed"
        )


def check_penalty(sequence_penalty: float) -> None:
    """Refuses a weight of the disagreement over the sequence that is none.

    With teachers q_k and their geometric pool q~ at each state, KL(p || P*) = E_p sum_t KL(p_t || q~_t) - E_p sum_t log Z(s_t)
    + const, P* the product of the teachers' distributions over whole completions: -log Z(s) is the price of walking into a
    state where teachers disagree. A loss that looks at one token at a time does not see it; a weight of 1 is the exact one
    where the student agrees with the pool from the next token on (with `objective.discount=1` everywhere).

    Args:
        sequence_penalty: The weight; 0 leaves it out, as every published method does.

    Raises:
        ConfigError: It is negative or not finite.
    """
    if not 0 <= sequence_penalty < math.inf:
        raise ConfigError(
            f"conflict.sequence_penalty: expected a finite weight of at least 0, got {sequence_penalty}; below 0 the student "
            "would seek the states where its teachers disagree"
        )


def whole_distributions_only(name: str, what: str) -> UnsupportedCombinationError:
    """Makes the error of a pool that cannot work on the logprob of the written token.

    Args:
        name: The pool.
        what: What it reads that one logprob does not tell.

    Returns:
        The error, to be raised.
    """
    return UnsupportedCombinationError(
        f"conflict={name} reads {what}, which the logprob of the written token does not tell; expected whole distributions. "
        "Set support=full, or conflict=select, linear, geometric or power"
    )


class HeldTeachers:
    """An accumulator that keeps every teacher of the chunk, for pools that compare them with each other.

    Args:
        pool: Makes the target from `[teacher token vocab]` logprobs, which it may overwrite, and `[teacher token]` weights.
    """

    def __init__(self, pool: Callable[[Tensor, Tensor], Target]) -> None:
        self._pool = pool
        self._logprobs: list[Tensor] = []
        self._weights: list[Tensor] = []

    def add(self, teacher_logprobs: Float[Tensor, "token vocab"], weights: Float[Tensor, " token"]) -> None:
        """Keeps one teacher."""
        self._logprobs.append(teacher_logprobs)
        self._weights.append(weights)

    def finish(self) -> Target:
        """Pools those that were kept."""
        assert self._logprobs, "finish() before add()"
        logprobs, weights = torch.stack(self._logprobs), torch.stack(self._weights)
        self._logprobs.clear()
        return self._pool(logprobs, weights)
