"""Loaded weights, shared: two teachers that name the same checkpoint hold one model."""

from __future__ import annotations

from collections import OrderedDict
from pathlib import Path

from torch import nn

from moteach.catalogue.modeling import check_head, load_causal_lm
from moteach.errors import ConfigError

_Key = tuple[str, str | None, str]


class ModelStore:
    """Loads frozen models on first use and keeps the most recently used ones.

    Models are told apart by resolved path, revision and precision.

    Args:
        max_resident: How many models stay loaded; the least recently used one is dropped and loaded again when it is
            needed. None keeps all.
        device: Where models live: a torch device, or `auto` (the first GPU, else the CPU).

    Raises:
        ConfigError: `max_resident` is not positive.
    """

    def __init__(self, *, max_resident: int | None = None, device: str = "cpu") -> None:
        if max_resident is not None and max_resident < 1:
            raise ConfigError(f"expected a positive 'max_resident' (or null for all), got {max_resident}")
        self._limit = max_resident
        self._device = device_of(device)
        self._models: OrderedDict[_Key, nn.Module] = OrderedDict()

    def __len__(self) -> int:
        return len(self._models)

    def get(self, path: str, *, revision: str | None = None, dtype: str = "float32") -> nn.Module:
        """Returns the frozen model in evaluation mode, loading it when it is not resident.

        Raises:
            ConfigError: It cannot be opened safely.
            MissingFileError: The folder does not exist.
            DeadTeacherError: Its logits are not finite.
            IncompatibleTeacherError: Its logits cannot be rebuilt from its hidden states.
        """
        folder = Path(path)
        local = folder.is_dir()
        key = (str(folder.resolve()) if local else path, None if local else revision, dtype)
        if key not in self._models:
            while self._limit is not None and len(self._models) >= self._limit:
                self._models.popitem(last=False)
            model: nn.Module = load_causal_lm(key[0], revision=revision, dtype=dtype)
            model.eval().requires_grad_(False)
            model.to(self._device)
            check_head(model, name=path)
            self._models[key] = model
        self._models.move_to_end(key)
        return self._models[key]


def device_of(name: str) -> str:
    """Resolves `auto` to the first GPU when there is one, else to the CPU."""
    if name != "auto":
        return name
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"
