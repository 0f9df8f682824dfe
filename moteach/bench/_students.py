"""Students trained in their own processes, cell by cell, and what they can do afterwards; a killed benchmark continues.

A *cell* is one run of `moteach train` with some overrides. Its result lies in a file named by what was asked, so it is
trained once; `source` in it says which source code made it.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from functools import cache
from multiprocessing import get_context
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from moteach.paths import conf_dir

_PROBE_STEPS = 10
_FEWEST_STEPS = 20
_QUIET = ("tracker=[]", "checkpoint.every_steps=0", "threads=1", "trace.completions=false")


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One student."""

    overrides: tuple[str, ...]
    seed: int
    steps: int | None = None
    """Training steps; None takes as many as `seconds` allow."""
    seconds: float | None = None
    """CPU seconds of training; the number of steps is worked out from the first ones."""
    extra_domains: tuple[str, ...] = ()
    """Domains to measure beside math, code and search."""

    @property
    def key(self) -> str:
        """Names the file of the result."""
        asked = json.dumps(asdict(self), sort_keys=True)
        return hashlib.sha256(asked.encode()).hexdigest()[:20]


@cache
def source_digest() -> str:
    """Hash of every source file and every config of the package."""
    digest = hashlib.sha256()
    for path in sorted([*Path(__file__).parent.parent.rglob("*.py"), *conf_dir().rglob("*.yaml")]):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


def trained(
    cells: Sequence[Cell], *, folder: Path, workers: int, tell: Callable[[Cell, Mapping[str, Any]], None] | None = None
) -> list[dict[str, Any]]:
    """Trains the cells whose results are not in `folder`.

    Args:
        cells: What to train.
        folder: Where results are kept.
        workers: Processes, of one thread each.
        tell: Called with each cell that was trained, in the order in which they end.

    Returns:
        For each cell `steps`, `cpu_seconds`, `accuracy` by domain and `source`; or `error`, which is not kept.
    """
    folder.mkdir(parents=True, exist_ok=True)
    found: dict[str, dict[str, Any]] = {}
    missing: dict[str, Cell] = {}
    for cell in cells:
        path = folder / f"{cell.key}.json"
        if path.is_file():
            found[cell.key] = json.loads(path.read_text(encoding="utf-8"))
        else:
            missing[cell.key] = cell
    for cell, result in _each(missing.values(), workers):
        if "error" not in result:
            _write(folder / f"{cell.key}.json", result)
        found[cell.key] = result
        if tell is not None:
            tell(cell, result)
    return [found[cell.key] for cell in cells]


def _each(cells: Iterable[Cell], workers: int) -> Iterator[tuple[Cell, dict[str, Any]]]:
    """Results of cells as they end; one worker is this very process."""
    if workers == 1:
        for cell in cells:
            yield cell, train_cell(cell)
        return
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        running: dict[Future[dict[str, Any]], Cell] = {pool.submit(train_cell, cell): cell for cell in cells}
        for future in as_completed(running):
            yield running[future], future.result()


def _write(path: Path, result: Mapping[str, Any]) -> None:
    temporary = path.with_name(f".tmp-{os.getpid()}-{path.name}")
    temporary.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    temporary.replace(path)


def train_cell(cell: Cell) -> dict[str, Any]:
    """Trains one student and measures it; what cannot be trained is an `error` of one line, not an exception."""
    from moteach.cli.app import run_app
    from moteach.errors import MoteachError

    found: dict[str, Any] = {}

    def task(cfg: Any) -> None:
        steps = cell.steps if cell.steps is not None else _affordable(cfg, cell.seconds or 0.0)
        job, cpu = _run(cfg, steps)
        domains = [*("math", "code", "search"), *cell.extra_domains]
        found.update(steps=steps, cpu_seconds=cpu, accuracy=greedy_accuracy(job, job.trainer.student.model, domains))

    try:
        run_app("train", [*cell.overrides, f"seed={cell.seed}", *_QUIET], task)
    except MoteachError as error:
        return {"error": str(error)}
    return found | {"source": source_digest()}


def _affordable(cfg: Any, seconds: float) -> int:
    """Steps of a run that take so many CPU seconds, from the time of its own first steps."""
    _run(cfg, 2)
    short, long = (_run(cfg, steps)[1] for steps in (2, 2 + _PROBE_STEPS))
    return max(_FEWEST_STEPS, round(seconds / max((long - short) / _PROBE_STEPS, 1e-3)))


def _run(cfg: Any, steps: int) -> tuple[Any, float]:
    """Trains without saving anything; returns the job and the CPU seconds of its steps."""
    from moteach.cli.app import quiet_libraries
    from moteach.config.assemble import assemble
    from moteach.config.validate import validate

    quiet_libraries()
    with tempfile.TemporaryDirectory(prefix="moteach-bench-") as folder:
        cfg.run_dir = str(Path(folder) / "run")
        cfg.max_steps = steps
        validate(cfg)
        job = assemble(cfg)
        job.run_dir.mkdir(parents=True)
        trainer = job.trainer
        trainer.traces.start(0)
        begin = time.process_time()
        trainer.train(0)
        seconds = time.process_time() - begin
        trainer.traces.finish()
    return job, seconds


def greedy_accuracy(job: Any, model: Any, domains: Sequence[str]) -> dict[str, float]:
    """Verified accuracy of greedy answers to held-out prompts, by domain."""
    from moteach.config.assemble import decoder, grade_prompt
    from moteach.evaluation.runner import evaluate
    from moteach.evaluation.tasks import chosen_prompts

    scores = evaluate(
        job.engine_for(model),
        chosen_prompts(job.prompts.evaluation, domains, limit=job.cfg.eval.prompts_per_domain),
        grade=grade_prompt,
        decode=decoder(job.tokenizer),
        max_new_tokens=job.cfg.eval.max_new_tokens,
    )
    return {domain: score.accuracy for domain, score in scores.items()}


def normalised(
    accuracy: Mapping[str, float], before: Mapping[str, float], best: Mapping[str, float]
) -> dict[str, float]:
    """(after - before) / (best - before) for each domain in `best`."""
    return {name: (accuracy[name] - before[name]) / (top - before[name]) for name, top in best.items()}


def spread(values: Sequence[float]) -> float:
    """Standard deviation over seeds (n - 1 below), 0 of a single one."""
    return stdev(values) if len(values) > 1 else 0.0


def over_seeds(rows: Sequence[Mapping[str, Any]], fields: Sequence[str]) -> dict[str, float]:
    """Mean and spread of each field over rows that differ in their seed alone."""
    found: dict[str, float] = {}
    for name in fields:
        values = [float(row[name]) for row in rows]
        found |= {name: mean(values), f"{name}_spread": spread(values)}
    return found
