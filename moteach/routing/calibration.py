"""From scores to probabilities that mean what they say: temperature scaling and isotonic regression."""

from __future__ import annotations

import math

import torch
from jaxtyping import Bool, Float
from torch import Tensor

_GOLDEN = (math.sqrt(5.0) - 1.0) / 2.0
_WIDEST = 6.0


def smoothed_loss(
    logits: Float[Tensor, "prompt teacher"], owners: Bool[Tensor, "prompt teacher"], *, temperature: float
) -> float:
    """Cross-entropy of softmax(logits / temperature) against labels that leave room for doubt, in nats a prompt.

    Of N prompts and K experts, N / (N + K) of the target is on the right experts together and 1 / (N + K) on each expert: the
    multi-class form of Platt's targets (N+ + 1) / (N+ + 2). With plain labels, exemplars that are all told apart would make
    every prompt certain, those outside of all domains included.

    Args:
        logits: Scores of the experts.
        owners: The experts that are right for a prompt, at least one each.
        temperature: Above 0.
    """
    prompts, experts = logits.shape
    logprobs = (logits.double() / temperature).log_softmax(dim=1)
    right = logprobs.masked_fill(~owners, -math.inf).logsumexp(dim=1)
    return float(-(prompts * right + logprobs.sum(dim=1)).mean() / (prompts + experts))


def fit_temperature(logits: Float[Tensor, "prompt teacher"], owners: Bool[Tensor, "prompt teacher"]) -> float:
    """Finds the temperature of least `smoothed_loss` (temperature scaling, arXiv 1706.04599, section 4.2).

    With one right expert a prompt the loss is convex in 1 / temperature, so a golden-section search over ln temperature in
    [-6, 6] finds its minimum.

    Args:
        logits: Scores on prompts that the scores were not learned from.
        owners: The experts that are right.
    """
    low, high = -_WIDEST, _WIDEST
    for _ in range(60):
        left, right = high - _GOLDEN * (high - low), low + _GOLDEN * (high - low)
        values = [smoothed_loss(logits, owners, temperature=math.exp(point)) for point in (left, right)]
        low, high = (low, right) if values[0] <= values[1] else (left, high)
    return math.exp((low + high) / 2)


def fit_isotonic(
    confidence: Float[Tensor, " prompt"], correct: Bool[Tensor, " prompt"]
) -> tuple[list[float], list[float]]:
    """Least-squares non-decreasing fit v of `correct` on `confidence`, by pooling adjacent violators; leaves room for doubt.

    Of N prompts, the value is (N v + 1) / (N + 2) as in Platt's targets: N prompts that were all right do not make the next one
    certain.

    Returns:
        Knots and values; `apply_isotonic` interpolates between them. Equal confidences are one point first.
    """
    points, which = torch.unique(confidence.double(), sorted=True, return_inverse=True)
    counts = torch.zeros(len(points), dtype=torch.float64).index_add_(0, which, torch.ones_like(confidence.double()))
    hits = torch.zeros(len(points), dtype=torch.float64).index_add_(0, which, correct.double())
    total = len(confidence)
    blocks: list[list[float]] = []  # first knot, last knot, hits, prompts
    for point, hit, count in zip(points.tolist(), hits.tolist(), counts.tolist(), strict=True):
        blocks.append([point, point, hit, count])
        while len(blocks) > 1 and blocks[-2][2] / blocks[-2][3] >= blocks[-1][2] / blocks[-1][3]:
            _, last, more, rows = blocks.pop()
            blocks[-1] = [blocks[-1][0], last, blocks[-1][2] + more, blocks[-1][3] + rows]
    knots: list[float] = []
    values: list[float] = []
    for first, last, hit, count in blocks:
        for knot in (first,) if first == last else (first, last):
            knots.append(knot)
            values.append((total * hit / count + 1) / (total + 2))
    return knots, values


def apply_isotonic(
    confidence: Float[Tensor, " prompt"], knots: list[float], values: list[float]
) -> Float[Tensor, " prompt"]:
    """Interpolates linearly between the knots and continues flat beyond them."""
    places = torch.tensor(knots, dtype=torch.float64)
    heights = torch.tensor(values, dtype=torch.float64)
    given = confidence.double().clamp(places[0], places[-1])
    right = torch.searchsorted(places, given).clamp(1, max(len(knots) - 1, 1)).clamp(max=len(knots) - 1)
    left = (right - 1).clamp(min=0)
    width = (places[right] - places[left]).clamp(min=1e-300)
    share = ((given - places[left]) / width).clamp(0, 1)
    return heights[left] + share * (heights[right] - heights[left])
