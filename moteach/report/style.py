"""How the figures look: colours, the empty figure, labels that keep their distance."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

from moteach.errors import MissingDependencyError
from moteach.report.plots import PALETTE

MANY = (
    "#332288", "#88CCEE", "#44AA99", "#117733", "#999933", "#DDCC77", "#CC6677", "#882255", "#AA4499", "#6E6E6E",
)  # fmt: skip
"""Paul Tol's muted scheme with a darker grey, for eight to ten teachers; colour-blind readers can tell them apart."""
INK, FAINT, GRID = "#222222", "#6E6E6E", "#E6E6E6"
RIGHT, WRONG = PALETTE[0], PALETTE[1]
_SETTINGS: Any = {
    "axes.axisbelow": True,
    "axes.edgecolor": "#9A9A9A",
    "axes.grid": False,
    "axes.labelcolor": FAINT,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlelocation": "left",
    "axes.titlesize": 10,
    "axes.titlecolor": FAINT,
    "font.size": 10,
    "grid.color": GRID,
    "hatch.linewidth": 0.8,
    "svg.fonttype": "none",
    "svg.hashsalt": "moteach",
    "text.color": INK,
    # A prompt may hold two dollar signs, which would make a formula of what is between them.
    "text.parse_math": False,
    "xtick.color": FAINT,
    "ytick.color": FAINT,
}


@contextmanager
def house() -> Iterator[None]:
    """Draws in the style of the house inside, and leaves matplotlib's settings as they were.

    Raises:
        MissingDependencyError: matplotlib is not installed.
    """
    try:
        import matplotlib as mpl
    except ImportError as error:
        raise MissingDependencyError("figures need matplotlib; pip install 'moteach[plots]'") from error
    with mpl.rc_context(_SETTINGS):
        yield


def new_figure(width: float, height: float, *, title: str | None = None, layout: str | None = "constrained") -> Any:
    """Makes an empty figure that a notebook shows by itself; sizes in inches.

    It is not one of pyplot's: nothing has to be closed, and no `%matplotlib inline` is needed.
    """
    from matplotlib.figure import Figure

    figure: Any = Figure(figsize=(width, height), dpi=110, layout=layout)  # type: ignore[arg-type]
    if title is not None:
        figure.suptitle(title, x=0.012, ha="left", fontsize=13, fontweight="bold")
    if layout == "constrained":
        figure.get_layout_engine().set(w_pad=0.1, h_pad=0.08)
    figure._repr_png_ = partial(png, figure)
    return figure


def png(figure: Any) -> bytes:
    """Returns the figure as a PNG."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()


def colours(names: Sequence[str]) -> dict[str, str]:
    """A colour a name, by its place; up to ten differ."""
    palette = PALETTE[:6] if len(names) <= 6 else MANY
    return {name: palette[place % len(palette)] for place, name in enumerate(names)}


def tint(colour: str, share: float) -> tuple[float, float, float]:
    """Mixes a colour with white; 1 is the colour itself."""
    from matplotlib.colors import to_rgb

    red, green, blue = (1 - share * (1 - part) for part in to_rgb(colour))
    return red, green, blue


def dark(colour: str) -> str:
    """The colour, mixed with black until it can be read as text on white (contrast of at least 4.5, WCAG 2.2)."""
    from matplotlib.colors import to_hex, to_rgb

    mixed = to_rgb(colour)
    while 1.05 / (luminance(mixed) + 0.05) < 4.5:
        mixed = (mixed[0] * 0.95, mixed[1] * 0.95, mixed[2] * 0.95)
    return to_hex(mixed)


def luminance(colour: tuple[float, float, float]) -> float:
    """Relative luminance of an sRGB colour, 0 for black and 1 for white (WCAG 2.2)."""
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in colour]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def readable_on(colour: tuple[float, float, float]) -> str:
    """Black or white, whichever has the larger contrast with a background (WCAG 2.2)."""
    light = luminance(colour) + 0.05
    return "black" if light / 0.05 >= 1.05 / light else "white"


def spread(wanted: Sequence[float], *, gap: float, low: float = 0.0, high: float = 1.0) -> list[float]:
    """Moves labels apart so that neighbours are at least `gap` from each other, in the order they had.

    They stay between `low` and `high` where there is room for all of them.
    """
    order = sorted(range(len(wanted)), key=lambda place: wanted[place])
    found = [0.0] * len(wanted)
    least = low
    for place in order:
        found[place] = max(wanted[place], least)
        least = found[place] + gap
    most = high
    for place in reversed(order):
        found[place] = min(found[place], most)
        most = found[place] - gap
    return found


def shorten(text: str, limit: int) -> str:
    """One line of at most `limit` characters."""
    line = " ".join(text.split())
    return line if len(line) <= limit else f"{line[: limit - 1]}…"
