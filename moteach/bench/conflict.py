"""[scenarios=NAMES] [arms=FILE] [resolvers=NAMES] [seeds=0,1,2] [best=6]: students of teams with bad teachers.

More words: [steps=150] or [seconds=S] a cell, [screen=20] seconds a cell when choosing, [variant=test] or tuning, [workers=1],
[cache=DIR]; every other argument goes to each `moteach train`. With `best=N` every resolver is first tried on one seed of the
*tuning* variant of the faults, and the N best are then trained on all seeds of `variant`. The label reference takes part
always. A killed benchmark continues where it was. Scores are normalised by the best good teacher of each domain.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

from rich.console import Console

from moteach.bench._arms_table import Arms, chosen, numbers, read_arms
from moteach.bench._conflict_table import print_tables
from moteach.bench._references import references
from moteach.bench._report import take_words, whole_number, wide_console, write_report
from moteach.bench._scenarios import SCENARIOS, VARIANTS, Team, Variant
from moteach.bench._students import Cell, normalised, over_seeds, trained
from moteach.catalogue.packaged import cache_dir
from moteach.errors import ConfigError, UnknownChoiceError, nearest

REFERENCE = "label"
"""The arm that is told the labels of an oracle: it leaves out the teachers that are bad."""
SETTINGS = ("data.evaluation_size=500",)
"""Of every student, before the arm's own. 150 steps of the default run's 192 prompts reach 0.88 with labels and without bad
teachers; 200 steps of 96 reached 0.81 in three quarters of the time."""
_STEPS = 150
_SCREEN_SECONDS = 20
_WORDS = (
    *("scenarios", "arms", "resolvers", "seeds", "best", "steps", "seconds"),
    *("screen", "variant", "workers", "cache", "out"),
)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What is trained."""

    scenarios: Sequence[str]
    arms: Arms
    seeds: Sequence[int]
    variant: Variant
    steps: int | None
    seconds: float | None
    extra: tuple[str, ...] = ()
    """Overrides of the command line."""
    folder: Path
    workers: int

    def cells(self) -> list[tuple[dict[str, Any], Cell]]:
        """Every cell, with the words that name it in a row."""
        found = []
        for scenario in self.scenarios:
            team = SCENARIOS[scenario].team(self.variant)
            told = team.overrides(self.folder / "teachers")
            for arm, overrides in self.arms.items():
                known = team.oracle() if arm == REFERENCE else []
                for seed in self.seeds:
                    asked = (*told, *SETTINGS, *overrides, *known, *self.extra)
                    cell = Cell(overrides=asked, seed=seed, steps=self.steps, seconds=self.seconds)
                    named = {"scenario": scenario, "variant": self.variant, "arm": arm, "seed": seed}
                    found.append((named, cell))
        return found


def run(argv: Sequence[str]) -> None:
    """Runs `moteach bench conflict`.

    Raises:
        ConfigError: A word cannot be used.
        UnknownChoiceError: A scenario, resolver or variant does not exist.
    """
    words, extra = take_words(argv, _WORDS)
    if unknown := [text for text in extra if "=" not in text]:
        raise ConfigError(f"expected word=value, got '{unknown[0]}'; {nearest(unknown[0], _WORDS)}")
    default = Path(__file__).with_name("conflict_arms.yaml")
    known = read_arms(Path(words["arms"]) if "arms" in words else default)
    names = chosen("resolvers", words.get("resolvers"), known)
    variant = words.get("variant", "test")
    if variant not in VARIANTS:
        raise UnknownChoiceError(f"variant: there is no '{variant}'; {nearest(variant, VARIANTS)}")
    if "steps" in words and "seconds" in words:
        raise ConfigError("expected steps= or seconds=, got both; they are two ways of saying how long a cell trains")
    plan = Plan(
        scenarios=chosen("scenarios", words.get("scenarios"), SCENARIOS),
        arms={name: known[name] for name in dict.fromkeys([REFERENCE, *names]) if name in known},
        seeds=numbers("seeds", words.get("seeds"), (0, 1, 2)),
        variant="tuning" if variant == "tuning" else "test",
        steps=None if "seconds" in words else whole_number(words, "steps", default=_STEPS, least=1),
        seconds=whole_number(words, "seconds", default=20, least=1) if "seconds" in words else None,
        extra=tuple(extra),
        folder=Path(words["cache"]) if "cache" in words else cache_dir() / "bench" / "conflict",
        workers=whole_number(words, "workers", default=1, least=1),
    )
    console = wide_console()
    summary: dict[str, Any] = {}
    if "best" in words:
        best = whole_number(words, "best", default=6, least=1)
        screen = whole_number(words, "screen", default=_SCREEN_SECONDS, least=1)
        tried = screening(plan, seconds=screen)
        screened = table(measured(tried, console))
        kept = best_arms(screened, best)
        console.print(f"kept after {screen} s a cell on {tried.variant}: {', '.join(kept)}", highlight=False)
        plan = Plan(**{**vars_of(plan), "arms": {name: known[name] for name in (REFERENCE, *kept) if name in known}})
        summary["screened"] = screened
    rows = measured(plan, console)
    summary["table"] = table(rows)
    print_tables(console, rows, summary["table"])
    write_report(words.get("out"), name="conflict", argv=argv, rows=rows, summary=summary)


