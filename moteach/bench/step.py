"""[overrides of train] [steps=20] [warmup=5]: a training step beside the same step in plain torch.

Both arms start from the same weights, see the same prompts and stay on-policy, each with its own copy of the student.
Their steps alternate inside one process, so that whatever else the machine does hits both alike; medians are reported.
"""

from __future__ import annotations

import copy
import resource
import sys
import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from moteach.bench._floor import Floor
from moteach.bench._interleave import FloorTracker, Pair, RouterTap, one_step, plain_adamw
from moteach.bench._report import machine, take_words, whole_number, wide_console, write_report
from moteach.bench.memory import peak_bytes

PARTS = ("generate", "route", "score", "update", "record", "other")
_FLOOR_WORK = {
    "router._target_": "moteach.routing.label.LabelRouter",
    "objective._target_": "moteach.objectives.divergence.DivergenceObjective",
    "objective.student_temperature": 1.0,
    "objective.teacher_temperature": 1.0,
    "divergence._target_": "moteach.divergences.full.ReverseKL",
    "rollout.temperature": 1.0,
    "rollout.top_p": 1.0,
    "rollout.top_k": 0,
    "optim.micro_batch_size": None,
    "optim.updates_per_step": 1,
    "balance._target_": "moteach.objectives.balance.NoBalance",
    "token_weights": {},
    "mix.outcome": 0.0,
    "mix.reference": 0.0,
    "mix.supervised": 0.0,
}
"""What the floor does; any other value and the two arms do different work."""


def run(argv: Sequence[str]) -> None:
    """Runs `moteach bench step`."""
    from moteach.cli.app import run_app

    words, overrides = take_words(argv, ("steps", "warmup", "out"))
    steps = whole_number(words, "steps", default=20, least=1)
    warmup = whole_number(words, "warmup", default=5, least=0)
    run_app("train", overrides, partial(task, steps=steps, warmup=warmup, out=words.get("out"), argv=argv))


def task(cfg: Any, *, steps: int, warmup: int, out: str | None, argv: Sequence[str]) -> None:
    """Measures one composed config of `moteach train`."""
    from moteach.cli.app import quiet_libraries
    from moteach.config.assemble import assemble
    from moteach.config.validate import validate

    console = wide_console()
    cfg.max_steps = warmup + steps
    cfg.checkpoint.every_steps = 0
    with tempfile.TemporaryDirectory(prefix="moteach-bench-") as folder:
        cfg.run_dir = str(Path(folder) / "run")
        validate(cfg)
        quiet_libraries()
        job = assemble(cfg)
        tracker = _prepare(job)
        with console.status(f"{warmup} + {steps} steps of each arm"):
            _train(job, tracker)
        peaks = _peaks(tracker, step=warmup + steps)
    pairs = tracker.pairs[warmup:]
    rows = table_rows(pairs)
    summary = summarise(pairs) | peaks | {"steps": steps, "warmup": warmup, "threads": torch.get_num_threads()}
    summary["different_work"] = different_work(cfg, merged=tracker.tap.merged)
    _print(console, rows, summary)
    write_report(out, name="step", argv=argv, rows=rows, summary=summary)


def _prepare(job: Any) -> FloorTracker:
    """Gives the run a floor that starts from the same weights."""
    trainer = job.trainer
    student = copy.deepcopy(trainer.student.model)
    floor = Floor(
        student=student,
        teacher=lambda name: trainer.teachers.get(name).model,
        optimizer=plain_adamw(student.parameters(), trainer.optimizer),
        eos_id=int(job.tokenizer.eos_token_id),
        vocab_size=trainer.student.vocab_size,
    )
    tap = RouterTap(router=trainer.router)
    trainer.router = tap
    tracker = FloorTracker(trainer=trainer, floor=floor, tap=tap)
    trainer.trackers = [*trainer.trackers, tracker]
    return tracker


def _train(job: Any, tracker: FloorTracker) -> None:
    job.run_dir.mkdir(parents=True)
    trainer = tracker.trainer
    trainer.traces.start(0)
    for each in trainer.trackers:
        each.start(run_dir=job.run_dir, config={}, step=0)
    trainer.train(0)
    for each in trainer.trackers:
        each.finish({})


def _peaks(tracker: FloorTracker, *, step: int) -> dict[str, float]:
    """Memory: of the process so far, and the tensors of one more step of each arm, traced and not timed."""
    unit = 1 if sys.platform == "darwin" else 1024
    peak_rss = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20
    moteach = peak_bytes(lambda: one_step(tracker.trainer, step)) / 2**20
    floor = peak_bytes(lambda: tracker.floor_step(step)) / 2**20
    return {"peak_rss_mib": peak_rss, "peak_tensors_mib": moteach, "floor_peak_tensors_mib": floor}


