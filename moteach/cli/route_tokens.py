"""`moteach route explain run=DIR`: completions of a run, coloured by the teacher of each token."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from moteach.errors import ConfigError

COLOURS = ("green", "cyan", "magenta", "yellow", "blue", "red", "bright_green", "bright_cyan")
UNTAUGHT = "dim strike"


def token_rows(run: Path) -> list[dict[str, Any]]:
    """Reads the rows of tokens of a run's last traced step, in the order they were written.

    Raises:
        ConfigError: The run has no `routing.parquet`, or it was not traced.
    """
    import pyarrow.parquet as pq

    path = run / "routing.parquet"
    if not path.is_file():
        raise ConfigError(
            f"run: expected a finished run with a routing.parquet, got {run}; nothing says who taught what"
        )
    table = pq.read_table(path)
    tokens = table.to_pylist() if "position" in table.column_names else []
    tokens = [row for row in tokens if row["position"] is not None]
    if not tokens:
        raise ConfigError(
            f"run: {path} has no rows of tokens; who taught a token was not written. Train with gate.trace=true"
        )
    last = max(row["step"] for row in tokens)
    return [row for row in tokens if row["step"] == last]


def completions(rows: Sequence[Mapping[str, Any]]) -> list[list[Mapping[str, Any]]]:
    """Groups the rows of tokens by completion, each in the order of its positions."""
    found: dict[tuple[str, int], list[Mapping[str, Any]]] = {}
    for row in rows:
        found.setdefault((row["prompt_id"], row["sample"]), []).append(row)
    return [sorted(group, key=lambda row: row["position"]) for group in found.values()]


def painted(tokens: Sequence[Mapping[str, Any]], colours: Mapping[str, str]) -> Text:
    """One completion: each token in the colour of its heaviest teacher, faint where that one has less than 0.9."""
    text = Text()
    for row in tokens:
        piece = row["token"] or "·"
        if row["teacher"] is None:
            text.append(piece, style=UNTAUGHT)
        else:
            text.append(piece, style=colours[row["teacher"]] + ("" if row["confidence"] >= 0.9 else " dim"))
    return text


def show(run: Path, *, count: int, console: Console) -> list[dict[str, Any]]:
    """Prints completions of the run's last traced step, at most `count` of a domain, and returns what was printed.

    Raises:
        ConfigError: The run was not traced.
    """
    return show_rows(token_rows(run), count=count, console=console)


def show_rows(rows: Sequence[Mapping[str, Any]], *, count: int, console: Console) -> list[dict[str, Any]]:
    """Prints the completions of these rows of tokens, at most `count` of a domain, and returns what was printed."""
    teachers = list(rows[0]["weights"])
    colours = {name: COLOURS[place % len(COLOURS)] for place, name in enumerate(teachers)}
    legend = Text(f"step {rows[0]['step']}   ")
    for name in teachers:
        legend.append(f"{name}  ", style=colours[name])
    legend.append("nobody", style=UNTAUGHT)
    console.print(legend)
    shown: list[dict[str, Any]] = []
    for tokens in completions(rows):
        domain = tokens[0]["domain"]
        if sum(entry["domain"] == domain for entry in shown) >= count:
            continue
        console.print(Text(f"{tokens[0]['prompt_id']}  ").append_text(painted(tokens, colours)), soft_wrap=True)
        shown.append(
            {
                "prompt_id": tokens[0]["prompt_id"],
                "domain": domain,
                "tokens": [row["token"] for row in tokens],
                "teachers": [row["teacher"] for row in tokens],
                "weights": [row["weights"] for row in tokens],
            }
        )
    return shown