def vars_of(plan: Plan) -> dict[str, Any]:
    """The fields of a plan."""
    return {name: getattr(plan, name) for name in plan.__dataclass_fields__}


def screening(plan: Plan, *, seconds: int) -> Plan:
    """The plan on which resolvers are chosen: one seed, short, and never the faults that the table shows."""
    return Plan(
        **{**vars_of(plan), "variant": "tuning", "seeds": plan.seeds[:1], "steps": None, "seconds": float(seconds)}
    )


def best_arms(rows: Sequence[Mapping[str, Any]], count: int) -> list[str]:
    """The arms with the largest mean over scenarios, the reference apart; arms that failed somewhere come last."""
    scores: dict[str, list[float]] = {}
    for row in rows:
        if row["arm"] != REFERENCE:
            scores.setdefault(row["arm"], []).append(row["mean"])
    ranked = sorted(scores, key=lambda name: (-len(scores[name]), -mean(scores[name])))
    return ranked[:count]


def measured(plan: Plan, console: Console) -> list[dict[str, Any]]:
    """Trains what is missing; returns a row a cell, those that cannot be trained with an `error`."""
    pairs = plan.cells()
    named = {cell.key: words for words, cell in pairs}
    done = 0

    def tell(cell: Cell, result: Mapping[str, Any]) -> None:
        nonlocal done
        done += 1
        words = named[cell.key]
        said = result.get("error") or f"{result['steps']} steps, {result['cpu_seconds']:.0f} s"
        text = f"{done}: {words['scenario']} {words['arm']} seed {words['seed']}: {said}"
        console.print(text, highlight=False, soft_wrap=True)

    results = trained([cell for _, cell in pairs], folder=plan.folder / "cells", workers=plan.workers, tell=tell)
    rows = []
    for (words, _), result in zip(pairs, results, strict=True):
        rows.append(words | (_scores(plan, words["scenario"], result) if "error" not in result else result))
    return rows


def _scores(plan: Plan, scenario: str, result: Mapping[str, Any]) -> dict[str, Any]:
    team = SCENARIOS[scenario].team(plan.variant)
    before, best = ceiling(team, plan.folder, plan.extra)
    scores = normalised(result["accuracy"], before, best)
    seconds = result["cpu_seconds"]
    each = mean(scores.values())
    return {
        "normalised": scores,
        "mean": each,
        "worst": min(scores.values()),
        "steps": result["steps"],
        "cpu_seconds": seconds,
        "per_cpu_second": each / seconds,
        "accuracy": dict(result["accuracy"]),
        "source": result["source"],
    }


def ceiling(team: Team, folder: Path, extra: Sequence[str] = ()) -> tuple[dict[str, float], dict[str, float]]:
    """Accuracy of the untrained student, and of the best teacher of each domain: the shipped one, or a good foreign one."""
    shipped = references([*SETTINGS, "experts=[math,code,search]", *extra], folder=folder / "cells")
    best = {name: float(shipped["teachers"][name][name]) for name in ("math", "code", "search")}
    foreign = [name for name, fault in team.faults.items() if fault.kind == "foreign"]
    if foreign:
        asked = [*SETTINGS, *team.overrides(folder / "teachers"), *extra]
        own = references(asked, folder=folder / "cells")["teachers"]
        best |= {domain: own[name][domain] for name in foreign for domain in team.faults[name].domains}
    return {name: float(value) for name, value in shipped["before"].items()}, best


def table(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """One row per scenario and arm: means over seeds with their spread, and how far it is behind the label reference."""
    groups: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for row in rows:
        if "error" not in row:
            groups.setdefault((row["scenario"], row["arm"]), []).append(row)
    found = []
    for (scenario, arm), mine in groups.items():
        fields = over_seeds(mine, ("mean", "worst", "cpu_seconds", "per_cpu_second", "steps"))
        reference = groups.get((scenario, REFERENCE))
        behind = None if reference is None else over_seeds(reference, ("mean",))["mean"] - fields["mean"]
        found.append({"scenario": scenario, "arm": arm, "seeds": len(mine), **fields, "behind_label": behind})
    return found
