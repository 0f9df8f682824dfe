"""Prompts of the user: a JSONL file, or a Hugging Face data set on disk or on the hub."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from moteach.data.base import PromptSet, check_disjoint, text_key
from moteach.data.rows import COLUMNS, RowReader
from moteach.errors import ConfigError, DataError, MissingDependencyError, MissingFileError, UnknownChoiceError, nearest
from moteach.types import Prompt


class JsonlPrompts:
    """Prompts from a file with one JSON object a line.

    Columns: `prompt` (a string, or chat messages `[{"role": ..., "content": ...}]`, which go through the tokenizer's chat
    template once), and optionally `domain`, `teacher_id`, `answer`, `verifier`, `id` (default: a hash of the text) and
    `metadata` (an object for the verifier). A row with an answer and no verifier is graded by `verifier`. Blank lines
    are skipped.

    Args:
        path: The file.
        evaluation_path: File of the held-out prompts.
        evaluation_fraction: Share of `path` to hold out instead; decided by a hash of the text, so it does not move when
            rows are added and copies of a prompt stay together.
        columns: Name in the file of each column, where it differs: `{prompt: question}`.
        verifier: Verifier of rows that have an answer and name none.
        max_prompt_tokens: Longer prompts are refused; null sets no limit.

    Raises:
        ConfigError: An argument is out of range, or both ways to hold out are given.
    """

    def __init__(
        self,
        *,
        path: str,
        evaluation_path: str | None = None,
        evaluation_fraction: float = 0.0,
        columns: Mapping[str, str] | None = None,
        verifier: str = "exact",
        max_prompt_tokens: int | None = None,
    ) -> None:
        _check_arguments(evaluation_fraction, evaluation_path, "evaluation_path", columns, max_prompt_tokens)
        self.path = path
        self.evaluation_path = evaluation_path
        self.evaluation_fraction = evaluation_fraction
        self.columns = dict(columns or {})
        self.verifier = verifier
        self.max_prompt_tokens = max_prompt_tokens

    def load(self, tokenizer: Any, *, verifiers: Collection[str] | None = None) -> PromptSet:
        """Reads the files; see `PromptSource.load`.

        Raises:
            DataError: Names file and line, what was expected, what was there and the remedy.
            MissingFileError: A file does not exist; names the nearest ones.
        """
        reader = RowReader(
            tokenizer=tokenizer,
            columns=self.columns,
            default_verifier=_known(self.verifier, verifiers),
            verifiers=verifiers,
            max_prompt_tokens=self.max_prompt_tokens,
        )
        train = _read_file(Path(self.path), reader)
        evaluation = [] if self.evaluation_path is None else _read_file(Path(self.evaluation_path), reader)
        return _split(train, evaluation, fraction=self.evaluation_fraction, name=self.path)


class HFPrompts:
    """Prompts from a data set: a folder written by `save_to_disk`, a JSON, parquet or CSV file, or a name on the hub.

    Needs the package `datasets`. Columns are those of `JsonlPrompts`.

    Args:
        path: Folder, file or hub name.
        name: Configuration of the data set on the hub.
        revision: Commit or tag on the hub.
        split: Split to train on.
        evaluation_split: Split to hold out.
        evaluation_fraction: Share of `split` to hold out instead, by a hash of the text.
        columns: Name in the data of each column, where it differs: `{prompt: question}`.
        verifier: Verifier of rows that have an answer and name none.
        max_prompt_tokens: Longer prompts are refused; null sets no limit.

    Raises:
        ConfigError: An argument is out of range, or both ways to hold out are given.
    """

    def __init__(
        self,
        *,
        path: str,
        name: str | None = None,
        revision: str | None = None,
        split: str = "train",
        evaluation_split: str | None = None,
        evaluation_fraction: float = 0.0,
        columns: Mapping[str, str] | None = None,
        verifier: str = "exact",
        max_prompt_tokens: int | None = None,
    ) -> None:
        _check_arguments(evaluation_fraction, evaluation_split, "evaluation_split", columns, max_prompt_tokens)
        self.path = path
        self.name = name
        self.revision = revision
        self.split = split
        self.evaluation_split = evaluation_split
        self.evaluation_fraction = evaluation_fraction
        self.columns = dict(columns or {})
        self.verifier = verifier
        self.max_prompt_tokens = max_prompt_tokens

    def load(self, tokenizer: Any, *, verifiers: Collection[str] | None = None) -> PromptSet:
        """Opens the data set; see `PromptSource.load`.

        Raises:
            DataError: Names split and row, what was expected, what was there and the remedy.
            MissingFileError: There is no such folder, file or data set.
            MissingDependencyError: The package `datasets` is not installed.
        """
        reader = RowReader(
            tokenizer=tokenizer,
            columns=self.columns,
            default_verifier=_known(self.verifier, verifiers),
            verifiers=verifiers,
            max_prompt_tokens=self.max_prompt_tokens,
        )
        splits = self._open()
        train = self._read_split(splits, self.split, reader)
        held_out = self.evaluation_split
        evaluation = [] if held_out is None else self._read_split(splits, held_out, reader)
        return _split(train, evaluation, fraction=self.evaluation_fraction, name=f"{self.path}[{self.split}]")

    def _open(self) -> Mapping[str, Any]:
        try:
            import datasets
        except ImportError as error:
            raise MissingDependencyError(
                "data=hf needs the package 'datasets', which is not installed: pip install 'moteach[data]'"
            ) from error
        path = Path(self.path).expanduser()
        if path.is_dir() and any((path / mark).exists() for mark in ("dataset_dict.json", "state.json")):
            found = datasets.load_from_disk(str(path))
        elif path.is_file():
            found = datasets.load_dataset(_format(path), data_files=str(path))
        elif not path.is_dir() and (path.suffix or self.path.startswith(("/", ".", "~"))):
            raise _missing(path)
        else:
            try:
                found = datasets.load_dataset(self.path, self.name, revision=self.revision)
            except (FileNotFoundError, ConnectionError, OSError) as error:
                raise MissingFileError(
                    f"expected a folder, a file or a data set on the hub, got '{self.path}', which is none of them or "
                    f"cannot be reached: {str(error).splitlines()[0]}"
                ) from error
        return dict(found) if isinstance(found, dict) else {self.split: found}

    def _read_split(self, splits: Mapping[str, Any], split: str, reader: RowReader) -> list[Prompt]:
        if split not in splits:
            raise DataError(f"{self.path}: expected a split of the data set, got '{split}'; {nearest(split, splits)}")
        rows = enumerate(splits[split])
        prompts = [reader.read(row, where=f"{self.path}[{split}] row {number}") for number, row in rows]
        if not prompts:
            raise DataError(f"{self.path}[{split}]: expected at least one row, got an empty split")
        return prompts


def _check_arguments(
    fraction: float, held_out: str | None, name: str, columns: Mapping[str, str] | None, longest: int | None
) -> None:
    if not 0 <= fraction < 1:
        raise ConfigError(f"data: expected evaluation_fraction to be a number in [0, 1), got {fraction!r}")
    if fraction > 0 and held_out is not None:
        raise ConfigError(
            f"data: expected either {name} or evaluation_fraction, got both ('{held_out}' and {fraction}); "
            f"set evaluation_fraction=0 or {name}=null"
        )
    if longest is not None and longest < 1:
        raise ConfigError(f"data: expected max_prompt_tokens to be at least 1 or null, got {longest}")
    for column in columns or {}:
        if column not in COLUMNS:
            raise ConfigError(
                f"data: expected the keys of columns to be ours, got '{column}'; {nearest(column, COLUMNS)}"
            )


def _known(verifier: str, verifiers: Collection[str] | None) -> str:
    if verifiers is not None and verifier not in verifiers:
        raise UnknownChoiceError(f"data.verifier: got '{verifier}'; {nearest(verifier, verifiers)}")
    return verifier


def _missing(path: Path) -> MissingFileError:
    folder = path.parent
    while not folder.is_dir():
        folder = folder.parent
    names = [entry.name for entry in folder.iterdir() if not entry.name.startswith(".")]
    return MissingFileError(f"there is no file '{path}'; in '{folder}': {nearest(path.name, names)}")


def _format(path: Path) -> str:
    kinds = {".json": "json", ".jsonl": "json", ".parquet": "parquet", ".csv": "csv"}
    if path.suffix not in kinds:
        raise DataError(f"{path}: expected one of {', '.join(kinds)}, got '{path.suffix}'")
    return kinds[path.suffix]


def _read_file(path: Path, reader: RowReader) -> list[Prompt]:
    path = path.expanduser()
    if not path.exists():
        raise _missing(path)
    if path.is_dir():
        raise DataError(f"{path}: expected a JSONL file, got a folder; for a data set saved to disk say data=hf")
    prompts = [reader.read(row, where=where) for where, row in _rows(path)]
    if not prompts:
        raise DataError(f"{path}: expected at least one prompt, got an empty file")
    return prompts


def _rows(path: Path) -> Iterator[tuple[str, object]]:
    with path.open("rb") as lines:
        for number, raw in enumerate(lines, start=1):
            where = f"{path}:{number}"
            try:
                line = raw.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise DataError(
                    f"{where}: expected UTF-8 text, got the byte 0x{raw[error.start]:02x} at column {error.start + 1}. "
                    f"Convert the file: iconv -f latin1 -t utf-8 {path.name}"
                ) from error
            if not line.strip():
                continue
            try:
                yield where, json.loads(line)
            except json.JSONDecodeError as error:
                raise DataError(
                    f"{where}: expected one JSON object a line, got something else: {error.msg} at column {error.colno}. "
                    'A line looks like {"prompt": "1+1=", "answer": "2", "domain": "math"}'
                ) from error


def _split(train: list[Prompt], evaluation: list[Prompt], *, fraction: float, name: str) -> PromptSet:
    if fraction > 0:
        held_out = [int.from_bytes(text_key(prompt.text)[:8], "big") < fraction * 2**64 for prompt in train]
        evaluation = [prompt for prompt, out in zip(train, held_out, strict=True) if out]
        train = [prompt for prompt, out in zip(train, held_out, strict=True) if not out]
        if not train or not evaluation:
            raise DataError(
                f"{name}: holding out {fraction} of {len(train) + len(evaluation)} prompts leaves {len(train)} to train on "
                f"and {len(evaluation)} to evaluate on; give more prompts or another evaluation_fraction"
            )
    prompts = PromptSet.of(train, evaluation)
    check_disjoint(prompts)
    return prompts
