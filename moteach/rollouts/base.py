"""The protocol of rollout engines."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

from torch import nn

from moteach.types import Prompt, RolloutBatch


@runtime_checkable
class RolloutEngine(Protocol):
    """Samples completions from the student and remembers which version of it wrote them.

    Sampling noise is keyed by (run seed, step, prompt id, sample, position): the same call gives the same completions
    whatever the order of the prompts, the batch size or the number of ranks.
    """

    def generate(
        self,
        prompts: Sequence[Prompt],
        *,
        step: int,
        group_size: int = 1,
        temperature: float | None = None,
        max_new_tokens: int | None = None,
    ) -> RolloutBatch:
        """Samples `group_size` completions of every prompt.

        Args:
            prompts: What to complete.
            step: Step of the run; part of the key of the sampling noise.
            group_size: Completions per prompt.
            temperature: None means the engine's own setting; 0 is greedy.
            max_new_tokens: None means the engine's own setting.

        Returns:
            Rollouts in prompt-major order: `p0s0, p0s1, ..., p1s0, ...`, prompts in the order given.
        """
        ...

    def sync(self, student: nn.Module, *, version: int) -> None:
        """Makes the engine sample from these student weights from now on.

        Args:
            student: The live student.
            version: Optimizer steps it has taken; stamped on every rollout as `student_version`.
        """
        ...
