"""[only=NAMES] [vocab=N,N] [tokens=N] [hidden=N] [rounds=5]: time and memory of every divergence, beside its peers.

From hidden states and heads to the gradients of the student's hidden states and head, in float32. Every option of
`conf/divergence` and the four truncations of top-k are computed by the chunked kernel and by plain autograd over all
tokens at once; three of them also by TRL and Liger. An arm is compared only after it gave the same loss and gradients.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from functools import partial
from statistics import median
from typing import Any, TypeVar, get_args

import yaml
from jaxtyping import Float
from rich.console import Console
from rich.table import Table
from torch import Tensor

from moteach.bench._arms import Arm, Problem, Size, arms_of, kernel
from moteach.bench._peers import find_peers, peer_beta
from moteach.bench._report import machine, only_words, whole_number, wide_console, write_report
from moteach.bench.memory import peak_bytes
from moteach.config.build import build
from moteach.conflict.base import Resolver
from moteach.conflict.pools import Geometric, Linear
from moteach.divergences.base import Divergence
from moteach.divergences.full import ReverseKL
from moteach.divergences.topk import TopK, Truncation
from moteach.errors import UnknownChoiceError, nearest
from moteach.objectives.base import tokens_per_chunk
from moteach.paths import conf_dir

VOCABULARIES = (32_000, 152_000)
TEACHERS = (1, 3)
POOLS = "pools"
"""Names the second table in `only=`."""
_TOP_K = 32
_OWN = ("moteach", "plain")
_LOSS_TOLERANCE = 1e-4
_GRADIENT_TOLERANCE = 1e-3
_MIB = 2**20
_Key = TypeVar("_Key")


def run(argv: Sequence[str]) -> None:
    """Runs `moteach bench divergence`.

    Raises:
        ConfigError: A word is unknown, or its value is not a whole number.
        UnknownChoiceError: `only=` names something that is not measured.
    """
    words = only_words(argv, ("only", "vocab", "tokens", "hidden", "rounds", "out"))
    chosen = choose(divergences(), words.get("only"))
    rounds = whole_number(words, "rounds", default=5, least=1)
    sizes = read_sizes(words)
    compared = any(peer_beta(divergence) is not None for divergence in chosen.values() if divergence is not None)
    found, missing = find_peers() if compared else ([], [])
    console = wide_console()
    rows: list[dict[str, Any]] = []
    for size in sizes:
        mine: list[dict[str, Any]] = []
        for name, divergence in chosen.items():
            with console.status(f"{name}, vocabulary {size.vocab:,}"):
                if divergence is not None:
                    mine += measure(size, name=name, arms=arms_of(divergence, found), rounds=rounds)
                else:
                    for pool in (Linear(), Geometric()):
                        mine += measure_pool(size, pool=pool, rounds=rounds)
        _print_tables(console, mine)
        rows += mine
    versions = {peer.name: peer.version for peer in found}
    summary = summarise(rows) | {"rounds": rounds, "versions": versions, "missing": missing}
    _print_notes(console, summary)
    write_report(words.get("out"), name="divergence", argv=argv, rows=rows, summary=summary)


def divergences() -> dict[str, Divergence]:
    """Builds every option of `conf/divergence` with its own values, and reverse KL on a top-k in each truncation."""
    found: dict[str, Divergence] = {}
    for path in sorted((conf_dir() / "divergence").glob("*.yaml")):
        node = yaml.safe_load(path.read_text(encoding="utf-8"))
        found[path.stem] = build(node, where=f"divergence={path.stem}")
    for truncation in get_args(Truncation):
        found[f"topk_{truncation}"] = TopK(divergence=ReverseKL(), k=_TOP_K, truncation=truncation)
    return found


def choose(known: Mapping[str, Divergence], only: str | None) -> dict[str, Divergence | None]:
    """Returns what is measured, in order; `pools`, the second table, has no divergence of its own.

    Raises:
        UnknownChoiceError: A name is not known.
    """
    every: dict[str, Divergence | None] = {**known, POOLS: None}
    if only is None:
        return every
    names = [name.strip() for name in only.split(",")]
    for name in names:
        if name not in every:
            raise UnknownChoiceError(f"only: there is no divergence '{name}'; {nearest(name, every)}")
    return {name: every[name] for name in dict.fromkeys(names)}


def read_sizes(words: Mapping[str, str]) -> list[Size]:
    """Reads `vocab`, `tokens` and `hidden`; by default there are fewer tokens where the vocabulary is large.

    Raises:
        ConfigError: One of them is not a whole number, or too small.
    """
    hidden = whole_number(words, "hidden", default=128, least=1)
    sizes = []
    for text in words.get("vocab", ",".join(map(str, VOCABULARIES))).split(","):
        vocab = whole_number({"vocab": text}, "vocab", default=0, least=_TOP_K)
        tokens = whole_number(words, "tokens", default=256 if vocab < 2**16 else 128, least=1)
        sizes.append(Size(vocab=vocab, tokens=tokens, hidden=hidden))
    return sizes


def measure(size: Size, *, name: str, arms: Mapping[str, Arm], rounds: int) -> list[dict[str, Any]]:
    """Checks, times and weighs the arms of one divergence; a peer that computes something else is only reported."""
    problem = Problem.make(size)
    # The comparison is the warm-up as well.
    compared = compare(problem, arms)
    same = {arm: work for arm, work in arms.items() if arm in _OWN or compared[arm]["agrees"]}
    seconds = interleave({arm: (problem, work) for arm, work in same.items()}, rounds)
    peaks = {arm: peak_of(Problem.make(size), work) for arm, work in same.items()}
    common = _common("divergence", size, problem) | {"divergence": name}
    rows = []
    for arm in arms:
        measured = _measured(seconds, peaks, arm, against="moteach") if arm in same else {}
        rows.append(common | {"arm": arm} | compared[arm] | measured)
    return rows


def measure_pool(size: Size, *, pool: Resolver, rounds: int) -> list[dict[str, Any]]:
    """Times and weighs reverse KL to one merged teacher and to three; the ratios are to one."""
    work: Arm = partial(kernel, divergence=ReverseKL(), resolver=pool)
    problems = {n: Problem.make(size, teachers=n) for n in TEACHERS}
    for problem in problems.values():
        seconds_of(problem, work)
    seconds = interleave({n: (problem, work) for n, problem in problems.items()}, rounds)
    peaks = {n: peak_of(Problem.make(size, teachers=n), work) for n in TEACHERS}
    return [
        _common(POOLS, size, problems[n])
        | {"pool": pool.name, "teachers": n}
        | _measured(seconds, peaks, n, against=TEACHERS[0])
        for n in TEACHERS
    ]


def compare(problem: Problem, arms: Mapping[str, Arm], *, reference: str = "plain") -> dict[str, dict[str, Any]]:
    """Runs every arm once and compares its loss and both gradients with those of the reference.

    Returns:
        For each arm its `loss` in nats; the relative `loss_error`; `gradient_error`, the larger of both gradients'
        ||mine - theirs|| / ||theirs||; and whether it `agrees`. The tolerances allow for float32: sums over 10^5 entries
        differ by their order, and a tie at the edge of a top-k may fall either way.
    """
    first = _outcome(problem, arms[reference])
    expected, *expected_gradients = first
    found = {}
    for name, arm in arms.items():
        loss, *gradients = first if name == reference else _outcome(problem, arm)
        loss_error = float((loss - expected).abs() / expected.abs())
        pairs = zip(gradients, expected_gradients, strict=True)
        gradient_error = max(float((mine - theirs).norm() / theirs.norm()) for mine, theirs in pairs)
        found[name] = {
            "loss": float(loss),
            "loss_error": loss_error,
            "gradient_error": gradient_error,
            "agrees": loss_error <= _LOSS_TOLERANCE and gradient_error <= _GRADIENT_TOLERANCE,
        }
    return found


def _outcome(problem: Problem, arm: Arm) -> tuple[Float[Tensor, ""], Tensor, Tensor]:
    """The loss of one pass and its gradients by the student's hidden states and head."""
    problem.forget()
    loss = arm(problem)
    loss.backward()  # type: ignore[no-untyped-call]
    hidden, weight = problem.hidden.grad, problem.head.weight.grad
    assert hidden is not None, "the arm did not reach the hidden states"
    assert weight is not None, "the arm did not reach the head"
    return loss.detach(), hidden, weight


