"""Policy gradient on what the teacher says about the token the student wrote."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from moteach.conflict.base import Resolver
from moteach.divergences.advantages import (
    Importance,
    discounted_to_go,
    importance_weights,
    kl_baseline_advantages,
    power_reward,
    ppo_surrogate,
    shape_log_ratio,
)
from moteach.divergences.base import Divergence
from moteach.divergences.logprobs import chunked_token_logprobs
from moteach.divergences.sampled import Estimator, estimator_reward
from moteach.errors import ConfigError, UnsupportedCombinationError
from moteach.objectives.base import Normalise, Scored, tokens_per_chunk
from moteach.objectives.divergence import check_chunk_size, check_discount
from moteach.objectives.teaching import FULL_STATS, SAMPLED_STATS, Teaching
from moteach.routing.base import Gate
from moteach.types import Head, LossOutput, Support

Shaping = Literal["none", "soft_log", "power"]
Advantage = Literal["log_ratio", "divergence"]
Baseline = Literal["none", "reverse_kl"]


@dataclass(frozen=True, kw_only=True, slots=True)
class _Signal:
    """What the teachers say, before it becomes an advantage."""

    target_logprobs: Tensor
    taught: Bool[Tensor, " packed"]
    divergence: Tensor | None


class PolicyGradientObjective:
    """loss = -sum_t w_t * c_t * A_t * log S(y_t), the advantage A_t made from sg[log T(y_t) - log S(y_t)].

    S is the student in the trainer, mu the student as it sampled, T the resolved teacher. With the defaults this is
    MiMo-V2-Flash (arXiv 2601.02780, Eq. 6-9): c_t = sg[S/mu] where ratio_low <= S/mu <= ratio_high, else 0, and the outcome
    advantage of `mix.outcome` is added to A_t, so that a masked token loses both. With on-policy samples and discount 0 the
    expected gradient is that of the reverse KL of each token; its variance is what the full-vocabulary objective removes.

    Three bounds, never mixed: `importance` with `ratio_*` acts on trainer against sampler; `log_ratio_clip` bounds teacher
    against student (Kimi K3, arXiv 2607.24653, Eq. 15); `ppo_clip` bounds the student against itself at the beginning of
    the step (Nemotron 3 Ultra, arXiv 2606.15007, Eq. 3: m_t c_t min(r_t A_t, clip(r_t) A_t), A_t from the proximal
    policy) and acts only where a step has several updates (`optim.updates_per_step`).

    Args:
        gate: Weights teachers per token.
        resolver: Pools the teachers.
        divergence: What is measured on support `full`; the loss does not read it.
        normalise: What the per-token values are averaged over.
        estimator: Which sampled estimate of the reverse KL is the (negative) reward: only `k1` has the right gradient.
        advantage: `log_ratio`; `divergence` is refused, see `DivergenceObjective` for what to do with one.
        baseline: `reverse_kl` adds KL(student || target) of the prefix (vOPD, arXiv 2605.07865): same expected gradient, an
            advantage whose mean is zero, and less variance where the teacher is far (not everywhere: the best baseline
            weighs by the score's length); needs support `full` and discount 0.
        discount: Weight of each following token's reward; 0 is myopic, as in every published system but MiniLLM and gamma-OPD.
        shaping: `none`; `soft_log` sign(x) log(1 + |x|) (arXiv 2607.13399); `power` T^alpha - S^alpha (arXiv 2606.17199).
        power_alpha: The alpha of `power`.
        log_ratio_clip: Bound of the teacher/student log-ratio in nats; None leaves it free.
        importance: `none`, `clip`, `truncated` (TIS) or `masked` (MiMo-V2-Flash, IcePop).
        ratio_low: Smallest kept trainer/sampler ratio.
        ratio_high: Largest kept trainer/sampler ratio.
        ppo_clip: The epsilon of the clip around the proximal policy; None takes no proximal policy.
        refresh: Read the log-ratio under the student as it is now at every update of a step (Open-MOPD); false keeps that of
            the proximal policy (Nemotron 3 Ultra).
        chunk_size: Tokens projected to the vocabulary at a time. None: about 4 million logits.
    """

    supports: frozenset[Support] = frozenset({"sampled", "full"})

    def __init__(
        self,
        *,
        gate: Gate,
        resolver: Resolver,
        divergence: Divergence,
        normalise: Normalise = "sequence_mean",
        estimator: Estimator = "k1",
        advantage: Advantage = "log_ratio",
        baseline: Baseline = "none",
        discount: float = 0.0,
        shaping: Shaping = "none",
        power_alpha: float = 1.0,
        log_ratio_clip: float | None = None,
        importance: Importance = "masked",
        ratio_low: float = 0.5,
        ratio_high: float = 2.0,
        ppo_clip: float | None = None,
        refresh: bool = True,
        chunk_size: int | None = None,
    ) -> None:
        estimator_reward(estimator)
        check_chunk_size(chunk_size)
        check_ratios(importance, ratio_low, ratio_high)
        for name, value in (("log_ratio_clip", log_ratio_clip), ("ppo_clip", ppo_clip)):
            if value is not None and not value > 0:
                raise ConfigError(f"objective.{name}: expected a number above 0, or null, got {value}")
        check_discount(discount)
        if not power_alpha > 0:
            raise ConfigError(f"objective.power_alpha: expected a number above 0, got {power_alpha}")
        _check_reward(advantage, baseline, discount, shaping, log_ratio_clip)
        self.teaching = Teaching(gate=gate, resolver=resolver)
        self.divergence = divergence
        self.normalise: Normalise = normalise
        self.baseline = baseline
        self.discount = discount
        self.shaping = shaping
        self.power_alpha = power_alpha
        self.log_ratio_clip = log_ratio_clip
        self.importance: Importance = importance
        self.ratio_low = ratio_low
        self.ratio_high = ratio_high
        self.ppo_clip = ppo_clip
        self.refresh = refresh
        self.chunk_size = chunk_size

    takes_outcome: ClassVar[bool] = True
    """The outcome's advantage is added to the teachers' before masking."""

    @property
    def needs_proximal(self) -> bool:
        """Whether `Scored.proximal_logprobs` is read when a step has several updates."""
        return self.ppo_clip is not None

    @property
    def needs(self) -> frozenset[str]:
        """What its gate and resolver need beside the teachers."""
        return self.teaching.needs

    def check(self, support: Support, k: int | None) -> None:
        """Refuses what needs whole distributions where only the written token is known.

        Raises:
            UnsupportedCombinationError: A baseline on support `sampled`.
        """
        if support != "full" and self.baseline != "none":
            raise UnsupportedCombinationError(
                f"objective.baseline={self.baseline} needs the teachers' whole distributions, got support={support}; one "
                "logprob a token only estimates it, and the estimate is the reward itself. Choose support=full"
            )

    def measurable(self, support: Support) -> frozenset[str]:
        """Everything on `full`, what concerns the written token on `sampled`."""
        return FULL_STATS if support == "full" else SAMPLED_STATS

    def taught(self, scored: Scored) -> Bool[Tensor, " packed"]:
        """True for the tokens that some teacher teaches."""
        return self.teaching.taught(scored)

    def measure(
        self, hidden: Float[Tensor, "packed hidden"], head: Head, scored: Scored, wanted: frozenset[str]
    ) -> dict[str, Float[Tensor, " packed"]]:
        """Looks at the tokens without a gradient, as far as the evidence allows."""
        size = tokens_per_chunk(self.chunk_size, head)
        if _has_full(scored):
            needed = wanted | {"target_logprobs", "log_ratio"}
            return self.teaching.measure_full(
                hidden, head, scored, divergence=self.divergence, chunk_size=size, wanted=needed
            )
        return self.teaching.measure_written(hidden, head, scored, chunk_size=size)

    def __call__(self, hidden: Float[Tensor, "packed hidden"], head: Head, scored: Scored) -> LossOutput:
        """Computes the surrogate loss inside the student's forward."""
        rollouts = scored.rollouts
        signal = self._signal(hidden, head, scored)
        size = tokens_per_chunk(self.chunk_size, head)
        student_logprobs = chunked_token_logprobs(hidden, head, rollouts.token_targets, chunk_size=size)
        current = student_logprobs.detach()
        anchor = current if scored.proximal_logprobs is None else scored.proximal_logprobs.to(current.dtype)
        log_ratio, taught_advantages = self._advantages(signal, current if self.refresh else anchor, scored)
        outcome = scored.outcome_advantages
        advantages = taught_advantages if outcome is None else taught_advantages + outcome
        ratio = (anchor - rollouts.rollout_logprobs[rollouts.loss_mask]).exp()
        weights, masked = importance_weights(ratio, mode=self.importance, low=self.ratio_low, high=self.ratio_high)
        active = signal.taught if outcome is None else torch.ones_like(signal.taught)
        coefficient = torch.where(active, scored.token_weights * weights, torch.zeros_like(weights))
        if self.ppo_clip is None:
            surrogate = advantages * student_logprobs
        else:
            surrogate = ppo_surrogate(
                (student_logprobs - anchor).exp(), advantages, epsilon_low=self.ppo_clip, epsilon_high=self.ppo_clip
            )
        stats = {
            "divergence": -log_ratio if signal.divergence is None else signal.divergence,
            "advantages": advantages,
            "log_ratio": log_ratio,
            "importance_ratio": ratio,
            "masked": (active & masked).to(current.dtype),
            "abstained": (~signal.taught).to(current.dtype),
        }
        return LossOutput(loss=-(coefficient * surrogate).sum(), denominator=1.0, token_stats=stats)

    def _signal(self, hidden: Tensor, head: Head, scored: Scored) -> _Signal:
        if not _has_full(scored):
            target = self.teaching.written(scored)
            return _Signal(target_logprobs=target.logprobs, taught=target.taught, divergence=None)
        seen = scored.stats
        if seen is None or "target_logprobs" not in seen:
            seen = self.measure(hidden, head, scored, frozenset())
        return _Signal(
            target_logprobs=seen["target_logprobs"], taught=seen["abstained"] == 0, divergence=seen["divergence"]
        )

    def _advantages(self, signal: _Signal, student: Tensor, scored: Scored) -> tuple[Tensor, Tensor]:
        """The raw log-ratio and the advantage made from it, both zero where nobody teaches."""
        zero = torch.zeros_like(student)
        target = torch.where(signal.taught, signal.target_logprobs.to(student.dtype), student)
        log_ratio = target - student
        rows = scored.rollouts.token_rows
        if self.shaping == "power":
            rewards = power_reward(student, target, alpha=self.power_alpha)
        else:
            rewards = shape_log_ratio(log_ratio, shaping=self.shaping, clip=self.log_ratio_clip)
        if self.baseline == "reverse_kl":
            assert signal.divergence is not None
            rewards = torch.where(signal.taught, kl_baseline_advantages(rewards, signal.divergence), zero)
        return log_ratio, rewards if self.discount == 0 else discounted_to_go(rewards, rows, discount=self.discount)


def check_ratios(importance: Importance, low: float, high: float) -> None:
    """Refuses bounds that would mask tokens on which trainer and sampler agree.

    Raises:
        ConfigError: One is not outside of one.
    """
    if importance != "none" and not 0 <= low < 1 < high:
        raise ConfigError(
            f"objective: expected ratio_low < 1 < ratio_high, got {low} and {high}; an on-policy token has ratio 1 and "
            "would be masked"
        )


def _has_full(scored: Scored) -> bool:
    return any(entry.support == "full" for entry in scored.evidence.teachers)


def _check_reward(
    advantage: Advantage, baseline: Baseline, discount: float, shaping: Shaping, log_ratio_clip: float | None
) -> None:
    shaped = shaping != "none" or log_ratio_clip is not None
    if advantage == "divergence":
        raise UnsupportedCombinationError(
            "objective.advantage=divergence: the divergence of a token depends on its prefix alone, so with discount 0 its "
            "expected gradient is exactly zero and the update would be noise. Back-propagate it (objective=divergence); there "
            "objective.discount above 0 also credits a token with the divergence of those that follow"
        )
    if baseline == "reverse_kl" and (shaped or discount != 0):
        raise UnsupportedCombinationError(
            "objective.baseline=reverse_kl is minus the expectation of the plain log-ratio: with shaping, a clip or a discount "
            "it is no longer that of the reward. Set shaping=none, log_ratio_clip=null, discount=0"
        )
    if shaping == "power" and log_ratio_clip is not None:
        raise UnsupportedCombinationError(
            "objective.shaping=power is a difference of probabilities, bounded by 1, got a log_ratio_clip, which is in nats "
            "of the log-ratio and would be ignored. Set log_ratio_clip=null"
        )
