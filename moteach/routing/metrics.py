"""Numbers that say what a router did in a step."""

from __future__ import annotations

import torch

from moteach.types import Routing


def routing_metrics(routing: Routing) -> dict[str, float]:
    """Summarises one step's routing.

    Returns:
        `routing/entropy` (mean over rows of -sum w ln w, nats), `routing/abstain` (share of rows without a teacher) and
        `routing/load/<expert>` (mean weight of each expert over all rows).
    """
    if not len(routing.prompt_ids):
        return {}
    weights = routing.weights.double()
    entropy = -torch.xlogy(weights, weights).sum(dim=1)
    load = weights.mean(dim=0)
    metrics = {
        "routing/entropy": float(entropy.mean()),
        "routing/abstain": float(routing.abstained.double().mean()),
    }
    metrics.update({f"routing/load/{name}": float(load[i]) for i, name in enumerate(routing.teacher_ids)})
    return metrics
