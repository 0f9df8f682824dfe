"""Pictures of routing: why a prompt went where it went, how often that was right, whether the router knows.

    from moteach.report import routing as show
    show.contingency("runs/mine")
    show.why("runs/mine/router", "34+25=")

`load` and `tokens` take the folder of a run; `why` takes a router that learned from exemplars, or the folder it was saved to;
`contingency`, `reliability` and `risk` take a run or what `ask(router, prompts)` returns. Each returns a matplotlib `Figure`,
which a notebook shows and `savefig` writes. matplotlib is imported when the first picture is drawn.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from moteach.errors import DataError
from moteach.report.plots import smooth, smoothing_window
from moteach.report.quality import contingency, reliability, risk
from moteach.report.routes import Routes, ask, learner_of, read_routes, routes_of
from moteach.report.style import FAINT, INK, colours, dark, house, new_figure, shorten, spread, tint
from moteach.report.tokens import tokens

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["Routes", "ask", "contingency", "load", "read_routes", "reliability", "risk", "tokens", "why"]


def why(router: Any, text: str, *, nearest: int = 6) -> Figure:
    """Draws why a prompt goes where it goes: probability of each teacher, thresholds, and the exemplars it is most like.

    Args:
        router: One that learned from exemplars, or the folder it was saved to.
        text: The prompt.
        nearest: Exemplars that are shown.

    Raises:
        ConfigError: The router has not learned from exemplars.
        MissingFileError: The folder holds no saved router.
    """
    learned = learner_of(router)
    routing, scores, unsure = learned.decide([text])
    close = learned.nearest(text, count=nearest)
    teachers = routing.teacher_ids
    palette = colours(teachers)
    chance = dict(zip(teachers, scores.probabilities[0].tolist(), strict=True))
    weight = dict(zip(teachers, routing.weights[0].tolist(), strict=True))
    order = sorted(teachers, key=lambda name: chance[name])
    sure, like, energy = (float(values[0]) for values in (scores.confidence, scores.similarity, scores.energy))
    misses = [
        f"{what} {value:.2f} < {least:.2f}"
        for what, value, least in (
            ("confidence", sure, learned.policy.min_confidence),
            ("similarity", like, learned.policy.min_similarity),
            ("energy", energy, learned.policy.min_energy),
        )
        if least is not None and value < least
    ]
    given = ", ".join(f"{name} {weight[name]:.2f}" for name in reversed(order) if weight[name] > 0) or "nobody"
    reason = f"abstains: {'; '.join(misses)}" if bool(unsure[0]) else f"confidence {sure:.2f}, energy {energy:.2f}"
    with house():
        rows = max(len(teachers), len(close))
        figure = new_figure(11.0, 1.5 + 0.34 * rows, title=f"“{shorten(text, 78)}”  →  {given}")
        left, right = figure.subplots(1, 2, width_ratios=(1, 1.7))
        left.set_title(f"probability of each teacher\n{reason}")
        for place, name in enumerate(order):
            taught = weight[name] > 0
            face = palette[name] if taught else tint(palette[name], 0.3)
            left.barh(place, chance[name], height=0.7, color=face)
            left.text(chance[name] + 0.015, place, f"{chance[name]:.2f}", va="center", color=INK if taught else FAINT)
        _names(left, order, palette)
        _threshold(left, learned.policy.min_confidence)
        left.set(xlim=(0, 1.15), xticks=(), ylim=(-0.6, max(len(teachers), 2) - 0.4))
        left.spines["bottom"].set_visible(False)
        right.set_title(f"exemplars it is most like, and the cosine to them\nsimilarity {like:.2f}")
        for place, (exemplar, names, cosine) in enumerate(close):
            colour = palette.get(names[0], FAINT)
            right.barh(place, cosine, height=0.78, color=tint(colour, 0.28))
            right.text(0.01, place, shorten(exemplar, 64), va="center", fontsize=9)
            right.text(1.02, place, f"{cosine:.2f}", va="center", fontsize=9, ha="left")
            right.text(1.11, place, ", ".join(names), va="center", fontsize=9, color=dark(colour), fontweight="bold")
        _threshold(right, learned.policy.min_similarity)
        right.set(xlim=(min(0.0, close[-1][2]), 1.32), ylim=(len(close) - 0.4, -0.6), xticks=(), yticks=())
        right.spines[["bottom", "left"]].set_visible(False)
    picture: Figure = figure
    return picture


def load(source: Routes | Path | str) -> Figure:
    """Draws which share of each step's prompts every teacher taught, and which nobody did (hatched).

    A prompt of several teachers counts for each by its weight. The numbers are means over the run; long runs are smoothed.

    Raises:
        DataError: There is no prompt.
    """
    routes = routes_of(source)
    steps, shares = load_per_step(routes)
    names = (*routes.teachers, "nobody")
    palette = {**colours(routes.teachers), "nobody": FAINT}
    window = smoothing_window(len(steps))
    means = [sum(column) / len(column) for column in shares]
    smoothed = [smooth(column, window) for column in shares]
    # A single step has no width.
    edges = [steps[0] - 0.5, *steps, steps[-1] + 0.5]
    with house():
        figure = new_figure(9.0, 4.2, title="Who taught how much")
        axes = figure.subplots()
        axes.set_title(f"share of the prompts of a step{f', mean of {window} steps' if window > 1 else ''}")
        floor = [0.0] * len(edges)
        middles = []
        for name, column in zip(names, smoothed, strict=True):
            ceiling = [low + part for low, part in zip(floor, [column[0], *column, column[-1]], strict=True)]
            if name == "nobody":
                axes.fill_between(
                    edges, floor, ceiling, facecolor="white", edgecolor="#B8B8B8", hatch="/////", linewidth=0
                )
            else:
                axes.fill_between(edges, floor, ceiling, color=tint(palette[name], 0.8), linewidth=0)
                axes.plot(edges, ceiling, color="white", linewidth=1)
            middles.append((floor[-1] + ceiling[-1]) / 2)
            floor = ceiling
        said = [place for place, name in enumerate(names) if name != "nobody" or means[place] > 0]
        heights = spread([middles[place] for place in said], gap=0.066, low=0.02, high=0.98)
        for place, height in zip(said, heights, strict=True):
            axes.annotate(
                f"{names[place]}  {means[place]:.0%}",
                (1, middles[place]),
                (1.035, height),
                xycoords=("axes fraction", "data"),
                textcoords=("axes fraction", "data"),
                color=dark(palette[names[place]]),
                va="center",
                fontweight="bold",
                fontsize=9,
                annotation_clip=False,
                arrowprops={
                    "arrowstyle": "-",
                    "color": palette[names[place]],
                    "linewidth": 0.8,
                    "shrinkA": 0,
                    "shrinkB": 0,
                },
            )
        axes.set(
            xlim=(edges[0], edges[-1]), ylim=(0, 1), xlabel="step", yticks=(0, 0.5, 1), yticklabels=("0", "½", "1")
        )
        axes.xaxis.get_major_locator().set_params(integer=True)
    picture: Figure = figure
    return picture


def load_per_step(routes: Routes) -> tuple[list[int], list[list[float]]]:
    """Mean weight of each teacher in each step, and last the share of the prompts without a weight.

    Returns:
        The steps, and a list over steps for each teacher and for nobody; in a step they sum to one.

    Raises:
        DataError: There is no prompt.
    """
    if not len(routes.steps):
        raise DataError("expected routed prompts, got none; there is no load to draw")
    found, which = torch.unique(routes.steps, return_inverse=True)
    nobody = 1 - routes.weights.double().sum(dim=1, keepdim=True)
    parts = torch.cat([routes.weights.double(), nobody.clamp(min=0)], dim=1)
    totals = torch.zeros(len(found), parts.shape[1], dtype=torch.float64).index_add_(0, which, parts)
    shares = totals / torch.bincount(which)[:, None]
    return found.tolist(), shares.T.tolist()


def _names(axes: Any, names: Sequence[str], palette: dict[str, str]) -> None:
    """Writes the names at the left axis in the colours of the teachers."""
    axes.set_yticks(range(len(names)), names)
    for label, name in zip(axes.get_yticklabels(), names, strict=True):
        label.set(color=dark(palette[name]), fontweight="bold")
    axes.tick_params(axis="y", length=0)


def _threshold(axes: Any, least: float | None) -> None:
    if least is not None:
        axes.axvline(least, color=INK, linestyle=(0, (3, 2)), linewidth=1)
        axes.annotate(
            f"at least {least:.2f}",
            (least, 0),
            (0, -4),
            xycoords=("data", "axes fraction"),
            textcoords="offset points",
            ha="center",
            va="top",
            fontsize=8.5,
            annotation_clip=False,
        )
