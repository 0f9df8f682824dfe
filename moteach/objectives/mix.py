"""What is mixed into the teachers' loss: the verified outcome, nearness to a reference, supervised answers."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from moteach.conflict.select import Select
from moteach.divergences.advantages import group_advantages
from moteach.divergences.chunked import chunked_divergence
from moteach.divergences.full import ReverseKL
from moteach.divergences.logprobs import chunked_token_logprobs
from moteach.errors import ConfigError
from moteach.objectives.base import Normalise, Objective, Scored, tokens_per_chunk
from moteach.objectives.credit import credit_loss
from moteach.objectives.teaching import teaching_of
from moteach.types import Head, LossOutput, RolloutBatch, Support


@dataclass(frozen=True, kw_only=True)
class Mix:
    """Weights of the terms beside the teachers' loss; zero leaves a term out.

    Raises:
        ConfigError: A weight is negative or not finite.
    """

    outcome: float = 0.0
    """alpha of A_t = log-ratio + alpha * A_ORM (MiMo-V2-Flash, arXiv 2601.02780, Eq. 9), A_ORM the group-relative advantage
    of the verified score."""
    outcome_normalise: bool = True
    """Divide the group's centred scores by their standard deviation (GRPO, arXiv 2402.03300)."""
    reference: float = 0.0
    """beta of beta * KL(student || reference), exact over the vocabulary (StableOPD, arXiv 2604.08527)."""
    supervised: float = 0.0
    """lambda of lambda * cross-entropy on the prompts' own answers (StableOPD's gold mixture)."""

    def __post_init__(self) -> None:
        for name in ("outcome", "reference", "supervised"):
            value = getattr(self, name)
            if not 0 <= value < math.inf:
                raise ConfigError(f"mix.{name}: expected a finite weight of at least 0, got {value}")


class MixedObjective:
    """The teachers' objective and, in the same forward of the student, the other terms on the same tokens.

    A policy-gradient objective adds the outcome to its own advantage, so that a token masked for its trainer/sampler ratio
    loses both signals (MiMo-V2-Flash, Eq. 7-9). Beside a back-propagated divergence it is a policy-gradient term of its own
    with the same mask. The other terms weigh every trained token by the normalisation alone: token weights and balance are
    about teachers.

    Args:
        main: The teachers' objective.
        mix: The weights.
    """

    def __init__(self, main: Objective, mix: Mix) -> None:
        self.main = main
        self.mix = mix
        self.supports: frozenset[Support] = main.supports
        self.normalise: Normalise = main.normalise

    @property
    def teaching(self) -> Any:
        """Gate and resolver of the teachers' objective."""
        return getattr(self.main, "teaching", None)

    @property
    def needs(self) -> frozenset[str]:
        """What the teachers' objective needs beside the teachers."""
        return self.main.needs

    @property
    def needs_proximal(self) -> bool:
        """Whether the teachers' objective reads the proximal policy."""
        return bool(getattr(self.main, "needs_proximal", False))

    @property
    def credits(self) -> frozenset[str]:
        """Statistics of the whole batch that the teachers' objective makes its credit of."""
        return frozenset(getattr(self.main, "credits", frozenset()))

    def credit(self, rollouts: RolloutBatch, stats: Mapping[str, Float[Tensor, " packed"]]) -> Float[Tensor, " packed"]:
        """Credit of the teachers' objective, see `DivergenceObjective.credit`."""
        credit: Tensor = cast(Any, self.main).credit(rollouts, stats)
        return credit

    def prepared(self, scored: Scored) -> Scored:
        """Adds what the resolver reads of whole completions, see `moteach.objectives.teaching.Teaching.prepared`."""
        teaching = teaching_of(self.main)
        return scored if teaching is None else teaching.prepared(scored)

    def check(self, support: Support, k: int | None) -> None:
        """Refuses what the teachers' objective refuses."""
        self.main.check(support, k)

    def measurable(self, support: Support) -> frozenset[str]:
        """What the teachers' objective can measure."""
        return self.main.measurable(support)

    def taught(self, scored: Scored) -> Bool[Tensor, " packed"]:
        """True for the tokens that some teacher teaches."""
        return self.main.taught(scored)

    def measure(
        self, hidden: Float[Tensor, "packed hidden"], head: Head, scored: Scored, wanted: frozenset[str]
    ) -> dict[str, Float[Tensor, " packed"]]:
        """Measures against the teachers."""
        return self.main.measure(hidden, head, scored, wanted)

    def __call__(self, hidden: Float[Tensor, "packed hidden"], head: Head, scored: Scored) -> LossOutput:
        """Adds the terms."""
        output = self.main(hidden, head, scored)
        loss, stats = output.loss, dict(output.token_stats)
        if scored.outcome_advantages is not None:
            stats["outcome_advantages"] = scored.outcome_advantages
            if not _takes_outcome(self.main):
                loss = loss + credit_loss(
                    hidden,
                    head,
                    scored,
                    advantages=scored.outcome_advantages,
                    weights=scored.base_weights,
                    chunk_size=tokens_per_chunk(None, head),
                )
        if self.mix.reference > 0 and scored.reference is not None:
            near = chunked_divergence(
                student_hidden=hidden,
                student_head=head,
                teachers=scored.reference.teachers,
                weights=torch.ones(scored.reference.num_tokens, 1),
                token_weights=scored.base_weights * self.mix.reference,
                divergence=ReverseKL(),
                resolver=Select(),
                chunk_size=tokens_per_chunk(None, head),
            )
            loss = loss + near.loss
            stats["reference_divergence"] = near.stats["divergence"]
        return LossOutput(loss=loss, denominator=1.0, token_stats=stats)


def outcome_advantages(rollouts: RolloutBatch, rewards: Sequence[float], mix: Mix) -> Float[Tensor, " packed"]:
    """Computes alpha * A_ORM of each completion, on each of its tokens; groups are the completions of one prompt id.

    A completion without a verified score (NaN) has advantage 0.

    Args:
        rollouts: The whole batch.
        rewards: One score a row.
        mix: Holds alpha.
    """
    members: dict[str, list[int]] = {}
    for row, rollout in enumerate(rollouts.rollouts):
        members.setdefault(rollout.prompt.prompt_id, []).append(row)
    scores = torch.tensor(list(rewards), dtype=torch.float32)
    advantages = torch.zeros(len(scores))
    for rows in members.values():
        group = scores[rows].unsqueeze(0)
        advantages[rows] = group_advantages(group, normalise=mix.outcome_normalise).squeeze(0)
    return mix.outcome * advantages[rollouts.token_rows]


def supervised_loss(
    hidden: Float[Tensor, "packed hidden"], head: Head, rollouts: RolloutBatch, weights: Float[Tensor, " packed"]
) -> LossOutput:
    """Cross-entropy -sum_t w_t log S(y_t) on completions that the student did not write."""
    logprobs = chunked_token_logprobs(hidden, head, rollouts.token_targets, chunk_size=tokens_per_chunk(None, head))
    return LossOutput(loss=-(weights * logprobs).sum(), denominator=1.0)


def _takes_outcome(main: Objective) -> bool:
    return bool(getattr(main, "takes_outcome", False))
