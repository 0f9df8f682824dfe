"""Every divergence over the whole vocabulary as a component: what `conf/divergence` offers, under one import.

Each class lives beside its function, and satisfies `ClosedFormDivergence`; all but `AdaptiveKL` and `Renyi` are sums of
terms and satisfy `PointwiseDivergence` too.
"""

from __future__ import annotations

from moteach.divergences.adaptive import AdaptiveKL, ToDi
from moteach.divergences.bounded import SkewForwardKL, SkewReverseKL, TotalVariation
from moteach.divergences.full import JSD, ForwardKL, ReverseKL
from moteach.divergences.generators import FDivergence
from moteach.divergences.powers import AlphaBeta, Renyi

__all__ = [
    "JSD",
    "AdaptiveKL",
    "AlphaBeta",
    "FDivergence",
    "ForwardKL",
    "Renyi",
    "ReverseKL",
    "SkewForwardKL",
    "SkewReverseKL",
    "ToDi",
    "TotalVariation",
]
