"""Makes an expert out of a real language model: a short supervised fine-tune on tasks of reasoning-gym.

The recipe stands in the expert's card (`kind: language`). Prompts go through the model's own chat template and the loss
is the cross entropy of the answer and the end-of-sequence token after it; nothing of the prompt is learned. Held-out
prompts are those of a run with the same `data`: the same seed and `evaluation_size` hold out the same questions.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from random import Random
from typing import Any

import torch
from torch import nn

from moteach.catalogue.modeling import load_causal_lm, load_tokenizer
from moteach.catalogue.packaged import replace_folder
from moteach.catalogue.spec import ExpertSpec
from moteach.data.base import PromptSet
from moteach.data.reasoning_gym import METADATA_KEY, ReasoningGymPrompts
from moteach.errors import ConfigError, DataError, nearest
from moteach.specialists.examples import Example
from moteach.specialists.measure import accuracy
from moteach.specialists.sft import SFTResult, SFTSettings, train_supervised
from moteach.types import Prompt

KIND = "language"
REPORT = "specialist.json"
"""Written beside the weights: the recipe, and what was measured."""

Measure = Callable[[nn.Module, Any, Sequence[Prompt]], Sequence[float]]
"""Verified score of a model's greedy answer to each prompt; the second argument is its tokenizer."""


@dataclass(frozen=True, kw_only=True)
class LanguageRecipe:
    """The `recipe:` of a card.

    Raises:
        ConfigError: A value cannot be used.
    """

    start: str
    """Folder, hub id or `package:NAME` of the model to start from."""
    output: str
    """Folder the expert is written to."""
    data: Mapping[str, Any]
    """Arguments of `moteach.data.reasoning_gym.ReasoningGymPrompts`."""
    max_steps: int = 150
    batch_size: int = 16
    learning_rate: float = 3e-4
    warmup_steps: int = 10
    cooldown_steps: int = 20
    validate_every: int = 25
    lowest: float = 0.95
    """Training stops when every task is answered right this often on validation prompts."""
    validation_size: int = 32
    """Training prompts of each task that are kept out to decide when to stop."""
    trained_layers: int | None = None
    """Only this many of the last layers are trained, and not the embeddings; None trains everything."""
    dtype: str = "bfloat16"
    """Precision the weights are saved in; they are trained in float32."""
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("max_steps", "batch_size", "validate_every", "validation_size"):
            if getattr(self, name) < 1:
                raise ConfigError(f"recipe.{name}: expected at least 1, got {getattr(self, name)}")
        if self.trained_layers is not None and self.trained_layers < 1:
            raise ConfigError(f"recipe.trained_layers: expected at least 1, or null, got {self.trained_layers}")
        if self.dtype not in ("float32", "bfloat16"):
            raise ConfigError(f"recipe.dtype: got '{self.dtype}'; {nearest(self.dtype, ('float32', 'bfloat16'))}")

    @classmethod
    def of(cls, recipe: Mapping[str, Any]) -> LanguageRecipe:
        """Reads the recipe of a card.

        Raises:
            ConfigError: A key is unknown or missing, or a value cannot be used.
        """
        known = {item.name: item for item in dataclasses.fields(cls)}
        given = {key: value for key, value in recipe.items() if key != "kind"}
        for key in given:
            if key not in known:
                raise ConfigError(f"recipe: there is no key '{key}'; {nearest(key, known)}")
        for key, item in known.items():
            if item.default is dataclasses.MISSING and key not in given:
                raise ConfigError(f"recipe.{key}: expected a value, got nothing")
        return cls(**given)


@dataclass(frozen=True, kw_only=True)
class LanguageReport:
    """What `specialize_language_model` did."""

    name: str
    output: Path
    steps: int
    seconds: float
    """Training and validation, loading and measuring left out."""
    validation: Mapping[str, float]
    """Share of validation prompts whose whole reference answer is the model's greedy one, per task."""
    before: Mapping[str, float] = field(default_factory=dict)
    """Mean of what `measure` said of the starting model on the held-out prompts, per task."""
    after: Mapping[str, float] = field(default_factory=dict)


def specialize_language_model(
    spec: ExpertSpec,
    *,
    output: Path | None = None,
    seed: int | None = None,
    measure: Measure | None = None,
    report: Callable[[Mapping[str, float]], None] | None = None,
) -> LanguageReport:
    """Trains the expert of a card whose recipe is of kind `language`, and writes it whole or not at all.

    Args:
        spec: The card.
        output: Where to write; None is where the card expects it. A model that is already there is replaced.
        seed: Seed of the order of the examples; None is the recipe's own.
        measure: Measures the model on the held-out prompts, before and after; None leaves that out.
        report: Called with the validation accuracy per task whenever it is measured.

    Raises:
        ConfigError: The recipe cannot be used.
        MissingDependencyError: The starting model, its reader or reasoning-gym is not installed.
        DataError: The tasks do not have enough different questions, or no reference answers.
    """
    recipe = LanguageRecipe.of(spec.recipe)
    recipe = recipe if seed is None else dataclasses.replace(recipe, seed=seed)
    tokenizer = load_tokenizer(recipe.start)
    prompts = ReasoningGymPrompts(**recipe.data).load(tokenizer)
    model = load_causal_lm(recipe.start, dtype="float32")
    before = _held_out(model, tokenizer, prompts, measure)
    began = time.perf_counter()
    result = fine_tune(model, tokenizer, prompts, recipe, report=report)
    seconds = time.perf_counter() - began
    after = _held_out(model, tokenizer, prompts, measure)
    found = LanguageReport(
        name=spec.name,
        output=output or Path(recipe.output),
        steps=result.steps,
        seconds=seconds,
        validation=dict(result.accuracies),
        before=before,
        after=after,
    )
    _save(model, tokenizer, found, recipe)
    return found


