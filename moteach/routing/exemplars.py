"""What routers learn from: the exemplars of the experts, or a file of labelled prompts."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor

from moteach.catalogue.spec import ExpertSpec
from moteach.data.base import text_key, words_of
from moteach.errors import ConfigError, DataError, MissingFileError, nearest
from moteach.types import Prompt


@dataclass(frozen=True, kw_only=True)
class Exemplars:
    """Texts and the experts they belong to, in an order that depends on the texts alone.

    Args:
        names: The experts, in the order of the columns of `owners`.
        texts: One text a row; texts that `text_key` calls the same are one row.
        owners: Whose exemplar it is; several experts may share one.
    """

    names: tuple[str, ...]
    texts: tuple[str, ...]
    owners: Bool[Tensor, "exemplar teacher"]

    def folds(self, count: int) -> list[Bool[Tensor, " exemplar"]]:
        """Splits the rows so that the exemplars of each expert are spread over all folds, whatever its place.

        Raises:
            ConfigError: An expert has fewer exemplars than there are folds; held out, it would have nothing to learn from.
        """
        if count < 2:
            raise ConfigError(f"router.folds: expected at least 2, got {count}; nothing would be held out")
        fold = torch.full((len(self.texts),), -1)
        for column, name in enumerate(self.names):
            rows = self.owners[:, column].nonzero().flatten().tolist()
            if len(rows) < count:
                raise ConfigError(
                    f"router.calibration: expected at least {count} exemplars of expert '{name}' to hold out in turn, got "
                    f"{len(rows)}. Add some, lower router.folds, or set router.calibration=none"
                )
        patterns: dict[tuple[bool, ...], int] = {}
        for row, pattern in enumerate(map(tuple, self.owners.tolist())):
            place = patterns[pattern] = patterns.get(pattern, -1) + 1
            fold[row] = place % count
        return [fold == number for number in range(count)]


def gather(names: Sequence[str], rows: Iterable[tuple[str, Sequence[str]]]) -> Exemplars:
    """Collects (text, names of its experts) into `Exemplars`; experts that do not take part are left out.

    Raises:
        ConfigError: An expert has no exemplar.
    """
    texts: dict[bytes, str] = {}
    owners: dict[bytes, set[str]] = {}
    for text, own in rows:
        key = text_key(text)
        texts[key] = min(text, texts.get(key, text))
        owners.setdefault(key, set()).update(own)
    order = [key for key in sorted(texts) if owners[key].intersection(names)]
    table = torch.tensor([[name in owners[key] for name in names] for key in order], dtype=torch.bool)
    table = table.reshape(len(order), len(names))
    for column, name in enumerate(names):
        if not bool(table[:, column].any()):
            raise ConfigError(
                f"expert '{name}' has no exemplars to learn from, so it would never be given a prompt. Write "
                "`exemplars: FILE.jsonl` into its card, label prompts in router.labelled_path, or set router=label"
            )
    return Exemplars(names=tuple(names), texts=tuple(texts[key] for key in order), owners=table)


def read_exemplars(experts: Sequence[ExpertSpec], *, labelled_path: str | None = None) -> Exemplars:
    """Reads the exemplars of the experts' cards, or instead a file of labelled prompts.

    Args:
        experts: The experts of the run.
        labelled_path: JSONL with `prompt` and `teacher_id` or `domain`; rows of a label that no expert claims are left out.

    Raises:
        ConfigError: An expert has no exemplars.
        DataError: A row cannot be read.
        MissingFileError: A file does not exist.
    """
    names = [expert.name for expert in experts]
    if labelled_path is not None:
        return gather(names, read_labelled(Path(labelled_path).expanduser(), experts))
    rows: list[tuple[str, Sequence[str]]] = []
    for expert in experts:
        if expert.exemplars is not None:
            found = read_rows(Path(expert.exemplars))
            rows += [(text_of(row, where), (expert.name,)) for where, row in found]
    return gather(names, rows)


def read_labelled(path: Path, experts: Sequence[ExpertSpec]) -> list[tuple[str, tuple[str, ...]]]:
    """Reads prompts and the experts that their label names: none for a label that no expert claims.

    Raises:
        DataError: A row has neither `teacher_id` nor `domain`.
    """
    labelled = []
    for where, row in read_rows(path):
        teacher, domain = row.get("teacher_id"), row.get("domain")
        if teacher is None and domain is None:
            raise DataError(
                f"{where}: expected a label, 'teacher_id' or 'domain', got the columns {sorted(row)}; nobody would know whose "
                "prompt it is"
            )
        labelled.append((text_of(row, where), claimants(experts, teacher_id=teacher, domain=domain)))
    return labelled


def claimants(experts: Sequence[ExpertSpec], *, teacher_id: str | None, domain: str | None) -> tuple[str, ...]:
    """Returns the experts that a label names: the one called `teacher_id`, else those that claim the domain."""
    if teacher_id is not None:
        return tuple(expert.name for expert in experts if expert.name == teacher_id)
    return tuple(expert.name for expert in experts if domain in expert.domains)


def read_rows(path: Path) -> list[tuple[str, dict[str, Any]]]:
    """Reads a JSONL file; returns `file:line` and the object of each line that is not blank.

    Raises:
        MissingFileError: There is no such file.
        DataError: A line is not a JSON object.
    """
    if not path.is_file():
        siblings = [entry.name for entry in path.parent.iterdir()] if path.parent.is_dir() else []
        raise MissingFileError(f"expected a JSONL file at {path}, found none; {nearest(path.name, siblings)}")
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8-sig").splitlines(), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise DataError(f"{path}:{number}: expected one JSON object a line, got: {error}") from error
        if not isinstance(row, dict):
            raise DataError(f"{path}:{number}: expected a JSON object, got {line[:40]!r}")
        rows.append((f"{path}:{number}", row))
    return rows


def text_of(row: dict[str, Any], where: str) -> str:
    """Returns what the user says in a row: its `prompt`, of chat messages those of the user.

    Raises:
        DataError: There is no such text.
    """
    prompt = row.get("prompt")
    if isinstance(prompt, list):
        said = [one.get("content") for one in prompt if isinstance(one, dict) and one.get("role") == "user"]
        prompt = "\n".join(part for part in said if isinstance(part, str))
    if not isinstance(prompt, str) or not prompt.strip():
        raise DataError(
            f"{where}: expected 'prompt' to be a non-empty string or chat messages, got {row.get('prompt')!r}"
        )
    return prompt


def check_leak(exemplars: Iterable[str], prompts: Iterable[Prompt], *, what: str) -> None:
    """Refuses prompts for evaluation that a router has learned from.

    Args:
        exemplars: Texts of the exemplars.
        prompts: What is evaluated on.
        what: Name of those prompts, for the message.

    Raises:
        DataError: Names one of them and how many there are.
    """
    known = {text_key(text) for text in exemplars}
    leaked = [prompt for prompt in prompts if text_key(words_of(prompt)) in known]
    if leaked:
        raise DataError(
            f"{what}: expected prompts that the router has not learned from, got {len(leaked)} that are among its exemplars, "
            f"for instance '{leaked[0].prompt_id}' ({words_of(leaked[0])[:60]!r}); the routing would be measured on its own "
            "memory. Remove them from the exemplars or from the evaluation"
        )
