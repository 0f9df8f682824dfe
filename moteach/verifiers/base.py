"""The protocol of verifiers, and how one is found by name.

A verifier says whether a completion is right. It is used by evaluation, as the reward of the policy gradient stage and by
teacher gates. `Prompt.verifier` holds the name. Adding one: a class with a `score` method, whose constructor has defaults
for everything, and a line in `VERIFIERS`.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from importlib import import_module
from types import MappingProxyType
from typing import Protocol, cast, runtime_checkable

from moteach.errors import UnknownChoiceError, nearest
from moteach.types import Prompt


@runtime_checkable
class Verifier(Protocol):
    """Grades completions."""

    def score(self, prompt: Prompt, completion: str) -> float:
        """Grades one completion.

        Args:
            prompt: The prompt, with what the verifier needs (text, reference answer, metadata).
            completion: What was written after it, decoded, without special tokens.

        Returns:
            A number in [0, 1]; 1.0 is right.
        """
        ...


VERIFIERS: Mapping[str, str] = MappingProxyType(
    {
        "arena": "moteach.verifiers.arena:ArenaVerifier",
        "exact": "moteach.verifiers.exact:ExactVerifier",
        "math": "moteach.verifiers.math:MathVerifier",
        "reasoning_gym": "moteach.verifiers.reasoning_gym:ReasoningGymVerifier",
    }
)
"""Where each verifier is; imported when it is first asked for, since some need an optional package."""


@cache
def verifier_named(name: str) -> Verifier:
    """Returns the verifier of this name, built once with its defaults.

    Raises:
        UnknownChoiceError: When there is no verifier of this name.
        MissingDependencyError: When the verifier needs a package that is not installed.
    """
    if name not in VERIFIERS:
        raise UnknownChoiceError(
            f"expected the name of a verifier, got {name!r}; its prompts could not be graded; {nearest(name, VERIFIERS)}"
        )
    module, _, attribute = VERIFIERS[name].partition(":")
    return cast(Verifier, getattr(import_module(module), attribute)())
