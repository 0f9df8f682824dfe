"""What a divergence is, and the shape of the pool that the kernel accepts.

A divergence compares two distributions over the vocabulary, the student's and the target's, token by token. Arguments
are always `(student, teacher)`. Writing one takes a class with `name`, `supports` and `__call__`; giving it
`value_and_gradient` as well makes it fast, and a divergence without one is differentiated by autograd.
"""

from __future__ import annotations

from typing import Protocol, cast, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from moteach.types import Support


@runtime_checkable
class Divergence(Protocol):
    """A per-token divergence between the student and a target; zero when they are equal, never negative."""

    @property
    def name(self) -> str:
        """The name it has in `conf/divergence`."""

    @property
    def supports(self) -> frozenset[Support]:
        """The supports on which its value and gradient are exact."""

    def __call__(
        self, student_logits: Float[Tensor, "*token vocab"], teacher_logits: Float[Tensor, "*token vocab"]
    ) -> Float[Tensor, "*token"]:
        """Returns the divergence of each token in nats, differentiable; logits need not be normalised."""


@runtime_checkable
class ClosedFormDivergence(Divergence, Protocol):
    """A divergence that knows its own gradient, which spares the kernel an autograd graph."""

    def value_and_gradient(
        self, student_logprobs: Float[Tensor, "*token vocab"], teacher_logprobs: Float[Tensor, "*token vocab"]
    ) -> tuple[Float[Tensor, "*token"], Float[Tensor, "*token vocab"]]:
        """Returns the value and its derivative with respect to the student's logits.

        Both inputs are normalised logprobs and must not be modified. The gradient is a fresh tensor, which the caller
        may overwrite; it is zero for a token whose value is infinite.
        """


@runtime_checkable
class PointwiseDivergence(Divergence, Protocol):
    """A divergence that is a sum of terms g(p_v, q_v), each of which knows only the two probabilities of one entry.

    It can be truncated to a part of the vocabulary: sum_v [g(p_v, q_v) - slope (p_v - q_v)] over any subset is
    non-negative entry by entry, and each entry is zero and stationary at p_v = q_v; over the whole vocabulary the
    correction sums to zero. Divergences that are no such sum do not have `terms`.
    """

    @property
    def slope(self) -> float:
        """dg/dp at p = q, which is the same for every p."""

    def terms(
        self, student_logprobs: Float[Tensor, "*token vocab"], teacher_logprobs: Float[Tensor, "*token vocab"]
    ) -> Float[Tensor, "*token vocab"]:
        """Returns g(p_v, q_v) in nats, differentiable; the entries need not sum to one.

        A term is 0 where both logprobs are -inf, and +inf, with a zero gradient, where the divergence is infinite.
        """


@runtime_checkable
class PoolTarget(Protocol):
    """What a pool returns, as far as the kernel reads it; `moteach.conflict.base.Target` is the real one."""

    @property
    def logprobs(self) -> Tensor:
        """Normalised logprobs of the target, `[token vocab]`."""

    @property
    def token_weight(self) -> Tensor | None:
        """Factor on the loss of each token, `[token]`; None stands for one."""

    @property
    def neg_log_z(self) -> Tensor:
        """Disagreement of the teachers in nats, `[token]`."""


@runtime_checkable
class PoolAccumulator(Protocol):
    """Takes teachers one at a time, so that memory need not grow with their number."""

    def add(self, teacher_logprobs: Tensor, weights: Tensor) -> None:
        """Adds one teacher; it owns `teacher_logprobs` from here on.

        A pool that needs `reference_logprobs` also takes those of the teacher's origin, as `reference`.
        """

    def finish(self) -> PoolTarget:
        """Returns the target."""


@runtime_checkable
class Pool(Protocol):
    """The part of a conflict resolver that the kernel uses."""

    @property
    def needs(self) -> frozenset[str]:
        """Names of what `accumulator` must be given."""

    @property
    def streams(self) -> bool:
        """Whether its memory does not grow with the number of teachers; chunks are smaller where it does."""

    def accumulator(self, **context: Tensor) -> PoolAccumulator:
        """Starts a pool for one chunk of tokens."""


def autograd_value_and_gradient(
    divergence: Divergence,
    student_logprobs: Float[Tensor, "*token vocab"],
    teacher_logprobs: Float[Tensor, "*token vocab"],
) -> tuple[Float[Tensor, "*token"], Float[Tensor, "*token vocab"]]:
    """Gives `value_and_gradient` of a divergence that has no closed form, through autograd.

    Logprobs are logits too, shifted by a constant to which a divergence is blind, so the derivative with respect to
    them is the derivative with respect to the logits.

    Args:
        divergence: Any divergence.
        student_logprobs: Normalised logprobs of the student.
        teacher_logprobs: Normalised logprobs of the target.

    Returns:
        The detached value of each token and its derivative with respect to the student's logits.
    """
    with torch.enable_grad():
        leaf = student_logprobs.detach().requires_grad_()
        value = divergence(leaf, teacher_logprobs.detach())
        (gradient,) = torch.autograd.grad(value.sum(), leaf)
    return value.detach(), gradient


def value_and_gradient(
    divergence: Divergence,
    student_logprobs: Float[Tensor, "*token vocab"],
    teacher_logprobs: Float[Tensor, "*token vocab"],
) -> tuple[Float[Tensor, "*token"], Float[Tensor, "*token vocab"]]:
    """Uses the closed form of a divergence when it has one, autograd otherwise.

    Args:
        divergence: Any divergence.
        student_logprobs: Normalised logprobs of the student.
        teacher_logprobs: Normalised logprobs of the target.

    Returns:
        The value of each token and its derivative with respect to the student's logits.
    """
    # hasattr, not isinstance: a protocol check costs as much as a small tensor operation, and this runs for each chunk
    if hasattr(divergence, "value_and_gradient"):
        closed = cast(ClosedFormDivergence, divergence)
        return closed.value_and_gradient(student_logprobs, teacher_logprobs)
    return autograd_value_and_gradient(divergence, student_logprobs, teacher_logprobs)
