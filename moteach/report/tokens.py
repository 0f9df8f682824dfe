"""Who taught which token of a completion, as a heat map that reads like the text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unicodedata import east_asian_width

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from moteach.errors import DataError
from moteach.report.routes import routing_table, teachers_of
from moteach.report.style import FAINT, colours, house, new_figure, readable_on, shorten, tint

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_WIDTH, _MARGIN, _LINE, _HEADER = 11.0, 0.15, 0.27, 0.24
_SIZE = 9.0
_CHARACTER = 0.602 * _SIZE / 72
"""Inches of a character: the advance of DejaVu Sans Mono, which ships with matplotlib, is 0.602 of its size."""
_SHOWN = str.maketrans({"\n": "↵", "\t": "→", "\r": "", "Ġ": " ", "▁": " ", "Ċ": "↵"})


@dataclass(frozen=True, kw_only=True)
class TokenRow:
    """One token of a completion and who taught it."""

    token: str
    teacher: str | None
    """The heaviest one, None where nobody teaches the token."""
    weight: float


@dataclass(frozen=True, kw_only=True)
class CompletionRow:
    """One completion of a run, token by token."""

    step: int
    prompt_id: str
    sample: int
    prompt: str | None
    """Its text, where the run kept it."""
    tokens: tuple[TokenRow, ...]


def read_completions(
    run_dir: Path | str, *, step: int | None = None, prompt_ids: Sequence[str] | None = None, limit: int = 8
) -> tuple[tuple[str, ...], list[CompletionRow]]:
    """Reads the token rows of one step.

    Args:
        run_dir: Folder of a run with `gate.trace=true`.
        step: Which; None takes the last one that has token rows.
        prompt_ids: Only these prompts; None takes all.
        limit: Most completions, in the order of the file.

    Returns:
        The teachers of the run and its completions.

    Raises:
        MissingFileError: There is no routing table.
        DataError: It has no token rows, or none of that step and those prompts.
    """
    folder = Path(run_dir)
    table = routing_table(folder)
    absent = [name for name in ("sample", "position", "token") if name not in table.column_names]
    rows = table.slice(0, 0) if absent else table.filter(pc.field("position").is_valid())
    if not rows.num_rows:
        said = f"no column {', '.join(absent)}" if absent else "prompt rows alone"
        raise DataError(
            f"expected token rows in the routing table of {folder}, got {said}; who taught which token was not written "
            "down. Train with gate.trace=true"
        )
    step = int(pc.max(rows["step"]).as_py()) if step is None else step
    wanted = pc.field("step") == step
    if prompt_ids is not None:
        wanted &= pc.field("prompt_id").isin(list(prompt_ids))
    groups: dict[tuple[str, int], list[dict[str, Any]]] = {}
    for row in rows.filter(wanted).to_pylist():
        groups.setdefault((row["prompt_id"], row["sample"]), []).append(row)
    if not groups:
        steps = sorted(set(rows["step"].to_pylist()))
        raise DataError(
            f"expected token rows of step {step} and of the prompts asked for, got none in {folder}; there are token rows of "
            f"steps {steps[0]} to {steps[-1]}"
        )
    texts = _prompts(folder, step)
    found = [
        CompletionRow(step=step, prompt_id=name, sample=sample, prompt=texts.get(name), tokens=_tokens(mine))
        for (name, sample), mine in list(groups.items())[:limit]
    ]
    return teachers_of(table), found


def tokens(
    run_dir: Path | str, *, step: int | None = None, prompt_ids: Sequence[str] | None = None, limit: int = 8
) -> Figure:
    """Draws completions with each token in the colour of its heaviest teacher, darker for more weight.

    Hatched tokens are taught by nobody. Arguments and errors: see `read_completions`.
    """
    teachers, completions = read_completions(run_dir, step=step, prompt_ids=prompt_ids, limit=limit)
    return draw_completions(teachers, completions)


def draw_completions(teachers: Sequence[str], completions: Sequence[CompletionRow]) -> Figure:
    """Draws what `read_completions` reads; the height grows with the text."""
    palette = colours(teachers)
    columns = int((_WIDTH - 2 * _MARGIN) / _CHARACTER)
    broken = [_lines(completion.tokens, columns) for completion in completions]
    with house():
        legend = _legend_lines(teachers, columns)
        top = 0.5 + _LINE * len(legend) + 0.1
        height = top + sum(_HEADER + _LINE * len(lines) + 0.14 for lines in broken) + 0.05
        figure = new_figure(_WIDTH, height, layout=None)
        axes = figure.add_axes((0, 0, 1, 1))
        axes.set(xlim=(0, _WIDTH), ylim=(height, 0))
        axes.axis("off")
        axes.text(_MARGIN, 0.25, "Who taught which token", fontsize=13, fontweight="bold", va="center")
        for number, entries in enumerate(legend):
            _legend(axes, entries, palette, 0.5 + _LINE * number)
        y = top
        for completion, lines in zip(completions, broken, strict=True):
            _heading(axes, completion, y + _HEADER / 2)
            y += _HEADER
            for line in lines:
                x = _MARGIN
                for token in line:
                    x += _cell(axes, token, x, y, palette)
                y += _LINE
            y += 0.14
    picture: Figure = figure
    return picture


def shown(token: str) -> str:
    """A token as it is written into its cell: what cannot be seen gets a sign, also with marks of byte-level vocabularies."""
    text = token.translate(_SHOWN) or "·"
    return "".join(sign if sign.isprintable() else "·" for sign in text).replace(" ", "␣" if not text.strip() else " ")


def _tokens(rows: Sequence[Mapping[str, Any]]) -> tuple[TokenRow, ...]:
    found = []
    for row in sorted(rows, key=lambda row: int(row["position"])):
        teacher = None if row["abstained"] else row["teacher"]
        weight = 0.0 if teacher is None else float(row["weights"][teacher] or 0.0)
        found.append(TokenRow(token=row["token"] or "", teacher=teacher, weight=weight))
    return tuple(found)


def _prompts(run_dir: Path, step: int) -> dict[str, str]:
    """Texts of the prompts of a step, where the run kept its completions."""
    path = run_dir / "rollouts.parquet"
    paths = [path] if path.is_file() else sorted((run_dir / "traces").glob("rollouts-*.parquet"))
    if not paths:
        return {}
    filters = [("step", "=", step)]
    table = pa.concat_tables([pq.read_table(p, columns=["prompt_id", "prompt"], filters=filters) for p in paths])
    return dict(zip(table["prompt_id"].to_pylist(), table["prompt"].to_pylist(), strict=True))


def _shade(weight: float) -> float:
    """Share of the teacher's colour; the least weight is still told from white and from the other teachers."""
    return 0.22 + 0.7 * weight


