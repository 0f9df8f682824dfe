"""One row of prompt data (a JSON object, a row of a data set) to one `Prompt`."""

from __future__ import annotations

import difflib
import hashlib
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from moteach.data.base import CONVERSATION, USER_TEXT
from moteach.data.encoding import encode_chat, encode_text
from moteach.errors import DataError, nearest
from moteach.types import Prompt

COLUMNS = ("prompt", "domain", "teacher_id", "answer", "verifier", "id", "metadata")
"""Columns that are read; others are ignored unless their name looks like a misspelt one of these."""

_TYPES: dict[str, tuple[type, ...]] = {
    "domain": (str,),
    "teacher_id": (str,),
    "answer": (str, int, float),
    "verifier": (str,),
    "id": (str, int),
    "metadata": (dict,),
}


@dataclass(frozen=True, kw_only=True)
class RowReader:
    """Reads rows into prompts and remembers the ids it has given.

    Args:
        tokenizer: Tokenizer of the student.
        columns: Name in the data of each column, where it differs from ours: `{"prompt": "question"}`.
        default_verifier: Verifier of rows that have an answer and name none.
        verifiers: Names a row may use; None leaves them unchecked.
        max_prompt_tokens: Longer prompts are refused; None sets no limit.
    """

    tokenizer: Any
    columns: Mapping[str, str] = field(default_factory=dict)
    default_verifier: str = "exact"
    verifiers: Collection[str] | None = None
    max_prompt_tokens: int | None = None
    _seen: dict[str, str] = field(default_factory=dict)

    def read(self, row: object, *, where: str) -> Prompt:
        """Makes the prompt of a row.

        Args:
            row: A mapping from column to value.
            where: Place of the row, for messages: `file:line`.

        Raises:
            DataError: The row cannot be used.
        """
        if not isinstance(row, Mapping):
            raise DataError(f"{where}: expected an object with the column 'prompt', got {_kind(row)}")
        values = self._values(row, where)
        try:
            text, ids = self._encode(values["prompt"], where)
        except DataError as error:
            raise DataError(str(error) if str(error).startswith(where) else f"{where}: {error}") from error
        if self.max_prompt_tokens is not None and len(ids) > self.max_prompt_tokens:
            raise DataError(
                f"{where}: the prompt has {len(ids)} tokens, expected at most {self.max_prompt_tokens}. "
                "Shorten or drop it, or raise data.max_prompt_tokens"
            )
        answer = values.get("answer")
        return Prompt(
            prompt_id=self._identify(values.get("id"), text, where),
            text=text,
            token_ids=ids,
            domain=values.get("domain"),
            teacher_id=values.get("teacher_id"),
            answer=None if answer is None else str(answer),
            verifier=self._verifier(values, where),
            metadata=_said(values["prompt"]) | (values.get("metadata") or {}),
        )

    def _values(self, row: Mapping[str, Any], where: str) -> dict[str, Any]:
        names = {column: self.columns.get(column, column) for column in COLUMNS}
        if names["prompt"] not in row:
            raise DataError(
                f"{where}: expected the column '{names['prompt']}', got the columns {sorted(map(str, row))}; "
                f"{_closest(names['prompt'], row)}rename it, or say data.columns.prompt=NAME"
            )
        for name in row:
            column = _misspelt(str(name), absent=[n for n in names.values() if n not in row])
            if column is not None and name not in names.values():
                raise DataError(
                    f"{where}: the column '{name}' is not read; did you mean '{column}'? It would silently be ignored. "
                    "Rename or remove it"
                )
        values = {column: row[name] for column, name in names.items() if row.get(name) is not None}
        for column, types in _TYPES.items():
            value = values.get(column)
            if value is not None and (not isinstance(value, types) or isinstance(value, bool)):
                expected = " or ".join(_NAMES[kind] for kind in types)
                raise DataError(f"{where}: expected '{names[column]}' to be {expected}, got {_kind(value)}")
        if "prompt" not in values:
            raise DataError(f"{where}: expected '{names['prompt']}' to be a string or a list of messages, got null")
        return values

    def _encode(self, prompt: object, where: str) -> tuple[str, tuple[int, ...]]:
        if isinstance(prompt, str):
            if not prompt.strip():
                raise DataError(f"{where}: the prompt is empty; there is nothing to complete. Remove the row")
            return encode_text(prompt, self.tokenizer)
        if not isinstance(prompt, list):
            raise DataError(f"{where}: expected the prompt to be a string or a list of messages, got {_kind(prompt)}")
        if not prompt:
            raise DataError(f"{where}: the prompt is an empty list of messages; there is nothing to complete")
        for number, message in enumerate(prompt):
            if not isinstance(message, Mapping) or not {"role", "content"} <= set(message):
                raise DataError(
                    f'{where}: expected message {number} to be {{"role": ..., "content": ...}}, got {message!r}'
                )
        return encode_chat(prompt, self.tokenizer)

    def _identify(self, given: str | int | None, text: str, where: str) -> str:
        if given is not None:
            prompt_id = str(given)
            if prompt_id in self._seen:
                raise DataError(
                    f"{where}: the id '{prompt_id}' is already that of {self._seen[prompt_id]}; sampling noise and scores "
                    "are keyed by it. Give every row its own id, or leave the column out"
                )
        else:
            base = prompt_id = hashlib.blake2b(text.encode(), digest_size=8).hexdigest()
            copy = 1
            while prompt_id in self._seen:
                copy += 1
                prompt_id = f"{base}-{copy}"
        self._seen[prompt_id] = where
        return prompt_id

    def _verifier(self, values: Mapping[str, Any], where: str) -> str | None:
        name: str | None = values.get("verifier")
        if name is None:
            return self.default_verifier if "answer" in values else None
        if self.verifiers is not None and name not in self.verifiers:
            raise DataError(f"{where}: expected the name of a verifier, got '{name}'; {nearest(name, self.verifiers)}")
        return name


def _said(prompt: object) -> dict[str, Any]:
    """Chat messages as they are, and what the user says in them, for the routers; a plain prompt says it itself."""
    if not isinstance(prompt, list):
        return {}
    said = [one["content"] for one in prompt if one["role"] == "user" and isinstance(one["content"], str)]
    return {CONVERSATION: [dict(one) for one in prompt]} | ({USER_TEXT: "\n".join(said)} if said else {})


_NAMES: dict[type, str] = {str: "a string", int: "a whole number", float: "a number", dict: "an object", list: "a list"}


def _kind(value: object) -> str:
    """Says what a value is in the words of JSON."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return f"{_NAMES.get(type(value), type(value).__name__)} ({str(value)[:40]!r})"


def _misspelt(name: str, *, absent: Collection[str]) -> str | None:
    close = difflib.get_close_matches(name.lower(), list(absent), n=1, cutoff=0.8)
    return close[0] if close else None


def _closest(wanted: str, row: Mapping[str, Any]) -> str:
    close = difflib.get_close_matches(wanted, [str(name) for name in row], n=1, cutoff=0.6)
    return f"did you mean '{close[0]}'? " if close else ""
