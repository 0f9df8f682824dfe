"""What each teacher thinks of a completion as a whole, from evidence of any support."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor

from moteach.divergences.logprobs import chunked_token_logprobs
from moteach.divergences.plan import full_evidence
from moteach.errors import RoutingError
from moteach.types import Evidence, RolloutBatch, Routing, TeacherEvidence

_LOGITS_PER_CHUNK = 2**22


@torch.no_grad()
def sequence_logprobs(rollouts: RolloutBatch, routing: Routing, evidence: Evidence) -> Float[Tensor, "batch teacher"]:
    """Computes each teacher's mean logprob of the tokens the student wrote, one value a completion.

    Taken from the evidence where it brings the logprobs of the written tokens, else made from hidden states and head chunk by
    chunk, at temperature 1; nothing of the size of the vocabulary is kept.

    Args:
        rollouts: Whole completions.
        routing: Names the columns.
        evidence: What the teachers said about them.

    Returns:
        Nats per token, -inf where a teacher scored nothing of a completion.

    Raises:
        RoutingError: The evidence of a teacher holds neither.
    """
    rows, targets = rollouts.token_rows, rollouts.token_targets
    means = torch.full((len(rollouts), len(routing.teacher_ids)), -math.inf, dtype=torch.float64)
    for entry in evidence.teachers:
        said = _written(entry, targets).double()
        mine = rows[entry.tokens]
        sums = torch.zeros(len(rollouts), dtype=torch.float64).index_add_(0, mine, said)
        counts = torch.bincount(mine, minlength=len(rollouts))
        column = sums / counts.clamp(min=1)
        means[:, routing.teacher_ids.index(entry.teacher_id)] = column.masked_fill(counts == 0, -math.inf)
    return means.to(routing.weights.dtype)


def _written(entry: TeacherEvidence, targets: Tensor) -> Tensor:
    if entry.sampled_logprobs is not None:
        return entry.sampled_logprobs
    if entry.hidden is None or entry.head is None:
        raise RoutingError(
            f"expected the logprobs of the written tokens, or hidden states and a head, from the teacher '{entry.teacher_id}', "
            f"got support={entry.support} with neither; its cross-entropy is not known. Set support=full or sampled"
        )
    hidden, head = full_evidence(entry)
    size = max(64, _LOGITS_PER_CHUNK // head.weight.shape[0])
    return chunked_token_logprobs(hidden, head, targets[entry.tokens], chunk_size=size)
