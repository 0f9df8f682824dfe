"""Greedy answers on held-out prompts, graded by their verifiers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from moteach.distributed import Ranks
from moteach.types import Prompt, RolloutBatch

if TYPE_CHECKING:
    from moteach.rollouts.base import RolloutEngine

Grade = Callable[[Prompt, str], float]
"""Scores one completion of a prompt in [0, 1]."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DomainScore:
    """What one model did on one domain."""

    accuracy: float
    """Mean verifier score over `prompts` held-out prompts."""
    prompts: int
    mean_length: float
    """Tokens per completion, end-of-sequence included."""
    truncated: float
    """Share of completions that the length limit cut."""


def evaluate(
    engine: RolloutEngine,
    prompts: Sequence[Prompt],
    *,
    grade: Grade,
    decode: Callable[[Sequence[int]], str],
    max_new_tokens: int | None = None,
    ranks: Ranks | None = None,
) -> dict[str, DomainScore]:
    """Writes one greedy completion per prompt and grades it.

    Args:
        engine: Bound to the model under test.
        prompts: Held-out prompts of any domains; those without a verifier are left out.
        grade: Dispatches to the prompt's verifier.
        decode: Token ids to text, special tokens skipped.
        max_new_tokens: Length limit; None uses the engine's.
        ranks: Processes that share the prompts; each gets all scores.

    Returns:
        A score per domain, in the order in which domains first appear.
    """
    ranks = Ranks() if ranks is None else ranks
    graded_prompts = [prompt for prompt in prompts if prompt.verifier]
    if not graded_prompts:
        return {}
    own: list[tuple[str, float, int, bool]] = []
    if mine := ranks.share(graded_prompts):
        batch = engine.generate(mine, step=0, temperature=0.0, max_new_tokens=max_new_tokens)
        for rollout, score in zip(batch.rollouts, grade_rollouts(batch, grade=grade, decode=decode), strict=True):
            domain = rollout.prompt.domain or "default"
            own.append((domain, score, len(rollout.completion_ids), not rollout.finished))
    rows: dict[str, list[tuple[float, int, bool]]] = {}
    for domain, score, length, cut in ranks.joined(ranks.gather(own)):
        rows.setdefault(domain, []).append((score, length, cut))
    return {
        domain: DomainScore(
            accuracy=sum(score for score, _, _ in graded) / len(graded),
            prompts=len(graded),
            mean_length=sum(length for _, length, _ in graded) / len(graded),
            truncated=sum(cut for _, _, cut in graded) / len(graded),
        )
        for domain, graded in rows.items()
    }


def grade_rollouts(batch: RolloutBatch, *, grade: Grade, decode: Callable[[Sequence[int]], str]) -> list[float]:
    """Scores every rollout of a batch, in order; a prompt without a verifier scores NaN."""
    return [
        grade(rollout.prompt, decode(rollout.completion_ids)) if rollout.prompt.verifier else float("nan")
        for rollout in batch.rollouts
    ]