def fine_tune(
    model: Any,
    tokenizer: Any,
    prompts: PromptSet,
    recipe: LanguageRecipe,
    *,
    report: Callable[[Mapping[str, float]], None] | None = None,
) -> SFTResult:
    """Trains a model in place on the reference answers of the training prompts.

    Raises:
        DataError: A prompt has no reference answer, or a task has too few prompts.
        ConfigError: The model has fewer layers than are to be trained.
    """
    torch.manual_seed(recipe.seed)
    train, validation = _split(prompts.train, recipe.validation_size, tokenizer)
    _freeze(model, recipe.trained_layers)
    pad_id = int(tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id)

    def validate(current: nn.Module) -> Mapping[str, float]:
        found = {
            task: accuracy(current, examples, pad_id=pad_id, batch_size=recipe.batch_size)
            for task, examples in validation.items()
        }
        if report is not None:
            report(found)
        return found

    settings = SFTSettings(
        max_steps=recipe.max_steps,
        learning_rate=recipe.learning_rate,
        lowest=recipe.lowest,
        floor_share=0.2,
        warmup_steps=recipe.warmup_steps,
        cooldown_steps=recipe.cooldown_steps,
        validate_every=recipe.validate_every,
        micro_batches=2,
    )
    draw = _Draw(train, batch_size=recipe.batch_size, seed=recipe.seed)
    result = train_supervised(model, draw=draw, validate=validate, settings=settings, pad_id=pad_id)
    model.requires_grad_(True)
    return result


def _held_out(model: Any, tokenizer: Any, prompts: PromptSet, measure: Measure | None) -> dict[str, float]:
    if measure is None:
        return {}
    scores: dict[str, list[float]] = {}
    for prompt, score in zip(prompts.evaluation, measure(model, tokenizer, prompts.evaluation), strict=True):
        scores.setdefault(_task_of(prompt), []).append(score)
    return {task: sum(found) / len(found) for task, found in scores.items()}


def _task_of(prompt: Prompt) -> str:
    return str(prompt.metadata[METADATA_KEY]["task"])


class _Draw:
    """Draws a batch: every row picks its task by the shares, then the next example of a shuffled task."""

    def __init__(self, examples: Mapping[str, Sequence[Example]], *, batch_size: int, seed: int) -> None:
        self._examples = examples
        self._batch_size = batch_size
        self._rng = Random(f"language/{seed}")
        self._left: dict[str, list[Example]] = {task: [] for task in examples}

    def __call__(self, shares: Mapping[str, float]) -> list[Example]:
        tasks = self._rng.choices(list(shares), weights=list(shares.values()), k=self._batch_size)
        return [self._next(task) for task in tasks]

    def _next(self, task: str) -> Example:
        if not self._left[task]:
            self._left[task] = list(self._examples[task])
            self._rng.shuffle(self._left[task])
        return self._left[task].pop()


def _split(
    prompts: Sequence[Prompt], validation_size: int, tokenizer: Any
) -> tuple[dict[str, list[Example]], dict[str, list[Example]]]:
    """Examples per task, for training and for the stop rule."""
    tasks: dict[str, list[Example]] = {}
    for prompt in prompts:
        tasks.setdefault(_task_of(prompt), []).append(_example(prompt, tokenizer))
    for task, examples in tasks.items():
        if len(examples) <= validation_size:
            raise DataError(
                f"recipe.data.train_size: expected more than validation_size={validation_size} prompts of '{task}', got "
                f"{len(examples)}"
            )
    return (
        {task: examples[validation_size:] for task, examples in tasks.items()},
        {task: examples[:validation_size] for task, examples in tasks.items()},
    )


def _example(prompt: Prompt, tokenizer: Any) -> Example:
    if prompt.answer is None:
        raise DataError(f"prompt '{prompt.prompt_id}' has no reference answer; choose tasks that have one")
    answer = (*tokenizer(prompt.answer, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id)
    asked = len(prompt.token_ids)
    return Example(
        token_ids=(*prompt.token_ids, *(int(i) for i in answer)), learned=(False,) * asked + (True,) * len(answer)
    )


def _freeze(model: Any, trained_layers: int | None) -> None:
    """Leaves only the last layers and the final norm trainable."""
    if trained_layers is None:
        return
    layers = model.model.layers
    if trained_layers > len(layers):
        raise ConfigError(f"recipe.trained_layers: expected at most {len(layers)}, got {trained_layers}")
    model.requires_grad_(False)
    for part in (*layers[-trained_layers:], model.model.norm):
        part.requires_grad_(True)


def _save(model: Any, tokenizer: Any, report: LanguageReport, recipe: LanguageRecipe) -> None:
    report.output.parent.mkdir(parents=True, exist_ok=True)
    aside = Path(tempfile.mkdtemp(prefix=f".tmp-{report.output.name}-", dir=report.output.parent))
    try:
        model.to(getattr(torch, recipe.dtype)).save_pretrained(aside, safe_serialization=True)
        tokenizer.save_pretrained(aside)
        facts = {"recipe": asdict(recipe), **asdict(report), "output": str(report.output)}
        (aside / REPORT).write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
        replace_folder(aside, report.output)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
