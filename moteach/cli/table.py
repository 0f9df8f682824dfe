"""The closing table of a run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.table import Table


def closing_table(summary: Mapping[str, Any]) -> Table:
    """Draws `summary.json`: per domain before, teacher, after, normalised score; mean and worst below."""
    table = Table(title="held-out accuracy, greedy")
    for name in ("domain", "prompts", "student before", "teacher", "student after", "normalised"):
        table.add_column(name, justify="left" if name == "domain" else "right")
    for domain, row in summary.get("domains", {}).items():
        table.add_row(
            domain,
            str(row["prompts"]),
            _share(row["before"]),
            _share(row["teacher"]),
            _share(row["after"]),
            _share(row["normalised"]),
        )
    for domain, row in summary.get("raw", {}).items():
        table.add_row(f"{domain} (raw)", str(row["prompts"]), _share(row["before"]), "", _share(row["after"]), "")
    if summary.get("mean") is not None:
        table.add_section()
        table.add_row("mean", "", "", "", "", _share(summary["mean"]), style="bold")
        table.add_row("worst domain", "", "", "", "", _share(summary["worst"]), style="bold")
    return table


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"
