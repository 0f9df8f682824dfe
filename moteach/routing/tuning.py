"""Teaches a sentence encoder which exemplars belong together, before a head learns from its vectors."""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from moteach.catalogue.packaged import CACHE, cache_path, replace_folder
from moteach.errors import ConfigError
from moteach.routing.embedding import SentenceEncoder, features_of
from moteach.routing.encoders import encoder_named

_FROZEN = "embeddings"
"""Part of the names of the parameters that stay as they are."""


def pair_loss(vectors: Float[Tensor, "text hidden"], owners: Bool[Tensor, "text teacher"]) -> Float[Tensor, ""]:
    """How far the cosines of all pairs of a batch are from 1 where an expert owns both, and from 0 elsewhere.

    L = 1/2 mean over pairs of a shared expert of (cos - 1)^2 + 1/2 mean over other pairs of cos^2; no text meets itself.
    SetFit (arXiv 2209.11055) draws pairs of both kinds; that all pairs of a batch count, both means weighing the same, is ours
    and needs one forward a text. A mean over no pairs is 0.

    Args:
        vectors: Of length one.
        owners: Who each text belongs to.
    """
    cosines = vectors @ vectors.T
    same = (owners.double() @ owners.double().T) > 0
    pairs = same & ~torch.eye(len(owners), dtype=torch.bool)
    near = ((cosines - 1) ** 2)[pairs].sum() / max(1, int(pairs.sum()))
    far = (cosines**2)[~same].sum() / max(1, int((~same).sum()))
    return (near + far) / 2


class Tuner:
    """Trains all layers of a sentence encoder but its embeddings with `pair_loss` and AdamW, without dropout.

    Args:
        epochs: Turns through the exemplars.
        batch_size: Exemplars that are paired with each other.
        learning_rate: Of AdamW.
        seed: Order of the exemplars.

    Raises:
        ConfigError: A value would train nothing.
    """

    def __init__(self, *, epochs: int, batch_size: int, learning_rate: float, seed: int) -> None:
        if epochs < 1 or batch_size < 2 or not learning_rate > 0:
            raise ConfigError(
                f"expected router.epochs >= 1, router.batch_size >= 2 and router.learning_rate > 0, got {epochs}, {batch_size} "
                f"and {learning_rate}; the encoder would stay as it is. router=classifier does that and is faster"
            )
        self.epochs = epochs
        self.batch_size = batch_size
        self.learning_rate = learning_rate
        self.seed = seed
        self._base: tuple[str, SentenceEncoder] | None = None
        self._aside: tempfile.TemporaryDirectory[str] | None = None

    @property
    def settings(self) -> dict[str, Any]:
        """Constructor arguments, in JSON types."""
        return {
            "epochs": self.epochs,
            "batch_size": self.batch_size,
            "learning_rate": self.learning_rate,
            "seed": self.seed,
        }

    def base(self, name: str) -> SentenceEncoder:
        """Opens the encoder to start from, once.

        Raises:
            ConfigError: It has nothing that could be trained.
        """
        if self._base is None or self._base[0] != name:
            encoder = encoder_named(name)
            if not isinstance(encoder, SentenceEncoder):
                raise ConfigError(
                    f"router.encoder: expected a sentence-transformers model to train, got '{name}', which has no weights; "
                    "nothing would be tuned. Name a model (package:NAME, a folder, a hub id), or set router=classifier"
                )
            self._base = (name, encoder)
        return self._base[1]

    def taught(self, name: str, texts: Sequence[str], owners: Bool[Tensor, "text teacher"]) -> SentenceEncoder:
        """Returns a copy of the encoder that was trained on these texts and has seen no others.

        Args:
            name: The encoder to start from.
            texts: Exemplars.
            owners: Who they belong to.
        """
        return self.base(name).changed(lambda model: self._train(model, texts, owners))

    def kept(self, name: str, texts: Sequence[str], owners: Bool[Tensor, "text teacher"], *, cache: str | None) -> Path:
        """Trains the encoder into a folder of its own, where it is found again by what it was made of, and returns that.

        Args:
            name: The encoder to start from.
            texts: Exemplars.
            owners: Who they belong to.
            cache: See `LearnerSettings.cache`; None keeps the folder as long as the router lives.

        Raises:
            ConfigError: The encoder cannot be trained, or the folder cannot be written.
        """
        said = [self.base(name).identity, list(texts), owners.int().tolist(), self.settings, torch.__version__]
        key = hashlib.sha256(json.dumps(said).encode()).hexdigest()[:16]
        if cache is None:
            self._aside = tempfile.TemporaryDirectory(prefix="moteach-tuned-")
            place = Path(self._aside.name)
        else:
            place = Path(cache_path(cache) if cache.startswith(CACHE) else cache).expanduser()
        final = place / f"tuned-{key}"
        if not final.is_dir():
            encoder = self.taught(name, texts, owners)
            try:
                place.mkdir(parents=True, exist_ok=True)
                with tempfile.TemporaryDirectory(prefix=".tmp-tuned-", dir=place) as aside:
                    encoder.save(Path(aside) / "encoder")
                    replace_folder(Path(aside) / "encoder", final)
            except OSError as error:
                raise ConfigError(
                    f"router.cache: expected a folder that can be written, got {place} ({error.strerror or error}); the "
                    "tuned encoder would be lost. Name another one, or set router.cache=null"
                ) from error
        return final

    def _train(self, model: Any, texts: Sequence[str], owners: Bool[Tensor, "text teacher"]) -> None:
        # Dropout would draw from the generator of the whole run.
        model.eval()
        trained = [weight for name, weight in model.named_parameters() if _FROZEN not in name]
        optimizer = torch.optim.AdamW(trained, lr=self.learning_rate)
        order = torch.Generator().manual_seed(self.seed)
        with torch.enable_grad():
            for _ in range(self.epochs):
                for rows in torch.split(torch.randperm(len(texts), generator=order), self.batch_size):
                    said = model(features_of(model, [texts[row] for row in rows.tolist()]))["sentence_embedding"]
                    loss = pair_loss(torch.nn.functional.normalize(said, dim=1), owners[rows])
                    optimizer.zero_grad()
                    loss.backward()  # type: ignore[no-untyped-call]
                    optimizer.step()
