"""Divergences on a support of k tokens: what is compared, and what becomes of the rest of the vocabulary.

Write `p` for the student, `q` for the teacher, `S` for the support, `m` and `n` for their masses on it, `p_S` and `q_S`
for the two renormalised on it, `T` for the rest of the vocabulary. For reverse KL nothing is lost in

    KL(p || q) = KL_bin(m, n) + m KL(p_S || q_S) + (1 - m) KL(p_T || q_T)

and each truncation keeps another part of it:

- `renormalise` D(p_S, q_S): the middle factor without m. Blind to mass that leaves S, hence the masses beside each value.
- `tail_bucket` D on the k tokens and one category for the rest (SDPO, arXiv 2601.20802): the first two parts; a lower
  bound of the full divergence that grows with nested supports.
- `plain` the terms on S at the probabilities of the full softmax (OPCD, arXiv 2602.12275): may be negative, and its
  gradient is not zero where student and teacher agree.
- `corrected` the same minus slope (p - q) on S, slope being the term's derivative in p at p = q (MOPD, arXiv 2606.30406,
  Eq. 5: p log(p/q) - p + q): never negative, zero and stationary where they agree on S.

All four are the full divergence when S is the vocabulary.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal, cast, get_args

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from moteach.divergences.base import Divergence, PointwiseDivergence, value_and_gradient
from moteach.errors import ConfigError, UnsupportedCombinationError, nearest
from moteach.types import Support

Truncation = Literal["renormalise", "tail_bucket", "plain", "corrected"]
"""What becomes of the tokens outside the support."""
Source = Literal["teacher", "student", "union", "intersection"]
"""Whose k likeliest tokens are the support."""

_OUT = -math.inf


@dataclass(frozen=True, kw_only=True, slots=True)
class TopKEvaluation:
    """A truncated divergence, its gradient, and the masses it may be blind to."""

    value: Float[Tensor, "*token"]
    """Nats, detached."""
    gradient: Float[Tensor, "*token vocab"]
    """Derivative with respect to all of the student's logits; a fresh tensor, zero for a token of infinite value."""
    student_mass: Float[Tensor, "*token"]
    """The student's probability of the support."""
    teacher_mass: Float[Tensor, "*token"]
    """The teacher's probability of the support."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Chosen:
    """A support: token ids, and which of them count (None: all). An uncounted id is a duplicate or not in the support."""

    ids: Int[Tensor, "*token width"]
    counted: Bool[Tensor, "*token width"] | None

    def read(self, logprobs: Float[Tensor, "*token vocab"]) -> Float[Tensor, "*token width"]:
        return self.keep(_wide(logprobs.gather(-1, self.ids)))

    def keep(self, values: Float[Tensor, "*token width"]) -> Float[Tensor, "*token width"]:
        return values if self.counted is None else values.masked_fill(~self.counted, _OUT)

    def without(self, logprobs: Float[Tensor, "*token vocab"]) -> Float[Tensor, "*token vocab"]:
        """A copy of the logprobs with -inf on the support."""
        if self.counted is None:
            return logprobs.scatter(-1, self.ids, _OUT)
        # the smaller wins, so an uncounted +inf leaves its token as it was, whatever the order of duplicates
        fill = torch.full(self.ids.shape, math.inf, dtype=logprobs.dtype, device=logprobs.device)
        return logprobs.scatter_reduce(-1, self.ids, fill.masked_fill_(self.counted, _OUT), reduce="amin")


@dataclass(frozen=True, kw_only=True)
class TopK:
    """A divergence on a support of k tokens.

    The choice of the support is a constant: no gradient flows through it. A support may be empty only with source
    `intersection`; value, gradient and masses are zero there. `renormalise` is +inf, with a zero gradient, where one of
    the two gives the whole support no mass: there is nothing to renormalise.

    Args:
        divergence: What is evaluated on the support; `plain` and `corrected` need its pointwise `terms`.
        k: Number of likeliest tokens; the whole vocabulary from `k >= vocab` on.
        source: Whose likeliest tokens: `teacher` (revisiting OPD, arXiv 2603.25562), `student` (rethinking OPD, arXiv
            2604.13016), `union` (up to 2k tokens, none twice) or `intersection` (0 to k tokens).
        truncation: What becomes of the other tokens; see the module.

    Raises:
        ConfigError: `k` is not positive, or `source` or `truncation` is not one of the above.
        UnsupportedCombinationError: A sum over the support is asked of a divergence that is not a sum over tokens, or
            the divergence is itself a truncated one.
    """

    name: ClassVar[str] = "topk"
    supports: ClassVar[frozenset[Support]] = frozenset({"full", "topk"})
    divergence: Divergence
    k: int
    source: Source = "teacher"
    truncation: Truncation = "renormalise"

    def __post_init__(self) -> None:
        if self.k < 1:
            raise ConfigError(f"expected k >= 1 tokens in the support of topk, got {self.k}; nothing would be compared")
        for key, value, choices in (
            ("source", self.source, get_args(Source)),
            ("truncation", self.truncation, get_args(Truncation)),
        ):
            if value not in choices:
                raise ConfigError(f"expected a {key} of topk, got '{value}'; {nearest(value, choices)}")
        if isinstance(self.divergence, TopK):
            raise UnsupportedCombinationError(
                "expected a divergence over a whole distribution inside topk, got another topk; the inner support would "
                "be chosen among the outer one's tokens and its masses would mean nothing. Keep one of the two"
            )
        if self.truncation in ("plain", "corrected") and not hasattr(self.divergence, "terms"):
            raise UnsupportedCombinationError(
                f"truncation={self.truncation} sums one term a token, and '{self.divergence.name}' is not such a sum: a "
                "partial sum would be no bound of it and have another minimum. Use truncation=renormalise or "
                "tail_bucket, which evaluate it on a proper distribution, or a pointwise divergence such as reverse_kl"
            )

    def __call__(
        self, student_logits: Float[Tensor, "*token vocab"], teacher_logits: Float[Tensor, "*token vocab"]
    ) -> Float[Tensor, "*token"]:
        """Returns the truncated divergence of each token in nats, by plain differentiable operations."""
        p, q = student_logits.log_softmax(-1), teacher_logits.log_softmax(-1)
        support = self._choose(p.detach(), q.detach())
        student, teacher = support.read(p), support.read(q)
        if self.truncation == "renormalise":
            student, teacher, no_p, no_q = _renormalisable(student, teacher)
            value = self.divergence(student, teacher)
            value = value.masked_fill(no_p & no_q, 0.0).masked_fill(no_p ^ no_q, math.inf)
        elif self.truncation == "tail_bucket":
            rest = support.without(torch.zeros_like(p)) == _OUT
            student_tail, teacher_tail = (_log_sum(side.masked_fill(rest, _OUT)) for side in (p, q))
            value = self.divergence(
                torch.cat([student, student_tail], dim=-1), torch.cat([teacher, teacher_tail], dim=-1)
            )
        else:
            value = self._sum(student, teacher)
        return value.to(student_logits.dtype)

    def value_and_gradient(
        self, student_logprobs: Float[Tensor, "*token vocab"], teacher_logprobs: Float[Tensor, "*token vocab"]
    ) -> tuple[Float[Tensor, "*token"], Float[Tensor, "*token vocab"]]:
        """Value and gradient of `evaluate`, without the masses."""
        seen = self.evaluate(student_logprobs, teacher_logprobs)
        return seen.value, seen.gradient

    def evaluate(
        self, student_logprobs: Float[Tensor, "*token vocab"], teacher_logprobs: Float[Tensor, "*token vocab"]
    ) -> TopKEvaluation:
        """Evaluates the truncated divergence where both distributions are known.

        With s_i the derivative of the value in log p_i at the i-th token of the support, the gradient is
        d/dz = scatter(s) - p sum(s); the renormalised forms have sum(s) = 0.

        Args:
            student_logprobs: Normalised logprobs of the student.
            teacher_logprobs: Normalised logprobs of the target.

        Returns:
            Value, gradient and both masses of the support.
        """
        student_logprobs, teacher_logprobs = student_logprobs.detach(), teacher_logprobs.detach()
        support = self._choose(student_logprobs, teacher_logprobs)
        tail = None
        if self.truncation == "tail_bucket":
            tail = _exponentiate_(support.without(teacher_logprobs))[0]
        return self._evaluate(student_logprobs, support, support.read(teacher_logprobs), tail)

    def evaluate_on(
        self,
        student_logprobs: Float[Tensor, "*token vocab"],
        ids: Int[Tensor, "*token given"],
        teacher_logprobs: Float[Tensor, "*token given"],
    ) -> TopKEvaluation:
        """Evaluates the truncated divergence where the teacher sent only its likeliest tokens.

        The teacher's tail is one minus the mass of what it sent, and never below the resolution of its numbers: a mass
        that rounds to one says nothing about how small the rest is, and must not make the reverse KL infinite.

        Args:
            student_logprobs: Normalised logprobs of the student.
            ids: Distinct tokens that contain the teacher's k likeliest; of more than k, the k likeliest are used.
            teacher_logprobs: Their logprobs, normalised over the whole vocabulary.

        Returns:
            Value, gradient and both masses of the support.

        Raises:
            UnsupportedCombinationError: The support has tokens of the student's choice.
            ConfigError: Fewer than k tokens (or than the vocabulary, if smaller) were sent.
        """
        if self.source in ("student", "union"):
            raise UnsupportedCombinationError(
                f"source={self.source} needs the teacher's probability of tokens that the student chose, and the teacher "
                "sent only its own likeliest; the missing ones would count as impossible. Use source=teacher or "
                "intersection, or support=full"
            )
        student_logprobs, teacher_logprobs = student_logprobs.detach(), teacher_logprobs.detach()
        given, k = ids.shape[-1], min(self.k, student_logprobs.shape[-1])
        if given < k:
            raise ConfigError(
                f"expected the teacher's {k} likeliest tokens, got {given}; the support would silently be smaller than "
                f"objective.k says. Ask the teacher for {k} (support.k={k}) or set objective.k={given}"
            )
        kept = teacher_logprobs
        if given > k:
            kept, best = teacher_logprobs.topk(k, dim=-1, sorted=False)
            ids = ids.gather(-1, best)
        counted = None
        if self.source == "intersection":
            counted = _among(ids, student_logprobs.topk(k, dim=-1, sorted=False).indices)
        support = _Chosen(ids=ids, counted=counted)
        teacher = support.keep(kept.to(_wide_dtype(student_logprobs)))
        tail = None
        if self.truncation == "tail_bucket":
            tail = _rest_of(teacher, torch.finfo(kept.dtype).eps)
            if k == student_logprobs.shape[-1]:
                tail.fill_(_OUT)
        return self._evaluate(student_logprobs, support, teacher, tail)

    def _choose(self, student: Tensor, teacher: Tensor) -> _Chosen:
        k = min(self.k, student.shape[-1])
        if self.source == "student":
            return _Chosen(ids=student.topk(k, dim=-1, sorted=False).indices, counted=None)
        ids = teacher.topk(k, dim=-1, sorted=False).indices
        if self.source == "teacher":
            return _Chosen(ids=ids, counted=None)
        mine = student.topk(k, dim=-1, sorted=False).indices
        if self.source == "intersection":
            return _Chosen(ids=ids, counted=_among(ids, mine))
        counted = torch.cat([torch.ones_like(ids, dtype=torch.bool), ~_among(mine, ids)], dim=-1)
        return _Chosen(ids=torch.cat([ids, mine], dim=-1), counted=counted)

    def _evaluate(
        self, student_logprobs: Tensor, support: _Chosen, teacher: Tensor, teacher_tail: Tensor | None
    ) -> TopKEvaluation:
        student = support.read(student_logprobs)
        if self.truncation == "renormalise":
            p, q, no_p, no_q = _renormalisable(student, teacher)
            value, slopes = value_and_gradient(self.divergence, p.log_softmax(-1), q.log_softmax(-1))
            value = value.masked_fill(no_p & no_q, 0.0).masked_fill(no_p ^ no_q, math.inf)
            gradient = torch.zeros_like(student_logprobs)
        elif teacher_tail is not None:
            rest = support.without(student_logprobs)
            student_tail, total = _exponentiate_(rest)
            p, q = torch.cat([student, student_tail], dim=-1), torch.cat([teacher, teacher_tail], dim=-1)
            value, slopes = value_and_gradient(self.divergence, p.log_softmax(-1), q.log_softmax(-1))
            # the bucket's share of each token in it; `total` is at least one unless the bucket is empty
            slopes, of_tail = slopes[..., :-1], slopes[..., -1:]
            gradient = rest.mul_(of_tail / total.clamp_min(1.0))
        else:
            with torch.enable_grad():
                leaf = student.detach().requires_grad_()
                value = self._sum(leaf, teacher.detach())
                (slopes,) = torch.autograd.grad(value.sum(), leaf)
            value = value.detach()
            gradient = student_logprobs.exp().mul_(-slopes.sum(-1, keepdim=True))
        gradient.scatter_add_(-1, support.ids, slopes.to(gradient.dtype))
        unreachable = ~value.isfinite()
        if bool(unreachable.any()):
            gradient.masked_fill_(unreachable.unsqueeze(-1), 0.0)
        dtype = student_logprobs.dtype
        masses = [side.exp().sum(-1).to(dtype) for side in (student, teacher)]
        return TopKEvaluation(value=value.to(dtype), gradient=gradient, student_mass=masses[0], teacher_mass=masses[1])

    def _sum(self, student: Tensor, teacher: Tensor) -> Tensor:
        """The differentiable sum of terms on the support; +inf where one of them is, with a zero gradient."""
        divergence = cast(PointwiseDivergence, self.divergence)
        terms = divergence.terms(student, teacher)
        if self.truncation == "corrected":
            terms = terms - divergence.slope * (student.exp() - teacher.exp())
        infinite = terms.detach().isinf().any(-1)
        return terms.sum(-1).masked_fill(infinite, math.inf)


def _renormalisable(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Makes tokens on whose support a side has no mass uniform, and says where that side is the student, the teacher."""
    no_p, no_q = (student == _OUT).all(-1), (teacher == _OUT).all(-1)
    void = (no_p | no_q).unsqueeze(-1)
    return student.masked_fill(void, 0.0), teacher.masked_fill(void, 0.0), no_p, no_q


