"""Shifts in a run: targets made from what each teacher *learned*, on top of the model that the student starts from.

`moteach.conflict.shift` has the same on plain logits. A shift is no pool: two teachers that learned the same move the target
twice as far, and a teacher alone is the target only where the checkpoint it was trained from is the anchor. The anchor is
`mix.reference_model`, by default the checkpoint the student starts from; it is scored once a step, as are the checkpoints that
the experts' cards name as `reference`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from moteach.conflict.base import Accumulator, Target, whole_distributions_only
from moteach.conflict.shift import difference
from moteach.errors import ConfigError
from moteach.types import Support

_ANCHORED = frozenset({"anchor_logprobs"})
_COMPARED = frozenset({"anchor_logprobs", "reference_logprobs"})


@dataclass(frozen=True, kw_only=True)
class Delta:
    """Delta-MOPD: softmax of anchor + scale sum_k w_k (teacher_k - its origin), see `moteach.conflict.shift.delta`.

    Args:
        scale: Factor on the weighted mean of the shifts; None stands for the number of teachers with weight at the token, so
            that equal weights give the paper's plain sum.

    Raises:
        ConfigError: scale is not finite, or not positive.
    """

    name: ClassVar[str] = "delta"
    supports: ClassVar[frozenset[Support]] = frozenset({"full"})
    needs: ClassVar[frozenset[str]] = _COMPARED
    streams: ClassVar[bool] = True
    scale: float | None = None

    def __post_init__(self) -> None:
        _check("scale", self.scale)

    def accumulator(self, **context: Tensor) -> Accumulator:
        """Starts a target; it holds two distributions, the anchor and the shift."""
        return _ShiftAccumulator(context["anchor_logprobs"], self.scale)

    def resolve_sampled(
        self, sampled_logprobs: Float[Tensor, "packed teacher"], weights: Float[Tensor, "packed teacher"]
    ) -> Float[Tensor, " packed"]:
        """Refused: the target is normalised over the vocabulary.

        Raises:
            UnsupportedCombinationError: Always.
        """
        raise whole_distributions_only(self.name, "the normaliser of the shifted model")


@dataclass(frozen=True, kw_only=True)
class Endpoint:
    """Softmax of anchor + scale sum_k w_k (teacher_k - anchor): what `delta` corrects, without the teachers' origins.

    At scale 1 it is the geometric pool whatever the anchor, because the weights of a token sum to one.

    Args:
        scale: As in `Delta`.

    Raises:
        ConfigError: scale is not finite, or not positive.
    """

    name: ClassVar[str] = "endpoint"
    supports: ClassVar[frozenset[Support]] = frozenset({"full"})
    needs: ClassVar[frozenset[str]] = _ANCHORED
    streams: ClassVar[bool] = True
    scale: float | None = None

    def __post_init__(self) -> None:
        _check("scale", self.scale)

    def accumulator(self, **context: Tensor) -> Accumulator:
        """Starts a target; it holds two distributions, the anchor and the shift."""
        return _ShiftAccumulator(context["anchor_logprobs"], self.scale)

    def resolve_sampled(
        self, sampled_logprobs: Float[Tensor, "packed teacher"], weights: Float[Tensor, "packed teacher"]
    ) -> Float[Tensor, " packed"]:
        """Refused: the target is normalised over the vocabulary.

        Raises:
            UnsupportedCombinationError: Always.
        """
        raise whole_distributions_only(self.name, "the normaliser of the shifted model")


@dataclass(frozen=True, kw_only=True)
class Proxy:
    """DExperts and proxy-tuning (arXiv 2105.03023, 2401.08565): softmax of anchor + alpha sum_k w_k (teacher_k - its origin).

    The tuned and the untuned model of the papers are a teacher and its origin, the model that is steered is the anchor. It is
    `delta` with a fixed strength: the weighted mean of what the teachers learned, and not their sum.

    Args:
        alpha: Strength, above 0.

    Raises:
        ConfigError: alpha is not finite, or not positive.
    """

    name: ClassVar[str] = "proxy"
    supports: ClassVar[frozenset[Support]] = frozenset({"full"})
    needs: ClassVar[frozenset[str]] = _COMPARED
    streams: ClassVar[bool] = True
    alpha: float = 1.0

    def __post_init__(self) -> None:
        _check("alpha", self.alpha)

    def accumulator(self, **context: Tensor) -> Accumulator:
        """Starts a target; it holds two distributions, the anchor and the shift."""
        return _ShiftAccumulator(context["anchor_logprobs"], self.alpha)

    def resolve_sampled(
        self, sampled_logprobs: Float[Tensor, "packed teacher"], weights: Float[Tensor, "packed teacher"]
    ) -> Float[Tensor, " packed"]:
        """Refused: the target is normalised over the vocabulary.

        Raises:
            UnsupportedCombinationError: Always.
        """
        raise whole_distributions_only(self.name, "the normaliser of the shifted model")


class _ShiftAccumulator:
    """The anchor, and the weighted mean of the shifts so far; measured from the anchor where no reference is given."""

    def __init__(self, anchor: Float[Tensor, "token vocab"], scale: float | None) -> None:
        self._anchor, self._scale = anchor, scale
        self._shift = torch.zeros_like(anchor)
        self._speakers: Int[Tensor, " token"] = torch.zeros(len(anchor), dtype=torch.long, device=anchor.device)

    def add(
        self,
        teacher_logprobs: Float[Tensor, "token vocab"],
        weights: Float[Tensor, " token"],
        *,
        reference: Float[Tensor, "token vocab"] | None = None,
    ) -> None:
        heard = weights > 0
        silent = ~heard.unsqueeze(-1)
        start = (self._anchor if reference is None else reference).masked_fill(silent, 0.0)
        # a silent teacher may hold anything, even NaN
        moved = difference(teacher_logprobs.masked_fill(silent, 0.0), start)
        self._shift.add_(moved.mul_(weights.unsqueeze(-1)).masked_fill_(silent, 0.0))
        self._speakers = self._speakers + heard

    def finish(self) -> Target:
        scale = self._speakers.to(self._shift.dtype).unsqueeze(-1) if self._scale is None else self._scale
        logprobs = self._shift.mul_(scale).add_(self._anchor).log_softmax(-1)
        return Target(logprobs=logprobs, token_weight=None, neg_log_z=logprobs.new_zeros(len(logprobs)))


def _check(name: str, value: float | None) -> None:
    if value is not None and not 0 < value < math.inf:
        raise ConfigError(
            f"conflict.{name}: expected a finite factor above 0 on the shifts, got {value}; the student would be taught the "
            "anchor, or away from its teachers"
        )
