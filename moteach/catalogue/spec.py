"""What an expert card may say: the schema of one YAML of the catalogue.

`ExpertSpec` is a plain dataclass of simple types, so that it is at once the schema against which cards are checked, the
structured node that Hydra composes, and the object the teachers are built from.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from moteach.catalogue.selves import context_problem, student_problems
from moteach.catalogue.urls import url_problem
from moteach.errors import ExpertCardError, MissingFileError, nearest

NAME_PATTERN = re.compile(r"[a-z0-9][a-z0-9_-]*")
"""What the name of an expert (the stem of its card) looks like."""

DTYPES = ("float32", "bfloat16", "auto")
"""Precisions a teacher may be loaded in; `auto` takes the one its weights were saved in."""


@dataclass(kw_only=True)
class ExpertSpec:
    """One entry of the catalogue.

    The weights come from exactly one place: `model`, or `adapter` on top of `base`, or the `output` folder of `recipe`.
    A recipe without `output` may stand beside `model`: it then records how that model was made.
    An expert behind a server has `url` in their place; `model` may stand beside it, as this machine's copy of what is served.
    An expert that is the run's own student has `student` in their place.

    Raises:
        ExpertCardError: A value cannot be used, or the weights come from no place or from two.
    """

    name: str
    """Stem of the card's file; the word used in `experts=[...]` and in every table."""
    model: str | None = None
    """Folder (relative to the card, or absolute) or hub id `org/name` of the whole model."""
    adapter: str | None = None
    """Folder or hub id of a LoRA adapter; needs `base`."""
    base: str | None = None
    """Folder or hub id of the model under the adapter."""
    url: str | None = None
    """Address of the server the expert answers from, as `http://127.0.0.1:8000`; nothing is loaded here."""
    served_name: str | None = None
    """Name the server knows it by (`--served-model-name`, or that of an adapter); None: the name of the expert."""
    student: str | None = None
    """The run's own student as a teacher: `live` (as it is now; needs `context`), `ema` or `snapshot`."""
    decay: float = 0.99
    """With `student: ema`: weight of the past after every step, from 0 to below 1."""
    snapshot_steps: list[int] = field(default_factory=lambda: [0])
    """With `student: snapshot`: steps after which the teacher becomes what the student is then; 0 is the start of the run."""
    context: str | None = None
    """What the teacher reads in the place of a prompt: a template with `{prompt}` and perhaps `{answer}`."""
    recipe: dict[str, Any] = field(default_factory=dict)
    """How to train the expert, read by `moteach specialize`; its `output` is the folder the weights go to.

    Empty rather than None when absent: Hydra 1.3 cannot put a mapping in the place of a None.
    """
    tokenizer: str | None = None
    """Folder or hub id of its tokenizer; None: beside `model` or `base`. Read with `alignment=bytes` alone."""
    revision: str | None = None
    """Commit of the hub repository; a branch or tag can move under a running experiment."""
    domains: list[str] = field(default_factory=list)
    """Labels of the domains it is a specialist of."""
    exemplars: str | None = None
    """JSONL file of prompts of its domains, relative to the card; what the embedding routers learn from."""
    reference: str | None = None
    """Checkpoint the expert was trained from, for the objectives that compare an expert with its origin."""
    weight: float = 1.0
    """Relative importance of the expert in the run, at least 0."""
    cost: float = 0.0
    """Relative price of a token this expert grades, at least 0; read by routers with `cost_weight`."""
    dtype: str = "float32"
    """`float32`, `bfloat16` or `auto`."""
    description: str = ""
    licence: str | None = None

    def __post_init__(self) -> None:
        for problem in problems_of(self):
            raise ExpertCardError(f"expert '{self.name}': {problem[1]}")

    @property
    def weights(self) -> str:
        """Where the weights are: `model`, `adapter` or `recipe.output`, whichever is given, or else `url` or `student`."""
        return str(self.model or self.adapter or self.url or self.student or self.recipe["output"])


