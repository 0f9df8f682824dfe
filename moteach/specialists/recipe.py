"""How the arena's base and its experts are made: recipes, `specialize`, and the manifest of what was made.

The base is trained from scratch on every family and stops half way, so that distillation has something to teach. An expert
starts from the base, is trained on its own domain and on its own steps inside composite answers, then by the rewards of the
verifier. Nothing but texts of the train split is trained on, and stop rules look at the validation split.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from random import Random
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from moteach.data.arena.families import COMPOSITE, FAMILIES, families_of
from moteach.data.arena.source import DOMAINS, ArenaSource
from moteach.data.arena.splits import draw_text
from moteach.errors import ConfigError, UnknownChoiceError, nearest
from moteach.specialists.examples import Example, ExampleMaker
from moteach.specialists.grpo import GRPOResult, GRPOSettings, Sampler, train_grpo
from moteach.specialists.measure import accuracy, family_examples, measure
from moteach.specialists.sft import SFTResult, SFTSettings, train_supervised
from moteach.types import Prompt
from moteach.verifiers.base import verifier_named

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

BASE = "base"
"""Name of the model that the experts start from."""

_STEP_MARK = "@"
_VALIDATION_TEXTS = 150


@dataclass(frozen=True, kw_only=True, slots=True)
class Phase:
    """A supervised phase on a few families: what is hard to discover among other tasks is learned sooner without them."""

    families: tuple[str, ...]
    sft: SFTSettings


@dataclass(frozen=True, kw_only=True, slots=True)
class Recipe:
    """Everything that decides the weights of an arena model, together with the model it starts from."""

    domain: str
    """`base`, or the domain of the expert."""
    sft: SFTSettings
    grpo: GRPOSettings | None = None
    batch_tokens: int = 2400
    """Tokens of a supervised batch, prompts included."""
    composite_share: float = 0.25
    """Share of them in composite prompts; an expert learns only its own steps there."""
    seed: int = 0
    curriculum: tuple[Phase, ...] = ()
    """Supervised phases before the main one."""
    model: Mapping[str, int] = field(default_factory=dict)
    """Sizes of a model trained from scratch (arguments of LlamaConfig); empty for an expert."""

    @property
    def kinds(self) -> frozenset[str]:
        """Kinds of the steps that are learned."""
        return frozenset(DOMAINS if self.domain == BASE else (self.domain,))

    @property
    def groups(self) -> tuple[str, ...]:
        """What accuracy is measured on: families, and `family@kind` for a step inside composites (experts only)."""
        plain = tuple(family.name for family in FAMILIES.values() if family.domain in self.kinds)
        if self.domain == BASE:
            return plain
        composite = tuple(
            f"{family.name}{_STEP_MARK}{self.domain}"
            for family in families_of(COMPOSITE)
            if self.domain in family.kinds
        )
        return plain + composite


@dataclass(frozen=True, kw_only=True, slots=True)
class Specialist:
    """A trained arena model and what was measured about it."""

    recipe: Recipe
    model: nn.Module
    sft: SFTResult
    grpo: GRPOResult | None
    accuracies: Mapping[str, Any]
    """As returned by `measure`, on the evaluation split."""
    seconds: float


_SIZES = MappingProxyType(
    {
        "hidden_size": 96,
        "intermediate_size": 256,
        "num_hidden_layers": 3,
        "num_attention_heads": 3,
        "num_key_value_heads": 3,
        "head_dim": 32,
        "max_position_embeddings": 128,
    }
)


def recipe_for(domain: str, *, seed: int = 0) -> Recipe:
    """Returns the recipe of a shipped model: `base`, `math`, `code` or `search`.

    Raises:
        UnknownChoiceError: When no shipped model has this name.
    """
    if domain == BASE:
        return Recipe(
            domain=BASE,
            curriculum=(Phase(families=("lookup",), sft=SFTSettings(max_steps=600, learning_rate=3e-3, lowest=0.95)),),
            sft=SFTSettings(
                max_steps=4000, learning_rate=3e-3, lowest=0.37, highest=0.66, goal=0.52, floor_share=0.004
            ),
            composite_share=0.06,
            seed=seed,
            model=dict(_SIZES),
        )
    if domain not in DOMAINS:
        raise UnknownChoiceError(
            f"expected the domain of an arena model, got {domain!r}; {nearest(domain, (BASE, *DOMAINS))}"
        )
    sft = SFTSettings(max_steps=1500, learning_rate=2e-3, lowest=0.88, cooldown_steps=200)
    return Recipe(domain=domain, sft=sft, grpo=GRPOSettings(steps=20), seed=seed)


def new_model(recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> nn.Module:
    """Makes the untrained Llama of a recipe, in float32, with weights drawn from the recipe's seed."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(recipe.seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        tie_word_embeddings=True,
        initializer_range=0.05,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
        **recipe.model,
    )
    model: nn.Module = LlamaForCausalLM(config)
    return model.float()


