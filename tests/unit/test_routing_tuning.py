"""The encoder that learns: the loss against a loop, what it has seen, where it is kept."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

from moteach.catalogue.spec import ExpertSpec
from moteach.errors import ConfigError
from moteach.routing.learned import FinetunedRouter
from moteach.routing.tuning import Tuner, pair_loss

sys.path.append(str(Path(__file__).parents[1] / "contracts"))
from tiny_sentences import make_sentence_encoder

TEXTS = [f"{word} number {i}" for word in ("math", "code") for i in range(6)]
OWNERS = torch.tensor([[True, False]] * 6 + [[False, True]] * 6)


def tuner(**changed: int | float) -> Tuner:
    return Tuner(**({"epochs": 4, "batch_size": 5, "learning_rate": 0.01, "seed": 0} | changed))  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    pytest.importorskip("sentence_transformers")
    return str(make_sentence_encoder(tmp_path_factory.mktemp("model"), ["math", "code", "number"]))


@pytest.fixture
def experts(tmp_path: Path) -> list[ExpertSpec]:
    made = []
    for name in ("math", "code"):
        path = tmp_path / f"{name}.jsonl"
        path.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in TEXTS if name in text))
        made.append(ExpertSpec(name=name, model=f"org/{name}", domains=[name], exemplars=str(path)))
    return made


def test_the_loss_is_the_mean_over_pairs_of_each_kind() -> None:
    draw = torch.Generator().manual_seed(3)
    vectors = torch.nn.functional.normalize(torch.randn(5, 4, generator=draw, dtype=torch.float64), dim=1)
    owners = torch.tensor([[1, 0, 0], [1, 1, 0], [0, 1, 0], [0, 0, 1], [0, 0, 1]]).bool()
    near, far = [], []
    for i in range(5):
        for j in range(5):
            cosine = sum(a * b for a, b in zip(vectors[i].tolist(), vectors[j].tolist(), strict=True))
            if any(a and b for a, b in zip(owners[i].tolist(), owners[j].tolist(), strict=True)):
                near += [(cosine - 1) ** 2] if i != j else []
            else:
                far.append(cosine**2)
    assert (len(near), len(far)) == (6, 14)
    expected = (sum(near) / len(near) + sum(far) / len(far)) / 2
    assert float(pair_loss(vectors, owners)) == pytest.approx(expected, abs=1e-12)
    alone = pair_loss(vectors[:1], owners[:1])
    assert float(alone) == 0.0


def test_tuning_brings_together_what_an_expert_owns_and_leaves_the_embeddings(model: str) -> None:
    start, state = tuner().base(model), torch.get_rng_state()
    before = start.encode(TEXTS)
    after = tuner().taught(model, TEXTS, OWNERS)
    assert float(pair_loss(after.encode(TEXTS), OWNERS)) < 0.5 * float(pair_loss(before, OWNERS))
    assert torch.equal(start.encode(TEXTS), before)
    one, two = (dict(encoder._loaded.named_parameters()) for encoder in (start, after))
    same = {name for name in one if torch.equal(one[name], two[name])}
    assert {name for name in same if "pooler" not in name} == {name for name in one if "embeddings" in name}
    assert torch.equal(torch.get_rng_state(), state)


def test_calibration_never_sees_an_encoder_that_knows_the_row(
    model: str, experts: list[ExpertSpec], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[list[str]] = []
    taught = Tuner.taught

    def watched(self: Tuner, name: str, texts: list[str], owners: torch.Tensor) -> object:
        seen.append(list(texts))
        return taught(self, name, texts, owners)

    monkeypatch.setattr(Tuner, "taught", watched)
    router = FinetunedRouter(encoder=model, cache=None, folds=3)
    router.bind(experts)
    assert router.learned.held_out_accuracy() is not None
    everything, *turns = map(set, seen)
    assert everything == set(TEXTS)
    assert len(turns) == 3
    left_out = [everything - turn for turn in turns]
    assert set.union(*left_out) == everything
    assert sum(map(len, left_out)) == len(TEXTS)


def test_the_tuned_encoder_is_found_again_and_another_one_is_not_taken_for_it(model: str, tmp_path: Path) -> None:
    first = tuner().kept(model, TEXTS, OWNERS, cache=str(tmp_path))
    written = (first / "model.safetensors").stat().st_mtime_ns
    assert tuner().kept(model, TEXTS, OWNERS, cache=str(tmp_path)) == first
    assert (first / "model.safetensors").stat().st_mtime_ns == written
    others = [tuner(seed=1).kept(model, TEXTS, OWNERS, cache=str(tmp_path))]
    others.append(tuner().kept(model, TEXTS, OWNERS.flip(0), cache=str(tmp_path)))
    assert len({first, *others}) == 3
    assert set(tmp_path.iterdir()) == {first, *others}


def test_a_loaded_router_is_saved_with_its_encoder_and_its_settings(
    model: str, experts: list[ExpertSpec], tmp_path: Path
) -> None:
    router = FinetunedRouter(encoder=model, cache=None, folds=3, epochs=2, learning_rate=0.01)
    router.bind(experts)
    router.save_pretrained(tmp_path / "one")
    asked = FinetunedRouter(cache=None, path=str(tmp_path / "one"))
    asked.bind(experts)
    asked.save_pretrained(tmp_path / "two")
    again = FinetunedRouter.from_pretrained(tmp_path / "two")
    scores = [one.learned.scores(["math", "code number"]).probabilities for one in (router, asked, again)]
    assert torch.equal(scores[0], scores[1])
    assert torch.equal(scores[0], scores[2])
    assert again.learned.tuner.settings == {"epochs": 2, "batch_size": 32, "learning_rate": 0.01, "seed": 0}
    weights = tmp_path / "two" / "encoder" / "config.json"
    weights.write_text(weights.read_text() + "\n")
    with pytest.raises(ConfigError, match="expected the encoder"):
        FinetunedRouter.from_pretrained(tmp_path / "two")


def test_what_cannot_be_tuned_is_refused(experts: list[ExpertSpec]) -> None:
    with pytest.raises(ConfigError, match="got 'ngrams', which has no weights"):
        FinetunedRouter(encoder="ngrams", cache=None).bind(experts)
    with pytest.raises(ConfigError, match=r"router\.epochs >= 1"):
        FinetunedRouter(epochs=0)
