"""The families of divergences against formulas written out here from their sources, in float64 or with 50 digits."""

from __future__ import annotations

import itertools
import math

import mpmath
import pytest
import torch
from torch import Tensor

from moteach.divergences.components import (
    JSD,
    AdaptiveKL,
    AlphaBeta,
    FDivergence,
    ForwardKL,
    Renyi,
    ReverseKL,
    SkewForwardKL,
    SkewReverseKL,
    ToDi,
    TotalVariation,
)
from moteach.divergences.full import (
    adaptive_kl,
    alpha_beta,
    f_divergence,
    forward_kl,
    jsd,
    renyi,
    reverse_kl,
    skew_forward_kl,
    skew_reverse_kl,
    todi,
    total_variation,
)
from moteach.divergences.generators import GENERATORS, Generator

INF = math.inf
P = torch.tensor([0.6, 0.25, 0.1, 0.05], dtype=torch.float64)
Q = torch.tensor([0.15, 0.3, 0.35, 0.2], dtype=torch.float64)


def logits(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 2


def close(got: Tensor, expected: Tensor | float, rtol: float = 1e-11, atol: float = 1e-13) -> None:
    torch.testing.assert_close(got, torch.as_tensor(expected, dtype=got.dtype).expand_as(got), rtol=rtol, atol=atol)


# --- total variation -------------------------------------------------------------------------------------------------


def test_total_variation_is_half_the_l1_distance():
    close(total_variation(P.log(), Q.log()), 0.5 * (0.45 + 0.05 + 0.25 + 0.15))


def test_one_minus_total_variation_is_the_acceptance_rate():
    p, q = logits(30, 9), logits(30, 9, seed=1)
    accepted = (p.softmax(-1) * (q.softmax(-1) / p.softmax(-1)).clamp_max(1.0)).sum(-1)
    close(1.0 - total_variation(p, q), accepted)


def test_pinskers_inequality_holds_and_is_nearly_reached():
    p, q = logits(300, 9), logits(300, 9, seed=1)
    for smaller in (reverse_kl(p, q), forward_kl(p, q)):
        assert (total_variation(p, q) <= (smaller / 2).sqrt()).all()
    near = torch.tensor([0.5 + 1e-4, 0.5 - 1e-4], dtype=torch.float64).log()
    even = torch.zeros(2, dtype=torch.float64)
    assert total_variation(near, even).item() == pytest.approx((reverse_kl(near, even) / 2).sqrt().item(), rel=1e-6)


# --- skewed KL -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("alpha", [0.1, 0.3, 0.9])
def test_alpha_of_the_skew_divergences_weighs_the_first_argument_of_each(alpha: float):
    of_teacher, of_student = alpha * Q + (1 - alpha) * P, alpha * P + (1 - alpha) * Q
    close(skew_forward_kl(P.log(), Q.log(), alpha=alpha), (Q * (Q / of_teacher).log()).sum())
    close(skew_reverse_kl(P.log(), Q.log(), alpha=alpha), (P * (P / of_student).log()).sum())
    assert (
        skew_forward_kl(P.log(), Q.log(), alpha=alpha) - skew_reverse_kl(P.log(), Q.log(), alpha=alpha)
    ).abs() > 1e-4


def test_skew_divergences_tend_to_the_kl_divergences():
    p, q = logits(30, 6), logits(30, 6, seed=1)
    close(skew_forward_kl(p, q, alpha=1e-9), forward_kl(p, q), rtol=1e-5)
    close(skew_reverse_kl(p, q, alpha=1e-9), reverse_kl(p, q), rtol=1e-5)


@pytest.mark.parametrize("alpha", [0.1, 0.4])
def test_skew_divergences_are_at_most_minus_log_alpha_and_reach_it(alpha: float):
    p, q = 20 * logits(300, 4), 20 * logits(300, 4, seed=1)
    apart = torch.tensor([[0.0, -INF], [-INF, 0.0]], dtype=torch.float64)
    for divergence in (skew_forward_kl, skew_reverse_kl):
        assert (divergence(p, q, alpha=alpha) <= -math.log(alpha) + 1e-12).all()
        close(divergence(apart[0], apart[1], alpha=alpha), -math.log(alpha))
    assert -math.log(0.1) == pytest.approx(2.3026, abs=1e-4)


# --- adaptive KL and ToDi --------------------------------------------------------------------------------------------


def adaptive_by_hand(p: Tensor, q: Tensor, head: list[int]) -> Tensor:
    gap = (p - q).abs()
    weight = gap[head].sum() / gap.sum()
    return weight * (q * (q / p).log()).sum() + (1 - weight) * (p * (p / q).log()).sum()


@pytest.mark.parametrize(
    ("head_mass", "head"),
    [
        (0.1, [2]),  # even the likeliest crosses it, and belongs to the head nevertheless
        (0.34, [2]),
        (0.36, [2]),
        (0.6, [2]),  # token 1 would take the mass from 0.35 to 0.65
        (0.7, [2, 1]),
        (0.86, [2, 1, 3]),
    ],
)
def test_the_token_that_crosses_the_head_mass_is_in_the_tail(head_mass: float, head: list[int]):
    close(adaptive_kl(P.log(), Q.log(), head_mass=head_mass), adaptive_by_hand(P, Q, head))


def test_a_head_that_fills_its_mass_exactly_is_a_head():
    q = torch.tensor([0.25, 0.5, 0.25], dtype=torch.float64)
    p = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
    close(adaptive_kl(p.log(), q.log(), head_mass=0.5), adaptive_by_hand(p, q, [1]))
    close(adaptive_kl(p.log(), q.log(), head_mass=0.75), adaptive_by_hand(p, q, [1, 0]))  # ties by token id


def test_adaptive_kl_has_the_gradient_of_its_mixture_at_frozen_weights():
    p, q = logits(20, 8), logits(20, 8, seed=1)
    student, teacher = p.softmax(-1), q.softmax(-1)
    order = teacher.argsort(dim=-1, descending=True)
    gap = (student - teacher).abs()
    weights = []
    for row in range(20):
        mass, head = 0.0, [int(order[row, 0])]
        for index in order[row].tolist():
            mass += teacher[row, index].item()
            if mass <= 0.5 and index not in head:
                head.append(index)
        weights.append(gap[row, head].sum() / gap[row].sum())
    weight = torch.stack(weights)
    leaf = p.clone().requires_grad_()
    frozen = weight * forward_kl(leaf, q) + (1 - weight) * reverse_kl(leaf, q)
    (expected,) = torch.autograd.grad(frozen.sum(), leaf)
    value, gradient = AdaptiveKL().value_and_gradient(p.log_softmax(-1), q.log_softmax(-1))
    close(value, frozen.detach())
    close(gradient, expected, rtol=1e-10)
    # and not the gradient of the value itself
    whole = torch.func.jacrev(lambda z: adaptive_value(z, teacher, weight_at=z))(p[0])
    assert (whole - gradient[0]).abs().max() > 1e-3


def adaptive_value(z: Tensor, teacher: Tensor, weight_at: Tensor) -> Tensor:
    """Row 0 of the above, with a weight that moves along."""
    student, q = weight_at.softmax(-1), teacher[0]
    ranked = q.argsort(descending=True)
    inside = (q[ranked].cumsum(0) <= 0.5) | (torch.arange(8) == 0)
    gap = (student - q).abs()[ranked]
    weight = (gap * inside).sum() / gap.sum()
    return (
        weight * (q * (q.log() - z.log_softmax(-1))).sum()
        + (1 - weight) * (z.softmax(-1) * (z.log_softmax(-1) - q.log())).sum()
    )


def test_an_infinite_divergence_of_no_weight_is_left_out():
    teacher = torch.tensor([0.5, 0.25, 0.25, 0.0], dtype=torch.float64)
    student = torch.tensor([0.5, 0.5, 0.0, 0.0], dtype=torch.float64)
    value, gradient = AdaptiveKL().value_and_gradient(student.log(), teacher.log())
    close(value, 0.5 * math.log(2.0))  # the head agrees, so the forward KL, which is infinite, has a weight of zero
    close(adaptive_kl(student.log(), teacher.log()), value)
    close(gradient, (student * ((student / teacher).log().nan_to_num(neginf=0.0) - value)).nan_to_num())


def test_the_value_of_todi_is_jeffreys_divergence():
    p, q = logits(30, 7), logits(30, 7, seed=1)
    close(todi(p, q), forward_kl(p, q) + reverse_kl(p, q))
    close(todi(P.log(), Q.log()), ((Q - P) * (Q / P).log()).sum())


def test_todi_has_the_gradient_of_its_mixture_at_frozen_weights():
    p, q = logits(20, 7), logits(20, 7, seed=1)
    weight = torch.sigmoid((q.softmax(-1) / p.softmax(-1)).log())
    leaf = p.clone().requires_grad_()
    student, teacher = leaf.softmax(-1), q.softmax(-1)
    terms = weight * teacher * (teacher / student).log() + (1 - weight) * student * (student / teacher).log()
    (expected,) = torch.autograd.grad(terms.sum(), leaf)
    value, gradient = ToDi().value_and_gradient(p.log_softmax(-1), q.log_softmax(-1))
    close(value, terms.sum(-1).detach())
    close(gradient, expected, rtol=1e-10)
    (jeffreys,) = torch.autograd.grad((forward_kl(leaf, q) + reverse_kl(leaf, q)).sum(), leaf)
    assert (jeffreys - gradient).abs().max() > 1e-2


# --- alpha-beta ------------------------------------------------------------------------------------------------------


def alpha_beta_exact(p: Tensor, q: Tensor, alpha: float, beta: float) -> float:
    """The formula itself, divisions by almost zero included, with 50 digits."""
    with mpmath.workdps(50):
        a, b = mpmath.mpf(alpha), mpmath.mpf(beta)
        pairs = [(mpmath.mpf(x), mpmath.mpf(y)) for x, y in zip(p.tolist(), q.tolist(), strict=True)]
        terms = [y**a * x**b - a / (a + b) * y ** (a + b) - b / (a + b) * x ** (a + b) for x, y in pairs]
        return float(-sum(terms) / (a * b))


@pytest.mark.parametrize(("alpha", "beta"), itertools.product([-1.5, -0.5, 0.2, 0.7, 1.0, 2.0], [-1.1, 0.3, 0.7, 1.3]))
def test_alpha_beta_is_its_formula(alpha: float, beta: float):
    close(alpha_beta(P.log(), Q.log(), alpha=alpha, beta=beta), alpha_beta_exact(P, Q, alpha, beta), rtol=1e-12)


@pytest.mark.parametrize(
    ("alpha", "beta"),
    [(0.0, 0.5), (0.0, 1.0), (0.0, -2.0), (0.5, 0.0), (1.0, 0.0), (-2.0, 0.0), (0.7, -0.7), (-1.0, 1.0), (0.0, 0.0)],
)
def test_alpha_beta_is_continuous_where_its_formula_divides_by_zero(alpha: float, beta: float):
    tiny = 1e-15
    limit = alpha_beta_exact(P, Q, alpha + tiny, beta + 2 * tiny)
    close(alpha_beta(P.log(), Q.log(), alpha=alpha, beta=beta), limit, rtol=1e-11)


def test_a_sum_that_is_zero_but_for_rounding_is_zero():
    excluded = torch.tensor([0.0, -INF, -1.0], dtype=torch.float64)
    assert 0.1 + 0.2 - 0.3 != 0.0
    assert alpha_beta(excluded, Q[:3].log(), alpha=0.1 + 0.2, beta=-0.3).item() == INF
    close(
        alpha_beta(P.log(), Q.log(), alpha=0.1 + 0.2, beta=-0.3), alpha_beta_exact(P, Q, 0.3 + 1e-15, -0.3), rtol=1e-11
    )


def test_alpha_beta_holds_the_kl_divergences_and_hellingers():
    p, q = logits(30, 6), logits(30, 6, seed=1)
    close(alpha_beta(p, q, alpha=1.0, beta=0.0), forward_kl(p, q))
    close(alpha_beta(p, q, alpha=0.0, beta=1.0), reverse_kl(p, q))
    hellinger = (p.softmax(-1).sqrt() - q.softmax(-1).sqrt()).square().sum(-1)
    close(alpha_beta(p, q, alpha=0.5, beta=0.5), 2.0 * hellinger)
    close(alpha_beta(p, q, alpha=1.0, beta=1.0), 0.5 * (p.softmax(-1) - q.softmax(-1)).square().sum(-1))
    close(alpha_beta(p, q, alpha=0.0, beta=0.0), 0.5 * (p.log_softmax(-1) - q.log_softmax(-1)).square().sum(-1))


@pytest.mark.parametrize("size", [0.5, 1.0, 2.0])
def test_the_edges_of_the_official_code_are_off_by_a_factor(size: float):
    """What ghwang-s/abkd computes at beta = 0, alpha = 0 and alpha + beta = 0 is `size` times the limit of its formula."""
    p_a, q_a = P.pow(size), Q.pow(size)
    wrong = {
        (size, 0.0): (q_a * (q_a / p_a).log() - q_a + p_a).sum() / size,
        (0.0, size): (p_a * (p_a / q_a).log() - p_a + q_a).sum() / size,
        (size, -size): ((p_a / q_a).log() + q_a / p_a - 1.0).sum() / size,
    }
    for (alpha, beta), value in wrong.items():
        right = alpha_beta(P.log(), Q.log(), alpha=alpha, beta=beta)
        close(right, alpha_beta_exact(P, Q, alpha + 1e-15, beta + 2e-15), rtol=1e-11)
        assert (value / right).item() == pytest.approx(size, rel=1e-11)


# --- Renyi -----------------------------------------------------------------------------------------------------------


def renyi_exact(p: Tensor, q: Tensor, order: float) -> float:
    with mpmath.workdps(50):
        a = mpmath.mpf(order)
        pairs = [(mpmath.mpf(x), mpmath.mpf(y)) for x, y in zip(p.tolist(), q.tolist(), strict=True)]
        # tolist() rounds: normalise, or the difference from one is divided by a - 1
        of_p, of_q = sum(x for x, _ in pairs), sum(y for _, y in pairs)
        return float(mpmath.log(sum((x / of_p) ** a * (y / of_q) ** (1 - a) for x, y in pairs)) / (a - 1))


@pytest.mark.parametrize("order", [0.01, 0.3, 0.5, 0.999, 1 - 1e-9, 1 + 1e-12, 1.0001, 2.0, 7.0, 100.0])
def test_renyi_is_its_formula_at_every_order_also_next_to_one(order: float):
    close(renyi(P.log(), Q.log(), order=order), renyi_exact(P, Q, order), rtol=1e-12)


def test_renyi_next_to_order_one_keeps_its_digits_in_float32():
    p, q = P.log().float(), Q.log().float()
    for order in (1 - 1e-4, 1 + 1e-6):
        assert renyi(p, q, order=order).item() == pytest.approx(renyi_exact(P, Q, order), rel=2e-6)


def test_renyi_of_order_one_is_the_reverse_kl_and_the_limit_of_both_sides():
    p, q = logits(30, 6), logits(30, 6, seed=1)
    assert torch.equal(renyi(p, q, order=1.0), reverse_kl(p, q))
    for order in (1 - 1e-7, 1 + 1e-7):
        close(renyi(p, q, order=order), reverse_kl(p, q), rtol=1e-5)
        got = Renyi(order=order).value_and_gradient(p.log_softmax(-1), q.log_softmax(-1))[1]
        close(got, ReverseKL().value_and_gradient(p.log_softmax(-1), q.log_softmax(-1))[1], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("order", [0.1, 0.35, 0.8])
def test_renyi_is_skew_symmetric_below_order_one(order: float):
    p, q = logits(30, 6), logits(30, 6, seed=1)
    close((1 - order) / order * renyi(p, q, order=order), renyi(q, p, order=1 - order))


def test_renyi_grows_with_its_order_towards_the_largest_log_ratio():
    p, q = logits(30, 6), logits(30, 6, seed=1)
    values = torch.stack([renyi(p, q, order=order) for order in (0.1, 0.5, 1.0, 2.0, 10.0, 1e4)])
    assert (values.diff(dim=0) > 0).all()
    close(values[-1], (p.log_softmax(-1) - q.log_softmax(-1)).amax(-1), rtol=1e-2)


def test_renyi_of_half_is_minus_twice_the_log_of_the_overlap():
    p, q = logits(30, 6), logits(30, 6, seed=1)
    close(renyi(p, q, order=0.5), -2 * (p.softmax(-1) * q.softmax(-1)).sqrt().sum(-1).log())


def test_renyi_of_two_is_the_log_of_one_plus_chi_square():
    p, q = logits(30, 6), logits(30, 6, seed=1)
    close(renyi(p, q, order=2.0), f_divergence(p, q, generator="neyman_chi2").log1p())


# --- f-divergences ---------------------------------------------------------------------------------------------------

PLAIN = {
    "forward_kl": lambda u: u * u.log(),
    "reverse_kl": lambda u: -u.log(),
    "jensen_shannon": lambda u: u * u.log() - (u + 1) * ((u + 1) / 2).log(),
    "total_variation": lambda u: (u - 1).abs() / 2,
    "squared_hellinger": lambda u: (u.sqrt() - 1).square(),
    "pearson_chi2": lambda u: (u - 1).square(),
    "neyman_chi2": lambda u: (u - 1).square() / u,
    "jeffreys": lambda u: (u - 1) * u.log(),
}


def independent(name: str, p: Tensor, q: Tensor) -> Tensor:
    """Each divergence by what it is elsewhere, without a generator."""
    sp, sq = p.softmax(-1), q.softmax(-1)
    return {
        "forward_kl": lambda: forward_kl(p, q),
        "reverse_kl": lambda: reverse_kl(p, q),
        "jensen_shannon": lambda: 2 * jsd(p, q, beta=0.5),
        "total_variation": lambda: (sp - sq).clamp_min(0).sum(-1),
        "squared_hellinger": lambda: 2 - 2 * (sp * sq).sqrt().sum(-1),
        "pearson_chi2": lambda: (sq.square() / sp).sum(-1) - 1,
        "neyman_chi2": lambda: (sp.square() / sq).sum(-1) - 1,
        "jeffreys": lambda: forward_kl(p, q) + reverse_kl(p, q),
    }[name]()


@pytest.mark.parametrize("name", GENERATORS)
def test_each_generator_gives_the_divergence_it_is_named_after(name: str):
    p, q = logits(30, 6), logits(30, 6, seed=1)
    close(f_divergence(p, q, generator=name), independent(name, p, q), rtol=1e-10)
    u = Q / P
    close(f_divergence(P.log(), Q.log(), generator=name), (P * PLAIN[name](u)).sum())


@pytest.mark.parametrize("name", GENERATORS)
def test_the_derivative_and_the_limits_of_each_generator_are_those_of_its_formula(name: str):
    generator, f = GENERATORS[name], PLAIN[name]
    u = torch.tensor([1e-3, 0.2, 0.9, 1.3, 7.0, 1e3], dtype=torch.float64).requires_grad_()
    (derivative,) = torch.autograd.grad(f(u).sum(), u)
    expected = (f(u) - u * derivative).detach()
    log_u, log_c = u.detach().log(), torch.full((6,), -1.5, dtype=torch.float64)
    close(generator.tangent_at(log_u, log_c), math.exp(-1.5) * expected)
    by_autograd = Generator(
        name="x", function=generator.function, at_zero=generator.at_zero, recession=generator.recession
    )
    close(by_autograd.tangent_at(log_u, log_c), math.exp(-1.5) * expected)
    near_one = torch.tensor([1 - 1e-6, 1 + 1e-6], dtype=torch.float64)
    assert generator.slope_at_one == pytest.approx((f(near_one).diff() / near_one.diff()).item(), abs=1e-9)
    near_zero, large = torch.tensor([1e-24], dtype=torch.float64), torch.tensor([1e24], dtype=torch.float64)
    for limit, seen in ((generator.at_zero, f(near_zero)), (generator.recession, f(large) / large)):
        if math.isinf(limit):
            assert seen.item() > 50
        else:
            assert seen.item() == pytest.approx(limit, abs=1e-9)


def test_a_generator_of_ones_own():
    """The alpha-divergence of order 3, (u^3 - 1 - 3 (u - 1)) / 6, with nothing but its formula."""
    own = Generator(
        name="cubic",
        function=lambda log_u, log_c: log_c.exp() * ((3 * log_u).expm1() - 3 * log_u.expm1()) / 6,
        at_zero=1 / 3,
        recession=INF,
    )
    p, q = logits(30, 6).requires_grad_(), logits(30, 6, seed=1)
    expected = ((q.softmax(-1).pow(3) / p.softmax(-1).square()).sum(-1) - 1) / 6
    value = f_divergence(p, q, generator=own)
    close(value.detach(), expected.detach(), rtol=1e-9)
    for got, wanted in zip(torch.autograd.grad(value.sum(), p), torch.autograd.grad(expected.sum(), p), strict=True):
        close(got, wanted, rtol=1e-8)


# --- exclusions, outliers and temperatures ---------------------------------------------------------------------------


def finite_at(divergence: object) -> tuple[bool, bool]:
    """Whether the value is finite where the student alone, and where the teacher alone, excludes a token."""
    match divergence:
        case ReverseKL():
            return True, False
        case ForwardKL():
            return False, True
        case AdaptiveKL() | ToDi():
            return False, False
        case AlphaBeta(alpha=alpha, beta=beta):
            return beta > 0 and alpha + beta > 0, alpha > 0 and alpha + beta > 0
        case Renyi(order=order):
            return True, order < 1
        case FDivergence(generator=name):
            return name not in ("forward_kl", "pearson_chi2", "jeffreys"), name not in (
                "reverse_kl",
                "neyman_chi2",
                "jeffreys",
            )
        case _:
            return True, True


@pytest.mark.parametrize(
    "divergence",
    [
        ReverseKL(), ForwardKL(), JSD(), TotalVariation(), SkewForwardKL(), SkewReverseKL(), AdaptiveKL(), ToDi(),
        *(AlphaBeta(alpha=a, beta=b) for a, b in itertools.product([-0.7, 0.0, 0.2, 1.0], [-0.7, 0.0, 0.3, 1.0])),
        *(Renyi(order=order) for order in (0.5, 1.0, 2.0)),
        *(FDivergence(generator=name) for name in GENERATORS),
    ],
    ids=repr,
)  # fmt: skip
def test_an_exclusion_by_one_side_is_infinite_exactly_where_the_mathematics_says_so(divergence):
    for side, finite in zip((0, 1), finite_at(divergence), strict=True):
        pair = [P.log(), Q.log()]
        pair[side][1] = -INF
        pair = [x.log_softmax(-1) for x in pair]
        value, gradient = divergence.value_and_gradient(*pair)
        assert bool(value.isfinite()) == finite
        assert divergence(*pair).isfinite().item() == finite
        assert gradient.isfinite().all()
        assert finite or (gradient == 0).all()


def test_the_gradient_of_reverse_kl_grows_with_an_outlier_and_that_of_jsd_does_not():
    student = torch.tensor([0.6, 0.4], dtype=torch.float64).log()
    norms: dict[str, list[float]] = {"reverse_kl": [], "jsd": []}
    for rare in (1e-2, 1e-6, 1e-12):
        teacher = torch.tensor([rare, 1 - rare], dtype=torch.float64).log()
        for divergence in (ReverseKL(), JSD(beta=0.5)):
            norms[divergence.name].append(divergence.value_and_gradient(student, teacher)[1].abs().sum().item())
    assert norms["reverse_kl"] == pytest.approx([2.40, 6.83, 13.46], abs=5e-3)
    assert max(norms["jsd"]) <= 0.301


FUNCTIONS = {
    "reverse_kl": (reverse_kl, {}),
    "forward_kl": (forward_kl, {}),
    "jsd": (jsd, {"beta": 0.3}),
    "total_variation": (total_variation, {}),
    "skew_forward_kl": (skew_forward_kl, {"alpha": 0.2}),
    "skew_reverse_kl": (skew_reverse_kl, {"alpha": 0.2}),
    "adaptive_kl": (adaptive_kl, {"head_mass": 0.4}),
    "todi": (todi, {}),
    "alpha_beta": (alpha_beta, {"alpha": 0.3, "beta": 0.4}),
    "renyi": (renyi, {"order": 2.0}),
    "f_divergence": (f_divergence, {"generator": "pearson_chi2"}),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_each_temperature_divides_the_logits_of_its_own_side(name: str):
    function, arguments = FUNCTIONS[name]
    p, q = logits(20, 6), logits(20, 6, seed=1)
    close(function(p, q, student_temperature=2.0, **arguments), function(p / 2, q, **arguments))
    close(function(p, q, teacher_temperature=0.5, **arguments), function(p, 2 * q, **arguments))
    both = function(p, q, student_temperature=2.0, teacher_temperature=2.0, **arguments)
    close(both, function(p / 2, q / 2, **arguments))
    assert (function(p, q, student_temperature=2.0, **arguments) - function(p, q / 2, **arguments)).abs().max() > 1e-3


def test_a_temperature_of_both_sides_shrinks_the_reverse_kl_with_its_square():
    """Which is why some rescale by T^2, and we leave it to the learning rate."""
    p, q = logits(20, 6), logits(20, 6, seed=1)
    hot = reverse_kl(p, q, student_temperature=1e3, teacher_temperature=1e3)
    z, y = (x - x.mean(-1, keepdim=True) for x in (p, q))
    close(hot * 1e6, (z - y).square().mean(-1) / 2, rtol=2e-2)
