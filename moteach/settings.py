"""The numbers of the training loop, and the learning rate they give each step."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from moteach.errors import ConfigError
from moteach.types import Support

Schedule = Literal["cosine", "linear", "constant"]


@dataclass(frozen=True, kw_only=True)
class TrainerSettings:
    """The numbers of the loop; `moteach.config.schema` says what each means."""

    max_steps: int
    support: Support = "full"
    k: int | None = None
    group_size: int = 1
    lr: float = 1e-3
    warmup_steps: int = 0
    schedule: Schedule = "cosine"
    final_lr_fraction: float = 0.0
    max_grad_norm: float = 1.0
    updates_per_step: int = 1
    gradient_cosine_every: int = 0
    diagnostics_every: int = 0
    checkpoint_every: int = 0

    def __post_init__(self) -> None:
        if self.updates_per_step < 1:
            raise ConfigError(f"updates_per_step: expected at least 1 update, got {self.updates_per_step}")

    def diagnostics_due(self, step: int) -> bool:
        """True in the steps that take one more look at the likeliest tokens, beginning with the first."""
        return self.diagnostics_every > 0 and step % self.diagnostics_every == 0

    def lr_at(self, step: int) -> float:
        """Learning rate of the update that takes `step` to `step + 1`: linear warm-up, then the schedule."""
        if step < self.warmup_steps:
            return self.lr * (step + 1) / self.warmup_steps
        if self.schedule == "constant":
            return self.lr
        done = (step - self.warmup_steps) / max(self.max_steps - self.warmup_steps - 1, 1)
        shape = 0.5 * (1 + math.cos(math.pi * done)) if self.schedule == "cosine" else 1 - done
        return self.lr * (self.final_lr_fraction + (1 - self.final_lr_fraction) * shape)
