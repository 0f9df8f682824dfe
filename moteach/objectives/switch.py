"""Reverse KL on most tokens, forward KL on those where it is known to fail: an entropy- or trust-aware switch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Literal, cast

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from moteach.conflict.base import Resolver
from moteach.divergences.advantages import Importance
from moteach.divergences.base import Divergence
from moteach.divergences.chunked import chunked_divergence
from moteach.divergences.full import ForwardKL
from moteach.divergences.topk import TopK, Truncation
from moteach.errors import ConfigError
from moteach.objectives.base import Normalise, Objective, Scored, tokens_per_chunk
from moteach.objectives.divergence import DivergenceObjective
from moteach.objectives.policy_gradient import PolicyGradientObjective
from moteach.objectives.teaching import FULL_STATS, Teaching
from moteach.routing.base import Gate
from moteach.types import Head, LossOutput, Support

Main = Literal["policy_gradient", "divergence"]
Criterion = Literal["target_entropy", "trust"]
Mode = Literal["add", "replace"]


class SwitchObjective:
    """loss = sum_t w_t * [main_t + coefficient * 1[switched_t] * D_topk(target_t, student_t)], D the forward KL.

    `criterion: target_entropy` switches where the target's entropy is above the threshold: a mode-seeking loss collapses
    the student where the teacher keeps several answers open (Entropy-Aware OPD, arXiv 2603.07079: H_T > 0.8 nats, the
    teacher's 16 likeliest tokens, plain truncated sum, added to the sampled policy gradient of all tokens).
    `criterion: trust` switches where min(T/S, 1) of the written token is below the threshold: the reverse KL's gradient
    grows without bound there (TrOPD, arXiv 2606.01249, outliers by top-k forward KL in the place of the main loss).

    Args:
        gate: Weights teachers per token.
        resolver: Turns the weighted teachers into one target.
        divergence: The main loss of `main: divergence`; also what is measured.
        main: `policy_gradient` on the sampled log-ratio, or the back-propagated `divergence`.
        criterion: What switches a token.
        threshold: Nats of entropy above which, or trust below which, a token is switched.
        mode: `add` the forward KL to the main loss of the token, or `replace` it.
        coefficient: Weight of the forward KL.
        k: Size of the teacher's support on which it is read.
        truncation: How it is read there.
        normalise: What the per-token values are averaged over.
        log_ratio_clip: Bound of the main policy gradient's log-ratio, nats.
        importance: How the trainer/sampler ratio enters the main policy gradient.
        ratio_low: Smallest kept trainer/sampler ratio.
        ratio_high: Largest kept trainer/sampler ratio.
        chunk_size: Tokens projected to the vocabulary at a time. None: about 4 million logits.
    """

    supports: frozenset[Support] = frozenset({"full"})

    def __init__(
        self,
        *,
        gate: Gate,
        resolver: Resolver,
        divergence: Divergence,
        main: Main = "policy_gradient",
        criterion: Criterion = "target_entropy",
        threshold: float = 0.8,
        mode: Mode = "add",
        coefficient: float = 1.0,
        k: int = 16,
        truncation: Truncation = "plain",
        normalise: Normalise = "token_mean",
        log_ratio_clip: float | None = None,
        importance: Importance = "masked",
        ratio_low: float = 0.5,
        ratio_high: float = 2.0,
        chunk_size: int | None = None,
    ) -> None:
        if not threshold >= 0 or not coefficient >= 0 or k < 1:
            raise ConfigError(
                f"objective: expected threshold >= 0, coefficient >= 0 and k >= 1, got {threshold}, {coefficient} and {k}"
            )
        if criterion == "trust" and threshold > 1:
            raise ConfigError(f"objective.threshold: trust is a probability ratio in [0, 1], got {threshold}")
        self._main: Objective = (
            DivergenceObjective(
                gate=gate, resolver=resolver, divergence=divergence, normalise=normalise, chunk_size=chunk_size
            )
            if main == "divergence"
            else PolicyGradientObjective(
                gate=gate,
                resolver=resolver,
                divergence=divergence,
                normalise=normalise,
                log_ratio_clip=log_ratio_clip,
                importance=importance,
                ratio_low=ratio_low,
                ratio_high=ratio_high,
                chunk_size=chunk_size,
            )
        )
        self._covering = TopK(divergence=ForwardKL(), k=k, source="teacher", truncation=truncation)
        self.teaching = Teaching(gate=gate, resolver=resolver)
        self.criterion = criterion
        self.threshold = threshold
        self.mode = mode
        self.coefficient = coefficient
        self.normalise: Normalise = normalise
        self.chunk_size = chunk_size

    @property
    def takes_outcome(self) -> bool:
        """Whether the main loss adds the outcome's advantage by itself."""
        return isinstance(self._main, PolicyGradientObjective)

    @property
    def needs(self) -> frozenset[str]:
        """What its gate and resolver need beside the teachers."""
        return self.teaching.needs

    def check(self, support: Support, k: int | None) -> None:
        """Nothing more to refuse: whole distributions allow everything."""

    def measurable(self, support: Support) -> frozenset[str]:
        """Everything: see `moteach.divergences.measure`."""
        return FULL_STATS

    def taught(self, scored: Scored) -> Bool[Tensor, " packed"]:
        """True for the tokens that some teacher teaches."""
        return self.teaching.taught(scored)

    def measure(
        self, hidden: Float[Tensor, "packed hidden"], head: Head, scored: Scored, wanted: frozenset[str]
    ) -> dict[str, Float[Tensor, " packed"]]:
        """Looks at the tokens without a gradient."""
        needed = {"target_entropy"} if self.criterion == "target_entropy" else {"log_ratio"}
        return self._main.measure(hidden, head, scored, wanted | needed)

    def __call__(self, hidden: Float[Tensor, "packed hidden"], head: Head, scored: Scored) -> LossOutput:
        """Computes both losses inside the student's forward."""
        stats = scored.stats
        if stats is None or not {"target_entropy", "log_ratio", "target_logprobs"} <= set(stats):
            wanted = frozenset({"target_entropy", "log_ratio", "target_logprobs"})
            stats = self.measure(hidden, head, scored, wanted)
        switched = self._switched(stats)
        weights = scored.token_weights
        kept = torch.where(switched, torch.zeros_like(weights), weights) if self.mode == "replace" else weights
        main = self._main(hidden, head, replace(scored, stats=stats, token_weights=kept))
        covering = chunked_divergence(
            student_hidden=hidden,
            student_head=head,
            teachers=scored.evidence.teachers,
            # only the switched tokens are projected again
            weights=self.teaching.weights(scored) * switched.unsqueeze(-1),
            token_weights=weights * self.coefficient,
            divergence=cast(Divergence, self._covering),
            resolver=self.teaching.resolver,
            chunk_size=tokens_per_chunk(self.chunk_size, head),
        )
        token_stats = {
            **main.token_stats,
            "switched": switched.to(weights.dtype),
            "target_entropy": stats["target_entropy"],
        }
        return LossOutput(loss=main.loss + covering.loss, denominator=1.0, token_stats=token_stats)

    def _switched(self, stats: Mapping[str, Tensor]) -> Bool[Tensor, " packed"]:
        taught = stats["abstained"] == 0
        if self.criterion == "target_entropy":
            return taught & (stats["target_entropy"] > self.threshold)
        return taught & (stats["log_ratio"].clamp(max=0.0).exp() < self.threshold)
