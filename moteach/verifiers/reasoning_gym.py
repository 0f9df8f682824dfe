"""The scorers of the package reasoning-gym (https://github.com/open-thought/reasoning-gym)."""

from __future__ import annotations

import contextlib
import io
import json
import re
from collections.abc import Mapping
from typing import Any

from moteach.errors import DataError, MissingDependencyError
from moteach.types import Prompt

_ANSWER = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)


def final_answer(completion: str) -> str:
    """Returns what to grade: without a `<think>` part, the last `<answer>...</answer>`, else everything."""
    text = completion.rpartition("</think>")[2]
    tagged = _ANSWER.findall(text)
    return (tagged[-1] if tagged else text).strip()


class ReasoningGymVerifier:
    """Scores a completion with the `score_answer` of the task that made the prompt.

    Reads `prompt.metadata["reasoning_gym"]`: `{"task", "config", "entry"}`, as `ReasoningGymPrompts` writes it. Some tasks
    give part of the score to answers that are nearly right. Needs the package `reasoning-gym`.

    Args:
        exact: Only full marks count: anything below 1 scores 0.
    """

    def __init__(self, *, exact: bool = False) -> None:
        self._exact = exact
        self._generators: dict[str, Any] = {}

    def score(self, prompt: Prompt, completion: str) -> float:
        """Grades one completion.

        Raises:
            DataError: The prompt does not come from reasoning-gym.
            MissingDependencyError: The package `reasoning-gym` is not installed.
        """
        made = prompt.metadata.get("reasoning_gym")
        if not isinstance(made, Mapping) or not {"task", "config", "entry"} <= set(made):
            raise DataError(
                f"expected metadata.reasoning_gym with task, config and entry in prompt {prompt.prompt_id!r}, got "
                f"{sorted(prompt.metadata)}; the task's own scorer needs them: use data=reasoning_gym or another verifier"
            )
        with contextlib.redirect_stdout(io.StringIO()):
            score = self._generator(made["task"], made["config"]).score_answer(final_answer(completion), made["entry"])
        # Before clipping: some tasks add up parts of the score and overshoot 1 on answers that are only nearly right.
        return float(score == 1.0) if self._exact else min(1.0, max(0.0, float(score)))

    def _generator(self, task: str, config: Mapping[str, Any]) -> Any:
        key = f"{task} {json.dumps(dict(config), sort_keys=True, default=str)}"
        if key not in self._generators:
            try:
                import reasoning_gym
            except ImportError as error:
                raise MissingDependencyError(
                    "the verifier 'reasoning_gym' needs the package 'reasoning-gym', which is not installed: "
                    "pip install 'moteach[reasoning-gym]'"
                ) from error
            self._generators[key] = reasoning_gym.create_dataset(task, **{**config, "seed": 0, "size": 1})
        return self._generators[key]
