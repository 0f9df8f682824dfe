"""Parts of what one teacher said, taken out and put together."""

from __future__ import annotations

from dataclasses import replace

import torch
from jaxtyping import Int
from torch import Tensor

from moteach.types import TeacherEvidence


def taken(entry: TeacherEvidence, places: Int[Tensor, " kept"]) -> TeacherEvidence:
    """Returns the same evidence at these places of its own axis."""
    if len(places) == len(entry.tokens) and bool((places == torch.arange(len(places))).all()):
        return entry
    return replace(
        entry,
        tokens=entry.tokens[places],
        hidden=None if entry.hidden is None else entry.hidden[places],
        topk_ids=None if entry.topk_ids is None else entry.topk_ids[places],
        topk_logprobs=None if entry.topk_logprobs is None else entry.topk_logprobs[places],
        sampled_logprobs=None if entry.sampled_logprobs is None else entry.sampled_logprobs[places],
    )


def joined(first: TeacherEvidence, second: TeacherEvidence) -> TeacherEvidence:
    """Returns two answers of one teacher about different tokens as one, tokens ascending."""

    def both(one: Tensor | None, other: Tensor | None) -> Tensor | None:
        return None if one is None or other is None else torch.cat([one, other])

    tokens = torch.cat([first.tokens, second.tokens])
    together = replace(
        first,
        tokens=tokens,
        hidden=both(first.hidden, second.hidden),
        topk_ids=both(first.topk_ids, second.topk_ids),
        topk_logprobs=both(first.topk_logprobs, second.topk_logprobs),
        sampled_logprobs=both(first.sampled_logprobs, second.sampled_logprobs),
    )
    return taken(together, tokens.argsort())
