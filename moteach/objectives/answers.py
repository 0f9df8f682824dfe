"""The prompts' own answers as completions, for the supervised term."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from moteach.types import Prompt, Rollout, RolloutBatch


class Answers:
    """Writes the reference answer of each prompt as the completion that the student should have written.

    The text is `metadata["solution"]` where a prompt has a worked one, else `answer`; an end-of-sequence token follows.

    Args:
        tokenizer: The student's.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        pad_id = tokenizer.pad_token_id
        self._pad_id = int(tokenizer.eos_token_id if pad_id is None else pad_id)

    def __call__(self, prompts: Sequence[Prompt]) -> RolloutBatch | None:
        """Returns one row a different prompt that has an answer, or None when none has."""
        rollouts = []
        for prompt in {prompt.prompt_id: prompt for prompt in prompts}.values():
            text = prompt.metadata.get("solution", prompt.answer)
            if text is None:
                continue
            ids = self._tokenizer(str(text), add_special_tokens=False)["input_ids"]
            completion = (*ids, self._tokenizer.eos_token_id)
            rollouts.append(
                Rollout(
                    prompt=prompt,
                    sample=0,
                    completion_ids=completion,
                    rollout_logprobs=(0.0,) * len(completion),
                    finished=True,
                    student_version=0,
                )
            )
        return RolloutBatch.from_rollouts(rollouts, pad_id=self._pad_id) if rollouts else None