def require_built(spec: ExpertSpec) -> None:
    """Checks that an expert that a recipe makes has been made.

    Raises:
        MissingFileError: Its weights are not there yet.
    """
    if spec.model or spec.adapter or spec.url or spec.student or Path(spec.weights).is_dir():
        return
    raise MissingFileError(
        f"the expert '{spec.name}' is not built yet: run `moteach specialize expert={spec.name}` (expected its weights "
        f"in {spec.weights})"
    )


def problems_of(spec: ExpertSpec) -> list[tuple[str | None, str]]:
    """Lists what is wrong with the values of a spec whose types are right.

    Returns:
        Pairs of the key at fault (None when it is the card as a whole) and a message.
    """
    problems: list[tuple[str | None, str]] = []
    if not NAME_PATTERN.fullmatch(spec.name):
        problems.append((None, name_message(spec.name)))
    for key, value in (("weight", spec.weight), ("cost", spec.cost)):
        if not (math.isfinite(value) and value >= 0):
            problems.append((key, f"expected a finite number of at least 0 for '{key}', got {value}"))
    if spec.dtype not in DTYPES:
        problems.append(
            ("dtype", f"expected a precision for 'dtype', got '{spec.dtype}'; {nearest(spec.dtype, DTYPES)}")
        )
    if "" in (label.strip() for label in spec.domains) or len(set(spec.domains)) != len(spec.domains):
        problems.append(("domains", f"expected different, non-empty labels in 'domains', got {spec.domains}"))
    if spec.context is not None and (problem := context_problem(spec.context)):
        problems.append(("context", problem))
    return problems + (_weights_problems(spec) if spec.student is None else student_problems(spec))


def _weights_problems(spec: ExpertSpec) -> list[tuple[str | None, str]]:
    output = spec.recipe.get("output")
    if output is not None and not (isinstance(output, str) and output):
        return [("recipe", f"expected a folder for 'recipe.output', got {output!r}")]
    if spec.url is not None or spec.served_name is not None:
        return _served_problems(spec)
    places = {"model": spec.model, "adapter": spec.adapter, "recipe.output": output}
    given = [key for key, value in places.items() if value]
    if not given:
        return [
            (
                "recipe" if spec.recipe else None,
                "expected weights: 'model: FOLDER-OR-HUB-ID', or 'adapter:' with 'base:', or a 'recipe:' with "
                "'output:', or the 'url:' of a server, got "
                + ("a recipe without 'output'" if spec.recipe else "none of them"),
            )
        ]
    if len(given) > 1:
        message = (
            f"expected the weights from one place, got {' and '.join(repr(key) for key in given)}; keep one of them"
        )
        return [(given[1].split(".")[0], message)]
    if spec.adapter and not spec.base:
        return [("adapter", "expected 'base:' (the model under the adapter) beside 'adapter', got no base")]
    if spec.base and not spec.adapter:
        return [("base", "expected 'adapter:' beside 'base', got a base alone; write 'model:' for a whole model")]
    return []


def _served_problems(spec: ExpertSpec) -> list[tuple[str | None, str]]:
    if spec.url is None:
        return [
            ("served_name", "expected 'url:' beside 'served_name', got none; no server would be asked for that name")
        ]
    if problem := url_problem(spec.url):
        return [("url", problem)]
    if spec.served_name is not None and not spec.served_name.strip():
        return [("served_name", "expected the name the server knows the expert by for 'served_name', got nothing")]
    beside = {"adapter": spec.adapter, "base": spec.base, "recipe.output": spec.recipe.get("output")}
    if given := [key for key, value in beside.items() if value]:
        message = (
            f"expected at most 'model:' (a copy of what is served) beside 'url', got {' and '.join(map(repr, given))}; "
            "the server alone decides which weights answer: start it with them, and remove the key"
        )
        return [(given[0].split(".")[0], message)]
    return []


def name_message(name: str) -> str:
    """Says what a name of an expert must look like."""
    return (
        f"expected a name of lower-case letters, digits, '-' and '_' that starts with a letter or digit, got '{name}'; "
        "the name becomes a key of the configuration and a part of file names: rename the file"
    )
