"""Multi-teacher expert routing for on-policy distillation of language models.

The public names below are imported on first use, so that `import moteach` stays light.
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

_PUBLIC = {
    "MoteachError": "moteach.errors",
    "Prompt": "moteach.types",
    "Rollout": "moteach.types",
    "RolloutBatch": "moteach.types",
    "Routing": "moteach.types",
    "Evidence": "moteach.types",
    "LossOutput": "moteach.types",
}

__all__ = ["__version__", *sorted(_PUBLIC)]


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(importlib.import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module 'moteach' has no attribute '{name}'")


def __dir__() -> list[str]:
    return sorted(__all__)
