"""From probabilities to the weights of teachers: how many of them, how soft, and when nobody."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from moteach.catalogue.spec import ExpertSpec
from moteach.errors import ConfigError, nearest
from moteach.types import Prompt, Routing

Weighting = Literal["hard", "top_m", "soft"]
OnAbstain = Literal["skip", "fallback", "uniform"]
_TIE = 1e-9


def priced(
    probabilities: Float[Tensor, "prompt teacher"], costs: Float[Tensor, " teacher"], *, cost_weight: float
) -> Float[Tensor, "prompt teacher"]:
    """Moves probability away from expensive experts: softmax(ln p - cost_weight * cost) over those with p > 0.

    The decision of vLLM's semantic-router (argmax of quality - lambda * cost) with ln p as the quality, so that hard, top-m
    and soft weights pay the same price: an expert that costs c more has to be exp(cost_weight * c) times as probable.

    Args:
        probabilities: Of each expert; rows of zeros stay zeros.
        costs: `cost` of each expert's card.
        cost_weight: Nats a unit of cost, at least 0.
    """
    if cost_weight == 0:
        return probabilities
    # The cheapest pays nothing, so that large prices cannot make every product underflow.
    raw = probabilities * torch.exp(-cost_weight * (costs - costs.min())) if len(costs) else probabilities
    total = raw.sum(dim=1, keepdim=True)
    return raw / torch.where(total == 0, torch.ones_like(total), total)


@dataclass(frozen=True, kw_only=True)
class Policy:
    """What a router makes of its probabilities.

    Raises:
        ConfigError: A value is out of range.
    """

    weighting: Weighting = "hard"
    """`hard`: the most probable expert (experts that tie share, by their weight); `top_m`: the `m` heaviest; `soft`: all."""
    m: int = 2
    """How many experts keep a weight under `top_m`."""
    temperature: float = 1.0
    """Weights under `top_m` and `soft` are proportional to probability ** (1 / temperature) * `experts.<name>.weight`."""
    min_confidence: float | None = None
    """The router abstains where the calibrated probability of the first expert is below this."""
    min_similarity: float | None = None
    """... and where the largest cosine to an exemplar is below this: a prompt unlike all that was learned from."""
    min_energy: float | None = None
    """... and where ln sum exp of the calibrated scores (the negative energy of arXiv 2010.03759, Eq. 4) is below this."""
    on_abstain: OnAbstain = "skip"
    """`skip`: nobody grades the row; `fallback`: the expert `fallback` does; `uniform`: all do, by their weight."""
    fallback: str | None = None
    """Expert of `on_abstain: fallback`."""
    cost_weight: float = 0.0
    """What a unit of `experts.<name>.cost` takes from an expert's ln probability before the weights are made, see `priced`."""

    def __post_init__(self) -> None:
        if self.m < 1 or not self.temperature > 0:
            raise ConfigError(
                f"expected router.m >= 1 and router.temperature > 0, got {self.m} and {self.temperature}; the weights would "
                "not be a distribution"
            )
        if not 0 <= self.cost_weight < math.inf:
            raise ConfigError(
                f"router.cost_weight: expected a finite number of at least 0, got {self.cost_weight}; expensive experts would "
                "be preferred, or nobody chosen"
            )
        if self.min_confidence is not None and not 0 <= self.min_confidence <= 1:
            raise ConfigError(f"router.min_confidence: expected a probability or null, got {self.min_confidence}")
        if (self.on_abstain == "fallback") != (self.fallback is not None):
            raise ConfigError(
                f"router.fallback: expected an expert with on_abstain=fallback and null otherwise, got {self.fallback} with "
                f"on_abstain={self.on_abstain}; abstentions would go elsewhere than you say"
            )

    def check(self, names: Sequence[str]) -> None:
        """Refuses a `fallback` that is not among the experts of the run.

        Raises:
            ConfigError: Names the nearest ones.
        """
        if self.fallback is not None and self.fallback not in names:
            raise ConfigError(
                f"router.fallback: expected one of the run's experts, got '{self.fallback}'; {nearest(self.fallback, names)}"
            )

    def abstains(
        self,
        confidence: Float[Tensor, " prompt"],
        similarity: Float[Tensor, " prompt"],
        energy: Float[Tensor, " prompt"],
    ) -> Bool[Tensor, " prompt"]:
        """Tells the rows on which a threshold is not reached."""
        found = torch.zeros_like(confidence, dtype=torch.bool)
        for value, least in (
            (confidence, self.min_confidence),
            (similarity, self.min_similarity),
            (energy, self.min_energy),
        ):
            if least is not None:
                found |= value < least
        return found

    def weights(
        self,
        probabilities: Float[Tensor, "prompt teacher"],
        abstained: Bool[Tensor, " prompt"],
        *,
        importance: Float[Tensor, " teacher"],
        names: Sequence[str],
        costs: Float[Tensor, " teacher"] | None = None,
    ) -> Float[Tensor, "prompt teacher"]:
        """Weights the experts of each row.

        Args:
            probabilities: Zero for experts that may not teach.
            abstained: Rows on which the router does not decide.
            importance: `weight` of each expert's card, at least 0.
            names: The experts, in the order of the columns.
            costs: `cost` of each expert's card; None is free.

        Returns:
            Weights that sum to one, or to zero where nobody grades the row.
        """
        if costs is not None:
            probabilities = priced(probabilities, costs, cost_weight=self.cost_weight)
        if self.weighting == "hard":
            first = probabilities.amax(dim=1, keepdim=True)
            raw = ((probabilities >= first - _TIE) & (probabilities > 0)) * importance
        else:
            raw = probabilities.pow(1 / self.temperature) * importance
            if self.weighting == "top_m" and self.m < raw.shape[1]:
                kept = raw.argsort(dim=1, descending=True, stable=True)[:, : self.m]
                raw = torch.zeros_like(raw).scatter(1, kept, raw.gather(1, kept))
        instead = torch.zeros_like(importance)
        if self.on_abstain == "uniform":
            instead = importance
        elif self.on_abstain == "fallback":
            instead = torch.tensor([float(name == self.fallback) for name in names], dtype=importance.dtype)
        raw = torch.where(abstained[:, None], instead, raw)
        total = raw.sum(dim=1, keepdim=True)
        return raw / torch.where(total == 0, torch.ones_like(total), total)


