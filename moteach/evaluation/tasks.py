"""The closing table: per domain before, teacher, after and the normalised score."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from moteach.evaluation.runner import DomainScore
from moteach.types import Prompt


def chosen_prompts(prompts: Sequence[Prompt], domains: Sequence[str], *, limit: int | None = None) -> list[Prompt]:
    """Keeps the prompts of these domains, domain by domain, the first `limit` of each; prompts without one are `default`."""
    kept: dict[str, list[Prompt]] = {domain: [] for domain in domains}
    for prompt in prompts:
        own = kept.get(prompt.domain or "default")
        if own is not None and (limit is None or len(own) < limit):
            own.append(prompt)
    return [prompt for own in kept.values() for prompt in own]


def normalised_score(before: float, teacher: float, after: float) -> float | None:
    """(after - before) / (teacher - before): 0 where the student started, 1 where its teacher is.

    The metric of the MOPD paper (arXiv 2606.30406). Returns None when the teacher is not ahead of the start, where the
    quotient has no meaning.
    """
    return (after - before) / (teacher - before) if teacher > before else None


def summarise(
    before: Mapping[str, DomainScore], teacher: Mapping[str, DomainScore], after: Mapping[str, DomainScore]
) -> dict[str, Any]:
    """Makes `summary.json`: a row per taught domain, the mean and the worst normalised score.

    Domains without a teacher, and those that were not measured before training (a resumed run may evaluate more), are
    reported raw under `raw`, and count in neither mean nor worst.
    """
    domains: dict[str, dict[str, float | int | None]] = {}
    raw: dict[str, dict[str, float | int | None]] = {}
    for domain, last in after.items():
        first = before.get(domain)
        if first is not None and domain in teacher:
            best = teacher[domain].accuracy
            domains[domain] = {
                "before": first.accuracy,
                "teacher": best,
                "after": last.accuracy,
                "normalised": normalised_score(first.accuracy, best, last.accuracy),
                "prompts": last.prompts,
                "mean_length": last.mean_length,
                "truncated": last.truncated,
            }
        else:
            start = None if first is None else first.accuracy
            raw[domain] = {"before": start, "after": last.accuracy, "prompts": last.prompts}
    scores = [row["normalised"] for row in domains.values() if row["normalised"] is not None]
    return {
        "domains": domains,
        "raw": raw,
        "mean": sum(scores) / len(scores) if scores else None,
        "worst": min(scores) if scores else None,
    }
