"""The rows of `routing.parquet` that are about one token: who teaches it, and what each teacher gives to it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
from jaxtyping import Float
from torch import Tensor

from moteach.types import RolloutBatch


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenTrace:
    """What a gate decided in one step."""

    weights: Float[Tensor, "packed teacher"]
    logprobs: Float[Tensor, "packed teacher"]
    """Logprob each teacher gives to the written token, NaN where it was not asked."""


def token_fields(teachers: Sequence[str]) -> list[tuple[str, pa.DataType]]:
    """Columns that a run with `gate.trace` has beside those of a prompt; null in the rows of prompts."""
    return [
        ("sample", pa.int32()),
        ("position", pa.int32()),
        ("token", pa.string()),
        ("token_id", pa.int32()),
        ("teacher_logprobs", pa.struct([(teacher, pa.float32()) for teacher in teachers])),
        ("disagreement", pa.float32()),
    ]


def token_rows(
    step: int,
    rollouts: RolloutBatch,
    teachers: Sequence[str],
    trace: TokenTrace,
    decode: Callable[[Sequence[int]], str],
) -> Iterator[Mapping[str, Any]]:
    """Makes one row a token: `weights`, `teacher`, `confidence` and `abstained` are the token's.

    `position` counts from 0 inside the completion; `disagreement` is the largest minus the smallest logprob of the teachers
    that were asked, null where one was.
    """
    every, said = trace.weights.tolist(), trace.logprobs.tolist()
    packed = 0
    for rollout in rollouts.rollouts:
        for position, token in enumerate(rollout.completion_ids):
            weights, logprobs = every[packed], [None if x != x else x for x in said[packed]]
            packed += 1
            asked = [value for value in logprobs if value is not None]
            heaviest = max(weights, default=0.0)
            yield {
                "step": step,
                "prompt_id": rollout.prompt.prompt_id,
                "domain": rollout.prompt.domain,
                "weights": dict(zip(teachers, weights, strict=True)),
                "teacher": teachers[weights.index(heaviest)] if heaviest > 0 else None,
                "confidence": heaviest,
                "abstained": heaviest == 0,
                "sample": rollout.sample,
                "position": position,
                "token": decode([token]),
                "token_id": token,
                "teacher_logprobs": dict(zip(teachers, logprobs, strict=True)),
                "disagreement": max(asked) - min(asked) if len(asked) > 1 else None,
            }
