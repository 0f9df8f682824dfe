"""Pictures of how good a router is: who was given what, whether it knows when it is right, what keeping less would bring."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from moteach.errors import ConfigError, DataError
from moteach.report.plots import PALETTE
from moteach.report.routes import Routes, routes_of
from moteach.report.style import FAINT, INK, RIGHT, WRONG, dark, house, new_figure, readable_on, shorten, tint
from moteach.routing.quality import area_under_risk_coverage, expected_calibration_error, risk_coverage

if TYPE_CHECKING:
    from matplotlib.figure import Figure

BINS = 15
"""Bins of equal width of the reliability diagram, those of the ECE."""
_ALONG: dict[str, Any] = {
    "rotation": 45,
    "transform_rotates_text": True,
    "rotation_mode": "anchor",
    "fontsize": 8.5,
    "color": FAINT,
}


def contingency(source: Routes | Path | str) -> Figure:
    """Draws how many prompts of each label went to which teacher: blue where it claims the label, orange where not.

    Prompts that the router abstained on are in the grey column; labels that no teacher claims are in the last rows. The shade
    is the share of the row.

    Raises:
        DataError: No prompt has a label.
    """
    routes = routes_of(source)
    names, counts, claims = contingency_counts(routes)
    columns = (*routes.teachers, "nobody")
    small = max(len(columns), len(names)) > 7
    with house():
        side = 0.62 if small else 0.85
        figure = new_figure(3.0 + side * len(columns), 1.9 + 0.75 * side * len(names), title="Who was given what")
        axes = figure.subplots()
        for row, label in enumerate(names):
            total = int(counts[row].sum())
            axes.text(-0.62, row, shorten(label, 22), ha="right", va="center", fontweight="bold")
            axes.text(len(columns) - 0.35, row, f"of {total}", ha="left", va="center", color=FAINT, fontsize=9)
            for column in range(len(columns)):
                count = int(counts[row, column])
                last = column == len(columns) - 1
                hue = FAINT if last else RIGHT if bool(claims[row, column]) else WRONG
                fill = tint(hue, 0.08 + 0.87 * count / total) if count else (0.965, 0.965, 0.965)
                axes.fill_between((column - 0.47, column + 0.47), row - 0.46, row + 0.46, color=fill, linewidth=0)
                if count or (not last and bool(claims[row, column])):
                    ink = readable_on(fill) if count else FAINT
                    size = 9 if small else 11
                    axes.text(column, row, str(count), ha="center", va="center", color=ink, fontsize=size)
        for column, name in enumerate(columns):
            axes.text(
                column - (0.1 if small else 0),
                -0.62,
                name,
                ha="left" if small else "center",
                va="bottom",
                rotation=35 if small else 0,
                color=FAINT if name == "nobody" else INK,
            )
        axes.set(xlim=(-0.5, len(columns) - 0.5), ylim=(len(names) - 0.5, -0.5), xticks=(), yticks=())
        axes.spines[:].set_visible(False)
        judged = routes.judged & ~routes.abstained
        share = f"{float(routes.correct[judged].double().mean()):.3f}" if bool(judged.any()) else "-"
        axes.set_xlabel(
            f"right among the routed: {share}    blue right, orange wrong, grey abstained", loc="left", labelpad=10
        )
    picture: Figure = figure
    return picture


def reliability(source: Routes | Path | str, *, bins: int = BINS) -> Figure:
    """Draws accuracy against confidence, bin by bin, and how many prompts each bin has.

    The lines from the dots to the diagonal, weighted by the prompts, add up to the ECE (arXiv 1706.04599, Eq. 3). The pale bars
    are 95 % intervals of the accuracy (Wilson's): a bin whose bar touches the diagonal says nothing against the router.

    Raises:
        DataError: There is no prompt of which is known who was chosen and who is right.
    """
    confidence, correct, apart = _judged(source)
    counts, means, shares = reliability_bins(confidence, correct, bins=bins)
    error = expected_calibration_error(confidence, correct, bins=bins)
    with house():
        figure = new_figure(5.8, 7.0, title="Does the confidence mean what it says?")
        upper, lower = figure.subplots(2, 1, height_ratios=(4, 1), sharex=True)
        upper.set_title(f"ECE {error:.3f}, {len(confidence)} prompts{apart}")
        upper.plot((0, 1), (0, 1), color="#9A9A9A", linewidth=1, zorder=1)
        upper.text(
            0.03,
            0.07,
            "confidence = accuracy",
            rotation=45,
            transform_rotates_text=True,
            rotation_mode="anchor",
            fontsize=8.5,
            color=FAINT,
        )
        upper.text(0.03, 0.94, "says less than it knows", fontsize=8.5, color=FAINT, style="italic")
        upper.text(0.97, 0.03, "promises too much", fontsize=8.5, color=FAINT, style="italic", ha="right")
        for count, mean, share in zip(counts.tolist(), means.tolist(), shares.tolist(), strict=True):
            if not count:
                continue
            low, high = wilson(share, count)
            upper.plot((mean, mean), (low, high), color=tint(RIGHT, 0.25), linewidth=5, solid_capstyle="butt", zorder=2)
            upper.plot((mean, mean), (mean, share), color=WRONG, linewidth=2, zorder=3)
            area = 18 + 160 * count / float(counts.max())
            upper.scatter(mean, share, s=area, color=RIGHT, edgecolor="white", linewidth=0.8, zorder=4)
        upper.set(xlim=(0, 1.02), ylim=(-0.02, 1.03), ylabel="share that is right")
        middles = [(place + 0.5) / bins for place in range(bins)]
        lower.bar(middles, counts.tolist(), width=0.94 / bins, color=tint(RIGHT, 0.6))
        lower.set(xlabel="confidence", ylabel="prompts")
    picture: Figure = figure
    return picture


def risk(source: Routes | Path | str) -> Figure:
    """Draws the share of wrong routes among the most confident prompts, for every share of prompts that is kept.

    The area under the line is the AURC (arXiv 1805.08206, section 2). Below it is the best order there is, with all wrong ones
    last; a confidence that says nothing would be the flat line at the risk of all.

    Raises:
        DataError: There is no prompt of which is known who was chosen and who is right.
    """
    routes = routes_of(source)
    confidence, correct, apart = _judged(routes)
    coverage, found = risk_coverage(confidence, correct)
    best = risk_coverage(correct.double(), correct)[1]
    area, least = area_under_risk_coverage(confidence, correct), float(best.mean())
    all_of = float(found[-1])
    top = max(float(found.max()), 0.02) * 1.15
    with house():
        figure = new_figure(7.4, 4.4, title="How much to keep, and what it costs")
        axes = figure.subplots()
        axes.set_title(
            f"AURC {area:.4f}, the blue area; in the best order of the same routes (green) {least:.4f}\n"
            f"{len(confidence)} prompts{apart}"
        )
        axes.fill_between(coverage.tolist(), found.tolist(), color=tint(RIGHT, 0.14), linewidth=0)
        axes.axhline(all_of, color="#9A9A9A", linestyle=(0, (4, 3)), linewidth=1)
        axes.plot(coverage.tolist(), best.tolist(), color=PALETTE[2], linewidth=1.6)
        axes.plot(coverage.tolist(), found.tolist(), color=RIGHT, linewidth=2.2)
        axes.text(0.01, all_of, f"all kept: {all_of:.1%} wrong", va="bottom", color=FAINT, fontsize=9)
        kept = routes.judged & ~routes.abstained
        if bool((routes.judged & routes.abstained).any()) and bool(kept.any()):
            x, y = float(kept.sum() / routes.judged.sum()), float((~routes.correct[kept]).double().mean())
            axes.scatter(x, y, s=50, color=WRONG, zorder=5, edgecolor="white", clip_on=False)
            axes.annotate(
                f"its thresholds keep {x:.0%},\n{y:.1%} of it wrong",
                (x, y),
                (9 if x < 0.5 else -9, 10),
                textcoords="offset points",
                color=dark(WRONG),
                fontsize=9,
                ha="left" if x < 0.5 else "right",
            )
        axes.set(xlim=(0, 1.005), ylim=(0, top), xlabel="share of the prompts that is kept, most confident first")
        axes.set_ylabel("share of those that is wrong")
    picture: Figure = figure
    return picture


def contingency_counts(
    routes: Routes,
) -> tuple[tuple[str, ...], Int[Tensor, "label column"], Bool[Tensor, "label column"]]:
    """Counts prompts by label and teacher, with a last column for those that the router abstained on.

    Returns:
        The labels (those of the first teacher first, those of nobody last), the counts, and whether a teacher claims a label.

    Raises:
        DataError: No prompt has a label.
    """
    rows: dict[str, list[int]] = {}
    for row, label in enumerate(routes.labels):
        if label is not None:
            rows.setdefault(label, []).append(row)
    if not rows:
        raise DataError(
            f"expected prompts with a domain, got {len(routes.labels)} without; the routes could not be compared with "
            "anything. Give the prompts a 'domain' or 'teacher_id'"
        )
    many = len(routes.teachers)
    owned = {label: routes.owners[mine[0]] for label, mine in rows.items()}
    first = {label: int(own.int().argmax()) if bool(own.any()) else many for label, own in owned.items()}
    names = tuple(sorted(rows, key=lambda label: (first[label], label)))
    columns = routes.chosen.masked_fill(routes.abstained | (routes.chosen < 0), many)
    counts = torch.stack([torch.bincount(columns[rows[label]], minlength=many + 1) for label in names])
    claims = torch.stack([torch.cat([owned[label], torch.zeros(1, dtype=torch.bool)]) for label in names])
    return names, counts, claims


def reliability_bins(
    confidence: Float[Tensor, " prompt"], correct: Bool[Tensor, " prompt"], *, bins: int = BINS
) -> tuple[Int[Tensor, " bin"], Float[Tensor, " bin"], Float[Tensor, " bin"]]:
    """Prompts, mean confidence and accuracy of each bin; NaN in empty ones.

    Bins are (i/bins, (i+1)/bins], 0 in the first, so that sum n_b / n * |accuracy_b - confidence_b| is the ECE.
    """
    which = ((confidence.double() * bins).ceil().long() - 1).clamp(0, bins - 1)
    counts = torch.bincount(which, minlength=bins)
    sums = torch.zeros(2, bins, dtype=torch.float64)
    sums[0].index_add_(0, which, confidence.double())
    sums[1].index_add_(0, which, correct.double())
    means = sums / counts
    return counts, means[0], means[1]


def wilson(share: float, count: int, *, z: float = 1.959963984540054) -> tuple[float, float]:
    """Wilson's interval of a share among `count`, 95 % for the default z.

    (p + z^2/2n +- z sqrt(p(1-p)/n + z^2/4n^2)) / (1 + z^2/n) (Wilson 1927, JASA 22:209).

    Raises:
        ConfigError: There is nothing to take a share of, or it is no share.
    """
    if count < 1 or not 0 <= share <= 1:
        raise ConfigError(f"expected a share from 0 to 1 of at least one prompt, got {share} of {count}")
    square = z * z / count
    middle, scale = share + square / 2, 1 + square
    reach = z * math.sqrt(share * (1 - share) / count + square / (4 * count))
    return max((middle - reach) / scale, 0.0), min((middle + reach) / scale, 1.0)


def _judged(source: Routes | Path | str) -> tuple[Float[Tensor, " prompt"], Bool[Tensor, " prompt"], str]:
    """Confidence and correctness of what can be judged, and a word on what was left out."""
    routes = routes_of(source)
    judged = routes.judged
    if not bool(judged.any()):
        raise DataError(
            f"expected routed prompts whose domain a teacher claims, got none among {len(judged)}; nobody could say which "
            "route was right. Name the domains in the experts' cards, or draw other prompts"
        )
    unknown = int((routes.owners.any(dim=1) & ~judged).sum())
    apart = f"; {unknown} abstentions are left out" if unknown else ""
    return routes.confidence[judged].double(), routes.correct[judged], apart
