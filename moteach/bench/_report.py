"""What every benchmark shares: its words on the command line, the machine it ran on, and the JSON it writes."""

from __future__ import annotations

import json
import os
import platform
import shlex
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from moteach.errors import ConfigError, nearest


def take_words(argv: Sequence[str], words: Collection[str]) -> tuple[dict[str, str], list[str]]:
    """Splits `word=value` arguments of a benchmark from those that are meant for Hydra.

    Returns:
        The values of the words that were given, the last one counting, and the other arguments in order.
    """
    values: dict[str, str] = {}
    rest = []
    for argument in argv:
        word, sign, value = argument.partition("=")
        if sign and word in words:
            values[word] = value
        else:
            rest.append(argument)
    return values, rest


def only_words(argv: Sequence[str], words: Collection[str]) -> dict[str, str]:
    """Reads the words of a benchmark that takes nothing else.

    Raises:
        ConfigError: There is another argument.
    """
    values, rest = take_words(argv, words)
    if rest:
        raise ConfigError(f"expected word=value, got '{rest[0]}'; {nearest(rest[0].partition('=')[0], words)}")
    return values


def whole_number(values: Mapping[str, str], word: str, *, default: int, least: int) -> int:
    """Reads one word as a whole number.

    Raises:
        ConfigError: It is not one, or below `least`.
    """
    text = values.get(word, str(default))
    if not text.isdecimal() or int(text) < least:
        raise ConfigError(f"{word}: expected a whole number of at least {least}, got '{text}'")
    return int(text)


def wide_console() -> Console:
    """Writes to the terminal as wide as it is, and elsewhere so wide that no number of a table is cut."""
    console = Console()
    return console if console.is_terminal else Console(width=180)


def machine() -> str:
    """Describes the machine: platform, processor, CPUs, torch and its threads."""
    processor = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        lines = info.read_text(encoding="utf-8", errors="replace").splitlines()
        models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
        processor = models[0] if models else processor
    return (
        f"{platform.platform()}, {processor}, {os.cpu_count()} CPUs, torch {torch.__version__} with "
        f"{torch.get_num_threads()} thread(s)"
    )


def write_report(
    out: str | None, *, name: str, argv: Sequence[str], rows: Sequence[Mapping[str, Any]], summary: Mapping[str, Any]
) -> None:
    """Writes `{"rows", "command", "machine", "summary"}` as JSON, when a file is named."""
    if out is None:
        return
    report = {
        "rows": [dict(row) for row in rows],
        "command": shlex.join(["moteach", "bench", name, *argv]),
        "machine": machine(),
        "summary": dict(summary),
    }
    Path(out).write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
