"""How good a router is, as pure functions of its answers and the labels."""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from moteach.errors import ConfigError


def accuracy(correct: Bool[Tensor, " prompt"]) -> float:
    """Share of the prompts that are given to a right expert.

    Raises:
        ConfigError: There is no prompt.
    """
    _not_empty(len(correct))
    return float(correct.double().mean())


def contingency(
    chosen: Int[Tensor, " prompt"], label: Int[Tensor, " prompt"], *, experts: int
) -> Int[Tensor, "label chosen"]:
    """Counts prompts by label (rows) and chosen expert (columns).

    Args:
        chosen: Expert each prompt is given to, from 0.
        label: Expert it belongs to.
        experts: Number of experts.
    """
    return torch.bincount(label * experts + chosen, minlength=experts**2).reshape(experts, experts)


def macro_f1(table: Int[Tensor, "label chosen"]) -> float:
    """Mean of the experts' F1 = 2 TP / (2 TP + FP + FN), every expert alike; those without label or choice are left out.

    Args:
        table: What `contingency` counts.

    Raises:
        ConfigError: There is no prompt.
    """
    _not_empty(int(table.sum()))
    both = (table.sum(dim=0) + table.sum(dim=1)).double()
    seen = both > 0
    return float((2 * table.diagonal().double()[seen] / both[seen]).mean())


def expected_calibration_error(
    confidence: Float[Tensor, " prompt"],
    correct: Bool[Tensor, " prompt"],
    *,
    bins: int = 15,
    binning: Literal["width", "count"] = "width",
) -> float:
    """ECE = sum over bins of n_b / n * |accuracy_b - confidence_b| (arXiv 1706.04599, Eq. 3).

    Args:
        confidence: Probability that the choice is right, from 0 to 1.
        correct: Whether it is.
        bins: Number of bins; 15 is that paper's.
        binning: `width`: (i/bins, (i+1)/bins], 0 in the first; `count`: sorted by confidence (stable) and cut into `bins` parts
            whose sizes differ by at most one (adaptive ECE). Empty bins count for nothing.

    Raises:
        ConfigError: There is no prompt, no bin, or a confidence that is no probability.
    """
    _not_empty(len(confidence))
    if bins < 1 or bool((confidence < 0).any()) or bool((confidence > 1).any()):
        raise ConfigError(
            f"expected at least one bin and confidences from 0 to 1, got {bins} bins and confidences from "
            f"{float(confidence.min())} to {float(confidence.max())}; the error would mean nothing"
        )
    gaps = correct.double() - confidence.double()
    if binning == "width":
        which = ((confidence.double() * bins).ceil().long() - 1).clamp(0, bins - 1)
    else:
        which = torch.empty(len(gaps), dtype=torch.long)
        which[confidence.sort(stable=True).indices] = torch.arange(len(gaps)) * bins // len(gaps)
    return float(torch.zeros(bins, dtype=torch.float64).index_add_(0, which, gaps).abs().sum() / len(gaps))


def risk_coverage(
    confidence: Float[Tensor, " prompt"], correct: Bool[Tensor, " prompt"]
) -> tuple[Float[Tensor, " prompt"], Float[Tensor, " prompt"]]:
    """Returns coverage i / n and risk (share of wrong ones) of the i most confident prompts, for i = 1 ... n.

    Equal confidences have no order of their own: inside a tie the expected risk over all orders is given, so the result
    does not depend on the order of the prompts.
    """
    _not_empty(len(confidence))
    levels, which = torch.unique(-confidence.double(), sorted=True, return_inverse=True)
    counts = torch.zeros(len(levels), dtype=torch.float64).index_add_(0, which, torch.ones(len(which)).double())
    wrong = torch.zeros(len(levels), dtype=torch.float64).index_add_(0, which, (~correct).double())
    errors = (wrong / counts).repeat_interleave(counts.long()).cumsum(dim=0)
    kept = torch.arange(1, len(confidence) + 1, dtype=torch.float64)
    return kept / len(confidence), errors / kept


def area_under_risk_coverage(confidence: Float[Tensor, " prompt"], correct: Bool[Tensor, " prompt"]) -> float:
    """AURC: the mean of `risk_coverage` over all coverages (arXiv 1805.08206, section 2); 0 is best."""
    return float(risk_coverage(confidence, correct)[1].mean())


def coverage_at_risk(confidence: Float[Tensor, " prompt"], correct: Bool[Tensor, " prompt"], *, risk: float) -> float:
    """Largest share of the prompts that a threshold on the confidence can keep with at most `risk` of them wrong.

    A threshold keeps all equal confidences or none, so only the ends of ties count. 0 when no threshold does.
    """
    coverage, found = risk_coverage(confidence, correct)
    ordered = confidence.double().sort(descending=True).values
    ends = torch.ones(len(ordered), dtype=torch.bool)
    ends[:-1] = ordered[:-1] != ordered[1:]
    allowed = coverage[ends & (found <= risk)]
    return float(allowed.max()) if len(allowed) else 0.0


def auroc(inside: Float[Tensor, " inside"], outside: Float[Tensor, " outside"]) -> float:
    """Probability that a prompt of the domains scores higher than one from outside, ties half (Mann-Whitney).

    Args:
        inside: Scores, higher for what is familiar, of prompts that some expert claims.
        outside: Scores of prompts that no expert claims.

    Raises:
        ConfigError: One of the two is empty.
    """
    _not_empty(min(len(inside), len(outside)))
    ordered = outside.double().sort().values
    below = torch.searchsorted(ordered, inside.double(), side="left")
    upto = torch.searchsorted(ordered, inside.double(), side="right")
    return float((below + upto).double().mean() / (2 * len(outside)))


def _not_empty(count: int) -> None:
    if not count:
        raise ConfigError("expected at least one prompt, got none; there is nothing to measure")
