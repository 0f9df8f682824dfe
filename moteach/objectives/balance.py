"""Balance between domains: one factor per domain on the weights of its tokens.

A domain's share of the gradient is its share of the weights times the size of its signal, and neither is its share of the
prompts: completions of one domain can be thirty times as long as those of another. Domains are `Prompt.domain`, or
"default". Tokens without a teacher (`abstained`) train nothing and count for nothing here; a domain that has no other gets
factor 1. Hand over whole steps, not micro-batches, and the weights as they are after the token weightings.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar, Literal, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from moteach.errors import CheckpointError, ConfigError, TrainingError
from moteach.objectives.domains import (
    by_domain,
    check_target,
    factors_to_target,
    finite_values,
    mean_one,
    mean_size,
    prompt_shares,
    row_domains,
    spread,
    total_of,
    weight_shares,
)
from moteach.objectives.token_weights import quantile, taught_tokens
from moteach.types import RolloutBatch


@runtime_checkable
class Balance(Protocol):
    """Says how much each domain of a step counts; all of its state fits in a checkpoint."""

    @property
    def name(self) -> str:
        """The name it has in `conf/balance`."""

    @property
    def needs(self) -> frozenset[str]:
        """The statistics it reads, beside `abstained`; without them it falls back to what its docstring says."""

    def factors(
        self, rollouts: RolloutBatch, stats: Mapping[str, Float[Tensor, " packed"]], base: Float[Tensor, " packed"]
    ) -> dict[str, float]:
        """Returns a finite factor of at least 0 for each domain of the batch.

        Args:
            rollouts: The whole batch of the step.
            stats: What `needs` names and `abstained`.
            base: The weight of each token so far.
        """

    def state_dict(self) -> dict[str, Any]:
        """Returns what `load_state_dict` needs to go on from here; plain JSON types."""

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from where `state_dict` was taken."""


def apply_balance(
    balance: Balance,
    rollouts: RolloutBatch,
    stats: Mapping[str, Float[Tensor, " packed"]],
    base: Float[Tensor, " packed"],
) -> Float[Tensor, " packed"]:
    """Multiplies the weight of each token by the factor of its domain.

    Raises:
        TrainingError: A domain has no factor, or one that is negative or not finite.
    """
    factors = balance.factors(rollouts, stats, base)
    rows = [factors.get(domain, math.nan) for domain in row_domains(rollouts)]
    if not all(math.isfinite(factor) and factor >= 0 for factor in rows):
        raise TrainingError(
            f"balance={balance.name}: expected a finite factor of at least 0 for each of the domains "
            f"{', '.join(sorted(set(row_domains(rollouts))))}, got {factors}; a domain would be lost or pushed away from "
            "its teacher. Check that the teachers' scores are finite"
        )
    return base * torch.tensor(rows, dtype=base.dtype)[rollouts.token_rows]


