r"""Logprobs of one tokenization of a text on the tokens of another, over the spans on whose ends both agree.

Two tokenizers cut the same bytes at different places. Where a cut of one is a cut of the other the text before it is the
same for both, so that between two common cuts lies one piece of text, a *span*, which each of them writes in tokens of its
own. By the chain rule the teacher's logprob of that piece is the sum over its tokens,

    log T(span) = sum_{j in span} log T(y'_j | y'_<j).

What the student's tokens of the span are given must add up to it. They share it in proportion to their own logprobs,

    log T_t = log T(span) * log S_t / log S(span),        log S(span) = sum_{t in span} log S_t,

because this is the one split with constant log T_t / log S_t over the span: every share is at most 0, as a logprob is; all
of a span's tokens have a log-ratio of one sign, that of log T(span) - log S(span); and with equal tokenizers, where each
span is one token, nothing changes. The whole sum on the last token would make the teacher certain (log T = 0) of the others
and reward them for being unlikely; equal shares of the log-ratio could put a logprob above 0.

What an estimate then means. sum_t (log S_t - log T_t) is exact over each span and so over the completion: its expectation
under the student is the reverse KL(student || teacher) of completions, with T the probability of the teacher's *own*
tokenization of the text, a lower bound of its probability of the text. The terms of single tokens inside a span of several
are shares, not divergences, and non-linear estimators (k2, k3, linear pools of several teachers) are exact on no span but
those of one token.

Byte offsets as in TRL's GOLD (huggingface/trl, PR 5885); the split within a span is ours.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate

import torch
from jaxtyping import Float, Int
from torch import Tensor

from moteach.errors import ConfigError


@dataclass(frozen=True, kw_only=True, slots=True)
class Spans:
    """Which span each token of two tokenizations belongs to; tokens beyond the last common end belong to none."""

    student: Int[Tensor, " student"]
    """Number of the span of each of the student's tokens, ascending; `count` for tokens that belong to none."""
    teacher: Int[Tensor, " teacher"]
    """The same of the teacher's tokens."""
    count: int


def ends_of(lengths: list[int]) -> Int[Tensor, " token"]:
    """Byte offsets at which tokens of these lengths end."""
    return torch.tensor(list(accumulate(lengths)), dtype=torch.long)


def spans_of(student_ends: Int[Tensor, " student"], teacher_ends: Int[Tensor, " teacher"]) -> Spans:
    """Finds the smallest pieces of text that both tokenizations end together.

    Args:
        student_ends: Byte offset at which each of the student's tokens ends, ascending; a token of no bytes ends where the
            one before it does, and belongs to its span.
        teacher_ends: The same of the teacher's tokens, over the same bytes or a beginning of them.

    Raises:
        ConfigError: Offsets descend.
    """
    for name, ends in (("student", student_ends), ("teacher", teacher_ends)):
        if bool((ends.diff() < 0).any()):
            raise ConfigError(f"expected ascending byte offsets of the {name}'s tokens, got {ends.tolist()[:20]}")
    common: Tensor = torch.unique(student_ends[torch.isin(student_ends, teacher_ends)])
    return Spans(
        student=torch.searchsorted(common, student_ends.contiguous()),
        teacher=torch.searchsorted(common, teacher_ends.contiguous()),
        count=len(common),
    )


def share_logprobs(
    student_logprobs: Float[Tensor, " student"], teacher_logprobs: Float[Tensor, " teacher"], spans: Spans
) -> Float[Tensor, " scored"]:
    """Gives the student's tokens the teacher's logprobs: log T_t = log T(span) * log S_t / log S(span).

    Where the student is certain of a whole span (log S = 0) its tokens have equal shares. A span of one student token takes
    the teacher's sum as it is, to the last bit.

    Args:
        student_logprobs: Logprobs of the student's tokens, at most 0; constants.
        teacher_logprobs: Logprobs of the teacher's tokens of the same text.
        spans: Of both, from `spans_of`.

    Returns:
        float64 logprobs of the student's tokens that belong to a span, which are the first ones; over each span they sum to
        the teacher's.
    """
    own = student_logprobs.double()[spans.student < spans.count]
    place = spans.student[spans.student < spans.count]
    theirs = teacher_logprobs.double()[spans.teacher < spans.count]
    zero = torch.zeros(spans.count, dtype=torch.float64)
    total = zero.index_add(0, spans.teacher[spans.teacher < spans.count], theirs)[place]
    mass = zero.index_add(0, place, own)[place]
    count = torch.bincount(place, minlength=spans.count)[place]
    share = torch.where(mass < 0, own / torch.where(mass < 0, mass, 1.0), 1.0 / count)
    return torch.where(count == 1, total, total * share)
