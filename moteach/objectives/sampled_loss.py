"""A sampled estimate of a divergence, back-propagated: the estimators that have a gradient of their own."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from moteach.conflict.base import Resolver
from moteach.divergences.advantages import Importance, importance_weights
from moteach.divergences.logprobs import chunked_token_logprobs
from moteach.divergences.sampled import Estimator, estimator_loss
from moteach.objectives.base import Normalise, Scored, tokens_per_chunk
from moteach.objectives.divergence import check_chunk_size
from moteach.objectives.policy_gradient import check_ratios
from moteach.objectives.teaching import SAMPLED_STATS, Teaching
from moteach.routing.base import Gate
from moteach.types import Head, LossOutput, Support


class SampledLossObjective:
    """loss = sum_t w_t * c_t * k(log S(y_t), log T(y_t)), differentiated through S.

    On the student's own samples `k2` has the expected gradient of the *reverse* KL and `k3` that of the *forward* KL,
    although both estimate the value of the reverse KL; `k1` has none at all and is refused (tested by enumeration; see
    "Comedy of Estimators", arXiv 2512.21852).

    Args:
        gate: Weights teachers per token.
        resolver: Pools the teachers' logprobs of the written token.
        estimator: `k2` or `k3`.
        normalise: What the per-token values are averaged over.
        importance: `none`, `clip`, `truncated` or `masked`: how the trainer/sampler ratio enters.
        ratio_low: Smallest kept trainer/sampler ratio.
        ratio_high: Largest kept trainer/sampler ratio.
        chunk_size: Tokens projected to the vocabulary at a time. None: about 4 million logits.
    """

    supports: frozenset[Support] = frozenset({"sampled"})

    def __init__(
        self,
        *,
        gate: Gate,
        resolver: Resolver,
        estimator: Estimator = "k2",
        normalise: Normalise = "sequence_mean",
        importance: Importance = "masked",
        ratio_low: float = 0.5,
        ratio_high: float = 2.0,
        chunk_size: int | None = None,
    ) -> None:
        check_chunk_size(chunk_size)
        check_ratios(importance, ratio_low, ratio_high)
        self.teaching = Teaching(gate=gate, resolver=resolver)
        self.estimator = estimator_loss(estimator)
        self.normalise: Normalise = normalise
        self.importance: Importance = importance
        self.ratio_low = ratio_low
        self.ratio_high = ratio_high
        self.chunk_size = chunk_size

    @property
    def needs(self) -> frozenset[str]:
        """What its gate and resolver need beside the teachers."""
        return self.teaching.needs

    def check(self, support: Support, k: int | None) -> None:
        """Nothing more to refuse."""

    def measurable(self, support: Support) -> frozenset[str]:
        """What concerns the written token."""
        return SAMPLED_STATS

    def taught(self, scored: Scored) -> Bool[Tensor, " packed"]:
        """True for the tokens that some teacher teaches."""
        return self.teaching.taught(scored)

    def measure(
        self, hidden: Float[Tensor, "packed hidden"], head: Head, scored: Scored, wanted: frozenset[str]
    ) -> dict[str, Float[Tensor, " packed"]]:
        """Looks at the written tokens without a gradient."""
        return self.teaching.measure_written(hidden, head, scored, chunk_size=tokens_per_chunk(self.chunk_size, head))

    def __call__(self, hidden: Float[Tensor, "packed hidden"], head: Head, scored: Scored) -> LossOutput:
        """Computes the estimate inside the student's forward."""
        rollouts = scored.rollouts
        target = self.teaching.written(scored)
        size = tokens_per_chunk(self.chunk_size, head)
        student_logprobs = chunked_token_logprobs(hidden, head, rollouts.token_targets, chunk_size=size)
        current = student_logprobs.detach()
        teacher_logprobs = torch.where(target.taught, target.logprobs.to(current.dtype), current)
        ratio = (current - rollouts.rollout_logprobs[rollouts.loss_mask]).exp()
        weights, masked = importance_weights(ratio, mode=self.importance, low=self.ratio_low, high=self.ratio_high)
        values = self.estimator(student_logprobs, teacher_logprobs)
        coefficient = torch.where(target.taught, scored.token_weights * weights, torch.zeros_like(weights))
        stats = {
            "divergence": values.detach(),
            "log_ratio": teacher_logprobs - current,
            "importance_ratio": ratio,
            "masked": (target.taught & masked).to(current.dtype),
            "abstained": (~target.taught).to(current.dtype),
        }
        return LossOutput(loss=(coefficient * values).sum(), denominator=1.0, token_stats=stats)