def decide(
    policy: Policy,
    experts: Sequence[ExpertSpec],
    prompts: Sequence[Prompt],
    scores: Float[Tensor, "prompt teacher"],
) -> Routing:
    """Makes a routing of scores in nats: softmax, then `Policy.weights`; the confidence is the chosen expert's probability.

    Args:
        policy: What becomes of the probabilities.
        experts: In the order of the columns; those of weight zero get nothing.
        prompts: One a row.
        scores: -inf where an expert cannot be chosen; a row of them abstains.
    """
    # In the order of their names, so that no sum depends on how the experts were listed.
    order = sorted(range(len(experts)), key=lambda column: experts[column].name)
    back = [order.index(column) for column in range(len(experts))]
    listed = [experts[column] for column in order]
    importance = torch.tensor([expert.weight for expert in listed], dtype=torch.float64)
    probabilities = scores.double()[:, order].masked_fill(importance == 0, -torch.inf).softmax(dim=1)
    probabilities = torch.nan_to_num(probabilities, nan=0.0)
    weights = policy.weights(
        probabilities,
        torch.zeros(len(prompts), dtype=torch.bool),
        importance=importance,
        names=[expert.name for expert in listed],
        costs=torch.tensor([expert.cost for expert in listed], dtype=torch.float64),
    )
    abstained = weights.sum(dim=1) == 0
    chosen = probabilities.gather(1, weights.argmax(dim=1, keepdim=True))[:, 0]
    return Routing(
        teacher_ids=tuple(expert.name for expert in experts),
        prompt_ids=tuple(prompt.prompt_id for prompt in prompts),
        weights=weights[:, back].float(),
        confidence=chosen.float().clamp(0, 1).masked_fill(abstained, 0.0),
        abstained=abstained,
    )
