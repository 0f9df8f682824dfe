"""Routers that need no learning: by the label a prompt carries, and everybody alike."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from moteach.catalogue.spec import ExpertSpec
from moteach.errors import ConfigError, RoutingError, nearest
from moteach.routing.base import routing_of
from moteach.types import Prompt, RolloutBatch, Routing


class LabelRouter:
    """Gives a prompt to the expert that its label names.

    The label is the prompt's `teacher_id` when it has one, else its `domain`, looked up in the `domains` of the experts;
    experts that share a domain share its prompts in proportion to their `weight`. This is the routing of MiMo-V2-Flash
    (arXiv 2601.02780, section 4) and of every published industrial system.

    An unknown label is refused unless `fallback` names an expert: silently giving the prompt to somebody is how a run
    ends up graded by the wrong teacher.

    Args:
        fallback: Expert for prompts without a label, or with one that no expert claims. None refuses them.
    """

    def __init__(self, *, fallback: str | None = None) -> None:
        self.fallback = fallback
        self._experts: tuple[ExpertSpec, ...] = ()
        self._rows: dict[tuple[str, str], Float[Tensor, " teacher"]] = {}

    def bind(self, experts: Sequence[ExpertSpec]) -> None:
        """Indexes the experts by name and by domain.

        Raises:
            ConfigError: When `fallback` is not among the experts of the run.
        """
        self._experts = tuple(experts)
        names = [expert.name for expert in experts]
        if self.fallback is not None and self.fallback not in names:
            raise ConfigError(
                f"router.fallback: expected one of the run's experts, got '{self.fallback}'; {nearest(self.fallback, names)}"
            )
        rows: dict[tuple[str, str], Float[Tensor, " teacher"]] = {}
        for index, expert in enumerate(experts):
            own = torch.zeros(len(experts))
            own[index] = 1.0
            rows["teacher", expert.name] = own
            for domain in expert.domains:
                rows.setdefault(("domain", domain), torch.zeros(len(experts)))[index] = expert.weight
        self._rows = rows

    def route(self, prompts: Sequence[Prompt], rollouts: RolloutBatch | None = None) -> Routing:
        """Looks each prompt's label up.

        Raises:
            RoutingError: When a label is missing or unknown and there is no fallback.
        """
        del rollouts
        rows = [self._row(prompt) for prompt in prompts]
        weights = torch.stack(rows) if rows else torch.zeros(0, len(self._experts))
        return routing_of(self._experts, prompts, weights)

    def _row(self, prompt: Prompt) -> Float[Tensor, " teacher"]:
        kind = "domain" if prompt.teacher_id is None else "teacher"
        label = prompt.domain if prompt.teacher_id is None else prompt.teacher_id
        row = self._rows.get((kind, label)) if label is not None else None
        if row is not None:
            return row
        if self.fallback is not None:
            return self._rows["teacher", self.fallback]
        known = sorted(name for which, name in self._rows if which == kind)
        got = "no label" if label is None else f"the {kind} '{label}'"
        raise RoutingError(
            f"prompt '{prompt.prompt_id}' has {got}, which no expert of this run claims; it would be graded by the wrong "
            f"teacher. {nearest(label or '', known)}. Add an expert for it, or set router.fallback=<expert>"
        )

    def state_dict(self) -> dict[str, Any]:
        """Nothing is learned."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Nothing to restore."""


class UniformRouter:
    """Gives every prompt to every expert, in proportion to `experts.<name>.weight`.

    With a pool it is DeepSeek-V4's weighted sum over all experts (arXiv 2606.19348, Eq. 29) read literally, and the
    baseline that a router has to beat; every teacher scores every row.
    """

    def __init__(self) -> None:
        self._experts: tuple[ExpertSpec, ...] = ()

    def bind(self, experts: Sequence[ExpertSpec]) -> None:
        """Remembers the experts and their weights."""
        self._experts = tuple(experts)

    def route(self, prompts: Sequence[Prompt], rollouts: RolloutBatch | None = None) -> Routing:
        """Repeats the experts' weights on each row."""
        del rollouts
        weights = torch.tensor([expert.weight for expert in self._experts], dtype=torch.float32)
        return routing_of(self._experts, prompts, weights.expand(len(prompts), -1))

    def state_dict(self) -> dict[str, Any]:
        """Nothing is learned."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Nothing to restore."""