def seconds_of(problem: Problem, arm: Arm) -> float:
    """Times one forward and backward pass, from no gradient to the gradient."""
    problem.forget()
    begin = time.perf_counter()
    arm(problem).backward()  # type: ignore[no-untyped-call]
    return time.perf_counter() - begin


def interleave(works: Mapping[_Key, tuple[Problem, Arm]], rounds: int) -> dict[_Key, list[float]]:
    """Times the arms in turn, round after round, so that whatever else the machine does hits all of them alike."""
    seconds: dict[_Key, list[float]] = {name: [] for name in works}
    for _ in range(rounds):
        for name, (problem, arm) in works.items():
            seconds[name].append(seconds_of(problem, arm))
    return seconds


def peak_of(problem: Problem, arm: Arm) -> int:
    """Peak bytes of one pass above its inputs; the gradients that it leaves behind are part of it in every arm."""
    # Before the count begins, or the release of old gradients would hide as much of the peak.
    problem.forget()
    return peak_bytes(lambda: arm(problem).backward())  # type: ignore[no-untyped-call]


def _common(table: str, size: Size, problem: Problem) -> dict[str, Any]:
    return {
        "table": table,
        "vocab": size.vocab,
        "tokens": size.tokens,
        "hidden": size.hidden,
        "chunk": tokens_per_chunk(None, problem.head),
        "head_gradient_mib": size.vocab * size.hidden * 4 / _MIB,
    }


