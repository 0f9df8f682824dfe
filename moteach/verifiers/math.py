"""Mathematical equality with the reference answer, by math-verify (https://github.com/huggingface/Math-Verify)."""

from __future__ import annotations

import re
import threading
from typing import Any

from moteach.errors import DataError, MissingDependencyError
from moteach.types import Prompt

_NUMBER = re.compile(r"[-+]?(?:\d[\d,]*(?:\.\d+)?|\.\d+)(?:\s*/\s*\d+)?\s*%?")
_BOXED = "\\boxed{"


def final_answer(completion: str) -> str | None:
    r"""Returns the last `\boxed{...}` of a completion, else its last number, else None."""
    start = completion.rfind(_BOXED)
    while start >= 0:
        depth = 1
        for end in range(start + len(_BOXED), len(completion)):
            depth += {"{": 1, "}": -1}.get(completion[end], 0)
            if depth == 0:
                return completion[start + len(_BOXED) : end].strip()
        start = completion.rfind(_BOXED, 0, start)  # The last one was cut by the length limit.
    numbers = _NUMBER.findall(completion)
    return numbers[-1].strip().rstrip(",") if numbers else None


class MathVerifier:
    r"""Scores 1.0 when the final answer of a completion equals `prompt.answer` as mathematics: `0.5` is `\frac{1}{2}`.

    The final answer is the last `\boxed{...}`, else the last number. Needs the package `math-verify`.

    Args:
        timeout: Seconds a comparison may take. The package enforces it with signals, which work in the main thread only;
            elsewhere there is no time limit, and `max_length` is what keeps comparisons short.
        max_length: Final answers with more characters are wrong unread.
    """

    def __init__(self, *, timeout: int = 5, max_length: int = 300) -> None:
        self._timeout = timeout
        self._max_length = max_length

    def score(self, prompt: Prompt, completion: str) -> float:
        """Compares the final answer with the reference answer.

        Raises:
            DataError: The prompt has no reference answer.
            MissingDependencyError: The package `math-verify` is not installed.
        """
        if prompt.answer is None:
            raise DataError(
                f"expected an `answer` in prompt {prompt.prompt_id!r}, which is graded by the verifier 'math'; every "
                "completion would count as wrong: add the reference answer or name another verifier"
            )
        package = _package()
        given = final_answer(completion)
        if given is None or len(given) > self._max_length:
            return 0.0
        if given == prompt.answer.strip():
            return 1.0
        timeout = self._timeout if threading.current_thread() is threading.main_thread() else None
        gold, target = (
            package.parse(f"${text.strip().strip('$')}$", parsing_timeout=timeout) for text in (prompt.answer, given)
        )
        return float(package.verify(gold, target, timeout_seconds=timeout))


def _package() -> Any:
    try:
        import math_verify
    except ImportError as error:
        raise MissingDependencyError(
            "the verifier 'math' needs the package 'math-verify', which is not installed: pip install 'moteach[math]'"
        ) from error
    return math_verify
