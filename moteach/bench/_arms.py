"""One loss from hidden states and heads, and every way of computing it: the kernel, plain autograd, and peers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from moteach.bench._peers import Peer, peer_beta
from moteach.conflict.base import Resolver
from moteach.conflict.pools import Linear
from moteach.divergences.base import Divergence
from moteach.divergences.chunked import chunked_divergence
from moteach.objectives.base import tokens_per_chunk
from moteach.types import Head, TeacherEvidence


@dataclass(frozen=True, kw_only=True)
class Size:
    """Sizes of one measurement."""

    vocab: int
    tokens: int
    hidden: int = 128


@dataclass(frozen=True, kw_only=True)
class Problem:
    """The inputs of one loss. Teachers are near the student, as specialists of one base model are."""

    hidden: Float[Tensor, "packed hidden"]
    head: Head
    evidence: tuple[TeacherEvidence, ...]
    weights: Float[Tensor, "packed teacher"]

    @classmethod
    def make(cls, size: Size, *, teachers: int = 1) -> Problem:
        """Draws the same inputs for the same size: student's logits of standard deviation 3, teachers' about 1 away."""
        generator = torch.Generator().manual_seed(0)

        def normal(rows: int, scale: float) -> Tensor:
            return torch.randn(rows, size.hidden, generator=generator) * scale

        unit = 3.0 / size.hidden**0.5
        hidden, weight = normal(size.tokens, 1.0), normal(size.vocab, unit)
        evidence = tuple(
            TeacherEvidence(
                teacher_id=f"teacher_{n}",
                support="full",
                tokens=torch.arange(size.tokens),
                hidden=hidden + normal(size.tokens, 0.25),
                head=Head(weight=weight + normal(size.vocab, 0.25 * unit)),
            )
            for n in range(teachers)
        )
        weights = torch.rand(size.tokens, teachers, generator=generator).softmax(dim=-1)
        student = Head(weight=weight.requires_grad_())
        return cls(hidden=hidden.requires_grad_(), head=student, evidence=evidence, weights=weights)

    def forget(self) -> None:
        """Drops the gradients of the last pass."""
        self.hidden.grad = self.head.weight.grad = None

    def teacher(self) -> tuple[Tensor, Tensor]:
        """Returns the hidden states and the head's weight of the first teacher."""
        hidden, head = self.evidence[0].hidden, self.evidence[0].head
        assert hidden is not None, "made with hidden states"
        assert isinstance(head, Head), "made with a head"
        return hidden, head.weight


Arm = Callable[[Problem], Float[Tensor, ""]]
"""A way of computing the mean loss of a problem."""


def kernel(problem: Problem, *, divergence: Divergence, resolver: Resolver) -> Float[Tensor, ""]:
    """The arm of moteach, in its default chunks."""
    tokens = len(problem.hidden)
    return chunked_divergence(
        student_hidden=problem.hidden,
        student_head=problem.head,
        teachers=problem.evidence,
        weights=problem.weights,
        token_weights=torch.full((tokens,), 1 / tokens),
        divergence=divergence,
        resolver=resolver,
        chunk_size=tokens_per_chunk(None, problem.head),
    ).loss


def plain(problem: Problem, *, divergence: Divergence) -> Float[Tensor, ""]:
    """The plain arm: autograd through `divergence(student_logits, teacher_logits)` over all tokens at once."""
    with torch.no_grad():
        teacher_logits = F.linear(*problem.teacher())
    return divergence(F.linear(problem.hidden, problem.head.weight), teacher_logits).mean()


def peer_arm(problem: Problem, *, peer: Peer, beta: float) -> Float[Tensor, ""]:
    """The arm of another library, in moteach's chunks where it lets them be chosen."""
    return peer.loss(
        problem.hidden,
        problem.head.weight,
        *problem.teacher(),
        beta=beta,
        chunk_size=tokens_per_chunk(None, problem.head),
    )


def arms_of(divergence: Divergence, peers: Sequence[Peer]) -> dict[str, Arm]:
    """Every way of computing one divergence: `moteach` first, then `plain`, which is the reference, then the peers."""
    arms: dict[str, Arm] = {
        "moteach": partial(kernel, divergence=divergence, resolver=Linear()),
        "plain": partial(plain, divergence=divergence),
    }
    beta = peer_beta(divergence)
    if beta is not None:
        arms |= {peer.name: partial(peer_arm, peer=peer, beta=beta) for peer in peers}
    return arms
