"""What learned routers are measured between: chance and the label."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from typing import Any

import torch

from moteach.catalogue.spec import ExpertSpec
from moteach.routing.base import routing_of
from moteach.types import Prompt, RolloutBatch, Routing


class RandomRouter:
    """Draws one expert a prompt in proportion to `experts.<name>.weight`, by the prompt's text.

    Each expert draws an exponential time of rate `weight` from the hash of (seed, text, name) and the first wins, so its chance
    is its share of the weights, and adding or reordering experts moves no more prompts than it must.

    Args:
        seed: Another seed, other experts.
    """

    def __init__(self, *, seed: int = 0) -> None:
        self.seed = seed
        self._experts: tuple[ExpertSpec, ...] = ()

    def bind(self, experts: Sequence[ExpertSpec]) -> None:
        """Remembers the experts and their weights."""
        self._experts = tuple(experts)

    def route(self, prompts: Sequence[Prompt], rollouts: RolloutBatch | None = None) -> Routing:
        """Draws; all-zero weights where no expert has one."""
        del rollouts
        weights = torch.zeros(len(prompts), len(self._experts))
        for row, prompt in enumerate(prompts):
            times = [self._time(prompt.text, expert) for expert in self._experts]
            if times and min(times) < math.inf:
                weights[row, times.index(min(times))] = 1.0
        return routing_of(self._experts, prompts, weights)

    def _time(self, text: str, expert: ExpertSpec) -> float:
        if expert.weight == 0:
            return math.inf
        digest = hashlib.blake2b(f"{self.seed}\0{expert.name}\0{text}".encode(), digest_size=8).digest()
        uniform = (int.from_bytes(digest, "little") + 0.5) / 2**64
        return -math.log(uniform) / expert.weight

    def state_dict(self) -> dict[str, Any]:
        """Nothing is learned."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Nothing to restore."""


class OracleRouter:
    """Gives a prompt to the experts that its label names, and abstains where the label is missing or nobody claims it.

    Unlike `label` it refuses nothing, so that prompts outside every domain can be part of a measurement.

    Args:
        metadata_key: Key of `Prompt.metadata` with the name of an expert or a domain; None takes `teacher_id`, else `domain`.
    """

    def __init__(self, *, metadata_key: str | None = None) -> None:
        self.metadata_key = metadata_key
        self._experts: tuple[ExpertSpec, ...] = ()

    def bind(self, experts: Sequence[ExpertSpec]) -> None:
        """Remembers the experts and their domains."""
        self._experts = tuple(experts)

    def route(self, prompts: Sequence[Prompt], rollouts: RolloutBatch | None = None) -> Routing:
        """Looks each prompt's label up; experts that share it share the prompt by their weight."""
        del rollouts
        weights = torch.zeros(len(prompts), len(self._experts))
        for row, prompt in enumerate(prompts):
            for column, expert in enumerate(self._experts):
                weights[row, column] = self._weight(prompt, expert)
        return routing_of(self._experts, prompts, weights)

    def _weight(self, prompt: Prompt, expert: ExpertSpec) -> float:
        if self.metadata_key is not None:
            label = prompt.metadata.get(self.metadata_key)
            named = label == expert.name
            return 1.0 if named else expert.weight * (label in expert.domains)
        if prompt.teacher_id is not None:
            return float(prompt.teacher_id == expert.name)
        return expert.weight * (prompt.domain in expert.domains)

    def state_dict(self) -> dict[str, Any]:
        """Nothing is learned."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Nothing to restore."""
