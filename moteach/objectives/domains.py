"""What belongs to a domain in a batch: its rows, its tokens, its share of prompts and of weights, its statistics.

A row's domain is `Prompt.domain`, or "default". Only tokens that have a teacher are counted.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from jaxtyping import Float, Int
from torch import Tensor

from moteach.errors import ConfigError
from moteach.objectives.token_weights import taught_tokens
from moteach.types import RolloutBatch


def row_domains(rollouts: RolloutBatch) -> list[str]:
    """The domain of each row."""
    return [rollout.prompt.domain or "default" for rollout in rollouts.rollouts]


def token_domains(rollouts: RolloutBatch, names: list[str]) -> Int[Tensor, " packed"]:
    """The index in `names` of each token's domain."""
    of_row = torch.tensor([names.index(domain) for domain in row_domains(rollouts)], dtype=torch.long)
    return of_row[rollouts.token_rows]


def weight_shares(
    rollouts: RolloutBatch, stats: Mapping[str, Float[Tensor, " packed"]], weights: Float[Tensor, " packed"]
) -> dict[str, float]:
    """Each domain's share of the weights of the taught tokens; domains with a share of zero are left out."""
    sums = by_domain(rollouts, {**stats, "weight": weights}, "weight", total_of)
    total = sum(sums.values())
    return {domain: value / total for domain, value in sums.items() if value > 0}


def prompt_shares(rollouts: RolloutBatch, stats: Mapping[str, Float[Tensor, " packed"]]) -> dict[str, float]:
    """Each domain's share of the sequences that have a taught token; the others are left out."""
    domains = row_domains(rollouts)
    rows = sorted(set(rollouts.token_rows[taught_tokens(stats)].tolist()))
    return {
        domain: sum(domains[row] == domain for row in rows) / len(rows) for domain in sorted({domains[r] for r in rows})
    }


def by_domain(
    rollouts: RolloutBatch,
    stats: Mapping[str, Float[Tensor, " packed"]],
    name: str,
    measure: Callable[[Float[Tensor, " token"]], float],
) -> dict[str, float]:
    """Measures one statistic over the finite values of each domain's taught tokens.

    A teacher that excludes a written token has a log-ratio of minus infinity there, which would swallow its domain.

    Returns:
        One number per domain that has a taught token, in the order of their names; those that come out NaN are left out.
    """
    names = sorted(set(row_domains(rollouts)))
    taught = taught_tokens(stats)
    values, of_token = stats[name][taught], token_domains(rollouts, names)[taught]
    measured = {
        domain: measure(finite_values(values[of_token == index]))
        for index, domain in enumerate(names)
        if bool((of_token == index).any())
    }
    return {domain: value for domain, value in measured.items() if not math.isnan(value)}


def spread(values: Float[Tensor, " token"]) -> float:
    """Population standard deviation; 0 for fewer than two values."""
    return float(values.double().std(correction=0)) if len(values) > 1 else 0.0


def finite_values(values: Float[Tensor, " token"]) -> Float[Tensor, " finite"]:
    """The values that are neither infinite nor NaN."""
    return values[torch.isfinite(values)]


def total_of(values: Float[Tensor, " token"]) -> float:
    """The sum, in float64."""
    return float(values.double().sum())


def mean_size(values: Float[Tensor, " token"]) -> float:
    """The mean absolute value, in float64; NaN for none."""
    return float(values.double().abs().mean())


def factors_to_target(
    observed: Mapping[str, float], target: Mapping[str, float | int] | None, prompts: Mapping[str, float]
) -> dict[str, float]:
    """Computes w_d = target_d / observed_d, with targets that sum to one over the observed domains.

    Args:
        observed: Share of each domain, positive, summing to one.
        target: Wanted share of each domain, any positive scale; None takes `prompts`.
        prompts: Share of each domain in the prompts.

    Raises:
        ConfigError: An observed domain has no target.
    """
    wanted = prompts if target is None else target
    unnamed = sorted(set(observed) - set(wanted))
    if unnamed:
        raise ConfigError(
            f"balance.target: expected a share for every domain of the step, got {dict(wanted)} without "
            f"{', '.join(unnamed)}; those domains would get no weight. Name them, or set balance.target=null"
        )
    total = sum(wanted[domain] for domain in observed)
    return {domain: wanted[domain] / total / share for domain, share in observed.items()}


def mean_one(factors: Mapping[str, float], observed: Mapping[str, float]) -> dict[str, float]:
    """Divides the factors of the observed domains by their weighted mean sum_d observed_d w_d."""
    mean = sum(share * factors[domain] for domain, share in observed.items())
    return {domain: factors[domain] / mean for domain in observed} if mean > 0 else {}


def check_target(target: Mapping[str, float | int] | None) -> None:
    """Checks the wanted shares.

    Raises:
        ConfigError: There is none, or one is not a positive finite number.
    """
    if target is not None and not (target and all(math.isfinite(v) and v > 0 for v in target.values())):
        raise ConfigError(
            f"balance.target: expected a finite share above 0 for each domain, or null, got {dict(target)}; a domain would be "
            "sampled and never trained. Leave it out of the sampler's mixture instead"
        )
