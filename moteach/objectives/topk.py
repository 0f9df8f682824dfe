"""Back-propagated divergence read on k tokens of the vocabulary only."""

from __future__ import annotations

from typing import cast

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from moteach.conflict.base import Resolver
from moteach.divergences.base import Divergence
from moteach.divergences.chunked import chunked_divergence
from moteach.divergences.chunked_topk import chunked_topk_divergence
from moteach.divergences.topk import Source, TopK, Truncation
from moteach.errors import ConfigError, UnsupportedCombinationError
from moteach.objectives.base import Normalise, Scored, tokens_per_chunk
from moteach.objectives.divergence import check_chunk_size, check_temperatures
from moteach.objectives.teaching import FULL_STATS, SAMPLED_STATS, Teaching
from moteach.routing.base import Gate
from moteach.types import Head, LossOutput, Support


class TopKObjective:
    """loss = sum_t w_t * D(student_t, target_t on S_t), S_t a support of k tokens.

    On support `full` the target is the pool of whole distributions and S_t may be anybody's; on support `topk` it is the
    top-k that the selected teacher sent (what an inference server gives). The student's mass on S_t is always among the
    statistics, because a renormalised loss does not see mass that leaks off the support (Revisiting OPD, arXiv 2603.25562,
    renormalises; MOPD, arXiv 2606.30406, Eq. 5, corrects; SDPO, arXiv 2601.20802, keeps a tail bucket; OPCD, arXiv
    2602.12275, truncates plainly).

    Args:
        gate: Weights teachers per token.
        resolver: Turns the weighted teachers into one target.
        divergence: What is read on the support.
        k: Size of the support; at most `support.k` where teachers send their top-k.
        source: Whose likeliest tokens: `teacher`, `student`, `union` or `intersection`.
        truncation: `renormalise`, `tail_bucket`, `plain` or `corrected`.
        normalise: What the per-token values are averaged over.
        chunk_size: Tokens projected to the vocabulary at a time. None: about 4 million logits.
        student_temperature: Divides the student's logits.
        teacher_temperature: Divides the teachers' logits; only where they send whole distributions.
    """

    supports: frozenset[Support] = frozenset({"full", "topk"})

    def __init__(
        self,
        *,
        gate: Gate,
        resolver: Resolver,
        divergence: Divergence,
        k: int = 32,
        source: Source = "teacher",
        truncation: Truncation = "renormalise",
        normalise: Normalise = "token_mean",
        chunk_size: int | None = None,
        student_temperature: float = 1.0,
        teacher_temperature: float = 1.0,
    ) -> None:
        if k < 1:
            raise ConfigError(f"objective.k: expected at least 1 token of the vocabulary, got {k}")
        check_chunk_size(chunk_size)
        check_temperatures(student_temperature, teacher_temperature)
        self.teaching = Teaching(gate=gate, resolver=resolver)
        self.divergence = TopK(divergence=divergence, k=k, source=source, truncation=truncation)
        self.normalise: Normalise = normalise
        self.chunk_size = chunk_size
        self.student_temperature = student_temperature
        self.teacher_temperature = teacher_temperature

    @property
    def needs(self) -> frozenset[str]:
        """What its gate and resolver need beside the teachers."""
        return self.teaching.needs

    def check(self, support: Support, k: int | None) -> None:
        """Refuses what a teacher's own top-k cannot answer.

        Raises:
            UnsupportedCombinationError: A support that needs other tokens, more of them than are sent, or a temperature
                that the sender does not apply.
        """
        if support == "full":
            return
        if self.divergence.source not in ("teacher", "intersection"):
            raise UnsupportedCombinationError(
                f"objective.source={self.divergence.source} needs the teacher's logprobs of tokens outside its own top-k, "
                "which support=topk does not send; they would be read as zero. Choose objective.source=teacher|intersection, "
                "or support=full"
            )
        if k is not None and self.divergence.k > k:
            raise UnsupportedCombinationError(
                f"objective.k={self.divergence.k} asks for more entries than the teachers send, support.k={k}; choose "
                f"objective.k={k} or support.k={self.divergence.k}"
            )
        if self.teacher_temperature != 1.0:
            raise UnsupportedCombinationError(
                f"objective.teacher_temperature={self.teacher_temperature} needs the teachers' whole distributions, got "
                "support=topk; teachers send logprobs at temperature 1 and it would be ignored. Choose support=full, or set it "
                "to 1"
            )

    def measurable(self, support: Support) -> frozenset[str]:
        """Everything on `full`; on `topk` what concerns the written token, and the truncated divergence."""
        return FULL_STATS if support == "full" else SAMPLED_STATS | {"divergence"}

    def taught(self, scored: Scored) -> Bool[Tensor, " packed"]:
        """True for the tokens that some teacher teaches."""
        return self.teaching.taught(scored)

    def measure(
        self, hidden: Float[Tensor, "packed hidden"], head: Head, scored: Scored, wanted: frozenset[str]
    ) -> dict[str, Float[Tensor, " packed"]]:
        """Compares the student with the target without a gradient."""
        size = tokens_per_chunk(self.chunk_size, head)
        if self._is_full(scored):
            return self.teaching.measure_full(
                hidden,
                head,
                scored,
                divergence=self._as_divergence(),
                chunk_size=size,
                wanted=wanted,
                student_temperature=self.student_temperature,
                teacher_temperature=self.teacher_temperature,
            )
        found = self.teaching.measure_written(hidden, head, scored, chunk_size=size)
        if "divergence" in wanted:
            with torch.no_grad():
                found["divergence"] = self._on_topk(hidden, head, scored).token_stats["divergence"]
        return found

    def __call__(self, hidden: Float[Tensor, "packed hidden"], head: Head, scored: Scored) -> LossOutput:
        """Computes the divergence inside the student's forward."""
        if not self._is_full(scored):
            return self._on_topk(hidden, head, scored)
        output = chunked_divergence(
            student_hidden=hidden,
            student_head=head,
            teachers=scored.evidence.teachers,
            weights=self.teaching.weights(scored),
            token_weights=scored.token_weights,
            divergence=self._as_divergence(),
            resolver=self.teaching.resolver,
            chunk_size=tokens_per_chunk(self.chunk_size, head),
            student_temperature=self.student_temperature,
            teacher_temperature=self.teacher_temperature,
            targets=scored.rollouts.token_targets,
        )
        return LossOutput(loss=output.loss, denominator=1.0, token_stats=output.stats)

    def _on_topk(self, hidden: Tensor, head: Head, scored: Scored) -> LossOutput:
        target = self.teaching.topk(scored, k=self.divergence.k)
        output = chunked_topk_divergence(
            student_hidden=hidden,
            student_head=head,
            ids=target.ids,
            teacher_logprobs=target.logprobs,
            taught=target.taught,
            token_weights=scored.token_weights,
            divergence=self.divergence,
            chunk_size=tokens_per_chunk(self.chunk_size, head),
            student_temperature=self.student_temperature,
            targets=scored.rollouts.token_targets,
        )
        stats = dict(output.stats)
        written = self.teaching.written(scored).logprobs.to(stats["student_logprobs"].dtype)
        stats["log_ratio"] = (written - stats["student_logprobs"]).masked_fill(stats["abstained"] > 0, 0.0)
        return LossOutput(loss=output.loss, denominator=1.0, token_stats=stats)

    def _as_divergence(self) -> Divergence:
        return cast(Divergence, self.divergence)

    @staticmethod
    def _is_full(scored: Scored) -> bool:
        return not any(entry.support == "topk" for entry in scored.evidence.teachers)
