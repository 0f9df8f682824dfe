"""Open-MOPD's policies for contested tokens (arXiv 2608.19098, M3), where teachers differ on what the student would write.

A token is contested when the spread, the largest minus the smallest logprob that its teachers give to the student's likeliest
token, exceeds a threshold. Only teachers with a positive weight are asked: a router that gives one teacher all of it leaves
nothing to contest. The paper's quantile threshold is one of the batch, which a chunk does not know; it is an option of
`token_weights=contested`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from moteach.conflict.base import Accumulator, Target, whole_distributions_only
from moteach.conflict.power import PowerAccumulator
from moteach.conflict.select import Select
from moteach.divergences.disagreement import span
from moteach.errors import ConfigError
from moteach.types import Support


@dataclass(frozen=True, kw_only=True)
class Mask:
    """The routed teacher (`select`) teaches what is not contested; contested tokens get a token weight of 0.

    The remaining tokens are not scaled up here: `token_weights=contested` does that, with conflict=select.

    Args:
        nats: Largest spread of a token that is taught, at least 0.

    Raises:
        ConfigError: nats is negative.
    """

    name: ClassVar[str] = "mask"
    supports: ClassVar[frozenset[Support]] = frozenset({"full"})
    needs: ClassVar[frozenset[str]] = frozenset({"student_logprobs"})
    streams: ClassVar[bool] = True
    nats: float = 1.0

    def __post_init__(self) -> None:
        _check_nats(self.nats)

    def accumulator(self, **context: Tensor) -> Accumulator:
        """Starts a selection; it holds one distribution."""
        return _MaskAccumulator(context["student_logprobs"], self.nats)

    def resolve_sampled(
        self, sampled_logprobs: Float[Tensor, "packed teacher"], weights: Float[Tensor, "packed teacher"]
    ) -> Float[Tensor, " packed"]:
        """Refused: the written token need not be the student's likeliest.

        Raises:
            UnsupportedCombinationError: Always.
        """
        raise whole_distributions_only(self.name, "the teachers' logprobs of the student's likeliest token")


@dataclass(frozen=True, kw_only=True)
class Consensus:
    """Where teachers agree, the normalised mean of their logprobs; where they do not, the routed teacher alone.

    The mean is plain, whatever the weights, over the teachers that have any, as in the authors' code, which does not normalise
    it. The weights say who is routed: the largest, the first of a tie. Give the routed teacher more weight than the others, or
    contested tokens go to whoever is listed first.

    Args:
        nats: Largest spread of a token on which teachers agree, at least 0.

    Raises:
        ConfigError: nats is negative.
    """

    name: ClassVar[str] = "consensus"
    supports: ClassVar[frozenset[Support]] = frozenset({"full"})
    needs: ClassVar[frozenset[str]] = frozenset({"student_logprobs"})
    streams: ClassVar[bool] = True
    nats: float = 1.0

    def __post_init__(self) -> None:
        _check_nats(self.nats)

    def accumulator(self, **context: Tensor) -> Accumulator:
        """Starts a pool; it holds two distributions, the routed teacher and the mean."""
        return _ConsensusAccumulator(context["student_logprobs"], self.nats)

    def resolve_sampled(
        self, sampled_logprobs: Float[Tensor, "packed teacher"], weights: Float[Tensor, "packed teacher"]
    ) -> Float[Tensor, " packed"]:
        """Refused: the written token need not be the student's likeliest.

        Raises:
            UnsupportedCombinationError: Always.
        """
        raise whole_distributions_only(self.name, "the teachers' logprobs of the student's likeliest token")


class _Contest:
    """The spread of the teachers so far."""

    def __init__(self, student_logprobs: Float[Tensor, "token vocab"]) -> None:
        self._watched: Int[Tensor, "token 1"] = student_logprobs.argmax(-1, keepdim=True)
        self._low = torch.full_like(student_logprobs[:, 0], torch.inf)
        self._high = torch.full_like(student_logprobs[:, 0], -torch.inf)

    def add(self, teacher_logprobs: Float[Tensor, "token vocab"], weights: Float[Tensor, " token"]) -> None:
        said = teacher_logprobs.gather(-1, self._watched).squeeze(-1).to(self._low.dtype)
        heard = weights > 0
        self._low = torch.where(heard, torch.minimum(self._low, said), self._low)
        self._high = torch.where(heard, torch.maximum(self._high, said), self._high)

    def agreed(self, nats: float) -> Bool[Tensor, " token"]:
        return span(self._low, self._high) <= nats


class _MaskAccumulator:
    def __init__(self, student_logprobs: Tensor, nats: float) -> None:
        self._contest, self._routed, self._nats = _Contest(student_logprobs), Select().accumulator(), nats

    def add(self, teacher_logprobs: Float[Tensor, "token vocab"], weights: Float[Tensor, " token"]) -> None:
        self._contest.add(teacher_logprobs, weights)
        self._routed.add(teacher_logprobs, weights)

    def finish(self) -> Target:
        routed = self._routed.finish()
        weight = self._contest.agreed(self._nats).to(routed.logprobs.dtype)
        return Target(logprobs=routed.logprobs, token_weight=weight, neg_log_z=routed.neg_log_z)


class _ConsensusAccumulator:
    def __init__(self, student_logprobs: Tensor, nats: float) -> None:
        self._contest, self._routed, self._nats = _Contest(student_logprobs), Select().accumulator(), nats
        self._mean = PowerAccumulator(r=0.0)

    def add(self, teacher_logprobs: Float[Tensor, "token vocab"], weights: Float[Tensor, " token"]) -> None:
        self._contest.add(teacher_logprobs, weights)
        # a selection writes into the first teacher it is given
        self._routed.add(teacher_logprobs.clone(), weights)
        self._mean.add(teacher_logprobs, (weights > 0).to(weights.dtype))

    def finish(self) -> Target:
        routed, contested = self._routed.finish(), ~self._contest.agreed(self._nats)
        mean = self._mean.finish(ignored=contested)
        return Target(
            logprobs=torch.where(contested.unsqueeze(-1), routed.logprobs, mean.logprobs),
            token_weight=None,
            neg_log_z=mean.neg_log_z.masked_fill(contested, 0.0),
        )


def _check_nats(nats: float) -> None:
    if not nats >= 0:
        raise ConfigError(
            f"conflict.nats: expected a spread of at least 0 nats, got {nats}; every token would be contested"
        )
