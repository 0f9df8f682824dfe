"""What a router did, from the files of a run or asked of the router itself."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
import yaml
from jaxtyping import Bool, Float, Int
from torch import Tensor

from moteach.data.base import words_of
from moteach.errors import ConfigError, DataError, MissingFileError
from moteach.routing.learner import Learner
from moteach.types import Prompt


@dataclass(frozen=True, kw_only=True)
class Routes:
    """Where prompts went, a row a prompt."""

    teachers: tuple[str, ...]
    labels: tuple[str | None, ...]
    """Domain of each prompt."""
    owners: Bool[Tensor, "prompt teacher"]
    """Whether a teacher claims the label; nobody does for prompts from outside."""
    chosen: Int[Tensor, " prompt"]
    """The most probable teacher, -1 where that is not known."""
    weights: Float[Tensor, "prompt teacher"]
    """Zero in rows that nobody grades."""
    confidence: Float[Tensor, " prompt"]
    abstained: Bool[Tensor, " prompt"]
    steps: Int[Tensor, " prompt"]
    """0 for prompts that were no part of a run."""

    @property
    def judged(self) -> Bool[Tensor, " prompt"]:
        """Prompts of which is known who was chosen and who is right."""
        return self.owners.any(dim=1) & (self.chosen >= 0)

    @property
    def correct(self) -> Bool[Tensor, " prompt"]:
        """Whether a teacher that claims the label was chosen."""
        return self.owners.gather(1, self.chosen.clamp(min=0)[:, None])[:, 0] & (self.chosen >= 0)


def read_routes(run_dir: Path | str) -> Routes:
    """Reads the prompt rows of a run, finished or still going.

    A run does not keep what the router thought of a prompt that it abstained on: there `chosen` is -1 and the confidence 0.

    Raises:
        MissingFileError: The folder has no routing table.
    """
    table = routing_table(Path(run_dir))
    if "position" in table.column_names:
        table = table.filter(pc.field("position").is_null())
    rows = table.select(["step", "domain", "weights", "confidence", "abstained"]).to_pylist()
    teachers = teachers_of(table)
    abstained = torch.tensor([row["abstained"] for row in rows], dtype=torch.bool)
    weights = torch.tensor([[row["weights"][name] for name in teachers] for row in rows]).reshape(-1, len(teachers))
    labels = tuple(row["domain"] for row in rows)
    return Routes(
        teachers=teachers,
        labels=labels,
        owners=_owners(labels, teachers, _domains(Path(run_dir), teachers)),
        chosen=weights.argmax(dim=1).masked_fill(abstained, -1),
        weights=weights,
        confidence=torch.tensor([row["confidence"] for row in rows], dtype=torch.float64),
        abstained=abstained,
        steps=torch.tensor([row["step"] for row in rows], dtype=torch.long),
    )


def ask(router: Any, prompts: Sequence[Prompt]) -> Routes:
    """Routes labelled prompts; what the router thinks before it abstains is kept.

    Args:
        router: One that learned from exemplars, or the folder it was saved to.
        prompts: As of `moteach.routing.evaluate.read_prompts`; `teacher_id` goes before `domain`.

    Raises:
        ConfigError: The router has not learned from exemplars.
        DataError: There is no prompt.
    """
    learned = learner_of(router)
    if not prompts:
        raise DataError("expected prompts to route, got none; there would be nothing to draw")
    routing, scores, unsure = learned.decide([words_of(prompt) for prompt in prompts])
    teachers = tuple(routing.teacher_ids)
    domains = {name: (name, *learned.domains.get(name, ())) for name in teachers}
    labels = tuple(prompt.teacher_id or prompt.domain for prompt in prompts)
    return Routes(
        teachers=teachers,
        labels=labels,
        owners=_owners(labels, teachers, domains),
        chosen=scores.probabilities.argmax(dim=1),
        weights=routing.weights,
        confidence=scores.confidence.double().clamp(0, 1),
        abstained=unsure,
        steps=torch.zeros(len(labels), dtype=torch.long),
    )


def routes_of(source: Routes | Path | str) -> Routes:
    """Takes routes as they are and reads those of a run folder."""
    return source if isinstance(source, Routes) else read_routes(source)


def learner_of(router: Any) -> Learner:
    """Finds the part of a router that learned; a path is that of a saved router.

    Raises:
        ConfigError: There is none.
        MissingFileError: The folder holds no saved router.
    """
    if isinstance(router, str | Path):
        router = _open(Path(router))
    learned = getattr(router, "learned", None)
    if not isinstance(learned, Learner):
        raise ConfigError(
            f"expected a router that learns from exemplars, got {type(router).__name__}, which has no reasons to show. Use "
            "router=embedding_prototype, embedding_knn, classifier or finetuned, or draw the folder of a run"
        )
    return learned


def routing_table(run_dir: Path) -> pa.Table:
    """Reads `routing.parquet`, or the parts of it while a run is going.

    Raises:
        MissingFileError: There is neither.
    """
    path = run_dir / "routing.parquet"
    parts = [path] if path.is_file() else sorted((run_dir / "traces").glob("routing-*.parquet"))
    if not parts:
        raise MissingFileError(
            f"expected a run folder with a 'routing.parquet', got {run_dir}; it is written at the first checkpoint of "
            "'moteach train'"
        )
    return pa.concat_tables([pq.read_table(part) for part in parts])


def teachers_of(table: pa.Table) -> tuple[str, ...]:
    """Names of the teachers, in the order of the run."""
    return tuple(field.name for field in table.schema.field("weights").type)


def _open(folder: Path) -> Any:
    from moteach.routing import learned

    path = folder / "router.json"
    if not path.is_file():
        raise MissingFileError(
            f"expected the folder of a saved router, got {folder}, which has no 'router.json'; 'moteach route fit' saves one "
            "to run_dir/router"
        )
    name = json.loads(path.read_text(encoding="utf-8"))["router"]
    return getattr(learned, name).from_pretrained(folder)


def _domains(run_dir: Path, teachers: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """The labels that each teacher claims: by the config of the run, else its own name."""
    path = run_dir / "config.yaml"
    config = yaml.safe_load(path.read_text(encoding="utf-8")) if path.is_file() else {}
    cards: Mapping[str, Mapping[str, Any]] = config.get("experts") or {}
    return {name: (name, *(cards.get(name, {}).get("domains") or ())) for name in teachers}


def _owners(
    labels: Sequence[str | None], teachers: Sequence[str], domains: Mapping[str, Sequence[str]]
) -> Bool[Tensor, "prompt teacher"]:
    rows = [[label in domains[name] for name in teachers] for label in labels]
    return torch.tensor(rows, dtype=torch.bool).reshape(len(labels), len(teachers))
