"""f-divergences sum_v p_v f(q_v / p_v): generators f by name, and the divergence of any of them.

Write `p` for the student, `q` for the teacher and u = q / p. A generator is convex with f(1) = 0. It is given as a
function of log u and of the log of a factor, because u alone overflows where p f(u) does not.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import softplus

from moteach.divergences.terms import align, at_exclusions, closed_form, logprobs_of, scaled_expm1, shielded, total
from moteach.errors import ConfigError, UnknownChoiceError, nearest
from moteach.types import Support

_SUPPORTS: frozenset[Support] = frozenset({"full", "topk"})
_LN2 = math.log(2.0)

Scaled = Callable[[Tensor, Tensor], Tensor]
"""Maps (log u, log c) to c times something of u."""


@dataclass(frozen=True, kw_only=True)
class Generator:
    """A convex f with f(1) = 0.

    Raises:
        ConfigError: f(1) is not 0, or f lies below its tangent at 1, so that it is not convex.
    """

    name: str
    """What messages call it."""
    function: Scaled
    """(log u, log c) -> c f(u). `lambda log_u, log_c: log_c.exp() * f(log_u.exp())` is right where f(u) does not
    overflow, which in float32 is |log u| < 88 for an f that grows like u."""
    at_zero: float
    """f(0), the limit for u -> 0, which weighs what the teacher alone excludes; may be `math.inf`."""
    recession: float
    """The limit of f(u) / u for u -> infinity, which weighs what the student alone excludes; may be `math.inf`."""
    tangent: Scaled | None = None
    """(log u, log c) -> c (f(u) - u f'(u)); None takes the derivative by autograd."""

    def __post_init__(self) -> None:
        log_u = torch.linspace(-3.0, 3.0, 13, dtype=torch.float64)
        below = self.function(log_u, torch.zeros_like(log_u)) - self.slope_at_one * log_u.expm1()
        if not abs(below[6].item()) < 1e-9 or not bool((below > -1e-9).all()):
            raise ConfigError(
                f"expected a convex generator with f(1) = 0, got '{self.name}' with f(1) = {below[6].item():g} and "
                f"{below.min().item():g} as its least height above its tangent at 1; the divergence would be negative "
                "and training would diverge. Subtract f(1) from it, and check its sign"
            )

    @property
    def slope_at_one(self) -> float:
        """f'(1)."""
        at_one = torch.zeros(1, dtype=torch.float64)
        return -self.tangent_at(at_one, at_one).item() + self.function(at_one, at_one).item()

    def tangent_at(
        self, log_u: Float[Tensor, "*token vocab"], log_scale: Float[Tensor, "*token vocab"]
    ) -> Float[Tensor, "*token vocab"]:
        """Computes c (f(u) - u f'(u)), where the tangent of f at u, times c, meets the axis; not differentiable."""
        if self.tangent is not None:
            return self.tangent(log_u, log_scale)
        with torch.enable_grad():
            leaf = log_u.detach().requires_grad_()
            value = self.function(leaf, log_scale.detach())
            (derivative,) = torch.autograd.grad(value.sum(), leaf)
        return value.detach() - derivative


def _jensen_shannon(log_u: Tensor, log_c: Tensor) -> Tensor:
    from_teacher = (log_c + log_u).exp() * (_LN2 - softplus(-log_u))
    return from_teacher - log_c.exp() * (softplus(log_u) - _LN2)


GENERATORS: Mapping[str, Generator] = MappingProxyType(
    {
        generator.name: generator
        for generator in (
            Generator(  # u log u
                name="forward_kl",
                function=lambda log_u, log_c: (log_c + log_u).exp() * log_u,
                tangent=lambda log_u, log_c: -(log_c + log_u).exp(),
                at_zero=0.0,
                recession=math.inf,
            ),
            Generator(  # -log u
                name="reverse_kl",
                function=lambda log_u, log_c: -log_c.exp() * log_u,
                tangent=lambda log_u, log_c: log_c.exp() * (1.0 - log_u),
                at_zero=math.inf,
                recession=0.0,
            ),
            Generator(  # u log u - (u + 1) log((u + 1) / 2)
                name="jensen_shannon",
                function=_jensen_shannon,
                tangent=lambda log_u, log_c: log_c.exp() * (_LN2 - softplus(log_u)),
                at_zero=_LN2,
                recession=_LN2,
            ),
            Generator(  # |u - 1| / 2
                name="total_variation",
                function=lambda log_u, log_c: 0.5 * scaled_expm1(log_c, log_u).abs(),
                tangent=lambda log_u, log_c: -0.5 * log_c.exp() * log_u.sign(),
                at_zero=0.5,
                recession=0.5,
            ),
            Generator(  # (sqrt(u) - 1)^2
                name="squared_hellinger",
                function=lambda log_u, log_c: scaled_expm1(0.5 * log_c, 0.5 * log_u).square(),
                tangent=lambda log_u, log_c: -scaled_expm1(log_c, 0.5 * log_u),
                at_zero=1.0,
                recession=1.0,
            ),
            Generator(  # (u - 1)^2
                name="pearson_chi2",
                function=lambda log_u, log_c: scaled_expm1(0.5 * log_c, log_u).square(),
                tangent=lambda log_u, log_c: -scaled_expm1(log_c, 2.0 * log_u),
                at_zero=1.0,
                recession=math.inf,
            ),
            Generator(  # (u - 1)^2 / u
                name="neyman_chi2",
                function=lambda log_u, log_c: scaled_expm1(0.5 * (log_c - log_u), log_u).square(),
                tangent=lambda log_u, log_c: 2.0 * scaled_expm1(log_c, -log_u),
                at_zero=math.inf,
                recession=1.0,
            ),
            Generator(  # (u - 1) log u
                name="jeffreys",
                function=lambda log_u, log_c: scaled_expm1(log_c, log_u) * log_u,
                tangent=lambda log_u, log_c: -log_c.exp() * log_u - scaled_expm1(log_c, log_u),
                at_zero=math.inf,
                recession=math.inf,
            ),
        )
    }
)
"""By name; the factors are those of f-GAN (arXiv 1606.00709), where it has the divergence."""


def f_divergence(
    student_logits: Float[Tensor, "*token vocab"],
    teacher_logits: Float[Tensor, "*token vocab"],
    *,
    generator: str | Generator,
    student_temperature: float = 1.0,
    teacher_temperature: float = 1.0,
) -> Float[Tensor, "*token"]:
    """D_f = sum_v p_v f(q_v / p_v), zero for p = q and never negative.

    By name: `forward_kl` u log u; `reverse_kl` -log u; `jensen_shannon` u log u - (u + 1) log((u + 1) / 2), which is
    twice JSD_0.5; `total_variation` |u - 1| / 2; `squared_hellinger` (sqrt(u) - 1)^2, without a factor 1/2;
    `pearson_chi2` (u - 1)^2; `neyman_chi2` (u - 1)^2 / u; `jeffreys` (u - 1) log u.

    Args:
        student_logits: Logits of `p`.
        teacher_logits: Logits of `q`.
        generator: A name, or your own.
        student_temperature: Divides the student's logits.
        teacher_temperature: Divides the teacher's logits.

    Returns:
        One value per token; +inf where one side excludes what the other can write and the generator's limit there is
        infinite, or where a power exceeds the dtype.

    Raises:
        UnknownChoiceError: No generator has this name.
        ConfigError: A temperature is not positive.
    """
    chosen = generator_of(generator)
    p, q = logprobs_of(student_logits, student_temperature), logprobs_of(teacher_logits, teacher_temperature)
    return total(_terms(p, q, chosen))


def generator_of(generator: str | Generator) -> Generator:
    """Looks a generator up by name; one that is given is returned.

    Raises:
        UnknownChoiceError: No generator has this name.
    """
    if isinstance(generator, Generator):
        return generator
    if generator not in GENERATORS:
        raise UnknownChoiceError(
            f"expected the name of a generator in f_divergence, got '{generator}'; {nearest(generator, GENERATORS)}. For "
            "one of your own call f_divergence(..., generator=Generator(...))"
        )
    return GENERATORS[generator]


@dataclass(frozen=True, kw_only=True)
class FDivergence:
    """`f_divergence` as a component, with a generator by name."""

    name: ClassVar[str] = "f_divergence"
    supports: ClassVar[frozenset[Support]] = _SUPPORTS
    generator: str = "squared_hellinger"

    def __post_init__(self) -> None:
        generator_of(self.generator)

    @property
    def slope(self) -> float:
        """-f'(1)."""
        return -generator_of(self.generator).slope_at_one

    def __call__(
        self, student_logits: Float[Tensor, "*token vocab"], teacher_logits: Float[Tensor, "*token vocab"]
    ) -> Float[Tensor, "*token"]:
        """See `f_divergence`."""
        return f_divergence(student_logits, teacher_logits, generator=self.generator)

    def terms(
        self, student_logprobs: Float[Tensor, "*token vocab"], teacher_logprobs: Float[Tensor, "*token vocab"]
    ) -> Float[Tensor, "*token vocab"]:
        """p_v f(q_v / p_v)."""
        return _terms(student_logprobs, teacher_logprobs, generator_of(self.generator))

    def value_and_gradient(
        self, student_logprobs: Float[Tensor, "*token vocab"], teacher_logprobs: Float[Tensor, "*token vocab"]
    ) -> tuple[Float[Tensor, "*token"], Float[Tensor, "*token vocab"]]:
        """Value, and the gradient of s_v = p_v (f(u_v) - u_v f'(u_v))."""
        chosen = generator_of(self.generator)
        terms = _terms(student_logprobs, teacher_logprobs, chosen)
        pair = align(student_logprobs, teacher_logprobs)
        slopes = chosen.tangent_at(pair.log_ratio, pair.student)
        slopes = slopes.masked_fill(student_logprobs == -math.inf, 0.0)
        # where f(0) is infinite so is the value, and its gradient zero
        limit = chosen.at_zero if math.isfinite(chosen.at_zero) else 0.0
        return closed_form(terms, at_exclusions(slopes, pair.teacher_out, limit, student_logprobs), student_logprobs)


def _terms(student_logprobs: Tensor, teacher_logprobs: Tensor, generator: Generator) -> Tensor:
    return shielded(lambda p, q: _raw_terms(p, q, generator), student_logprobs, teacher_logprobs)


def _raw_terms(student_logprobs: Tensor, teacher_logprobs: Tensor, generator: Generator) -> Tensor:
    pair = align(student_logprobs, teacher_logprobs)
    neither = (student_logprobs == -math.inf) & (teacher_logprobs == -math.inf)
    terms = generator.function(pair.log_ratio, pair.student).masked_fill(neither, 0.0)
    terms = at_exclusions(terms, pair.student_out, generator.recession, teacher_logprobs)
    return at_exclusions(terms, pair.teacher_out, generator.at_zero, student_logprobs)
