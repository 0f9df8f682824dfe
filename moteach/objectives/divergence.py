"""Back-propagated divergence from the resolved teacher to the student, over the full vocabulary."""

from __future__ import annotations

from collections.abc import Mapping

from jaxtyping import Bool, Float
from torch import Tensor

from moteach.conflict.base import Resolver
from moteach.divergences.advantages import discounted_to_go, position_baseline
from moteach.divergences.base import Divergence
from moteach.divergences.chunked import chunked_divergence
from moteach.errors import ConfigError
from moteach.objectives.base import Normalise, Scored, tokens_per_chunk
from moteach.objectives.credit import credit_loss
from moteach.objectives.teaching import FULL_STATS, Teaching
from moteach.routing.base import Gate
from moteach.types import Head, LossOutput, RolloutBatch, Support


class DivergenceObjective:
    """loss = sum_t w_t * D(student_t, target_t), target_t = resolve(teachers at t, gate weights at t).

    Exact over the whole vocabulary, in chunks of tokens; teachers give hidden states and their heads rebuild the logits
    (DeepSeek-V4, arXiv 2606.19348, section 5.2.2). The divergence is back-propagated: used as an advantage with discount 0
    it would be a baseline, whose expected gradient is exactly zero.

    A `discount` above 0 also credits each written token with the divergence it leads to: the term
    -A_t log S(y_t), A_t = -sum_{t' > t} discount^(t' - t) D_t'. With discount 1, reverse KL and sequence weights this is the
    exact, Rao-Blackwellised gradient of the KL between the distributions over whole completions (arXiv 2504.10637); 0, the
    default, is what every published system but MiniLLM and gamma-OPD uses.

    Args:
        gate: Weights teachers per token.
        resolver: Turns the weighted teachers into one target.
        divergence: Compares the student with the target.
        normalise: What the per-token values are averaged over.
        chunk_size: Tokens projected to the vocabulary at a time; peak memory is a few chunk_size x vocab floats. None: about
            4 million logits.
        student_temperature: Divides the student's logits; the loss is not rescaled by its square.
        teacher_temperature: Divides every teacher's logits, before they are resolved.
        discount: Weight of the divergence of each following token; 0 is myopic.
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
        student_temperature: float = 1.0,
        teacher_temperature: float = 1.0,
        discount: float = 0.0,
    ) -> None:
        check_chunk_size(chunk_size)
        check_discount(discount)
        check_temperatures(student_temperature, teacher_temperature)
        self.teaching = Teaching(gate=gate, resolver=resolver)
        self.divergence = divergence
        self.normalise: Normalise = normalise
        self.chunk_size = chunk_size
        self.student_temperature = student_temperature
        self.teacher_temperature = teacher_temperature
        self.discount = discount
        self.sequence_penalty = float(getattr(resolver, "sequence_penalty", 0.0))

    @property
    def needs(self) -> frozenset[str]:
        """What its gate and resolver need beside the teachers."""
        return self.teaching.needs

    def check(self, support: Support, k: int | None) -> None:
        """Nothing more to refuse: whole distributions allow everything."""

    @property
    def credits(self) -> frozenset[str]:
        """Statistics of the whole batch that `credit` reads; none without a penalty on the sequence."""
        return frozenset({"neg_log_z"}) if self.sequence_penalty > 0 else frozenset()

    def credit(self, rollouts: RolloutBatch, stats: Mapping[str, Float[Tensor, " packed"]]) -> Float[Tensor, " packed"]:
        """A_t = -penalty * (sum_{t' > t} -log Z_t' minus its baseline), see `moteach.conflict.base.check_penalty`.

        Args:
            rollouts: The whole batch.
            stats: `neg_log_z` of its tokens.
        """
        rows, costs = rollouts.token_rows, stats["neg_log_z"]
        returns = discounted_to_go(costs, rows, discount=1.0) - costs
        return -self.sequence_penalty * (returns - position_baseline(returns, rows))

    def measurable(self, support: Support) -> frozenset[str]:
        """Everything: see `moteach.divergences.measure`."""
        return FULL_STATS

    def taught(self, scored: Scored) -> Bool[Tensor, " packed"]:
        """True for the tokens that some teacher teaches."""
        return self.teaching.taught(scored)

    def measure(
        self, hidden: Float[Tensor, "packed hidden"], head: Head, scored: Scored, wanted: frozenset[str]
    ) -> dict[str, Float[Tensor, " packed"]]:
        """Compares the student with the target without a gradient."""
        return self.teaching.measure_full(
            hidden,
            head,
            scored,
            divergence=self.divergence,
            chunk_size=tokens_per_chunk(self.chunk_size, head),
            wanted=wanted,
            student_temperature=self.student_temperature,
            teacher_temperature=self.teacher_temperature,
        )

    def __call__(self, hidden: Float[Tensor, "packed hidden"], head: Head, scored: Scored) -> LossOutput:
        """Computes the divergence inside the student's forward."""
        output = chunked_divergence(
            student_hidden=hidden,
            student_head=head,
            teachers=scored.evidence.teachers,
            weights=self.teaching.weights(scored),
            token_weights=scored.token_weights,
            divergence=self.divergence,
            resolver=self.teaching.resolver,
            chunk_size=tokens_per_chunk(self.chunk_size, head),
            student_temperature=self.student_temperature,
            teacher_temperature=self.teacher_temperature,
            targets=scored.rollouts.token_targets,
        )
        if self.discount == 0 and not self.credits:
            return LossOutput(loss=output.loss, denominator=1.0, token_stats=output.stats)
        costs = output.stats["divergence"]
        advantages = costs - discounted_to_go(costs, scored.rollouts.token_rows, discount=self.discount)
        if self.credits:
            advantages = advantages + (
                self.credit(scored.rollouts, output.stats) if scored.credit is None else scored.credit
            )
        credit = credit_loss(
            hidden,
            head,
            scored,
            advantages=advantages,
            weights=scored.token_weights,
            chunk_size=tokens_per_chunk(self.chunk_size, head),
        )
        stats = {**output.stats, "advantages": advantages}
        return LossOutput(loss=output.loss + credit, denominator=1.0, token_stats=stats)


def check_chunk_size(chunk_size: int | None) -> None:
    """Refuses a chunk without a token.

    Raises:
        ConfigError: `chunk_size` is below one.
    """
    if chunk_size is not None and chunk_size < 1:
        raise ConfigError(f"objective.chunk_size: expected at least 1 token, got {chunk_size}")


def check_discount(discount: float) -> None:
    """Refuses a discount that is none.

    Raises:
        ConfigError: It is not from 0 to 1.
    """
    if not 0 <= discount <= 1:
        raise ConfigError(f"objective.discount: expected a number from 0 to 1, got {discount}")


def check_temperatures(student: float, teacher: float) -> None:
    """Refuses temperatures that divide by nothing.

    Raises:
        ConfigError: One of them is not positive.
    """
    for name, value in (("student", student), ("teacher", teacher)):
        if not value > 0:
            raise ConfigError(f"objective.{name}_temperature: expected a number above 0, got {value}")
