"""Training curves of one or more runs, drawn from their files alone."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import yaml

from moteach.errors import ConfigError, DataError, MissingDependencyError, MissingFileError

PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
"""Okabe and Ito's colours, which colour-blind readers can tell apart."""
_FORMATS = (".svg", ".png", ".pdf")


@dataclass(frozen=True, kw_only=True)
class RunHistory:
    """What a run folder says about a run; plain lists."""

    columns: Mapping[str, list[float]]
    """Metric name to one value per step, NaN where a step lacks it; `step` is one of them."""
    baseline: Mapping[str, Mapping[str, float]]
    """`before` and `teacher`: held-out accuracy of each domain, empty when it was not measured."""
    config: Mapping[str, Any]

    def domains(self, metric: str) -> list[str]:
        """Domains that have `metric/<domain>`, in the order they first appear."""
        return [name.partition("/")[2] for name in self.columns if name.startswith(f"{metric}/")]


def read_run(run_dir: Path) -> RunHistory:
    """Reads `metrics.jsonl`, and `baseline.json` and `config.yaml` where they exist.

    Raises:
        MissingFileError: There is no `metrics.jsonl`.
        DataError: It holds no step, or a line that is not a row.
    """
    path = run_dir / "metrics.jsonl"
    if not path.is_file():
        raise MissingFileError(
            f"expected a run folder with a 'metrics.jsonl', got {run_dir}; train with tracker=[jsonl]"
        )
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError as error:
            raise DataError(
                f"{path}:{number}: expected a JSON object, got {line[:40]!r}; the run is still writing"
            ) from error
    if not rows:
        raise DataError(f"expected at least one step in {path}, got none; nothing could be drawn")
    names = dict.fromkeys(name for row in rows for name in row)
    columns = {name: [math.nan if row.get(name) is None else float(row[name]) for row in rows] for name in names}
    baseline, config = run_dir / "baseline.json", run_dir / "config.yaml"
    scores = json.loads(baseline.read_text(encoding="utf-8")) if baseline.is_file() else {}
    return RunHistory(
        columns=columns,
        baseline={who: {d: float(s["accuracy"]) for d, s in table.items()} for who, table in scores.items()},
        config=yaml.safe_load(config.read_text(encoding="utf-8")) if config.is_file() else {},
    )


def training_curves(runs: Sequence[Path], path: Path, *, title: str | None = None) -> None:
    """Draws verified accuracy of the student's own rollouts and its divergence to the routed teacher, per domain.

    A thin line is one run, a bold one the mean over runs. The same files give the same bytes.

    Args:
        runs: Run folders, usually of one config and several seeds.
        path: Where the figure goes; `.svg`, `.png` or `.pdf`.
        title: Heading; None names the data and counts the seeds.

    Raises:
        MissingDependencyError: matplotlib is not installed.
        MissingFileError: A folder is not that of a run.
        ConfigError: The suffix is another, or there is no run.
        DataError: A run has no step, or none has a metric to draw.
    """
    try:
        import matplotlib as mpl
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingDependencyError("figures need matplotlib; pip install 'moteach[plots]'") from error
    if path.suffix not in _FORMATS:
        raise ConfigError(f"expected a figure file that ends in {', '.join(_FORMATS)}, got '{path.name}'")
    if not runs:
        raise ConfigError("expected at least one run folder, got none")
    histories = [read_run(run) for run in runs]
    domains = list(dict.fromkeys(d for h in histories for m in ("reward", "divergence") for d in h.domains(m)))
    if not domains:
        raise DataError(
            f"expected 'reward/<domain>' or 'divergence/<domain>' in {runs[0] / 'metrics.jsonl'}, got neither"
        )
    colours = {domain: PALETTE[i % len(PALETTE)] for i, domain in enumerate(domains)}
    window = smoothing_window(min(len(history.columns["step"]) for history in histories))
    settings: Any = {
        "svg.hashsalt": "moteach",
        "svg.fonttype": "none",
        "axes.spines.top": False,
        "axes.spines.right": False,
    }
    with mpl.rc_context(settings):
        figure = Figure(figsize=(10, 4.2), dpi=150, layout="constrained")
        left, right = figure.subplots(1, 2)
        _accuracy(left, histories, colours, window)
        _divergence(right, histories, colours, window)
        figure.suptitle(title or heading(histories), fontsize=13, fontweight="bold")
        # matplotlib stamps date and version otherwise
        metadata: dict[str, Any] = {".svg": {"Date": None, "Creator": None}, ".png": {"Software": None}}.get(
            path.suffix, {"CreationDate": None, "Creator": None, "Producer": None}
        )
        figure.savefig(path, metadata=metadata)


