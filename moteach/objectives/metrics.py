"""The numbers of one step, under the names that users of TRL know where there is one."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from moteach.divergences.measure import OF_TOPK
from moteach.types import Evidence, RolloutBatch

_MEANS = (
    *("divergence", "student_entropy", "target_entropy", "neg_log_z", "student_mass", "teacher_mass", "log_ratio"),
    *("advantages", "importance_ratio", "masked", "switched", "reference_divergence"),
    *("spread", "argmax_disagreement", "teacher_jsd", "topk_slack"),
    *OF_TOPK,
)

CONTESTED_NATS = 1.0
"""Spread of the teachers' logprobs above which a token counts as contested; Open-MOPD (arXiv 2608.19098) counts so."""

REPEATED_TOKENS = 4
"""Length of the runs of tokens that `completions/repetition` looks for."""


def staleness_metrics(rollouts: RolloutBatch, step: int) -> dict[str, float]:
    """How many optimizer steps behind the student the versions were that wrote the rollouts: mean and largest.

    Args:
        rollouts: The batch.
        step: Optimizer steps the student had taken when it learned from them.
    """
    behind = [step - rollout.student_version for rollout in rollouts.rollouts]
    return {"rollouts/staleness": sum(behind) / len(behind), "rollouts/staleness_max": float(max(behind))}


def rollout_metrics(rollouts: RolloutBatch, rewards: Sequence[float]) -> dict[str, float]:
    """Lengths, truncation, repetition and verified reward of what the student wrote.

    `completions/clipped_ratio` is the share of completions that were cut off. `completions/repetition` is the share of the
    4-grams of a completion (runs of four tokens, at every position) that stood in the same completion before, averaged over
    the completions of at least four tokens, and left out where there is none: 0 where nothing repeats, near 1 in a loop.

    Args:
        rollouts: The batch.
        rewards: One score per row, NaN where the prompt has no verifier.
    """
    lengths = [len(rollout.completion_ids) for rollout in rollouts.rollouts]
    metrics = {
        "num_tokens": float(rollouts.num_tokens),
        "completions/mean_length": sum(lengths) / len(lengths),
        "completions/min_length": float(min(lengths)),
        "completions/max_length": float(max(lengths)),
        "completions/clipped_ratio": sum(not rollout.finished for rollout in rollouts.rollouts) / len(lengths),
    }
    repeated = [share for rollout in rollouts.rollouts if (share := _repetition(rollout.completion_ids)) is not None]
    if repeated:
        metrics["completions/repetition"] = sum(repeated) / len(repeated)
    graded: dict[str, list[float]] = {}
    for rollout, reward in zip(rollouts.rollouts, rewards, strict=True):
        if not math.isnan(reward):
            graded.setdefault(rollout.prompt.domain or "default", []).append(reward)
    metrics.update({f"reward/{domain}": sum(scores) / len(scores) for domain, scores in sorted(graded.items())})
    return metrics


def _repetition(ids: Sequence[int]) -> float | None:
    """Share of the 4-grams that occurred before; None for fewer tokens."""
    grams = list(zip(*(ids[start:] for start in range(REPEATED_TOKENS)), strict=False))
    return 1 - len(set(grams)) / len(grams) if grams else None


def teacher_metrics(evidence: Evidence) -> dict[str, float]:
    """Share of the batch's tokens that each teacher scored."""
    total = max(evidence.num_tokens, 1)
    return {f"teacher_token_frac/{entry.teacher_id}": len(entry.tokens) / total for entry in evidence.teachers}


def token_metrics(rollouts: RolloutBatch, stats: Mapping[str, Float[Tensor, " packed"]]) -> dict[str, float]:
    """Means of the per-token values over the taught tokens, and of the divergence and the token share per domain.

    Tokens that no teacher was given (`abstained`) are left out of the means and counted as `abstained`. Where several
    teachers share tokens, `spread` also has its 99th percentile and largest value, and `contested` is the share of taught
    tokens above one nat. `entropy_gap` is the student's minus the target's entropy in nats, with its sign: negative where
    the student is surer than what teaches it (arXiv 2604.13016, Eq. 8, takes the absolute value).
    """
    abstained = stats["abstained"] > 0 if "abstained" in stats else torch.zeros(rollouts.num_tokens, dtype=torch.bool)
    metrics = {
        name: float(stats[name][~abstained].double().mean())
        for name in _MEANS
        if name in stats and not bool(abstained.all())
    }
    if "student_entropy" in metrics and "target_entropy" in metrics:
        metrics["entropy_gap"] = metrics["student_entropy"] - metrics["target_entropy"]
    if "spread" in stats and not bool(abstained.all()):
        spread = stats["spread"][~abstained].double()
        metrics["spread/p99"] = float(spread.quantile(0.99))
        metrics["spread/max"] = float(spread.max())
        metrics["contested"] = float((spread > CONTESTED_NATS).double().mean())
    if "abstained" in stats and len(abstained):
        metrics["abstained"] = float(abstained.double().mean())
    if "divergence" not in stats:
        return metrics
    domains = [rollout.prompt.domain or "default" for rollout in rollouts.rollouts]
    names = sorted(set(domains))
    of_row = torch.tensor([names.index(domain) for domain in domains])
    of_token = of_row[rollouts.token_rows].masked_fill(abstained, -1)
    for index, name in enumerate(names):
        mine = stats["divergence"][of_token == index]
        if len(mine):
            metrics[f"divergence/{name}"] = float(mine.double().mean())
            metrics[f"token_frac/{name}"] = len(mine) / len(of_token)
    return metrics
