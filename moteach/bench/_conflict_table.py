"""Tables of `moteach bench conflict`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import mean
from typing import Any

from rich.console import Console
from rich.table import Table

from moteach.bench._report import machine


def print_tables(console: Console, rows: Sequence[Mapping[str, Any]], table: Sequence[Mapping[str, Any]]) -> None:
    """Prints mean and worst of the domains by scenario, and what a CPU second buys."""
    scenarios = list(dict.fromkeys(row["scenario"] for row in table))
    arms = list(dict.fromkeys(row["arm"] for row in table))
    cells = {(row["arm"], row["scenario"]): row for row in table}
    seeds = max((row["seeds"] for row in table), default=0)
    for field, title in (("mean", "mean over domains"), ("worst", "worst domain")):
        shown = Table(title=f"normalised score, {title}: mean ± standard deviation over {seeds} seed(s)")
        shown.add_column("arm")
        for name in (*scenarios, "all", *(("per CPU s",) if field == "mean" else ())):
            shown.add_column(name, justify="right")
        for arm in arms:
            own = [cells[arm, name] for name in scenarios if (arm, name) in cells]
            texts = [
                f"{cells[arm, name][field]:.3f} ± {cells[arm, name][f'{field}_spread']:.3f}"
                if (arm, name) in cells
                else "-"
                for name in scenarios
            ]
            texts.append(f"{mean(row[field] for row in own):.3f}")
            if field == "mean":
                texts.append(f"{mean(row['per_cpu_second'] for row in own):.4f}")
            shown.add_row(arm, *texts)
        console.print(shown)
    for line in notes(rows):
        console.print(line, highlight=False, soft_wrap=True)


def notes(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """What a reader has to know: cells that failed, results of different sources, the machine."""
    found = [f"{row['scenario']} {row['arm']} could not be trained: {row['error']}" for row in rows if "error" in row]
    sources = {row["source"] for row in rows if "source" in row}
    if len(sources) > 1:
        found.append(
            f"these numbers come from {len(sources)} versions of the source; give another cache=DIR to train all of them again"
        )
    return [*dict.fromkeys(found), machine()]
