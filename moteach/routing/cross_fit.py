"""Scores of exemplars by heads, and encoders, that have not seen them: what calibration is fitted on."""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from moteach.errors import ConfigError
from moteach.routing.exemplars import Exemplars
from moteach.routing.heads import Head


def cross_fitted(
    head: Head,
    exemplars: Exemplars,
    *,
    folds: int,
    vectors: Callable[[Bool[Tensor, " exemplar"]], Float[Tensor, "exemplar hidden"]],
) -> Float[Tensor, "exemplar teacher"]:
    """Scores each exemplar by a head that was fitted without its fold.

    Args:
        head: Its settings are those of the heads that score; it stays as it is.
        exemplars: What is held out in turn.
        folds: Number of turns.
        vectors: Given the rows that may be learned from, the vectors of all exemplars from an encoder that knows no others.

    Returns:
        Scores in float64.

    Raises:
        ConfigError: An expert has too few exemplars, or none of its own outside of a fold.
    """
    owners = exemplars.owners
    logits = torch.zeros(owners.shape, dtype=torch.float64)
    for fold in exemplars.folds(folds):
        if not bool(owners[~fold].any(dim=0).all()):
            raise ConfigError(
                "router.calibration: expected exemplars of every expert in every fold, got an expert that shares all of "
                "its own; held out, it would have nothing to learn from. Set router.calibration=none or calibration_path"
            )
        fresh = type(head)(**head.settings)
        found = vectors(~fold)
        fresh.fit(found[~fold], owners[~fold])
        logits[fold] = fresh.logits(found[fold])
    return logits