def table_rows(pairs: Sequence[Pair]) -> list[dict[str, Any]]:
    """Milliseconds of every part in both arms; `score + update` is where the same work is split at another place."""
    total = median(pair.total for pair in pairs)
    times: dict[str, tuple[list[float], list[float]]] = {}
    for part in PARTS:
        times[part] = (
            [pair.seconds.get(part, 0.0) for pair in pairs],
            [pair.floor.seconds[part] for pair in pairs if part in pair.floor.seconds],
        )
    both = [[a + b for a, b in zip(times["score"][arm], times["update"][arm], strict=True)] for arm in (0, 1)]
    times["score + update"] = (both[0], both[1])
    times["total"] = ([pair.total for pair in pairs], [sum(pair.floor.seconds.values()) for pair in pairs])
    return [_row(part, *times[part], total) for part in (*PARTS[:4], "score + update", *PARTS[4:], "total")]


def _row(part: str, mine: Sequence[float], floor: Sequence[float], total: float) -> dict[str, Any]:
    row: dict[str, Any] = {
        "part": part,
        "moteach_ms": 1e3 * median(mine),
        "moteach_min_ms": 1e3 * min(mine),
        "share": median(mine) / total,
        "floor_ms": 1e3 * median(floor) if floor else None,
        "floor_min_ms": 1e3 * min(floor) if floor else None,
    }
    alike = floor and part not in ("score", "update")
    return row | {"ratio": median(mine) / median(floor) if alike else None}


def summarise(pairs: Sequence[Pair]) -> dict[str, Any]:
    """Tokens, tokens per second, and how many times the floor's time moteach takes, per step and per token."""
    floors = [sum(pair.floor.seconds.values()) for pair in pairs]
    mine = [pair.total / pair.tokens for pair in pairs]
    theirs = [seconds / pair.floor.tokens for seconds, pair in zip(floors, pairs, strict=True)]
    return {
        "tokens_per_step": median(pair.tokens for pair in pairs),
        "floor_tokens_per_step": median(pair.floor.tokens for pair in pairs),
        "tokens_per_second": 1 / median(mine),
        "floor_tokens_per_second": 1 / median(theirs),
        "ratio": median(pair.total for pair in pairs) / median(floors),
        "ratio_per_token": median(mine) / median(theirs),
    }


def different_work(cfg: Any, *, merged: bool) -> list[str]:
    """Names the choices of this run that the floor does not follow."""
    found = ["several teachers per prompt"] if merged else []
    for key, expected in _FLOOR_WORK.items():
        node = cfg
        for name in key.split("."):
            node = None if node is None else node.get(name)
        if node != expected and not (node is None and key.startswith("objective.")):
            found.append(f"{key}={node}")
    return found


def _print(console: Console, rows: Sequence[dict[str, Any]], summary: dict[str, Any]) -> None:
    table = Table(title=f"one training step, {summary['steps']} steps of each arm, alternating")
    for name in ("part", "moteach ms", "min", "share", "floor ms", "min", "ratio"):
        table.add_column(name, justify="left" if name == "part" else "right")
    for row in rows:
        if row["part"] == "total":
            table.add_section()
        table.add_row(
            row["part"],
            f"{row['moteach_ms']:.2f}",
            f"{row['moteach_min_ms']:.2f}",
            f"{row['share']:.1%}",
            "" if row["floor_ms"] is None else f"{row['floor_ms']:.2f}",
            "" if row["floor_min_ms"] is None else f"{row['floor_min_ms']:.2f}",
            "" if row["ratio"] is None else f"{row['ratio']:.2f}",
            style="bold" if row["part"] == "total" else None,
        )
    console.print(table)
    for line in _notes(summary):
        console.print(line, highlight=False)
    if summary["different_work"]:
        console.print(
            f"the floor does different work than this run ({', '.join(summary['different_work'])}): the ratio says what "
            "the choice costs, not what the framework does",
            style="yellow",
            highlight=False,
        )


def _notes(summary: dict[str, Any]) -> list[str]:
    per_step = f"tokens per step: {summary['tokens_per_step']:.0f}, floor {summary['floor_tokens_per_step']:.0f}"
    per_second = f"tokens/s: {summary['tokens_per_second']:.0f}, floor {summary['floor_tokens_per_second']:.0f}"
    tensors = f"{summary['peak_tensors_mib']:.1f} MiB, floor {summary['floor_peak_tensors_mib']:.1f} MiB"
    split = "score and update have no ratio of their own: moteach projects the teachers' heads inside update, the floor inside"
    return [
        f"{split} score. moteach's generate includes its sampler; the floor is given the prompts and their teachers.",
        f"{per_step}; {per_second}; time per token: {summary['ratio_per_token']:.2f} x the floor",
        f"peak of a step's tensors: {tensors}; peak RSS of the process, both arms: {summary['peak_rss_mib']:.0f} MiB",
        machine(),
    ]
