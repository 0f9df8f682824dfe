"""Back-propagated divergence from the resolved teacher to the student, over the full vocabulary."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor, nn

from moteach.conflict.base import Resolver
from moteach.divergences.base import Divergence
from moteach.divergences.chunked import chunked_divergence
from moteach.errors import ConfigError
from moteach.objectives.base import Normalise, gate_columns, tokens_per_chunk
from moteach.routing.base import Gate
from moteach.types import Evidence, Head, LossOutput, RolloutBatch, Routing, Support


class DivergenceObjective:
    """loss = sum_t w_t * D(student_t, target_t), target_t = resolve(teachers at t, gate weights at t).

    Exact over the whole vocabulary, in chunks of tokens; teachers give hidden states and their heads rebuild the logits
    (DeepSeek-V4, arXiv 2606.19348, section 5.2.2).

    Args:
        gate: Weights teachers per token.
        resolver: Turns the weighted teachers into one target.
        divergence: Compares the student with the target.
        normalise: What the per-token values are averaged over.
        chunk_size: Tokens projected to the vocabulary at a time; peak memory is a few chunk_size x vocab floats. None: about
            4 million logits.
        temperature: Divides the logits of the student and of every teacher before the divergence.
    """

    supports: frozenset[Support] = frozenset({"full"})

    def __init__(
        self,
        *,
        gate: Gate,
        resolver: Resolver,
        divergence: Divergence,
        normalise: Normalise = "token_mean",
        chunk_size: int | None = None,
        temperature: float = 1.0,
    ) -> None:
        if chunk_size is not None and chunk_size < 1:
            raise ConfigError(f"objective.chunk_size: expected at least 1 token, got {chunk_size}")
        if not temperature > 0:
            raise ConfigError(f"objective.temperature: expected a number above 0, got {temperature}")
        self.gate = gate
        self.resolver = resolver
        self.divergence = divergence
        self.normalise: Normalise = normalise
        self.chunk_size = chunk_size
        self.temperature = temperature

    def __call__(
        self,
        student: nn.Module,
        rollouts: RolloutBatch,
        routing: Routing,
        evidence: Evidence,
        token_weights: Float[Tensor, " packed"],
    ) -> LossOutput:
        """Runs the student with the divergence inside its forward."""
        gate_weights = gate_columns(self.gate.weights(rollouts, routing), routing, evidence)

        def loss(hidden: Float[Tensor, "packed hidden"], head: Head) -> LossOutput:
            output = chunked_divergence(
                student_hidden=hidden,
                student_head=head,
                teachers=evidence.teachers,
                weights=gate_weights,
                token_weights=token_weights,
                divergence=self.divergence,
                resolver=self.resolver,
                chunk_size=tokens_per_chunk(self.chunk_size, head),
                temperature=self.temperature,
            )
            return LossOutput(loss=output.loss, denominator=1.0, token_stats=output.stats)

        result: LossOutput = student(rollouts, loss)
        return result
