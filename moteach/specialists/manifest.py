"""The manifest of shipped arena models: which files, made by which recipe, how good they were measured to be."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moteach.data.arena.families import families_of
from moteach.data.arena.splits import draw_distinct
from moteach.errors import MissingFileError
from moteach.specialists.recipe import Specialist, describe

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MANIFEST = "manifest.json"
_DIGITS = 4


def save_specialist(specialist: Specialist, folder: Path, *, tokenizer: PreTrainedTokenizerBase) -> None:
    """Writes a trained model and its tokenizer, so that `from_pretrained(folder)` loads both."""
    folder.mkdir(parents=True, exist_ok=True)
    specialist.model.save_pretrained(folder)  # type: ignore[operator]
    tokenizer.save_pretrained(folder)


def file_table(folder: Path) -> dict[str, dict[str, Any]]:
    """Returns size in bytes and sha256 of every file of a model folder, by name.

    Raises:
        MissingFileError: When there is no such folder.
    """
    if not folder.is_dir():
        raise MissingFileError(f"expected a model folder at {folder}, found none; train it with `moteach specialize`")
    return {
        path.name: {"size": path.stat().st_size, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
        for path in sorted(folder.iterdir())
        if path.is_file()
    }


def manifest_entry(specialist: Specialist, folder: Path) -> dict[str, Any]:
    """Describes one saved model as plain data: files, recipe, stages and measured accuracies."""
    stages: dict[str, Any] = {
        "supervised": {
            "steps": specialist.sft.steps,
            "seconds": round(specialist.sft.seconds, 1),
            "stop_rule_met": specialist.sft.reached,
            "validation": _rounded(specialist.sft.accuracies),
        }
    }
    if specialist.grpo is not None:
        stages["verifier_reward"] = {
            "steps": specialist.grpo.steps,
            "seconds": round(specialist.grpo.seconds, 1),
            "mean_rewards": [round(reward, _DIGITS) for reward in specialist.grpo.rewards],
        }
    return {
        "files": file_table(folder),
        "recipe": json.loads(json.dumps(describe(specialist.recipe))),
        "stages": stages,
        "seconds": round(specialist.seconds, 1),
        "accuracy": _rounded(specialist.accuracies),
    }


def write_manifest(folder: Path, entries: Mapping[str, Mapping[str, Any]]) -> Path:
    """Adds entries to the manifest of a folder of models, replacing those of the same name, and returns its path."""
    path = folder / MANIFEST
    models = read_manifest(folder) if path.exists() else {}
    models |= {name: dict(entry) for name, entry in entries.items()}
    path.write_text(json.dumps({"models": models}, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    return path


def read_manifest(folder: Path) -> dict[str, Any]:
    """Returns the entries of a manifest by model name.

    Raises:
        MissingFileError: When the folder has no manifest.
    """
    path = folder / MANIFEST
    if not path.is_file():
        raise MissingFileError(f"expected a manifest at {path}, found none; train the models with `moteach specialize`")
    models: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))["models"]
    return models


def write_exemplars(folder: Path, domain: str, *, count: int = 64) -> Path:
    """Writes `count` prompts of a domain, from the train split, as JSON lines: what a router may learn the domain from."""
    families = families_of(domain)
    share = -(-count // len(families))
    texts = [draw_distinct(family, share, split="train", seed="exemplars") for family in families]
    mixed = [text for turn in zip(*texts, strict=True) for text in turn][:count]
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{domain}.jsonl"
    path.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in mixed), encoding="utf-8")
    return path


def _rounded(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _rounded(inner) for key, inner in value.items()}
    return round(value, _DIGITS)
