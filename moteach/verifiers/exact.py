"""Exact match with the reference answer of the prompt."""

from __future__ import annotations

from moteach.errors import DataError
from moteach.types import Prompt


class ExactVerifier:
    """Scores 1.0 when the completion is the reference answer.

    Args:
        strip: Ignore white space before and after both texts.
        case_sensitive: Whether `Paris` and `paris` differ.
    """

    def __init__(self, *, strip: bool = True, case_sensitive: bool = True):
        self._strip = strip
        self._case_sensitive = case_sensitive

    def score(self, prompt: Prompt, completion: str) -> float:
        """Compares a completion with `prompt.answer`.

        Raises:
            DataError: When the prompt has no reference answer.
        """
        if prompt.answer is None:
            raise DataError(
                f"expected an `answer` in prompt {prompt.prompt_id!r}, which is graded by exact match; every completion "
                "would count as wrong: add the reference answer or name another verifier"
            )
        return float(self._normalise(completion) == self._normalise(prompt.answer))

    def _normalise(self, text: str) -> str:
        text = text.strip() if self._strip else text
        return text if self._case_sensitive else text.casefold()
