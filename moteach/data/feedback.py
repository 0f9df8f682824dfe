"""What a sampler is told of a step."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from moteach.data.sampling import StepFeedback
from moteach.types import RolloutBatch


def feedback_of(
    step: int, rollouts: RolloutBatch, rewards: Sequence[float], metrics: Mapping[str, float]
) -> StepFeedback:
    """Takes the verified scores and the divergence of each domain out of a step.

    Args:
        step: The step.
        rollouts: Its completions.
        rewards: One score a row, NaN where there is no verifier.
        metrics: Those of its tokens.
    """
    graded: dict[str, list[float]] = {}
    for rollout, reward in zip(rollouts.rollouts, rewards, strict=True):
        if not math.isnan(reward):
            graded.setdefault(rollout.prompt.prompt_id, []).append(reward)
    divergence = {name.partition("/")[2]: value for name, value in metrics.items() if name.startswith("divergence/")}
    return StepFeedback(step=step, divergence=divergence, rewards=graded)
