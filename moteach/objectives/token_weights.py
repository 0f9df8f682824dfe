"""Weights per token: what a weighting is, how several are applied, and those that weigh without dropping.

A weighting looks at what was measured at each trained token and says how much the token counts. The weights of all chosen
weightings are multiplied with the base weights of the normalisation and rescaled to the same total, so that dropping
tokens is not a smaller learning rate. Statistics of a batch (minima, quantiles, fractions) are those of what is handed
over: call it once on the whole step, before micro-batches are cut. Weightings that keep or drop a token are in
`token_masks.py`.

Tokens without a teacher (`abstained`) have no statistics and enter none.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from moteach.errors import ConfigError, TrainingError, UnsupportedCombinationError
from moteach.types import RolloutBatch


@runtime_checkable
class TokenWeighting(Protocol):
    """Says how much each trained token counts, from what was measured there."""

    @property
    def name(self) -> str:
        """The name it has in `conf/token_weights`."""

    @property
    def needs(self) -> frozenset[str]:
        """The statistics it reads, beside `abstained`."""

    def weights(
        self, rollouts: RolloutBatch, stats: Mapping[str, Float[Tensor, " packed"]]
    ) -> Float[Tensor, " packed"]:
        """Returns a finite weight of at least 0 per token, before rescaling.

        Args:
            rollouts: The whole batch of the step.
            stats: What `needs` names and `abstained`; zero where a token is abstained, where the weight does not matter.
        """


@dataclass(frozen=True, kw_only=True, slots=True)
class WeightedTokens:
    """Token weights after every weighting, and what it took."""

    weights: Float[Tensor, " packed"]
    """Sums over the taught tokens to what the base weights sum to; an abstained token keeps its base weight."""
    kept_fraction: float
    """Share of the taught tokens whose weight is above zero."""
    scale: float
    """Factor that restored the total; 0 when nothing was kept."""


def apply_token_weights(
    weightings: Sequence[TokenWeighting],
    rollouts: RolloutBatch,
    stats: Mapping[str, Float[Tensor, " packed"]],
    base: Float[Tensor, " packed"],
) -> WeightedTokens:
    """Computes w_t = c * base_t * prod_i f_i(t) with c such that sum_t w_t = sum_t base_t over the taught tokens.

    Args:
        weightings: Any number; without one the base weights come back as they are.
        rollouts: The whole batch of the step.
        stats: Per-token statistics, `abstained` among them.
        base: Weights of the normalisation, zero or more.

    Returns:
        The weights. When every taught token ends at zero, all weights are zero and nothing is rescaled.

    Raises:
        UnsupportedCombinationError: A weighting needs a statistic that was not measured.
        TrainingError: A weighting gave a negative or non-finite weight to a taught token.
    """
    if not weightings:
        return WeightedTokens(weights=base, kept_fraction=1.0, scale=1.0)
    taught = taught_tokens(stats)
    product = torch.ones_like(base, dtype=torch.float64)
    for weighting in weightings:
        require_statistics(f"token_weights={weighting.name}", weighting.needs, stats)
        factors = weighting.weights(rollouts, stats).double()
        bad = taught & ~(torch.isfinite(factors) & (factors >= 0))
        if bool(bad.any()):
            raise TrainingError(
                f"token_weights={weighting.name}: expected finite weights of at least 0, got {float(factors[bad][0])} at "
                f"{int(bad.sum())} of {int(taught.sum())} taught tokens; the step would train on noise or in the "
                "opposite direction. Check that the teachers' scores are finite"
            )
        product *= factors
    weighted = base.double() * product
    total, given = float(weighted[taught].sum()), float(base.double()[taught].sum())
    if not total > 0:
        return WeightedTokens(weights=torch.zeros_like(base), kept_fraction=0.0, scale=0.0)
    scale = given / total
    return WeightedTokens(
        weights=torch.where(taught, weighted * scale, base.double()).to(base.dtype),
        kept_fraction=float((product[taught] > 0).double().mean()),
        scale=scale,
    )


def told_by(
    weightings: Sequence[TokenWeighting], rollouts: RolloutBatch, stats: Mapping[str, Float[Tensor, " packed"]]
) -> dict[str, float]:
    """Collects what weightings say about a batch; a weighting that has something to say has a method `metrics`."""
    tellers = [weighting for weighting in weightings if hasattr(weighting, "metrics")]
    return {name: value for one in tellers for name, value in one.metrics(rollouts, stats).items()}


def taught_tokens(stats: Mapping[str, Float[Tensor, " packed"]]) -> Bool[Tensor, " packed"]:
    """True for the tokens that have a teacher.

    Raises:
        UnsupportedCombinationError: `abstained` was not measured.
    """
    require_statistics("token weights", frozenset({"abstained"}), stats)
    return stats["abstained"] == 0


def require_statistics(where: str, needs: frozenset[str], stats: Mapping[str, Float[Tensor, " packed"]]) -> None:
    """Checks that everything a component reads was measured.

    Raises:
        UnsupportedCombinationError: Naming the component and what is missing.
    """
    missing = sorted(needs - set(stats))
    if missing:
        raise UnsupportedCombinationError(
            f"{where}: expected the statistics {', '.join(sorted(needs))}, got {', '.join(sorted(stats)) or 'none'}; "
            f"without {', '.join(missing)} the choice would do nothing. Choose an objective or support that measures it, "
            "or leave the choice out"
        )


@dataclass(frozen=True, kw_only=True)
class SelectKd:
    """SelecTKD (arXiv 2510.24021), greedy form: 1 where the student's likeliest token is among the teacher's, else beta.

    Accepted iff the teacher ranks fewer than `top_k` tokens strictly above the student's argmax. The paper multiplies the
    loss by these weights as they are; here they are rescaled to the same total like every weighting.

    Args:
        top_k: Length of the teacher's list.
        beta: Weight of a rejected token, from 0 to 1.
        mode: `down_weight` gives rejected tokens beta, `mask` gives them 0 and ignores beta.

    Raises:
        ConfigError: An argument is out of range.
    """

    name: ClassVar[str] = "selectkd"
    needs: ClassVar[frozenset[str]] = frozenset({"student_top1_rank"})
    top_k: int = 5
    beta: float = 0.01
    mode: Literal["down_weight", "mask"] = "down_weight"

    def __post_init__(self) -> None:
        if self.top_k < 1:
            raise ConfigError(
                f"token_weights.selectkd.top_k: expected at least 1, got {self.top_k}; every token would be rejected"
            )
        if not 0 <= self.beta <= 1:
            raise ConfigError(f"token_weights.selectkd.beta: expected a weight from 0 to 1, got {self.beta}")
        if self.mode not in ("down_weight", "mask"):
            raise ConfigError(f"token_weights.selectkd.mode: expected down_weight or mask, got '{self.mode}'")

    def weights(
        self, rollouts: RolloutBatch, stats: Mapping[str, Float[Tensor, " packed"]]
    ) -> Float[Tensor, " packed"]:
        """Weighs by acceptance."""
        rank = stats["student_top1_rank"]
        rejected = torch.full_like(rank, self.beta if self.mode == "down_weight" else 0.0)
        weights = torch.where(rank < self.top_k, torch.ones_like(rank), rejected)
        return weights.masked_fill(~taught_tokens(stats), 0.0)


@dataclass(frozen=True, kw_only=True)
class PositionBias:
    """IW-OPD (arXiv 2606.22600): w_t = 1 + (w_max - 1)(1 - F_{t-1}), early tokens count more.

    F_{t-1} = sum_{i<t} |log T_i - log S_i| / sum_i |log T_i - log S_i| over one completion, T and S of the written token:
    the share of the completion's disagreement that lies before t. Weights fall from w_max to 1; a completion without any
    disagreement has F = 0 and weight w_max throughout. The authors' code leaves the mean weight above 1, which raises the
    learning rate; here the total is kept. Gaps [1, 3, 0, 4] and w_max = 1.5 give [1.5, 1.4375, 1.25, 1.25].

    Args:
        w_max: Weight of the first token before rescaling, at least 1.

    Raises:
        ConfigError: w_max is below 1 or not finite.
    """

    name: ClassVar[str] = "position"
    needs: ClassVar[frozenset[str]] = frozenset({"log_ratio"})
    w_max: float = 1.5

    def __post_init__(self) -> None:
        if not 1 <= self.w_max < float("inf"):
            raise ConfigError(
                f"token_weights.position.w_max: expected a finite weight of at least 1, got {self.w_max}; late tokens "
                "would outweigh the prefix that led to them"
            )

    def weights(
        self, rollouts: RolloutBatch, stats: Mapping[str, Float[Tensor, " packed"]]
    ) -> Float[Tensor, " packed"]:
        """Weighs by the share of disagreement still to come."""
        taught, mask = taught_tokens(stats), rollouts.loss_mask
        gaps = torch.zeros(mask.shape, dtype=torch.float64)
        gaps[mask] = stats["log_ratio"].double().abs().masked_fill(~taught, 0.0)
        total = gaps.sum(dim=1, keepdim=True)
        before = gaps.cumsum(dim=1) - gaps
        share = torch.where(total > 0, before / total, torch.zeros_like(total)).clamp(0.0, 1.0)
        weights = 1.0 + (self.w_max - 1.0) * (1.0 - share[mask])
        return weights.masked_fill(~taught, 0.0).to(stats["log_ratio"].dtype)


@dataclass(frozen=True, kw_only=True)
class TrustRegion:
    """TrOPD (arXiv 2606.01249): trust = min(T/S, 1) of the written token; outliers are masked or weighted by their trust.

    A token is an outlier when its trust is below the threshold. E_{y~S}[trust] = 1 - TV(S, T), the acceptance rate of
    speculative decoding. With `threshold: 1.0` and `outliers: weight` every token counts by its trust, and then
    |trust * log trust| <= 1/e bounds the log-ratio signal of a token the teacher rejects, which is unbounded without.
    Masking at 1.0 keeps only tokens the teacher likes at least as much as the student: nothing is unlearned any more.

    The trust is the paper's. Its rule of membership is not known to us at first hand: a reading of it has a Bernoulli draw
    with probability `trust`, whose expected mask is our default; another speaks of an adaptive threshold. The paper's
    forward divergence on outliers and its off-policy prefixes are not part of a weight.

    Args:
        threshold: Trust below which a token is an outlier, in (0, 1]; None takes `quantile`.
        quantile: Adaptive threshold: this quantile of the batch's trusts, in (0, 1); None takes `threshold`.
        outliers: `weight` multiplies an outlier by its trust, `mask` drops it.

    Raises:
        ConfigError: Not exactly one of threshold and quantile is given, or one is out of range.
    """

    name: ClassVar[str] = "trust_region"
    needs: ClassVar[frozenset[str]] = frozenset({"log_ratio"})
    threshold: float | None = 1.0
    quantile: float | None = None
    outliers: Literal["weight", "mask"] = "weight"

    def __post_init__(self) -> None:
        if (self.threshold is None) == (self.quantile is None):
            raise ConfigError(
                f"token_weights.trust_region: expected either a threshold or a quantile, got threshold={self.threshold} "
                f"and quantile={self.quantile}; one of them would be ignored. Set the other to null"
            )
        if self.threshold is not None and not 0 < self.threshold <= 1:
            raise ConfigError(
                f"token_weights.trust_region.threshold: expected a trust above 0 and at most 1, got {self.threshold}"
            )
        if self.quantile is not None and not 0 < self.quantile < 1:
            raise ConfigError(
                f"token_weights.trust_region.quantile: expected a number between 0 and 1, got {self.quantile}"
            )
        if self.outliers not in ("weight", "mask"):
            raise ConfigError(f"token_weights.trust_region.outliers: expected weight or mask, got '{self.outliers}'")

    def weights(
        self, rollouts: RolloutBatch, stats: Mapping[str, Float[Tensor, " packed"]]
    ) -> Float[Tensor, " packed"]:
        """Weighs by trust."""
        taught = taught_tokens(stats)
        trust = stats["log_ratio"].clamp_max(0.0).exp()
        if not bool(taught.any()):
            return torch.zeros_like(trust)
        threshold = quantile(trust[taught], self.quantile) if self.quantile is not None else self.threshold
        assert threshold is not None, "the constructor accepts no trust region without a threshold"
        outside = trust if self.outliers == "weight" else torch.zeros_like(trust)
        return torch.where(trust < threshold, outside, torch.ones_like(trust)).masked_fill(~taught, 0.0)


@dataclass(frozen=True, kw_only=True)
class Agreement:
    """UniSD (arXiv 2605.06597): w = max(floor, 1 / (1 + gamma min(d / Q, cap))), d how far the token's teachers are apart.

    Q is a quantile of the batch's disagreements. The authors' code takes the variance or the range of the teachers' logprobs
    of the *written* token; `spread` is that range on the student's likeliest token. Tokens of a single teacher agree.

    Args:
        gamma: Strength, at least 0.
        of: The disagreement: `spread`, `teacher_jsd` or `neg_log_z`, see `moteach.divergences.measure`.
        scale_quantile: Quantile of the batch that counts as a disagreement of one, in (0, 1]; at least 1e-6 nats.
        cap: Largest disagreement in units of the quantile, above 0.
        floor: Smallest weight, in [0, 1].

    Raises:
        ConfigError: An argument is out of range.
    """

    name: ClassVar[str] = "agreement"
    gamma: float = 1.0
    of: Literal["spread", "teacher_jsd", "neg_log_z"] = "spread"
    scale_quantile: float = 0.95
    cap: float = 10.0
    floor: float = 0.01

    def __post_init__(self) -> None:
        if not (self.gamma >= 0 and 0 < self.scale_quantile <= 1 and self.cap > 0 and 0 <= self.floor <= 1):
            raise ConfigError(
                "token_weights.agreement: expected gamma >= 0, 0 < scale_quantile <= 1, cap > 0 and 0 <= floor <= 1, got "
                f"{self.gamma}, {self.scale_quantile}, {self.cap} and {self.floor}; contested tokens would count more, or none"
            )

    @property
    def needs(self) -> frozenset[str]:
        """The disagreement."""
        return frozenset({self.of})

    def weights(
        self, rollouts: RolloutBatch, stats: Mapping[str, Float[Tensor, " packed"]]
    ) -> Float[Tensor, " packed"]:
        """Weighs by agreement."""
        taught = taught_tokens(stats)
        apart = stats[self.of].clamp(max=torch.finfo(stats[self.of].dtype).max)
        if not bool(taught.any()):
            return torch.zeros_like(apart)
        unit = max(quantile(apart[taught], self.scale_quantile), 1e-6)
        weights = 1.0 / (1.0 + self.gamma * (apart / unit).clamp(max=self.cap))
        return weights.clamp(min=self.floor).masked_fill(~taught, 0.0)


def quantile(values: Float[Tensor, " token"], q: float) -> float:
    """The q-quantile with linear interpolation between order statistics: position q (n - 1) of the sorted values.

    Args:
        values: At least one value; `torch.quantile` refuses more than 16 million, a step can have more.
        q: From 0 to 1.
    """
    ordered = values.double().sort().values
    position = q * (len(ordered) - 1)
    low = int(position)
    high = min(low + 1, len(ordered) - 1)
    return float(torch.lerp(ordered[low], ordered[high], position - low))
