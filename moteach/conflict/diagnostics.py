"""How much teachers disagree, as pure functions on `[teacher, token, vocab]`.

They live beside the divergences, so that `moteach.divergences.measure` can report them; this is their name in this room.
"""

from __future__ import annotations

from moteach.divergences.disagreement import (
    argmax_disagreement,
    generalised_jsd,
    mean_pairwise_jsd,
    pairwise_jsd,
    spread,
)

__all__ = ["argmax_disagreement", "generalised_jsd", "mean_pairwise_jsd", "pairwise_jsd", "spread"]
