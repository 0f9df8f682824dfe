"""The teacher that has been right most often in the prompt's domain, whatever its card claims."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from moteach.catalogue.spec import ExpertSpec
from moteach.data.base import domain_of
from moteach.errors import ConfigError
from moteach.routing.base import routing_of
from moteach.routing.policy import Policy, Weighting, decide
from moteach.types import Prompt, ReliabilityTable, RolloutBatch, Routing


class ReliabilityRouter:
    """Weights w_j = softmax_j(sharpness * ln r_j), r_j the running reliability of teacher j in the prompt's domain.

    The reliability is the posterior mean that `teacher_gate=reliable` keeps, from verified answers of the teachers to training
    prompts. Before the first probe all teachers are alike and share every row, so that each is probed; a teacher that is no
    longer asked forgets its record with `teacher_gate.decay` and comes back at the prior's mean, when the best one is below.
    It needs labels of domains, but no expert has to claim one: what a card says is a promise, this is a record.

    Args:
        sharpness: Exponent of the reliability, with `weighting` top_m or soft.
        weighting, m, cost_weight: See `Policy`.

    Raises:
        ConfigError: `sharpness` is not positive.
    """

    needs = frozenset({"reliability"})

    def __init__(
        self, *, sharpness: float = 4.0, weighting: Weighting = "hard", m: int = 2, cost_weight: float = 0.0
    ) -> None:
        if not 0 < sharpness < float("inf"):
            raise ConfigError(
                f"router.sharpness: expected a finite number above 0, got {sharpness}; the record would not matter, for that "
                "choose router=uniform"
            )
        self.sharpness = sharpness
        self.policy = Policy(weighting=weighting, m=m, cost_weight=cost_weight)
        self._experts: tuple[ExpertSpec, ...] = ()
        self._table: ReliabilityTable | None = None

    def bind(self, experts: Sequence[ExpertSpec]) -> None:
        """Remembers the experts."""
        self._experts = tuple(experts)

    def bind_reliability(self, table: ReliabilityTable) -> None:
        """Remembers where the reliabilities are read."""
        self._table = table

    def route(self, prompts: Sequence[Prompt], rollouts: RolloutBatch | None = None) -> Routing:
        """Reads the table for each prompt's domain.

        Raises:
            ConfigError: There is no table.
        """
        if self._table is None:
            raise ConfigError(
                "router=reliability: expected a record of the teachers, got none; nobody could be preferred. It works inside "
                "`moteach train` with teacher_gate=reliable"
            )
        if not prompts:
            return routing_of(self._experts, prompts, torch.zeros(0, len(self._experts)))
        table = self._table
        of = [[table.of(expert.name, domain_of(prompt)) for expert in self._experts] for prompt in prompts]
        scores = self.sharpness * torch.tensor(of, dtype=torch.float64).log()
        return decide(self.policy, self._experts, prompts, scores)

    def state_dict(self) -> dict[str, Any]:
        """The record belongs to the teacher gate."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Has no state."""