def specialize(
    recipe: Recipe,
    *,
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    engine: Sampler | None = None,
    report: Callable[[Mapping[str, float]], None] | None = None,
) -> Specialist:
    """Trains a model in place by a recipe: supervised until the stop rule, then by the verifier's reward.

    Args:
        recipe: What to do.
        model: What to start from: a copy of the base, or `new_model(recipe, tokenizer)` for the base itself.
        tokenizer: The arena's tokenizer.
        engine: Rollout engine bound to `model`; needed by recipes with a verifier-reward stage.
        report: Called with the held-out accuracies each time the supervised stage measures them.

    Raises:
        ConfigError: When the recipe has a verifier-reward stage and no engine is given.
    """
    if recipe.grpo is not None and engine is None:
        raise ConfigError(
            "expected a rollout engine for the verifier-reward stage, got none; the expert would be the supervised one "
            "only: give `engine`, or a recipe with grpo=None"
        )
    began = time.perf_counter()
    torch.manual_seed(recipe.seed)
    pad_id = int(tokenizer.pad_token_id)
    maker = ExampleMaker(tokenizer)
    draw = _Mixture(recipe, maker)
    for phase in recipe.curriculum:
        alone = _Validation(phase.families, maker, pad_id=pad_id, report=report)
        train_supervised(model, draw=draw, validate=alone, settings=phase.sft, pad_id=pad_id)
    validate = _Validation(recipe.groups, maker, pad_id=pad_id, report=report)
    sft = train_supervised(model, draw=draw, validate=validate, settings=recipe.sft, pad_id=pad_id)
    grpo = None
    if recipe.grpo is not None and engine is not None:
        source = ArenaSource(seed=recipe.seed, domains=[recipe.domain], evaluation_size=len(families_of(recipe.domain)))
        prompts = source.load(tokenizer).train
        grade = partial(_grade, tokenizer=tokenizer)
        grpo = train_grpo(model, prompts=prompts, engine=engine, grade=grade, settings=recipe.grpo, seed=recipe.seed)
    seconds = time.perf_counter() - began
    accuracies = measure(model, maker, pad_id=pad_id)
    return Specialist(recipe=recipe, model=model, sft=sft, grpo=grpo, accuracies=accuracies, seconds=seconds)


def describe(recipe: Recipe) -> dict[str, Any]:
    """Returns every number of a recipe as plain data."""
    return asdict(recipe)


class _Mixture:
    """Draws supervised batches of a given number of tokens from the train split."""

    def __init__(self, recipe: Recipe, maker: ExampleMaker) -> None:
        self._recipe = recipe
        self._maker = maker
        self._rng = Random(f"sft/{recipe.domain}/{recipe.seed}")
        lengths = Random("lengths")
        self._length = {
            name: len(maker(draw_text(family, lengths, split="train")).token_ids) for name, family in FAMILIES.items()
        }

    def __call__(self, shares: Mapping[str, float]) -> Sequence[Example]:
        recipe = self._recipe
        weights = dict.fromkeys(FAMILIES, 0.0)
        own = [name for name in shares if _STEP_MARK not in name]
        own_total = sum(shares[name] for name in own) or 1.0
        for name in own:
            weights[name] = (1 - recipe.composite_share) * shares[name] / own_total
        composites = [family.name for family in families_of(COMPOSITE) if recipe.kinds & set(family.kinds)]
        for name in composites:
            weights[name] = recipe.composite_share / len(composites)
        examples: list[Example] = []
        for name, weight in weights.items():
            expected = weight * recipe.batch_tokens / self._length[name]
            for _ in range(int(expected + self._rng.random())):
                text = draw_text(FAMILIES[name], self._rng, split="train")
                examples.append(self._maker(text, kinds=recipe.kinds))
        return examples


class _Validation:
    """Measures groups (see `Recipe.groups`) on the validation split."""

    def __init__(
        self,
        groups: Sequence[str],
        maker: ExampleMaker,
        *,
        pad_id: int,
        report: Callable[[Mapping[str, float]], None] | None,
    ) -> None:
        self._pad_id = pad_id
        self._report = report
        self._examples: dict[str, list[Example]] = {}
        for group in groups:
            family, _, kind = group.partition(_STEP_MARK)
            kinds = [kind] if kind else None
            self._examples[group] = family_examples(
                maker, family, count=_VALIDATION_TEXTS, split="validation", kinds=kinds
            )

    def __call__(self, model: nn.Module) -> Mapping[str, float]:
        found = {group: accuracy(model, examples, pad_id=self._pad_id) for group, examples in self._examples.items()}
        if self._report is not None:
            self._report(found)
        return found


def _grade(prompt: Prompt, completion_ids: Sequence[int], *, tokenizer: PreTrainedTokenizerBase) -> float:
    completion = str(tokenizer.decode(list(completion_ids), skip_special_tokens=True))
    return verifier_named(str(prompt.verifier)).score(prompt, completion)
