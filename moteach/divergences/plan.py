"""Which teacher heads each token needs: checks the evidence and groups tokens by the set of their teachers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from moteach.errors import ConfigError, IncompatibleTeacherError, RoutingError, UnsupportedCombinationError
from moteach.types import Head, TeacherEvidence

_SUM_TOLERANCE = 5e-3
_MAX_BITS = 62


@dataclass(frozen=True, kw_only=True, slots=True)
class Group:
    """Tokens that listen to the same teachers."""

    tokens: Int[Tensor, " token"]
    """Packed indices, ascending."""
    columns: tuple[int, ...]
    """The teachers with a positive weight, in the order of the columns of the weights."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """Everything the kernel knows before it touches a hidden state."""

    groups: tuple[Group, ...]
    weights: Float[Tensor, "packed teacher"]
    """Weights of each token, summing to one to the last bit of float64, or all zero where abstained."""
    positions: Int[Tensor, "teacher packed"]
    """Where a token lies in the evidence of a teacher, -1 where that teacher did not score it."""
    abstained: Bool[Tensor, " packed"]
    """Tokens to which no teacher gave any weight."""
    chunk_size: int

    def chunks(self, *, held: bool = False) -> Iterator[Group]:
        """Cuts the groups into pieces of at most `chunk_size` tokens, over the teachers where all are `held` at once."""
        for group in self.groups:
            size = max(1, self.chunk_size // len(group.columns)) if held else self.chunk_size
            for tokens in torch.split(group.tokens, size):
                yield Group(tokens=tokens, columns=group.columns)


def make_plan(
    *, teachers: Sequence[TeacherEvidence], weights: Float[Tensor, "packed teacher"], vocab: int, chunk_size: int
) -> Plan:
    """Checks the evidence against the weights and groups the tokens.

    Args:
        teachers: Evidence of each teacher; the columns of `weights` follow it.
        weights: Weight of each teacher at each token: non-negative, summing to one, or all zero where abstained.
        vocab: Size of the student's vocabulary.
        chunk_size: Largest number of tokens handled at once.

    Returns:
        The plan.

    Raises:
        ConfigError: `chunk_size` is not positive.
        UnsupportedCombinationError: The evidence of a teacher is not of support `full`.
        IncompatibleTeacherError: The vocabulary of a teacher is not the student's.
        RoutingError: Weights are not a distribution, or name a teacher that did not score the token.
    """
    if chunk_size < 1:
        raise ConfigError(f"expected chunk_size >= 1, got {chunk_size}; it is the number of tokens projected at once")
    if weights.shape[1] != len(teachers):
        raise RoutingError(
            f"expected one column of weights for each of the {len(teachers)} teachers, got {weights.shape[1]}; "
            "weights would reach the wrong teachers"
        )
    for evidence in teachers:
        check_evidence(evidence, vocab)
    exact = weights.detach().to(torch.float64)
    abstained = _check_weights(exact)
    positive = exact > 0.0
    positions = positions_in(teachers, positive)
    sums = exact.sum(-1, keepdim=True).masked_fill_(abstained.unsqueeze(-1), 1.0)
    return Plan(
        groups=_group(positive, abstained),
        weights=exact / sums,
        positions=positions,
        abstained=abstained,
        chunk_size=chunk_size,
    )


def full_evidence(evidence: TeacherEvidence) -> tuple[Float[Tensor, "scored hidden"], Head]:
    """Returns the hidden states and the head of a teacher of support `full`.

    Args:
        evidence: What the teacher said.

    Returns:
        Its hidden states and its head.

    Raises:
        UnsupportedCombinationError: One of them is missing.
    """
    if evidence.support != "full" or evidence.hidden is None or evidence.head is None:
        raise UnsupportedCombinationError(
            f"expected hidden states and a head (support=full) from teacher '{evidence.teacher_id}', got "
            f"support={evidence.support}; a divergence over the whole vocabulary cannot be made from it. Ask this "
            "teacher for support=full, or use an objective made for its support"
        )
    return evidence.hidden, evidence.head if isinstance(evidence.head, Head) else evidence.head()


def check_evidence(evidence: TeacherEvidence, vocab: int) -> None:
    """Refuses evidence that the kernel cannot project to the student's vocabulary.

    Args:
        evidence: What a model said.
        vocab: Size of the student's vocabulary.

    Raises:
        UnsupportedCombinationError: It is not of support `full`.
        IncompatibleTeacherError: Its vocabulary is not the student's.
        RoutingError: It has not one hidden state a token.
    """
    hidden, head = full_evidence(evidence)
    if head.weight.shape[0] != vocab:
        raise IncompatibleTeacherError(
            f"expected the student's vocabulary of {vocab} tokens from teacher '{evidence.teacher_id}', got a head of "
            f"{head.weight.shape[0]}; probabilities of different tokens would be compared. Use a teacher of the same "
            "tokenizer, or trim both heads to the shared ids"
        )
    if len(hidden) != len(evidence.tokens):
        raise RoutingError(
            f"expected a hidden state for each of the {len(evidence.tokens)} tokens that teacher "
            f"'{evidence.teacher_id}' scored, got {len(hidden)}; states would be matched to the wrong tokens"
        )


def _check_weights(weights: Tensor) -> Tensor:
    """Returns where all weights are zero, and refuses anything that is neither that nor a distribution."""
    abstained = (weights == 0.0).all(-1)
    proper = ((weights.sum(-1) - 1.0).abs() <= _SUM_TOLERANCE) & (weights >= 0.0).all(-1)
    bad = ~(proper | abstained)
    if bool(bad.any()):
        raise RoutingError(
            f"expected teacher weights that sum to one at each token, or are all zero where abstained, got "
            f"{int(bad.sum())} token(s) that are neither, the first being {weights[bad][0].tolist()}; their target "
            "would not be a distribution. Renormalise when a teacher failed"
        )
    return abstained


def positions_in(
    teachers: Sequence[TeacherEvidence], positive: Bool[Tensor, "packed teacher"]
) -> Int[Tensor, "teacher packed"]:
    """Finds where each token lies in the evidence of each teacher.

    Args:
        teachers: The evidence.
        positive: True where a token needs a teacher, columns in the order of `teachers`.

    Returns:
        Positions, -1 where a teacher did not score a token.

    Raises:
        RoutingError: A teacher did not score a token that needs it.
    """
    positions = torch.full((len(teachers), len(positive)), -1, dtype=torch.long, device=positive.device)
    for column, evidence in enumerate(teachers):
        index = torch.arange(len(evidence.tokens), device=positive.device)
        positions[column, evidence.tokens.to(positive.device)] = index
        missing = int((positive[:, column] & (positions[column] < 0)).sum())
        if missing:
            raise RoutingError(
                f"expected teacher '{evidence.teacher_id}' to have scored every token at which it has a weight, got "
                f"{missing} token(s) that it did not score; they would silently not be taught. Route before scoring, "
                "or renormalise over the teachers that answered"
            )
    return positions


def _group(positive: Tensor, abstained: Tensor) -> tuple[Group, ...]:
    """Groups the tokens that have any teacher by which ones they have."""
    tokens = (~abstained).nonzero(as_tuple=True)[0]
    if len(tokens) == 0:
        return ()
    rows = positive[tokens]
    if rows.shape[1] <= _MAX_BITS:
        codes = (rows.long() << torch.arange(rows.shape[1], device=rows.device)).sum(-1)
        kinds, inverse = torch.unique(codes, return_inverse=True)
    else:
        kinds, inverse = torch.unique(rows, dim=0, return_inverse=True)
    groups = []
    for kind in range(len(kinds)):
        members = tokens[inverse == kind]
        columns = positive[members[0]].nonzero(as_tuple=True)[0].tolist()
        groups.append(Group(tokens=members, columns=tuple(columns)))
    return tuple(groups)
