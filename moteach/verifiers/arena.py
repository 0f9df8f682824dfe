"""Grades arena completions by solving the prompt again: arithmetic, the interpreter, or the documents in the prompt."""

from __future__ import annotations

from moteach.data.arena.rules import Step, solve
from moteach.types import Prompt


class ArenaVerifier:
    """Scores 1.0 when the completion is exactly the right answer, every step of a composite included, else 0.0.

    The truth is worked out from the prompt text, not read from `prompt.answer`.
    """

    def score(self, prompt: Prompt, completion: str) -> float:
        """Grades one completion (decoded, without special tokens); spaces around it are not forgiven."""
        return float(completion == "".join(step.text for step in solve(prompt.text)))


def steps_right(prompt: Prompt, completion: str) -> tuple[tuple[Step, bool], ...]:
    """Says of each reference step whether the completion holds it at its place.

    A step begins where the reference steps before it end, so a step can be right after a wrong one of the same length.
    The last step must also end the completion.

    Args:
        prompt: An arena prompt.
        completion: Decoded completion without special tokens.

    Returns:
        One pair for each reference step, in order.
    """
    steps = solve(prompt.text)
    verdicts = []
    start = 0
    for number, step in enumerate(steps):
        end = start + len(step.text)
        written = completion[start:] if number == len(steps) - 1 else completion[start:end]
        verdicts.append((step, written == step.text))
        start = end
    return tuple(verdicts)
