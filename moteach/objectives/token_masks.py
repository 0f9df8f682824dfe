"""Token weightings that keep a token or drop it: by a score, by entropy, by place, by id.

"Keep the top fraction" of n tokens keeps exactly ceil(fraction * n), ties going to the earlier token. The total weight is
restored by `apply_token_weights`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import ClassVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from moteach.errors import ConfigError
from moteach.objectives.token_weights import quantile, taught_tokens
from moteach.types import RolloutBatch


@dataclass(frozen=True, kw_only=True)
class Tip:
    """TIP (arXiv 2604.14084): keeps the top rho of h + d - h d, the soft OR of uncertainty and disagreement.

    h is the student's entropy and d the divergence, each min-max normalised over the taught tokens of the batch:
    (x - min) / (max - min), 0 when all are equal. A token scores high when the student is unsure or when it is sure and
    the teacher disagrees. Since 1 - score = (max - h)(max - d) / ranges, the order depends on the two maxima alone, and one
    outlier there makes the other measure decide; the paper has no remedy and neither has this.

    Args:
        rho: Fraction of the taught tokens to keep, in (0, 1].

    Raises:
        ConfigError: rho is out of range.
    """

    name: ClassVar[str] = "tip"
    needs: ClassVar[frozenset[str]] = frozenset({"student_entropy", "divergence"})
    rho: float = 0.5

    def __post_init__(self) -> None:
        _check_fraction(self.rho, "tip.rho")

    def weights(
        self, rollouts: RolloutBatch, stats: Mapping[str, Float[Tensor, " packed"]]
    ) -> Float[Tensor, " packed"]:
        """1 for the kept tokens, 0 for the others."""
        taught = taught_tokens(stats)
        unsure = min_max(stats["student_entropy"][taught])
        apart = min_max(stats["divergence"][taught])
        return _spread(top_fraction(unsure + apart - unsure * apart, self.rho), taught, like=stats["abstained"])


@dataclass(frozen=True, kw_only=True)
class Teachability:
    """TA-OPD (arXiv 2605.26844): keeps the tokens with the largest disagreement times compatibility.

    Disagreement is the divergence, compatibility the teacher's mass on the student's 16 likeliest tokens; each is
    normalised over the taught tokens as clip((z - Q_low) / (Q_high - Q_low), 0, 1). Where both quantiles coincide a value
    is 1 unless it lies below them, so that the other factor decides. Disagreement alone would select tokens whose target
    lies where the student has no mass to move.

    Args:
        budget: Fraction of the taught tokens to keep, in (0, 1].
        low: Quantile that becomes 0.
        high: Quantile that becomes 1.

    Raises:
        ConfigError: An argument is out of range.
    """

    name: ClassVar[str] = "teachability"
    needs: ClassVar[frozenset[str]] = frozenset({"divergence", "target_mass_on_student_topk"})
    budget: float = 0.05
    low: float = 0.05
    high: float = 0.95

    def __post_init__(self) -> None:
        _check_fraction(self.budget, "teachability.budget")
        if not 0 <= self.low < self.high <= 1:
            raise ConfigError(
                f"token_weights.teachability: expected 0 <= low < high <= 1, got low={self.low} and high={self.high}; "
                "every token would score alike"
            )

    def weights(
        self, rollouts: RolloutBatch, stats: Mapping[str, Float[Tensor, " packed"]]
    ) -> Float[Tensor, " packed"]:
        """1 for the kept tokens, 0 for the others."""
        taught = taught_tokens(stats)
        disagreement = quantile_normalised(stats["divergence"][taught], self.low, self.high)
        compatibility = quantile_normalised(stats["target_mass_on_student_topk"][taught], self.low, self.high)
        return _spread(top_fraction(disagreement * compatibility, self.budget), taught, like=stats["abstained"])


@dataclass(frozen=True, kw_only=True)
class Contested:
    """Open-MOPD's mask (arXiv 2608.19098, M3): drops the tokens on which teachers differ, and scales up the others.

    A token is contested when the spread, the largest minus the smallest logprob that its teachers give to the student's
    likeliest token, exceeds the threshold. Tokens with a single teacher are not contested, so it takes a router or a gate
    that gives weight to several. `conflict=mask` is the same without scaling up, `conflict=consensus` teaches the contested
    tokens by the routed teacher.

    Args:
        nats: Threshold, at least 0; null when `quantile` is given.
        quantile: Threshold as a quantile of the batch's spreads, in [0, 1]; null when `nats` is given.

    Raises:
        ConfigError: Not exactly one of them is given, or it is out of range.
    """

    name: ClassVar[str] = "contested"
    needs: ClassVar[frozenset[str]] = frozenset({"spread"})
    nats: float | None = 1.0
    quantile: float | None = None

    def __post_init__(self) -> None:
        if (self.nats is None) == (self.quantile is None):
            raise ConfigError(
                f"token_weights.contested: expected one threshold, got nats={self.nats} and quantile={self.quantile}; set the "
                "other one to null"
            )
        if not (self.nats or 0) >= 0 or not 0 <= (self.quantile or 0) <= 1:
            raise ConfigError(
                f"token_weights.contested: expected nats of at least 0, or a quantile from 0 to 1, got nats={self.nats} and "
                f"quantile={self.quantile}; every token would be contested, or none"
            )

    def weights(
        self, rollouts: RolloutBatch, stats: Mapping[str, Float[Tensor, " packed"]]
    ) -> Float[Tensor, " packed"]:
        """1 for the tokens on which teachers agree, 0 for the others."""
        taught = taught_tokens(stats)
        spread = stats["spread"][taught]
        threshold = self.nats or 0.0
        if self.quantile is not None and len(spread):
            # an infinite spread, where one teacher excludes the token, is the largest there can be
            threshold = quantile(spread.clamp(max=torch.finfo(spread.dtype).max), self.quantile)
        return _spread(spread <= threshold, taught, like=stats["abstained"])


@dataclass(frozen=True, kw_only=True)
class EntropyTop:
    """Revisiting OPD (arXiv 2603.25562): keeps the highest student entropies of each sample.

    ceil(fraction * n) of a sample's n taught tokens, so that every taught sample keeps at least one. The authors' code
    keeps max(1, floor(fraction * n)) and all ties of the last one.

    Args:
        fraction: Fraction of each sample's taught tokens to keep, in (0, 1].

    Raises:
        ConfigError: fraction is out of range.
    """

    name: ClassVar[str] = "entropy_top"
    needs: ClassVar[frozenset[str]] = frozenset({"student_entropy"})
    fraction: float = 0.2

    def __post_init__(self) -> None:
        _check_fraction(self.fraction, "entropy_top.fraction")

    def weights(
        self, rollouts: RolloutBatch, stats: Mapping[str, Float[Tensor, " packed"]]
    ) -> Float[Tensor, " packed"]:
        """1 for the kept tokens, 0 for the others."""
        taught = taught_tokens(stats)
        rows = rollouts.token_rows[taught]
        lengths = torch.bincount(rows, minlength=len(rollouts))
        quota = torch.tensor([fraction_of(self.fraction, length) for length in lengths.tolist()], dtype=torch.long)
        by_entropy = stats["student_entropy"][taught].sort(descending=True, stable=True).indices
        order = by_entropy[rows[by_entropy].sort(stable=True).indices]
        place = torch.arange(len(rows)) - (lengths.cumsum(0) - lengths)[rows[order]]
        kept = torch.zeros(len(rows), dtype=torch.bool)
        kept[order] = place < quota[rows[order]]
        return _spread(kept, taught, like=stats["abstained"])


@dataclass(frozen=True, kw_only=True)
class FirstTokens:
    """ESR (arXiv 2605.27028) as a mask: keeps the first `count` tokens of each completion.

    The paper stops the rollout there, because a teacher's corrections decay along a prefix it would not have written;
    a mask has the same gradient per token and none of the saved generation. To save it too, shorten the rollouts.

    Args:
        count: Tokens to keep per completion, at least 1.

    Raises:
        ConfigError: count is below 1.
    """

    name: ClassVar[str] = "first_tokens"
    needs: ClassVar[frozenset[str]] = frozenset()
    count: int = 100

    def __post_init__(self) -> None:
        if self.count < 1:
            raise ConfigError(
                f"token_weights.first_tokens.count: expected at least 1 token, got {self.count}; nothing would be trained"
            )

    def weights(
        self, rollouts: RolloutBatch, stats: Mapping[str, Float[Tensor, " packed"]]
    ) -> Float[Tensor, " packed"]:
        """1 for the kept tokens, 0 for the others."""
        mask = rollouts.loss_mask
        place = mask.long().cumsum(dim=1)[mask]
        return (place <= self.count).to(stats["abstained"].dtype)


@dataclass(frozen=True, kw_only=True)
class SpecialTokens:
    """Drops written special tokens, on which teachers with another template disagree for no reason of content.

    The special-token mask of Revisiting OPD (arXiv 2603.25562). The end of sequence is spared by default: a student that
    is never taught to stop grows longer.

    Args:
        special_ids: Exactly the token ids to drop; None takes those of the tokenizer.
        keep_eos: With `special_ids: null`, spare the end-of-sequence tokens.
        tokenizer_special_ids: Special tokens of the student's tokenizer, handed over by whoever builds this.
        tokenizer_eos_ids: End-of-sequence tokens of the student, handed over likewise.

    Raises:
        ConfigError: A token id is negative.
    """

    name: ClassVar[str] = "special_tokens"
    needs: ClassVar[frozenset[str]] = frozenset()
    special_ids: list[int] | None = None
    keep_eos: bool = True
    tokenizer_special_ids: frozenset[int] = frozenset()
    tokenizer_eos_ids: frozenset[int] = frozenset()

    def __post_init__(self) -> None:
        if self.special_ids is not None and any(token < 0 for token in self.special_ids):
            raise ConfigError(
                f"token_weights.special_tokens.special_ids: expected token ids of at least 0, got {self.special_ids}; "
                "a negative id is never written"
            )

    @property
    def dropped_ids(self) -> frozenset[int]:
        """The token ids that get weight 0."""
        if self.special_ids is not None:
            return frozenset(self.special_ids)
        return self.tokenizer_special_ids - (self.tokenizer_eos_ids if self.keep_eos else frozenset())

    def weights(
        self, rollouts: RolloutBatch, stats: Mapping[str, Float[Tensor, " packed"]]
    ) -> Float[Tensor, " packed"]:
        """1 for the kept tokens, 0 for the others."""
        dropped = torch.tensor(sorted(self.dropped_ids), dtype=torch.long)
        return (~torch.isin(rollouts.token_targets, dropped)).to(stats["abstained"].dtype)


def fraction_of(fraction: float, count: int) -> int:
    """ceil(fraction * count) of the decimal as it is written: 0.07 of 100 is 7, while 0.07 * 100 > 7 in binary."""
    return math.ceil(Fraction(str(fraction)) * count)


def top_fraction(scores: Float[Tensor, " token"], fraction: float) -> Bool[Tensor, " token"]:
    """True for the ceil(fraction * n) largest scores; of equal ones the earlier wins."""
    kept = torch.zeros(len(scores), dtype=torch.bool)
    order = scores.sort(descending=True, stable=True).indices
    kept[order[: fraction_of(fraction, len(scores))]] = True
    return kept


def min_max(values: Float[Tensor, " token"]) -> Float[Tensor, " token"]:
    """(x - min) / (max - min) in float64, 0 when all values are equal."""
    if not len(values):
        return values.double()
    shifted = values.double() - values.double().min()
    largest = shifted.max()
    return shifted / largest if bool(largest > 0) else torch.zeros_like(shifted)


def quantile_normalised(values: Float[Tensor, " token"], low: float, high: float) -> Float[Tensor, " token"]:
    """clip((x - Q_low) / (Q_high - Q_low), 0, 1) in float64; x >= Q_low as 0 or 1 when the quantiles coincide."""
    if not len(values):
        return values.double()
    bottom, top = quantile(values, low), quantile(values, high)
    if not top > bottom:
        return (values.double() >= bottom).double()
    return ((values.double() - bottom) / (top - bottom)).clamp(0.0, 1.0)


def _spread(
    kept: Bool[Tensor, " token"], taught: Bool[Tensor, " packed"], *, like: Float[Tensor, " packed"]
) -> Float[Tensor, " packed"]:
    """Puts the decisions about the taught tokens back on the packed axis, 0 elsewhere."""
    weights = torch.zeros_like(like)
    weights[taught] = kept.to(like.dtype)
    return weights


def _check_fraction(value: float, where: str) -> None:
    if not 0 < value <= 1:
        raise ConfigError(
            f"token_weights.{where}: expected a fraction above 0 and at most 1, got {value}; nothing would be kept, or "
            "more than there is"
        )
