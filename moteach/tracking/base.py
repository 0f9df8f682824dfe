"""The protocol of trackers and what they share."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

_SECRET = re.compile(
    r"(^|[_\-.])((secret|password|passwd|pwd|credential|(api|access|private)[_\-]?key)s?($|[_\-.])|(token|auth)$)|^key$",
    re.I,
)
_USER = re.compile(r"(?<=://)[^\s/]*@")
_QUERY = re.compile(r"(://[^\s?#]*)[?#]\S*")
_REDACTED = "<redacted>"


@runtime_checkable
class Tracker(Protocol):
    """Receives what happens in a run. Steps count optimizer updates; step 0 is the state before the first."""

    def start(self, *, run_dir: Path, config: Mapping[str, Any], step: int) -> None:
        """Opens the tracker at `step`; rows of a later step, left by a crash, must not survive."""
        ...

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Records the metrics of one step."""
        ...

    def finish(self, summary: Mapping[str, Any]) -> None:
        """Records the closing table and closes."""
        ...


def redact(value: Any, key: str = "") -> Any:
    """Returns a copy of a config without secrets.

    Values whose key looks like a secret (token, api_key, password, ...) are replaced, with everything below them, and so
    are the user information and the query of every URL in a text. True, false and null stay: they give nothing away.
    """
    secret = _SECRET.search(key) is not None
    if isinstance(value, Mapping):
        return {name: redact(child, key if secret else str(name)) for name, child in value.items()}
    if isinstance(value, list | tuple):
        return [redact(child, key) for child in value]
    if secret and value is not None and not isinstance(value, bool):
        return _REDACTED
    if isinstance(value, str):
        return _QUERY.sub(rf"\1?{_REDACTED}", _USER.sub(f"{_REDACTED}@", value))
    return value