class NoBalance:
    """Every domain counts by the weights its tokens have: factor 1."""

    name: ClassVar[str] = "none"
    needs: ClassVar[frozenset[str]] = frozenset()

    def factors(
        self, rollouts: RolloutBatch, stats: Mapping[str, Float[Tensor, " packed"]], base: Float[Tensor, " packed"]
    ) -> dict[str, float]:
        """Returns 1 for each domain."""
        return dict.fromkeys(row_domains(rollouts), 1.0)

    def state_dict(self) -> dict[str, Any]:
        """There is no state."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """There is no state."""


class TokenShare:
    """Open-MOPD M1 (arXiv 2608.19098): w_d = target_d / observed_d, so that domain d gets target_d of the weight.

    observed_d is the domain's share of the weights of the taught tokens, which under `normalise: token_mean` is its token
    share, the paper's quantity; under `sequence_mean` it is its share of sequences, already without the length. The
    weighted mean of w is sum_d observed_d w_d = sum_d target_d = 1: the learning rate stays. A domain with few tokens gets
    a large factor (the authors saw 27 and more), and with it the noise of few tokens.

    Args:
        target: Share of each domain, any positive scale, over the domains that a step contains. None takes the domain's
            share of the step's taught sequences, that is of its prompts.

    Raises:
        ConfigError: A target is not a positive finite number.
    """

    name: ClassVar[str] = "token_share"
    needs: ClassVar[frozenset[str]] = frozenset()

    def __init__(self, *, target: Mapping[str, float | int] | None = None) -> None:
        check_target(target)
        self.target = None if target is None else dict(target)

    def factors(
        self, rollouts: RolloutBatch, stats: Mapping[str, Float[Tensor, " packed"]], base: Float[Tensor, " packed"]
    ) -> dict[str, float]:
        """Returns target share over observed share.

        Raises:
            ConfigError: `target` does not name a domain of the batch.
        """
        observed = weight_shares(rollouts, stats, base)
        scaled = factors_to_target(observed, self.target, prompt_shares(rollouts, stats))
        return dict.fromkeys(row_domains(rollouts), 1.0) | scaled

    def state_dict(self) -> dict[str, Any]:
        """There is no state."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """There is no state."""


class Sigma:
    """DN-MOPD (arXiv 2609.35347): w_d = clip(sigma_all / sigma_d, low, high), sigma the spread of the log-ratio.

    sigma_d is the population standard deviation of log T - log S of the written token, in nats, over the domain's taught
    tokens, sigma_all that of all domains' tokens together (not a mean of the sigma_d). An unclipped domain ends with spread
    sigma_all. w_d = 1 where either is zero, has fewer than two values, or was not measured. Published without renormalising:
    the total weight, hence the learning rate, moves. The authors take log S from the sampler, here it is the trainer's.

    Args:
        low: Smallest factor.
        high: Largest factor.
        renormalise: Divide by the weighted mean factor, so that the total stays; not part of the publication.

    Raises:
        ConfigError: Not 0 < low <= 1 <= high.
    """

    name: ClassVar[str] = "sigma"
    needs: ClassVar[frozenset[str]] = frozenset({"log_ratio"})

    def __init__(self, *, low: float = 0.25, high: float = 4.0, renormalise: bool = False) -> None:
        _check_bounds(low, high)
        self.low = low
        self.high = high
        self.renormalise = renormalise

    def factors(
        self, rollouts: RolloutBatch, stats: Mapping[str, Float[Tensor, " packed"]], base: Float[Tensor, " packed"]
    ) -> dict[str, float]:
        """Returns the clipped ratio of the pooled spread to the domain's."""
        factors = dict.fromkeys(row_domains(rollouts), 1.0)
        if "log_ratio" not in stats:
            return factors
        pooled = spread(finite_values(stats["log_ratio"][taught_tokens(stats)]))
        for domain, own in by_domain(rollouts, stats, "log_ratio", spread).items():
            if pooled > 0 and own > 0:
                factors[domain] = min(max(pooled / own, self.low), self.high)
        if not self.renormalise:
            return factors
        return factors | mean_one(factors, weight_shares(rollouts, stats, base))

    def state_dict(self) -> dict[str, Any]:
        """There is no state."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """There is no state."""


class Gap:
    """Open-MOPD M2 (arXiv 2608.19098): the weights of `token_share` times clip((mag_d / ref_d)^alpha, low, high).

    mag_d is the mean (or a quantile) of |log T - log S| of the written token over the domain's taught tokens, in nats: the
    budget follows the gap that remains. It multiplies and never divides: dividing gives most to the domain that is nearly
    learned (the authors measured a factor rising from 27 to 91 and a token share of 57 % against a target of 33 %).
    The result is normalised so that its weighted mean is one.

    `reference: batch` takes ref = sum_d w_d mag_d / sum_d w_d with the w of `token_share`, as the authors' code does. Since
    it is the same for all domains, it cancels in the normalisation and matters only at the bounds. `reference: anchored`
    takes each domain's own magnitude in the first step that measured one above zero: that step is `token_share`, later ones
    follow how much of the gap is left. The anchors are in the checkpoint.

    The magnitude per token falls with the length of completions (the authors report r of about -0.8), because long ones are
    mostly filler; a high quantile reads the tokens that carry the signal. A domain without a measured log-ratio, and an
    unanchored batch without any gap, keeps the weight of `token_share`.

    Args:
        target: Share of each domain, any positive scale; None takes the prompt shares of the step.
        alpha: Strength; 0 is `token_share`, 1 proportional.
        quantile: Quantile of |log T - log S| that stands for the domain, in (0, 1); None takes the mean.
        reference: `batch` or `anchored`.
        low: Smallest ratio.
        high: Largest ratio.

    Raises:
        ConfigError: An argument is out of range.
    """

    name: ClassVar[str] = "gap"
    needs: ClassVar[frozenset[str]] = frozenset({"log_ratio"})

    def __init__(
        self,
        *,
        target: Mapping[str, float | int] | None = None,
        alpha: float = 1.0,
        quantile: float | None = None,
        reference: Literal["batch", "anchored"] = "batch",
        low: float = 0.05,
        high: float = 20.0,
    ) -> None:
        check_target(target)
        _check_bounds(low, high)
        if not 0 <= alpha <= 2:
            raise ConfigError(
                f"balance.alpha: expected a strength from 0 to 2, got {alpha}; a negative one divides by the gap and gives "
                "most to the domain that is nearly learned"
            )
        if quantile is not None and not 0 < quantile < 1:
            raise ConfigError(f"balance.quantile: expected a number between 0 and 1, or null, got {quantile}")
        if reference not in ("batch", "anchored"):
            raise ConfigError(f"balance.reference: expected batch or anchored, got '{reference}'")
        self.target = None if target is None else dict(target)
        self.alpha = alpha
        self.quantile = quantile
        self.reference = reference
        self.low = low
        self.high = high
        self._anchors: dict[str, float] = {}

    def factors(
        self, rollouts: RolloutBatch, stats: Mapping[str, Float[Tensor, " packed"]], base: Float[Tensor, " packed"]
    ) -> dict[str, float]:
        """Returns the token-share factor times the ratio of gaps; anchors domains on their first gap.

        Raises:
            ConfigError: `target` does not name a domain of the batch.
        """
        observed = weight_shares(rollouts, stats, base)
        scaled = factors_to_target(observed, self.target, prompt_shares(rollouts, stats))
        found = by_domain(rollouts, stats, "log_ratio", self._magnitude) if "log_ratio" in stats else {}
        magnitudes = {domain: value for domain, value in found.items() if domain in scaled}
        for domain, reference in self._references(magnitudes, scaled).items():
            ratio = (magnitudes[domain] / reference) ** self.alpha
            scaled[domain] *= min(max(ratio, self.low), self.high)
        return dict.fromkeys(row_domains(rollouts), 1.0) | mean_one(scaled, observed)

    def state_dict(self) -> dict[str, Any]:
        """Returns the anchors, nats by domain; empty unless anchored."""
        return {"anchors": dict(self._anchors)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores the anchors.

        Raises:
            CheckpointError: They are not positive finite numbers.
        """
        anchors = state.get("anchors")
        if not isinstance(anchors, Mapping) or not all(
            isinstance(v, int | float) and math.isfinite(v) and v > 0 for v in anchors.values()
        ):
            raise CheckpointError(
                f"balance=gap: expected anchors above 0 by domain, got {dict(state)}; the gaps would be measured against "
                "something else than before. Resume with the balance the checkpoint was made with"
            )
        self._anchors = {str(domain): float(value) for domain, value in anchors.items()}

    def _magnitude(self, values: Float[Tensor, " token"]) -> float:
        if self.quantile is None or not len(values):
            return mean_size(values)
        return quantile(values.abs(), self.quantile)

    def _references(self, magnitudes: Mapping[str, float], scaled: Mapping[str, float]) -> dict[str, float]:
        """The reference of each domain that has one."""
        if self.reference == "anchored":
            for domain, magnitude in magnitudes.items():
                if magnitude > 0:
                    self._anchors.setdefault(domain, magnitude)
            return {domain: self._anchors[domain] for domain in magnitudes if domain in self._anchors}
        total = sum(scaled[domain] for domain in magnitudes)
        mean = sum(scaled[domain] * value for domain, value in magnitudes.items()) / total if total > 0 else 0.0
        return dict.fromkeys(magnitudes, mean) if mean > 0 else {}