def _among(ids: Int[Tensor, "*token width"], others: Int[Tensor, "*token k"]) -> Bool[Tensor, "*token width"]:
    """Says which ids are among the others, in memory of the size of the ids."""
    ordered = others.sort(-1).values
    place = torch.searchsorted(ordered, ids.contiguous()).clamp_max_(others.shape[-1] - 1)
    return ordered.gather(-1, place) == ids


def _exponentiate_(
    logprobs: Float[Tensor, "*token vocab"],
) -> tuple[Float[Tensor, "*token 1"], Float[Tensor, "*token 1"]]:
    """Turns logprobs, in place, into exp(logprob - largest); returns the log of their mass and the sum of what is left.

    One minus the mass of the support would lose a tail below the resolution of the dtype, and a teacher's tail rounded
    to zero makes the reverse KL infinite.
    """
    largest = logprobs.amax(-1, keepdim=True)
    largest = largest.masked_fill(largest == _OUT, 0.0)
    total = logprobs.sub_(largest).exp_().sum(-1, keepdim=True, dtype=_wide_dtype(logprobs))
    return total.log() + largest, total


def _log_sum(logprobs: Float[Tensor, "*token vocab"]) -> Float[Tensor, "*token 1"]:
    """Differentiable log of the mass, -inf with a zero gradient where there is none."""
    empty = (logprobs == _OUT).all(-1, keepdim=True)
    return _wide(logprobs.masked_fill(empty, 0.0).logsumexp(-1, keepdim=True)).masked_fill(empty, _OUT)


def _rest_of(logprobs: Float[Tensor, "*token width"], resolution: float) -> Float[Tensor, "*token 1"]:
    """log(1 - mass), stable at both ends and not below the log of the resolution."""
    mass = logprobs.logsumexp(-1, keepdim=True).clamp_max(0.0)
    small = mass < -math.log(2.0)
    rest = torch.where(small, torch.log1p(-mass.exp()), torch.log(-torch.expm1(mass)))
    return rest.clamp_min(math.log(resolution))


def _wide(values: Tensor) -> Tensor:
    return values.to(_wide_dtype(values))


def _wide_dtype(values: Tensor) -> torch.dtype:
    """At least float32: the tensors of k entries are small, and their sums decide."""
    return torch.promote_types(values.dtype, torch.float32)
