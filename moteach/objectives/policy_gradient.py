"""Policy gradient on the sampled token's log-ratio between teacher and student."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn

from moteach.conflict.base import Resolver
from moteach.divergences.chunked import chunked_token_logprobs
from moteach.errors import ConfigError, RoutingError
from moteach.objectives.base import Normalise, gate_columns, tokens_per_chunk
from moteach.routing.base import Gate
from moteach.types import Evidence, Head, LossOutput, RolloutBatch, Routing, Support


class PolicyGradientObjective:
    """loss = -sum_t w_t * r_t * A_t * log S(y_t), A_t = sg[log T(y_t) - log S(y_t)].

    S is the student in the trainer, mu the student as it sampled, T the resolved teacher, and
    r_t = sg[S(y_t) / mu(y_t)] where ratio_low <= S/mu <= ratio_high, else 0 (MiMo-V2-Flash, arXiv 2601.02780, Eq. 6-9
    without outcome reward). With on-policy samples the expected gradient is that of the reverse KL of each token; its
    variance is what the full-vocabulary objective removes.

    Two bounds, never mixed: `ratio_*` masks tokens on which trainer and sampler disagree; `advantage_clip` bounds the
    teacher/student log-ratio (Kimi K3, arXiv 2607.24653, Eq. 15).

    Args:
        gate: Weights teachers per token.
        resolver: Pools the teachers' logprobs of the written token.
        normalise: What the per-token values are averaged over.
        ratio_low: Smallest kept importance ratio.
        ratio_high: Largest kept importance ratio.
        advantage_clip: Bound of |A_t| in nats; None leaves it free.
        chunk_size: Tokens projected to the vocabulary at a time; peak memory is a few chunk_size x vocab floats. None: about
            4 million logits.
    """

    supports: frozenset[Support] = frozenset({"sampled"})

    def __init__(
        self,
        *,
        gate: Gate,
        resolver: Resolver,
        normalise: Normalise = "sequence_mean",
        ratio_low: float = 0.5,
        ratio_high: float = 2.0,
        advantage_clip: float | None = None,
        chunk_size: int | None = None,
    ) -> None:
        if not 0 <= ratio_low < 1 < ratio_high:
            raise ConfigError(
                f"objective: expected ratio_low < 1 < ratio_high, got {ratio_low} and {ratio_high}; an on-policy token "
                "has ratio 1 and would be masked"
            )
        if advantage_clip is not None and not advantage_clip > 0:
            raise ConfigError(f"objective.advantage_clip: expected nats above 0, or null, got {advantage_clip}")
        if chunk_size is not None and chunk_size < 1:
            raise ConfigError(f"objective.chunk_size: expected at least 1 token, got {chunk_size}")
        self.gate = gate
        self.resolver = resolver
        self.normalise: Normalise = normalise
        self.ratio_low = ratio_low
        self.ratio_high = ratio_high
        self.advantage_clip = advantage_clip
        self.chunk_size = chunk_size

    def __call__(
        self,
        student: nn.Module,
        rollouts: RolloutBatch,
        routing: Routing,
        evidence: Evidence,
        token_weights: Float[Tensor, " packed"],
    ) -> LossOutput:
        """Runs the student with the surrogate loss inside its forward."""
        weights = gate_columns(self.gate.weights(rollouts, routing), routing, evidence)
        taught = weights.sum(dim=1) > 0
        teacher_logprobs = torch.zeros(len(taught))
        if bool(taught.any()):
            given = _sampled_columns(evidence)[taught]
            teacher_logprobs[taught] = self.resolver.resolve_sampled(given, weights[taught])
        targets = rollouts.token_targets
        rollout_logprobs = rollouts.rollout_logprobs[rollouts.loss_mask]

        def loss(hidden: Float[Tensor, "packed hidden"], head: Head) -> LossOutput:
            size = tokens_per_chunk(self.chunk_size, head)
            student_logprobs = chunked_token_logprobs(hidden, head, targets, chunk_size=size)
            current = student_logprobs.detach()
            ratio = (current - rollout_logprobs).exp()
            kept = taught & (ratio >= self.ratio_low) & (ratio <= self.ratio_high)
            advantages = torch.where(taught, teacher_logprobs - current, torch.zeros_like(current))
            if self.advantage_clip is not None:
                advantages = advantages.clamp(-self.advantage_clip, self.advantage_clip)
            coefficient = torch.where(kept, token_weights * ratio * advantages, torch.zeros_like(current))
            return LossOutput(
                loss=-(coefficient * student_logprobs).sum(),
                denominator=1.0,
                token_stats={
                    "divergence": -advantages,
                    "advantages": advantages,
                    "importance_ratio": ratio,
                    "masked": (taught & ~kept).to(current.dtype),
                    "abstained": (~taught).to(current.dtype),
                },
            )

        result: LossOutput = student(rollouts, loss)
        return result


def _sampled_columns(evidence: Evidence) -> Float[Tensor, "packed scored_teacher"]:
    """Spreads each teacher's logprobs over the packed axis; -inf where it scored nothing, which a zero weight hides."""
    columns = torch.full((evidence.num_tokens, len(evidence.teachers)), float("-inf"))
    for index, entry in enumerate(evidence.teachers):
        if entry.sampled_logprobs is None:
            raise RoutingError(
                f"the teacher '{entry.teacher_id}' gave no logprob of the written tokens; expected evidence of support "
                f"sampled, got {entry.support}. Set support=sampled"
            )
        columns[entry.tokens, index] = entry.sampled_logprobs.float()
    return columns
