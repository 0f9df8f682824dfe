"""Encoders: texts to vectors of length one, for the routers that learn from exemplars."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from moteach.catalogue.packaged import CACHE, cache_path
from moteach.errors import ConfigError
from moteach.routing.cache import EmbeddingCache

NGRAMS = "ngrams"
"""Name of the encoder that needs no model."""


@runtime_checkable
class Encoder(Protocol):
    """Turns texts into vectors; the same text always gets the same vector."""

    @property
    def identity(self) -> str:
        """Changes whenever the vectors would: part of the key under which they are cached."""
        ...

    def encode(self, texts: Sequence[str]) -> Float[Tensor, "text hidden"]:
        """Returns one float32 vector of length one per text (all zero for a text without content)."""
        ...


class HashedNgrams:
    """Counts of character n-grams, signed and hashed into `size` places: no model, no download, the same everywhere.

    Feature hashing (arXiv 0902.2206, Eq. 4): x_j = sum over n-grams g with h(g) = j of s(g), s(g) = +-1, then scaled to length
    one. It sees spelling and no meaning.

    Args:
        size: Length of a vector.
        longest: Longest n-gram, in characters; all shorter ones count too.
    """

    def __init__(self, *, size: int = 1024, longest: int = 3) -> None:
        self.size = size
        self.longest = longest
        self._places: dict[str, tuple[int, float]] = {}

    @property
    def identity(self) -> str:
        """Names the hash, the length of a vector and the longest n-gram."""
        return f"ngrams/crc32/{self.size}/{self.longest}"

    def encode(self, texts: Sequence[str]) -> Float[Tensor, "text hidden"]:
        """Hashes the n-grams of each text, with its beginning and end marked."""
        vectors = torch.zeros(len(texts), self.size, dtype=torch.float64)
        for row, text in enumerate(texts):
            counts: dict[int, float] = {}
            marked = f"\x02{text}\x03" if text else ""
            for length in range(1, self.longest + 1):
                for start in range(len(marked) - length + 1):
                    place, sign = self._place(marked[start : start + length])
                    counts[place] = counts.get(place, 0.0) + sign
            if counts:
                vectors[row, list(counts)] = torch.tensor(list(counts.values()), dtype=torch.float64)
        return torch.nn.functional.normalize(vectors, dim=1).float()

    def _place(self, gram: str) -> tuple[int, float]:
        found = self._places.get(gram)
        if found is None:
            value = zlib.crc32(gram.encode())
            found = self._places[gram] = ((value >> 1) % self.size, 1.0 if value & 1 else -1.0)
        return found


class Embedder:
    """An encoder behind its cache.

    Args:
        encoder: What makes the vectors.
        cache: Where they are kept; None makes them anew each time.
    """

    def __init__(self, encoder: Encoder, *, cache: Path | None = None) -> None:
        self.encoder = encoder
        self._cache = None if cache is None else EmbeddingCache(cache, identity=encoder.identity)

    def __call__(self, texts: Sequence[str]) -> Float[Tensor, "text hidden"]:
        """Returns the vectors of `texts`; each different text that is not cached is encoded once."""
        if not texts:
            return torch.zeros(0, 1)
        if self._cache is not None:
            return self._cache.get_or_make(texts, self.encoder.encode)
        different = list(dict.fromkeys(texts))
        vectors = self.encoder.encode(different)
        rows = {text: row for row, text in enumerate(different)}
        return vectors[[rows[text] for text in texts]]


def encoder_named(name: str) -> Encoder:
    """Makes the encoder that `router.encoder` names.

    Args:
        name: `ngrams`; or a sentence-transformers model: `package:NAME` of an installed package, a folder or a hub id.

    Raises:
        ConfigError: The name is empty.
    """
    if name == NGRAMS:
        return HashedNgrams()
    if not name.strip():
        raise ConfigError(
            f"router.encoder: expected '{NGRAMS}', 'package:NAME', a folder or a hub id, got nothing; prompts could not be "
            "compared with exemplars"
        )
    from moteach.routing.embedding import SentenceEncoder

    return SentenceEncoder(model=name)


def embedder_named(encoder: str, *, cache: str | None) -> Embedder:
    """Makes the encoder that `router.encoder` names behind the cache that `router.cache` names.

    Args:
        encoder: See `encoder_named`.
        cache: Folder, `cache:NAME` for one below the cache of moteach, or None.
    """
    folder = None if cache is None else Path(cache_path(cache) if cache.startswith(CACHE) else cache).expanduser()
    return Embedder(encoder_named(encoder), cache=folder)