def _cells(token: TokenRow) -> float:
    """Width in characters; a short token keeps room for its colour."""
    signs = shown(token.token)
    return max(len(signs) + sum(east_asian_width(sign) in "WF" for sign in signs), 1) + 0.9


def _lines(row: Sequence[TokenRow], columns: int) -> list[list[TokenRow]]:
    """Breaks a completion between tokens; a token never is."""
    lines: list[list[TokenRow]] = [[]]
    used = 0.0
    for token in row:
        if lines[-1] and used + _cells(token) > columns:
            lines.append([])
            used = 0.0
        lines[-1].append(token)
        used += _cells(token)
    return lines


def _cell(axes: Any, token: TokenRow, x: float, y: float, palette: Mapping[str, str]) -> float:
    """Draws one token and returns its width in inches."""
    from matplotlib.patches import Rectangle

    width = _cells(token) * _CHARACTER
    box, size = (x, y), (width - 0.015, _LINE - 0.04)
    if token.teacher is None:
        axes.add_patch(Rectangle(box, *size, facecolor="white", edgecolor="#B8B8B8", hatch="/////", linewidth=0))
        ink = FAINT
    else:
        fill = tint(palette[token.teacher], _shade(token.weight))
        axes.add_patch(Rectangle(box, *size, facecolor=fill, linewidth=0))
        ink = readable_on(fill)
    halo = {"boxstyle": "square,pad=0.05", "facecolor": "white", "linewidth": 0} if token.teacher is None else None
    axes.text(
        x + size[0] / 2,
        y + size[1] / 2,
        shown(token.token),
        color=ink,
        family="DejaVu Sans Mono",
        fontsize=_SIZE,
        ha="center",
        va="center_baseline",
        bbox=halo,
    )
    return width


def _heading(axes: Any, completion: CompletionRow, y: float) -> None:
    place = f"step {completion.step}, {completion.prompt_id}, sample {completion.sample}"
    said = place if completion.prompt is None else shorten(completion.prompt, 95)
    axes.text(_MARGIN, y, said, fontsize=9, color=FAINT, va="center", style="normal")
    if completion.prompt is not None:
        axes.text(_WIDTH - _MARGIN, y, shorten(place, 60), fontsize=7.5, color="#9A9A9A", va="center", ha="right")


def _legend_lines(teachers: Sequence[str], columns: int) -> list[list[str | None]]:
    lines: list[list[str | None]] = [[]]
    used = 0
    for name in (*teachers, None):
        width = len(name or "nobody (abstained)") + 14
        if lines[-1] and used + width > columns:
            lines.append([])
            used = 0
        lines[-1].append(name)
        used += width
    return lines


def _legend(axes: Any, entries: Sequence[str | None], palette: Mapping[str, str], y: float) -> None:
    """Each teacher with its shades from little to all of the weight, then nobody."""
    from matplotlib.patches import Rectangle

    x, high = _MARGIN, _LINE - 0.1
    for name in entries:
        if name is None:
            axes.add_patch(
                Rectangle((x, y), 0.42, high, facecolor="white", edgecolor="#B8B8B8", hatch="/////", linewidth=0)
            )
        else:
            for place, weight in enumerate((0.25, 0.5, 1.0)):
                fill = tint(palette[name], _shade(weight))
                axes.add_patch(Rectangle((x + 0.14 * place, y), 0.14, high, facecolor=fill, linewidth=0))
        said = name or "nobody (abstained)"
        axes.text(x + 0.48, y + high / 2, said, fontsize=9, va="center_baseline")
        x += 0.48 + (len(said) + 5) * _CHARACTER
