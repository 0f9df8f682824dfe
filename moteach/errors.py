"""The exceptions of moteach.

Every error derives from `MoteachError` and also from the standard exception it stands for, so that both
`except MoteachError` and `except ValueError` work. A message says what was expected, what was given, what would silently
go wrong, and the remedy; `nearest` lists the closest valid choices.

Adding one: derive from `MoteachError` and one standard exception, keep a single positional `message`, so that instances
survive pickling between processes.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable

_LISTED = 20
"""Most choices that a message lists in full."""


class MoteachError(Exception):
    """Root of every error that moteach raises on purpose."""


class ConfigError(MoteachError, ValueError):
    """A configuration value, key or combination that cannot be used."""


class UnknownChoiceError(MoteachError, LookupError):
    """A name that is not among the known ones (an expert, a domain, a verifier, ...)."""


class ExpertCardError(MoteachError, ValueError):
    """An expert card (one YAML of the catalogue) that does not satisfy `ExpertSpec`."""


class DataError(MoteachError, ValueError):
    """A prompt file or data set that cannot be used."""


class MissingFileError(MoteachError, FileNotFoundError):
    """A file or folder that was named and does not exist."""


class IncompatibleTeacherError(MoteachError, ValueError):
    """A teacher whose vocabulary, special tokens or template differ from the student's."""


class DeadTeacherError(MoteachError, ValueError):
    """A teacher whose scores are not finite, or uniform over the vocabulary."""


class TeacherUnavailableError(MoteachError, ConnectionError):
    """A teacher that could not answer: its server is down, too slow, or sends what cannot be read."""


class RolloutServerError(MoteachError, ConnectionError):
    """A rollout server that could not answer, or that answers as it must not."""


class WeightSyncError(MoteachError, RuntimeError):
    """A rollout server that does not sample from the student's weights after they were sent to it."""


class RoutingError(MoteachError, ValueError):
    """A prompt that the router may not give to any teacher."""


class UnsupportedCombinationError(MoteachError, ValueError):
    """Two choices that are each valid and are not defined together."""


class CheckpointError(MoteachError, RuntimeError):
    """A checkpoint that cannot be written, read or resumed from."""


class TrainingError(MoteachError, ArithmeticError):
    """A training step that must not be taken, such as one on a loss that is not finite."""


class MissingDependencyError(MoteachError, ImportError):
    """An optional package that a choice needs and that is not installed."""


def nearest(word: str, choices: Iterable[str], *, limit: int = 3) -> str:
    """Says which valid choices are closest to a wrong word.

    Args:
        word: What the user wrote.
        choices: Every valid word.
        limit: How many close matches to name.

    Returns:
        `did you mean 'a' or 'b'? (valid choices: a, b, c)`, or only the list when nothing is close. Of more than 20
        choices only the close ones are named, or the first few when none is: a folder would flood the line.
    """
    known = sorted(set(choices))
    few = len(known) <= _LISTED
    listed = ", ".join(known if few else known[:limit]) if known else "none"
    if not few:
        listed += f", ... ({len(known)} in all)"
    close = difflib.get_close_matches(word, known, n=limit, cutoff=0.5)
    if not close:
        return f"valid choices: {listed}"
    quoted = " or ".join(f"'{match}'" for match in close)
    return f"did you mean {quoted}?" + (f" (valid choices: {listed})" if few else "")