def balance_metrics(
    rollouts: RolloutBatch,
    stats: Mapping[str, Float[Tensor, " packed"]],
    before: Float[Tensor, " packed"],
    after: Float[Tensor, " packed"],
) -> dict[str, float]:
    """What each domain has and what it was given, over the taught tokens.

    Returns:
        For each domain with a taught token: `balance/prompt_share/<d>` of sequences, `balance/token_share/<d>` of tokens,
        `balance/weight_share/<d>` of the weights `after`, `balance/factor/<d>` = its weight after over before, and, when
        `log_ratio` was measured, `balance/log_ratio_sigma/<d>` and `balance/advantage_abs/<d>` (mean |log T - log S|), nats.
    """
    tokens = weight_shares(rollouts, stats, torch.ones_like(after))
    weights = weight_shares(rollouts, stats, after)
    totals = [by_domain(rollouts, {**stats, "weight": given}, "weight", total_of) for given in (before, after)]
    measured: dict[str, Mapping[str, float]] = {
        "prompt_share": prompt_shares(rollouts, stats),
        "token_share": tokens,
        "weight_share": {domain: weights.get(domain, 0.0) for domain in tokens},
        "factor": {domain: totals[1][domain] / given for domain, given in totals[0].items() if given > 0},
    }
    if "log_ratio" in stats:
        measured["log_ratio_sigma"] = by_domain(rollouts, stats, "log_ratio", spread)
        measured["advantage_abs"] = by_domain(rollouts, stats, "log_ratio", mean_size)
    return {f"balance/{name}/{domain}": value for name, values in measured.items() for domain, value in values.items()}


def _check_bounds(low: float, high: float) -> None:
    if not 0 < low <= 1 <= high < math.inf:
        raise ConfigError(
            f"balance: expected 0 < low <= 1 <= high, finite, got low={low} and high={high}; a domain like the reference "
            "would not keep its weight"
        )
