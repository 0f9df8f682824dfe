"""The protocol of objectives, and how per-token losses become one number."""

from __future__ import annotations

from typing import Literal, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor, nn

from moteach.errors import RoutingError
from moteach.types import Evidence, Head, LossOutput, RolloutBatch, Routing, Support

Normalise = Literal["token_mean", "sequence_mean"]
"""`token_mean`: every trained token of the global batch counts alike; `sequence_mean`: every sequence counts alike, its
tokens share its weight (MiMo-V2-Flash Eq. 7). The two differ by a factor of the length, so the choice decides which domain
dominates when lengths differ between domains."""

_LOGITS_PER_CHUNK = 2**22


@runtime_checkable
class Objective(Protocol):
    """Turns what teachers said into a loss: gate, then resolve, then divergence or advantage."""

    supports: frozenset[Support]
    """Kinds of evidence this objective is defined on."""
    normalise: Normalise

    def __call__(
        self,
        student: nn.Module,
        rollouts: RolloutBatch,
        routing: Routing,
        evidence: Evidence,
        token_weights: Float[Tensor, " packed"],
    ) -> LossOutput:
        """Computes sum_t token_weights_t * loss_t, differentiable in the student.

        Args:
            student: The root module; the loss is computed inside its forward.
            rollouts: The rows of this micro-batch.
            routing: The same rows.
            evidence: What their teachers said.
            token_weights: Weight of each packed token; sums to one over the whole (global) batch, so that micro-batches
                and ranks simply add.
        """
        ...


def token_weights(rollouts: RolloutBatch, normalise: Normalise) -> Float[Tensor, " packed"]:
    """Weights that turn per-token losses into the mean that `normalise` names; they sum to one.

    Sequences without a trained token are left out of `sequence_mean`.
    """
    rows = rollouts.token_rows
    if normalise == "token_mean":
        return torch.full((len(rows),), 1.0 / max(len(rows), 1))
    lengths = rollouts.loss_mask.sum(dim=1)
    sequences = int((lengths > 0).sum())
    return 1.0 / (lengths[rows].float() * max(sequences, 1))


def tokens_per_chunk(chunk_size: int | None, head: Head) -> int:
    """Tokens projected to the vocabulary at a time: `chunk_size`, or about 4 million logits (16 MiB of float32)."""
    return max(64, _LOGITS_PER_CHUNK // head.weight.shape[0]) if chunk_size is None else chunk_size


def gate_columns(
    weights: Float[Tensor, "packed teacher"], routing: Routing, evidence: Evidence
) -> Float[Tensor, "packed scored_teacher"]:
    """Keeps the gate's columns of the teachers that scored something, in the order of the evidence.

    Raises:
        RoutingError: When the gate gives weight to a teacher that was not asked.
    """
    asked = [entry.teacher_id for entry in evidence.teachers]
    for index, name in enumerate(routing.teacher_ids):
        if name not in asked and bool((weights[:, index] > 0).any()):
            raise RoutingError(
                f"the gate gives weight to the teacher '{name}', which the router did not ask; its tokens would be "
                "dropped from the loss. Let the router pass more candidates, or choose gate=prompt"
            )
    return weights[:, [routing.teacher_ids.index(name) for name in asked]]