def smoothing_window(steps: int) -> int:
    """Odd number of steps that a point is averaged over: about a fortieth of the run, at most 9."""
    return min(9, 1 + 2 * (steps // 80))


def smooth(values: Sequence[float], window: int) -> list[float]:
    """Centred moving mean; NaN is left out, and at both ends the window is cut off."""
    reach = window // 2
    found = []
    for i in range(len(values)):
        near = [value for value in values[max(i - reach, 0) : i + reach + 1] if not math.isnan(value)]
        found.append(fmean(near) if near else math.nan)
    return found


def mean_curve(curves: Sequence[tuple[Sequence[float], Sequence[float]]]) -> tuple[list[float], list[float]]:
    """Mean over runs at the steps that all of them have: one that ends early must not bend the mean."""
    tables = [dict(zip(steps, values, strict=True)) for steps, values in curves]
    shared = [step for step in tables[0] if all(step in table for table in tables)]
    means = []
    for step in shared:
        known = [table[step] for table in tables if not math.isnan(table[step])]
        means.append(fmean(known) if known else math.nan)
    return shared, means


def heading(histories: Sequence[RunHistory]) -> str:
    """Says what the figure is: `MOPD on the arena, 3 seeds`; runs that differ in more than the seed are `3 runs`."""
    plain = [_without_seeds(history.config) for history in histories]
    seeds = {history.config.get("seed") for history in histories}
    same = all(config == plain[0] for config in plain) and len(seeds) == len(histories) and None not in seeds
    word = "seed" if same else "run"
    source = (
        str((histories[0].config.get("data") or {}).get("_target_", "")).removeprefix("moteach.data.").split(".")[0]
    )
    place = {"": "", "arena": " on the arena"}.get(source, f" on {source}")
    return f"MOPD{place}, {len(histories)} {word}{'' if len(histories) == 1 else 's'}"


def _without_seeds(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _without_seeds(child) for key, child in value.items() if key not in ("seed", "run_dir")}
    return value


def _accuracy(axes: Any, histories: Sequence[RunHistory], colours: Mapping[str, str], window: int) -> None:
    _curves(axes, histories, colours, "reward", window, lambda value: value)
    for who, style, label in (("teacher", "--", "teacher"), ("before", ":", "student before")):
        drawn = False
        for domain, colour in colours.items():
            scores = [h.baseline[who][domain] for h in histories if domain in h.baseline.get(who, {})]
            if scores:
                axes.axhline(fmean(scores), color=colour, linestyle=style, linewidth=1.2, zorder=1)
                drawn = True
        if drawn:
            axes.plot([], [], color="0.4", linestyle=style, linewidth=1.2, label=f"{label} (held-out, greedy)")
    axes.set(ylim=(-0.03, 1.03), xlabel="step", ylabel=f"verified accuracy{_smoothed(window)}")
    axes.set_title("the student's own rollouts", fontsize=11)
    _finish(axes)


def _divergence(axes: Any, histories: Sequence[RunHistory], colours: Mapping[str, str], window: int) -> None:
    _curves(axes, histories, colours, "divergence", window, lambda value: value if value > 0 else math.nan)
    axes.set(yscale="log", xlabel="step", ylabel=f"nats per token{_smoothed(window)}")
    axes.set_title("divergence to the routed teacher", fontsize=11)
    _finish(axes)


def _curves(
    axes: Any,
    histories: Sequence[RunHistory],
    colours: Mapping[str, str],
    metric: str,
    window: int,
    clean: Callable[[float], float],
) -> None:
    for domain, colour in colours.items():
        name = f"{metric}/{domain}"
        curves = [
            (history.columns["step"], smooth([clean(value) for value in history.columns[name]], window))
            for history in histories
            if name in history.columns
        ]
        if not curves:
            continue
        for steps, values in curves if len(curves) > 1 else []:
            axes.plot(steps, values, color=colour, linewidth=0.7, alpha=0.4, zorder=2)
        axes.plot(*mean_curve(curves), color=colour, linewidth=2.2, label=domain, zorder=3)
    if len(histories) > 1:
        axes.plot([], [], color="0.4", linewidth=0.7, label=f"one of {len(histories)} runs")


def _smoothed(window: int) -> str:
    return f" (mean of {window} steps)" if window > 1 else ""


def _finish(axes: Any) -> None:
    axes.grid(visible=True, color="0.92", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.margins(x=0.01)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False, fontsize=9)
