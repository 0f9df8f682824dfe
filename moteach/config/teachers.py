"""What the group `teachers` says about memory, in the types the teachers take."""

from __future__ import annotations

import torch
from omegaconf import DictConfig

from moteach.errors import ConfigError, nearest
from moteach.teachers.residency import parse_bytes

_HIDDEN_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def memory_of(teachers: DictConfig) -> int | None:
    """Reads `teachers.memory` as bytes; None keeps every teacher loaded.

    Raises:
        ConfigError: It is not an amount of memory.
    """
    return None if teachers.memory is None else parse_bytes(str(teachers.memory), where="teachers.memory")


def hidden_dtype_of(teachers: DictConfig) -> torch.dtype | None:
    """Reads `teachers.hidden_dtype`; None keeps hidden states as the teachers made them.

    Raises:
        ConfigError: It is not a precision that hidden states may wait in.
    """
    name = teachers.hidden_dtype
    if name is not None and name not in _HIDDEN_DTYPES:
        raise ConfigError(
            f"teachers.hidden_dtype: expected a precision or null, got '{name}'; {nearest(name, _HIDDEN_DTYPES)}"
        )
    return None if name is None else _HIDDEN_DTYPES[name]
