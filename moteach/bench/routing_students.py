"""[parts=single,composite] [arms=FILE] [only=NAMES] [seeds=0,1,2]: what students learn under each router and gate.

More words: [steps=150] or [seconds=S] a cell, [workers=1], [cache=DIR]; every other argument goes to each `moteach train`.
Part `single` trains on prompts of one domain each and normalises by the teachers. Part `composite` trains on prompts that need
two experts in one answer, and normalises their accuracy by the step oracle: greedy decoding where each token comes
from the expert of its step's kind. A killed benchmark continues where it was.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from rich.console import Console
from rich.table import Table

from moteach.bench._arms_table import Arms, chosen, numbers, read_parts
from moteach.bench._conflict_table import notes
from moteach.bench._references import references
from moteach.bench._report import take_words, whole_number, wide_console, write_report
from moteach.bench._students import Cell, normalised, over_seeds, trained
from moteach.catalogue.packaged import cache_dir
from moteach.errors import ConfigError, nearest

SETTINGS: Mapping[str, tuple[str, ...]] = {
    "single": ("data.evaluation_size=500",),
    "composite": (
        *("data.evaluation_size=500", "data.domains=[math,code,search,composite]"),
        *("sampler.mixture={composite: 1}", "sampler.prompts_per_step=64"),
    ),
}
"""Of every student of a part, before the arm's own. Nobody claims composites, so their share is said; their completions are
longer, so a step has fewer of them."""
_EXTRA: Mapping[str, tuple[str, ...]] = {"single": (), "composite": ("composite",)}
_STEPS = 150
_WORDS = ("parts", "arms", "only", "seeds", "steps", "seconds", "workers", "cache", "out")


def run(argv: Sequence[str]) -> None:
    """Runs `moteach bench routing-students`.

    Raises:
        ConfigError: A word cannot be used.
        UnknownChoiceError: A part or an arm does not exist.
    """
    words, extra = take_words(argv, _WORDS)
    if unknown := [text for text in extra if "=" not in text]:
        raise ConfigError(f"expected word=value, got '{unknown[0]}'; {nearest(unknown[0], _WORDS)}")
    if "steps" in words and "seconds" in words:
        raise ConfigError("expected steps= or seconds=, got both; they are two ways of saying how long a cell trains")
    default = Path(__file__).with_name("routing_students_arms.yaml")
    known = read_parts(Path(words["arms"]) if "arms" in words else default)
    parts = chosen("parts", words.get("parts"), [part for part in known if part in SETTINGS])
    names = chosen("only", words.get("only"), {name: None for part in parts for name in known[part]})
    steps = None if "seconds" in words else whole_number(words, "steps", default=_STEPS, least=1)
    seconds = whole_number(words, "seconds", default=20, least=1) if "seconds" in words else None
    seeds = numbers("seeds", words.get("seeds"), (0, 1, 2))
    workers = whole_number(words, "workers", default=1, least=1)
    folder = Path(words["cache"]) if "cache" in words else cache_dir() / "bench" / "routing-students"
    console = wide_console()
    rows: list[dict[str, Any]] = []
    summary: dict[str, Any] = {}
    for part in parts:
        arms = {name: overrides for name, overrides in known[part].items() if name in names}
        pairs = cells(part, arms, seeds=seeds, steps=steps, seconds=seconds, extra=extra)
        compared = references([*SETTINGS[part], *extra], folder=folder, extra_domains=_EXTRA[part])
        mine = measured(part, pairs, compared, folder=folder, workers=workers, console=console)
        rows += mine
        summary[part] = {"references": compared, "table": table(mine)}
        _print(console, part, summary[part])
    for line in notes([row | {"scenario": row["part"]} for row in rows]):
        console.print(line, highlight=False, soft_wrap=True)
    write_report(words.get("out"), name="routing-students", argv=argv, rows=rows, summary=summary)


def cells(
    part: str, arms: Arms, *, seeds: Sequence[int], steps: int | None, seconds: float | None, extra: Sequence[str]
) -> list[tuple[dict[str, Any], Cell]]:
    """Every cell of a part, with the words that name it in a row."""
    found = []
    for arm, overrides in arms.items():
        asked = (*SETTINGS[part], *overrides, *extra)
        for seed in seeds:
            cell = Cell(overrides=asked, seed=seed, steps=steps, seconds=seconds, extra_domains=_EXTRA[part])
            found.append(({"part": part, "arm": arm, "seed": seed}, cell))
    return found


def measured(
    part: str,
    pairs: Sequence[tuple[dict[str, Any], Cell]],
    compared: Mapping[str, Any],
    *,
    folder: Path,
    workers: int,
    console: Console,
) -> list[dict[str, Any]]:
    """Trains what is missing; returns a row a cell, those that cannot be trained with an `error`."""
    named = {cell.key: words for words, cell in pairs}

    def tell(cell: Cell, result: Mapping[str, Any]) -> None:
        words = named[cell.key]
        said = result.get("error") or f"{result['steps']} steps, {result['cpu_seconds']:.0f} s"
        console.print(f"{part} {words['arm']} seed {words['seed']}: {said}", highlight=False, soft_wrap=True)

    results = trained([cell for _, cell in pairs], folder=folder, workers=workers, tell=tell)
    rows = []
    for (words, _), result in zip(pairs, results, strict=True):
        rows.append(words | (result if "error" in result else scores(part, result, compared)))
    return rows


def scores(part: str, result: Mapping[str, Any], compared: Mapping[str, Any]) -> dict[str, Any]:
    """Normalised score of each domain; of composites also the accuracy itself, by which arms are compared there."""
    best = {name: float(compared["teachers"][name][name]) for name in ("math", "code", "search")}
    if part == "composite":
        best["composite"] = float(compared["step_oracle"])
    each = normalised(result["accuracy"], compared["before"], best)
    shown = each["composite"] if part == "composite" else mean(each.values())
    return {
        "normalised": each,
        "mean": mean(each[name] for name in ("math", "code", "search")),
        "worst": min(each[name] for name in ("math", "code", "search")),
        **each,
        **({"composite_accuracy": result["accuracy"]["composite"]} if part == "composite" else {}),
        "steps": result["steps"],
        "cpu_seconds": result["cpu_seconds"],
        "per_cpu_second": shown / result["cpu_seconds"],
        "accuracy": dict(result["accuracy"]),
        "source": result["source"],
    }


def table(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """One row an arm: means over seeds with their spread."""
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        if "error" not in row:
            groups.setdefault(row["arm"], []).append(row)
    found = []
    for arm, mine in groups.items():
        fields = [name for name in _FIELDS if name in mine[0]]
        found.append({"arm": arm, "seeds": len(mine), **over_seeds(mine, [*fields, "steps"])})
    return found


_FIELDS = (
    *("mean", "worst", "math", "code", "search", "composite", "composite_accuracy"),
    *("cpu_seconds", "per_cpu_second"),
)


def _print(console: Console, part: str, summary: Mapping[str, Any]) -> None:
    rows = summary["table"]
    if not rows:
        return
    shown = Table(title=f"{part} prompts: normalised, mean ± standard deviation over {rows[0]['seeds']} seed(s)")
    shown.add_column("arm", no_wrap=True)
    fields = [name for name in _FIELDS if name in rows[0]]
    for name in fields:
        shown.add_column(name.replace("_", " "), justify="right", no_wrap=True)
    for row in rows:
        shown.add_row(row["arm"], *(_text(name, row[name], row[f"{name}_spread"]) for name in fields))
    console.print(shown)
    if "step_oracle" in summary["references"]:
        before = summary["references"]["before"]["composite"]
        oracle = summary["references"]["step_oracle"]
        console.print(f"composites: untrained student {before:.3f}, step oracle {oracle:.3f}", highlight=False)


def _text(name: str, value: float, spread: float) -> str:
    digits = {"cpu_seconds": 1, "per_cpu_second": 4}.get(name, 3)
    return f"{value:.{digits}f} ± {spread:.{digits}f}"
