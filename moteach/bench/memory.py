"""Peak memory of the loss kernel as the number of merged teachers grows, beside plain autograd.

Counts the bytes of live tensors, not time, so that the numbers are the same on a busy machine.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from rich.table import Table
from torch.profiler import ProfilerActivity, profile

from moteach.bench._report import only_words, wide_console, write_report
from moteach.conflict.base import Resolver, resolve
from moteach.conflict.pools import Geometric, Linear
from moteach.divergences.chunked import chunked_divergence
from moteach.divergences.full import ReverseKL
from moteach.types import Head, TeacherEvidence

VOCABULARIES = (32_000, 152_000)
TEACHERS = (1, 2, 3, 5)
_MIB = 2**20


def peak_bytes(work: Callable[[], object], *, mapped: Collection[int] = ()) -> int:
    """Largest number of tensor bytes that were allocated inside `work` and not yet released.

    Taken from every allocation and release that torch's CPU allocator reports, so what was there before does not count. A
    mapped file is reported with the size of the whole file, whatever little of it is read.

    Args:
        work: What to measure.
        mapped: Sizes of the files that it maps, which are left out.
    """
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        work()
    results: Any = profiler.profiler.kineto_results
    reported = [event for event in results.events() if event.name() == "[memory]"]
    events = [event for event in reported if abs(event.nbytes()) not in mapped]
    assert events, "the profiler reported no allocation"
    live = highest = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        live += event.nbytes()
        highest = max(highest, live)
    return highest


@dataclass(frozen=True, kw_only=True)
class Size:
    """Sizes of one measurement; hidden sizes are small because they do not matter to what is measured."""

    vocab: int
    tokens: int = 64
    chunk: int = 16
    hidden: int = 16


def run(argv: Sequence[str]) -> None:
    """Runs `moteach bench memory [out=FILE.json]`."""
    words = only_words(argv, ("out",))
    console = wide_console()
    rows = []
    with console.status("measuring"):
        for vocab in VOCABULARIES:
            for pool in (Linear(), Geometric()):
                rows += [measure(Size(vocab=vocab), pool=pool, teachers=n) for n in TEACHERS]
    console.print(_table(rows))
    console.print(
        "Above the inputs; forward and backward, reverse KL, every teacher on every token. The gradient of the student's "
        "head is part of both. `plain` is autograd over all tokens at once, the logprobs of all teachers side by side.",
        highlight=False,
    )
    write_report(words.get("out"), name="memory", argv=argv, rows=rows, summary=summarise(rows))


def measure(size: Size, *, pool: Resolver, teachers: int) -> dict[str, Any]:
    """Measures the kernel and the plain computation of the same loss once."""
    # Fresh inputs for each: the second must not find the gradients of the first.
    mine, other = _Work.make(size, teachers), _Work.make(size, teachers)
    kernel = peak_bytes(lambda: mine.kernel(pool).backward())  # type: ignore[no-untyped-call]
    plain = peak_bytes(lambda: other.plain(pool).backward())  # type: ignore[no-untyped-call]
    return {
        "vocab": size.vocab,
        "pool": pool.name,
        "teachers": teachers,
        "tokens": size.tokens,
        "chunk": size.chunk,
        "peak_mib": kernel / _MIB,
        "head_gradient_mib": size.vocab * size.hidden * 4 / _MIB,
        "plain_peak_mib": plain / _MIB,
    }


def summarise(rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Largest peak over smallest, over the number of teachers, for each pool and vocabulary; 1 is no growth."""
    found = {}
    for vocab, pool in dict.fromkeys((row["vocab"], row["pool"]) for row in rows):
        mine = [row for row in rows if (row["vocab"], row["pool"]) == (vocab, pool)]
        for key, label in (("peak_mib", "growth"), ("plain_peak_mib", "plain_growth")):
            peaks = [row[key] for row in mine]
            found[f"{label}/{pool}/{vocab}"] = max(peaks) / min(peaks)
    return found


@dataclass(frozen=True, kw_only=True)
class _Work:
    """The inputs of one loss."""

    size: Size
    hidden: Any
    head: Head
    evidence: tuple[TeacherEvidence, ...]
    weights: Any

    @classmethod
    def make(cls, size: Size, teachers: int) -> _Work:
        generator = torch.Generator().manual_seed(0)

        def normal(rows: int) -> torch.Tensor:
            return torch.randn(rows, size.hidden, generator=generator)

        evidence = tuple(
            TeacherEvidence(
                teacher_id=f"teacher_{n}",
                support="full",
                tokens=torch.arange(size.tokens),
                hidden=normal(size.tokens),
                head=Head(weight=normal(size.vocab)),
            )
            for n in range(teachers)
        )
        return cls(
            size=size,
            hidden=normal(size.tokens).requires_grad_(),
            head=Head(weight=normal(size.vocab).requires_grad_()),
            evidence=evidence,
            weights=torch.rand(size.tokens, teachers, generator=generator).softmax(dim=-1),
        )

    def kernel(self, pool: Resolver) -> torch.Tensor:
        return chunked_divergence(
            student_hidden=self.hidden,
            student_head=self.head,
            teachers=self.evidence,
            weights=self.weights,
            token_weights=torch.full((self.size.tokens,), 1 / self.size.tokens),
            divergence=ReverseKL(),
            resolver=pool,
            chunk_size=self.size.chunk,
        ).loss

    def plain(self, pool: Resolver) -> torch.Tensor:
        target = self._plain_target(pool)
        logprobs = _logprobs(self.hidden, self.head)
        return (logprobs.exp() * (logprobs - target)).sum(dim=-1).mean()

    @torch.no_grad()
    def _plain_target(self, pool: Resolver) -> torch.Tensor:
        stack = torch.empty(len(self.evidence), self.size.tokens, self.size.vocab)
        for index, entry in enumerate(self.evidence):
            stack[index] = _logprobs(entry.hidden, entry.head)
        return resolve(pool, stack, self.weights).logprobs


def _logprobs(hidden: Any, head: Any) -> torch.Tensor:
    return torch.nn.functional.linear(hidden, head.weight).log_softmax(dim=-1)


def _table(rows: Sequence[dict[str, Any]]) -> Table:
    first = rows[0]
    table = Table(title=f"peak memory of the loss, {first['tokens']} tokens in chunks of {first['chunk']}")
    for name in ("vocabulary", "pool", "teachers", "kernel MiB", "plain MiB"):
        table.add_column(name, justify="left" if name == "pool" else "right")
    for before, row in zip([None, *rows], rows, strict=False):
        if before is not None and (before["vocab"], before["pool"]) != (row["vocab"], row["pool"]):
            table.add_section()
        table.add_row(
            f"{row['vocab']:,}",
            row["pool"],
            str(row["teachers"]),
            f"{row['peak_mib']:.1f}",
            f"{row['plain_peak_mib']:.1f}",
        )
    return table