def _measured(
    seconds: Mapping[_Key, Sequence[float]], peaks: Mapping[_Key, int], mine: _Key, *, against: _Key
) -> dict[str, Any]:
    """Numbers of one arm; its ratio of time is the median of the ratios inside each round, with the extremes."""
    ratios = [a / b for a, b in zip(seconds[mine], seconds[against], strict=True)]
    return {
        "ms": 1e3 * median(seconds[mine]),
        "min_ms": 1e3 * min(seconds[mine]),
        "time_ratio": median(ratios),
        "time_ratio_min": min(ratios),
        "time_ratio_max": max(ratios),
        "peak_mib": peaks[mine] / _MIB,
        "memory_ratio": peaks[mine] / peaks[against],
    }


def summarise(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Ratios by name, and the arms that did not compute the same.

    `time_ratio/ARM/DIVERGENCE/VOCABULARY` and `memory_ratio/...` are of the arm to moteach: above 1 moteach is the faster,
    or needs less. `time_growth/POOL/VOCABULARY` and `memory_growth/...` are of most teachers to one.
    """
    found: dict[str, Any] = {}
    different = []
    for row in rows:
        if row["table"] == POOLS:
            if row["teachers"] == TEACHERS[-1]:
                found[f"time_growth/{row['pool']}/{row['vocab']}"] = row["time_ratio"]
                found[f"memory_growth/{row['pool']}/{row['vocab']}"] = row["memory_ratio"]
            continue
        key = f"{row['arm']}/{row['divergence']}/{row['vocab']}"
        if not row["agrees"]:
            different.append(key)
        if row["arm"] != "moteach" and "time_ratio" in row:
            found[f"time_ratio/{key}"] = row["time_ratio"]
            found[f"memory_ratio/{key}"] = row["memory_ratio"]
    return found | {"different": different}


def _print_tables(console: Console, rows: Sequence[Mapping[str, Any]]) -> None:
    """Prints what was measured at one size."""
    for name, make in (("divergence", _table), (POOLS, _pool_table)):
        mine = [row for row in rows if row["table"] == name]
        if mine:
            console.print(make(mine))


def _table(rows: Sequence[Mapping[str, Any]]) -> Table:
    size = "vocabulary {vocab:,}, {tokens} tokens in chunks of {chunk}, hidden size {hidden}".format(**rows[0])
    table = Table(title=size)
    for name in ("divergence", "arm", "ms", "/ moteach", "(min - max)", "MiB", "/ moteach"):
        table.add_column(name, justify="left" if name in ("divergence", "arm") else "right", no_wrap=True)
    for row in rows:
        own = row["arm"] == "moteach"
        if own:
            table.add_section()
        if "ms" not in row:
            table.add_row("", row["arm"], "differs", "", "", "", "", style="yellow")
            continue
        table.add_row(
            row["divergence"] if own else "",
            row["arm"],
            f"{row['ms']:.0f}",
            "" if own else f"{row['time_ratio']:.2f}",
            "" if own else f"{row['time_ratio_min']:.2f} - {row['time_ratio_max']:.2f}",
            f"{row['peak_mib']:.0f}",
            "" if own else f"{row['memory_ratio']:.2f}",
        )
    return table


def _pool_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    table = Table(title="reverse KL to merged teachers, the kernel of moteach")
    for name in ("vocabulary", "pool", "teachers", "ms", "/ one", "(min - max)", "MiB", "/ one"):
        table.add_column(name, justify="left" if name == "pool" else "right", no_wrap=True)
    for row in rows:
        one = row["teachers"] == TEACHERS[0]
        if one:
            table.add_section()
        table.add_row(
            f"{row['vocab']:,}" if one else "",
            row["pool"] if one else "",
            str(row["teachers"]),
            f"{row['ms']:.0f}",
            "" if one else f"{row['time_ratio']:.2f}",
            "" if one else f"{row['time_ratio_min']:.2f} - {row['time_ratio_max']:.2f}",
            f"{row['peak_mib']:.0f}",
            "" if one else f"{row['memory_ratio']:.2f}",
        )
    return table


def _print_notes(console: Console, summary: Mapping[str, Any]) -> None:
    timed = (
        f"Forward and backward; medians of {summary['rounds']} interleaved rounds, ratios inside each round: above 1,"
    )
    lines = [
        f"{timed} moteach is faster. Peaks are above the inputs and include the student's gradients.",
        "moteach and liger work in moteach's default chunks; trl in its own tiles of 4096 tokens x 32768 entries.",
        *(f"{name} {version}" for name, version in summary["versions"].items()),
        machine(),
    ]
    for line in lines:
        console.print(line, highlight=False)
    different = [f"{key}: not the loss or the gradients of plain autograd" for key in summary["different"]]
    for line in [*different, *summary["missing"]]:
        console.print(line, style="yellow", highlight=False)
