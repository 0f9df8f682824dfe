"""Gradient surgery: one update from the gradients of several teachers, `[teacher, parameter]` to `[parameter]`.

Pure functions; `moteach.conflict.surgery` has them for a run, with one backward pass a teacher. No published run of on-policy
distillation of language models is known to have won by them (CaMOPD, arXiv 2605.27115, and Open-MOPD, arXiv 2608.19098,
disagree on whether teachers' gradients conflict at all). The results differ in scale: `pcgrad` is a sum over teachers, the
others are means.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from moteach.errors import ConfigError

_STEPS = 5_000
_HALVINGS = 100
_PRECISION = 1e-15
_VANISHED = 1e-9


def pcgrad(
    gradients: Float[Tensor, "teacher parameter"], *, generator: torch.Generator | None = None
) -> Float[Tensor, " parameter"]:
    """PCGrad (arXiv 2001.06782, Algorithm 1): each gradient is projected off every other one it opposes; their sum.

    g_i <- g_i - (g_i . g_j / ||g_j||^2) g_j wherever g_i . g_j < 0, with the original g_j, one j after the other.

    Args:
        gradients: One row a teacher.
        generator: Draws the order of the j, as the paper does; None takes them as they are listed. From three teachers on
            the result depends on the order.

    Returns:
        The sum of the projected gradients.
    """
    n = len(gradients)
    norms = gradients.square().sum(-1)
    total = torch.zeros_like(gradients[0])
    for i in range(n):
        mine = gradients[i].clone()
        order = range(n) if generator is None else torch.randperm(n, generator=generator).tolist()
        for j in order:
            product = mine @ gradients[j]
            if j != i and bool(product < 0):
                mine = mine - product / norms[j] * gradients[j]
        total = total + mine
    return total


def mgda(gradients: Float[Tensor, "teacher parameter"]) -> Float[Tensor, " parameter"]:
    """MGDA (arXiv 1810.04650): the point of least norm in the convex hull of the gradients.

    It has the same product with every gradient that takes part, and at least that with the others, so a small step against
    it lowers every teacher's loss; it is zero where no step does. Two teachers: w_1 = clip((g_2 - g_1) . g_2 /
    ||g_1 - g_2||^2, 0, 1), without the .001 and .999 of LibMTL's code.

    Args:
        gradients: One row a teacher.

    Returns:
        The convex combination of least norm.
    """
    return mgda_weights(gradients).to(gradients.dtype) @ gradients


def mgda_weights(gradients: Float[Tensor, "teacher parameter"]) -> Float[Tensor, " teacher"]:
    """Weights of the teachers in `mgda`, in float64: argmin over the simplex of w' G w, G the products of the gradients.

    Args:
        gradients: One row a teacher.

    Returns:
        Non-negative weights that sum to one.
    """
    gram = _gram(gradients)

    def stride(w: Tensor, direction: Tensor, longest: float) -> float:
        bend = float(direction @ gram @ direction)
        return min(-float(direction @ gram @ w) / bend, longest) if bend > 0 else longest

    scale = float(gram.diagonal().max())
    return _minimise_on_simplex(lambda w: gram @ w, stride, n=len(gram), tolerance=_PRECISION * scale)


def cagrad(
    gradients: Float[Tensor, "teacher parameter"], *, c: float = 0.5, rescale: bool = True
) -> Float[Tensor, " parameter"]:
    """CAGrad (arXiv 2110.14048): the direction near the mean gradient whose least product with a teacher's is largest.

    d maximises min_k g_k . d subject to ||d - g_0|| <= c ||g_0||, g_0 the mean. By its dual d = g_0 + c ||g_0|| g_w / ||g_w||
    with g_w = sum_k w_k g_k and w the minimiser over the simplex of g_w . g_0 + c ||g_0|| ||g_w||.

    Args:
        gradients: One row a teacher.
        c: Radius in norms of the mean, in [0, 1); 0 is the mean.
        rescale: Whether to divide by 1 + c^2, as the authors' code and LibMTL do.

    Returns:
        The direction; the mean where g_w vanishes, since no direction then has a positive product with all.

    Raises:
        ConfigError: c is out of range.
    """
    if not 0 <= c < 1:
        raise ConfigError(
            f"expected 0 <= c < 1 in cagrad, got {c}; from 1 on the direction may vanish or point away from the mean gradient"
        )
    gram = _gram(gradients)
    to_mean = gram.mean(-1)
    radius = c * math.sqrt(max(float(to_mean.mean()), 0.0))

    def derivative(w: Tensor) -> Tensor:
        length = math.sqrt(max(float(w @ gram @ w), 0.0))
        return to_mean + radius / length * (gram @ w) if length > 0 else to_mean

    def stride(w: Tensor, direction: Tensor, longest: float) -> float:
        along, square = float(direction @ to_mean), float(w @ gram @ w)
        cross, bend = float(direction @ gram @ w), float(direction @ gram @ direction)

        def slope(step: float) -> float:
            length = math.sqrt(max(square + 2 * step * cross + step * step * bend, 0.0))
            return along + (radius * (cross + step * bend) / length if length > 0 else 0.0)

        return _root(slope, longest)

    scale = float(gram.diagonal().max())
    w = _minimise_on_simplex(derivative, stride, n=len(gram), tolerance=_PRECISION * scale)
    mean = gradients.mean(0)
    pulled = w.to(gradients.dtype) @ gradients
    length = float(pulled.norm())
    direction = mean if length <= _VANISHED * math.sqrt(scale) else mean + radius / length * pulled
    return direction / (1.0 + c * c) if rescale else direction


def sign_vote(gradients: Float[Tensor, "teacher parameter"]) -> Float[Tensor, " parameter"]:
    """Each teacher votes with its sign on each parameter; the mean over all teachers of the gradients that won.

    GOVERN (arXiv 2405.03764) votes by sign; what is made of the winners is ours. A zero abstains, and a tie moves nothing.

    Args:
        gradients: One row a teacher.

    Returns:
        The vote; what agrees by all teachers is their mean.
    """
    signs = gradients.sign()
    elected = signs.sum(0).sign()
    return torch.where((signs == elected) & (elected != 0), gradients, 0.0).mean(0)


def _gram(gradients: Float[Tensor, "teacher parameter"]) -> Float[Tensor, "teacher teacher"]:
    exact = gradients.double()
    return exact @ exact.T


def _root(slope: Callable[[float], float], longest: float) -> float:
    """Where a rising function crosses zero in [0, longest]; an end where it does not."""
    if slope(longest) <= 0.0:
        return longest
    low, high = 0.0, longest
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        low, high = (middle, high) if slope(middle) < 0.0 else (low, middle)
    return low


def _minimise_on_simplex(
    derivative: Callable[[Tensor], Tensor],
    stride: Callable[[Tensor, Tensor, float], float],
    *,
    n: int,
    tolerance: float,
) -> Float[Tensor, " teacher"]:
    """Minimises a convex function of n weights: moves weight from the dearest teacher to the cheapest, exactly along the line.

    Frank-Wolfe with pairwise steps (arXiv 1511.05932). `stride` finds the minimum along a direction, up to a longest step.
    """
    w = torch.full((n,), 1.0 / n, dtype=torch.float64)
    for _ in range(_STEPS):
        prices = derivative(w)
        best = int(prices.argmin())
        worst = int(prices.masked_fill(w == 0.0, -math.inf).argmax())
        if float(prices[worst] - prices[best]) <= tolerance:
            break
        direction = torch.zeros_like(w)
        direction[best], direction[worst] = 1.0, -1.0
        longest = float(w[worst])
        step = stride(w, direction, longest)
        if step <= 0.0:
            break
        w[best] += step
        w[worst] = 0.0 if step >= longest else longest - step
    return w / w.sum()
