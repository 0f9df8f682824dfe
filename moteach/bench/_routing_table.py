"""Tables of `moteach bench routing`, and which targets were reached."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

TARGETS = {"accuracy": 0.97, "ece": 0.03, "ood": 0.90, "overhead": 0.05}
"""What a router on sentence embeddings should reach: at least, at most, at least, at most."""
_AT_LEAST = ("accuracy", "ood")
_QUALITY = ("accuracy", "macro_f1", "ece", "aurc", "coverage", "ood")
_HEADS = ("accuracy", "macro F1", "ECE", "AURC", "coverage at 1 % risk", "AUROC outside")


def reached(row: Mapping[str, Any]) -> dict[str, bool]:
    """Says of each target whether a row reaches it; what was not measured is not reached."""
    return {
        name: row[name] is not None and bool(row[name] >= goal if name in _AT_LEAST else row[name] <= goal)
        for name, goal in TARGETS.items()
    }


def verdict(row: Mapping[str, Any]) -> str:
    """Names the targets that a row misses, with what it has instead."""
    missed = [
        f"{name} {'not measured' if row[name] is None else format(row[name], '.3f')} "
        f"({'>=' if name in _AT_LEAST else '<='} {TARGETS[name]:g})"
        for name, met in reached(row).items()
        if not met
    ]
    return "reaches every target" if not missed else f"misses {', '.join(missed)}"


def print_tables(console: Console, rows: Sequence[Mapping[str, Any]], summary: Mapping[str, Any]) -> None:
    """Prints quality, quality by source, times, targets and what the prompts are."""
    quality = Table(title=f"routers on prompts of {summary['on']}")
    times = Table(title="times")
    for table, heads in (
        (quality, (*_HEADS, "by")),
        (times, ("encoder s", "route s", "overhead", "fit s", "cached prompts/s")),
    ):
        table.add_column("router")
        table.add_column("encoder")
        table.add_column("calibration")
        for head in heads:
            table.add_column(head, justify="right")
    for row in rows:
        names = (str(row["router"]), short(row["encoder"]), row["calibration"] or "-")
        cells = ["-" if row[key] is None else f"{row[key]:.3f}" for key in _QUALITY]
        quality.add_row(*names, *cells, row["ood_score"] or "-")
        if row["overhead"] is not None:
            times.add_row(
                *names,
                f"{row['encode_seconds']:.3f}",
                f"{row['route_seconds']:.3f}",
                f"{row['overhead']:.2%}",
                f"{row['fit_seconds']:.2f}",
                f"{row['cached_per_second']:,.0f}",
            )
    console.print(quality)
    console.print(_by_source(_once(rows), summary["prompts"]))
    console.print(times)
    for line in _notes(rows, summary):
        console.print(line, highlight=False, soft_wrap=True)


def short(encoder: str | None) -> str:
    """Name of an encoder without where it comes from."""
    return "-" if encoder is None else encoder.rpartition(":")[2]


def _once(rows: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The first row of each router and encoder: calibration moves no prompt to another expert."""
    return list({(row["router"], row["encoder"]): row for row in reversed(rows)}.values())[::-1]


def _by_source(rows: Sequence[Mapping[str, Any]], prompts: Mapping[str, int]) -> Table:
    table = Table(title="by source: accuracy, and of texts from outside the AUROC of the score above")
    table.add_column("source")
    table.add_column("prompts", justify="right")
    for row in rows:
        table.add_column(f"{row['router']}\n{short(row['encoder'])}", justify="right")
    for name, count in prompts.items():
        cells = [f"{row['by_source'][name]:.3f}" if name in row["by_source"] else "-" for row in rows]
        table.add_row(name, str(count), *cells)
    return table


def _notes(rows: Sequence[Mapping[str, Any]], summary: Mapping[str, Any]) -> list[str]:
    found = [
        f"{row['router']}, {short(row['encoder'])}, {row['calibration']}: {verdict(row)}"
        for row in rows
        if row["overhead"] is not None
    ]
    versions = ", ".join(f"{name} {number}" for name, number in summary["versions"].items())
    return [
        *found,
        *([f"packages: {versions}"] if versions else []),
        *summary["missing"],
        "overhead: what routing takes beside the encoder, over the encoder's time in the same calls; fit encodes the exemplars",
        summary["machine"],
    ]
