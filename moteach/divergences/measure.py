"""The first of the two passes: what the tokens look like, without a loss or a gradient.

Token weights, balance between domains and diagnostics read these values; the pass runs over the same chunks as the loss.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from moteach.divergences.base import Divergence, Pool
from moteach.divergences.chunked import Pooled, make_job
from moteach.divergences.disagreement import OF_TEACHERS, STREAMED
from moteach.divergences.fused import empty_stats, record
from moteach.errors import ConfigError
from moteach.types import Head, TeacherEvidence

OF_TOPK = (
    *("topk_overlap", "target_mass_on_student_topk", "student_mass_on_target_topk"),
    "overlap_token_advantage",
)
"""Statistics of the likeliest tokens; they need a sort of each distribution."""
OF_TOP1 = ("student_top1_rank",)
"""Statistics of the student's likeliest token."""


def measure(
    *,
    student_hidden: Float[Tensor, "packed hidden"],
    student_head: Head,
    teachers: Sequence[TeacherEvidence],
    weights: Float[Tensor, "packed teacher"],
    divergence: Divergence,
    resolver: Pool,
    chunk_size: int,
    student_temperature: float = 1.0,
    teacher_temperature: float = 1.0,
    targets: Int[Tensor, " packed"] | None = None,
    k: int = 16,
    wanted: Collection[str] | None = None,
    references: Sequence[TeacherEvidence] = (),
    anchor: TeacherEvidence | None = None,
) -> dict[str, Float[Tensor, " packed"]]:
    """Looks at the tokens through the same chunks as `chunked_divergence`.

    Args:
        student_hidden: States that predict the trained tokens, in packed order.
        student_head: The student's head.
        teachers: Evidence of support `full`.
        weights: Weight of each teacher at each token.
        divergence: What is measured.
        resolver: How several teachers become one target.
        chunk_size: Tokens projected at once.
        student_temperature: Divides the student's logits.
        teacher_temperature: Divides every teacher's logits.
        targets: The tokens the student wrote; without them there are no statistics of the written token.
        k: How many of the likeliest tokens are compared (at most the vocabulary); 16 in arXiv 2604.13016 and 2605.26844.
        wanted: Which of the statistics beyond those of the loss to make; None makes all of them.
        references: As in `chunked_divergence`.
        anchor: As in `chunked_divergence`.

    Returns:
        The statistics of `chunked_divergence` (with `targets` those of the written token too) and, 0 where abstained:
        `topk_overlap` - share of the student's k likeliest tokens that are among the target's (arXiv 2604.13016, Eq. 6);
        `target_mass_on_student_topk` - probability the target gives to the student's k likeliest tokens;
        `student_mass_on_target_topk` - probability the student gives to the target's k likeliest tokens;
        `overlap_token_advantage` - mean over the tokens v that are among both k likeliest of p(v) (log q(v) - log p(v)), p the
        student and q the target, each renormalised on these tokens (arXiv 2604.13016, Eq. 7): minus their reverse_kl there
        over their number, nats, 0 where they agree, strongly negative for a student that is too sure; 0 without such tokens;
        `student_top1_rank` - number of tokens that the target ranks above the student's likeliest one, 0 where they agree;
        `spread` - largest minus smallest logprob the token's teachers give to the student's likeliest token, nats;
        `argmax_disagreement` - share of the pairs of the token's teachers whose likeliest tokens differ;
        `teacher_jsd` - mean Jensen-Shannon divergence of these pairs, nats; it holds all teachers of a chunk, which is made
        that many times smaller. The last three are 0 where one teacher has all the weight.

    Raises:
        ConfigError: `chunk_size`, a temperature or `k` is not positive.
        UnsupportedCombinationError: Evidence is not of support `full`, or the pool needs what the kernel does not have.
        IncompatibleTeacherError: A teacher's vocabulary is not the student's.
        RoutingError: Weights are not a distribution, or name a teacher that did not score the token.
    """
    if k < 1:
        raise ConfigError(f"expected k >= 1 for the top-k overlap, got {k}")
    k = min(k, student_head.weight.shape[0])
    job = make_job(
        student_head=student_head,
        teachers=teachers,
        weights=weights,
        divergence=divergence,
        resolver=resolver,
        chunk_size=chunk_size,
        student_temperature=student_temperature,
        teacher_temperature=teacher_temperature,
        targets=targets,
        references=references,
        anchor=anchor,
    )
    chosen = frozenset(name for name in (*OF_TOPK, *OF_TOP1, *OF_TEACHERS) if wanted is None or name in wanted)
    stats = empty_stats(student_hidden, student_head, (*job.stat_names, *sorted(chosen)))
    with torch.no_grad():
        for group in job.plan.chunks(held=not resolver.streams or "teacher_jsd" in chosen):
            pooled = job.pool(student_hidden.detach(), group, wanted=(chosen & {*OF_TEACHERS}).union(STREAMED))
            record(stats, group.tokens, job.compare(pooled)[2])
            record(stats, group.tokens, _more(pooled, k, chosen))
            del pooled
    stats["abstained"] = job.abstained.to(stats["divergence"].dtype)
    return stats


def _more(pooled: Pooled, k: int, chosen: frozenset[str]) -> dict[str, Tensor]:
    """The statistics of one chunk beyond those of the loss."""
    student, target = pooled.student.logprobs, pooled.target.logprobs
    found: dict[str, Tensor] = {}
    if any(name in chosen for name in OF_TOPK):
        mine = student.topk(k, sorted=False).indices
        found["target_mass_on_student_topk"] = target.gather(-1, mine).exp().sum(-1)
        if not chosen.isdisjoint({*OF_TOPK} - {"target_mass_on_student_topk"}):
            theirs = target.topk(k, sorted=False).indices
            shared = (mine.unsqueeze(-1) == theirs.unsqueeze(-2)).any(-1)
            found["topk_overlap"] = shared.sum(-1).to(student.dtype) / k
            found["student_mass_on_target_topk"] = student.gather(-1, theirs).exp().sum(-1)
            found["overlap_token_advantage"] = _advantage(student.gather(-1, mine), target.gather(-1, mine), shared)
    if "student_top1_rank" in chosen:
        likeliest = target.gather(-1, student.argmax(-1, keepdim=True))
        found["student_top1_rank"] = (target > likeliest).sum(-1).to(student.dtype)
    return {name: values for name, values in found.items() if name in chosen}


def _advantage(
    student: Float[Tensor, "token k"], target: Float[Tensor, "token k"], shared: Bool[Tensor, "token k"]
) -> Float[Tensor, " token"]:
    """The overlap-token advantage of one chunk, from the logprobs of the student's k likeliest tokens."""
    # a token that one side excludes is among its k likeliest only where fewer than k have any probability
    shared = shared & (student > float("-inf")) & (target > float("-inf"))
    p, q = (values.masked_fill(~shared, float("-inf")).log_softmax(-1) for values in (student, target))
    terms = torch.where(shared, p.exp() * (q - p), torch.zeros_like(p))
    return terms.sum(-1) / shared.sum(-1).clamp(min=1)
