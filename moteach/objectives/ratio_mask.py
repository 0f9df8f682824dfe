"""The train/inference ratio mask: tokens that the sampler wrote with another probability than the trainer gives them.

Rollouts of a server, of an older student or in another precision are not quite the student's own. This is one of three
truncations that are never mixed: the teacher/student log-ratio has `token_weights=trust_region`, the vocabulary `support.k`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from moteach.divergences.advantages import importance_weights
from moteach.errors import ConfigError
from moteach.objectives.token_weights import taught_tokens
from moteach.types import RolloutBatch


@dataclass(frozen=True, kw_only=True)
class RatioMask:
    """1 where low <= r <= high, else 0, with r = S(y_t) / mu(y_t), the student over the sampler at the written token.

    The rule of `importance=masked` (MiMo-V2-Flash, arXiv 2601.02780, Eq. 8; IcePop) without its weight r, for losses that are
    differentiated through whole distributions; the total is restored, which the papers do not do. S is at temperature 1
    without truncation: with another `rollout.temperature` or a truncated sampler the ratio holds that difference too.

    Args:
        low: Smallest trusted ratio, from 0 to 1.
        high: Largest trusted ratio, at least 1.

    Raises:
        ConfigError: An on-policy token would be masked.
    """

    name: ClassVar[str] = "ratio_mask"
    needs: ClassVar[frozenset[str]] = frozenset({"student_logprobs"})
    low: float = 0.5
    high: float = 2.0

    def __post_init__(self) -> None:
        if not 0.0 <= self.low <= 1.0 <= self.high:
            raise ConfigError(
                f"token_weights.ratio_mask: expected 0 <= low <= 1 <= high, got {self.low} and {self.high}; tokens of the very "
                "student that is trained have ratio 1 and would be masked"
            )

    def weights(
        self, rollouts: RolloutBatch, stats: Mapping[str, Float[Tensor, " packed"]]
    ) -> Float[Tensor, " packed"]:
        """1 for the trusted tokens, 0 for the others."""
        ratio = log_ratios(rollouts, stats).exp()
        _, masked = importance_weights(ratio, mode="masked", low=self.low, high=self.high)
        return (~masked & taught_tokens(stats)).to(stats["abstained"].dtype)

    def metrics(self, rollouts: RolloutBatch, stats: Mapping[str, Float[Tensor, " packed"]]) -> dict[str, float]:
        """What was found on the taught tokens, in nats but for the share.

        `rollouts/log_ratio` is the mean of log r, `rollouts/log_ratio_max` the largest of its absolute values,
        `rollouts/divergence_k3` the mean of r - 1 - log r, which has the expectation KL(mu || S) under the sampler mu,
        `rollouts/masked` the share of tokens that are masked.
        """
        taught = taught_tokens(stats)
        if not bool(taught.any()):
            return {}
        found = log_ratios(rollouts, stats)[taught].double()
        kept = self.weights(rollouts, stats)[taught] > 0
        return {
            "rollouts/log_ratio": float(found.mean()),
            "rollouts/log_ratio_max": float(found.abs().max()),
            "rollouts/divergence_k3": float((torch.expm1(found) - found).mean()),
            "rollouts/masked": float((~kept).double().mean()),
        }


def log_ratios(rollouts: RolloutBatch, stats: Mapping[str, Float[Tensor, " packed"]]) -> Float[Tensor, " packed"]:
    """Computes log S(y_t) - log mu(y_t) of the written tokens, S as measured and mu as the rollouts say."""
    mine = stats["student_logprobs"]
    return mine - rollouts.rollout_logprobs[rollouts.loss_mask].to(mine.dtype)
